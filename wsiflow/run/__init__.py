"""One run: from a configuration to files with receipts."""
