"""Stain normalisation: the colours of slides are measured and transferred to those of a target."""
