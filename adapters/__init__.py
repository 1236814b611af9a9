"""The adapters: the only code of jobguard that knows a queue library."""
