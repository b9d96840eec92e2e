"""The YAML configuration of wsiflow, found by Hydra as ``pkg://wsiflow.conf``."""
