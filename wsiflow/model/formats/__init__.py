"""Formats of weights files: each is a file here, and a line in `wsiflow.model.formats.registry.FORMATS`."""
