"""Test patch classifiers on whole-slide images: dense inference, lesion scores, and what they cost."""

from importlib.metadata import version

__version__ = version("wsiflow")
