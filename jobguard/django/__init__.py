"""What a Django project needs of jobguard."""

from jobguard.django.transactions import atomic

__all__ = ["atomic"]
