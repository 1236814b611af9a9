"""An app of a Django project whose migrations create the schema of jobguard."""
