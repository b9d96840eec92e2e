"""The colours of slides: measured, and brought to those of a target."""
