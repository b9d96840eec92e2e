"""Network architectures that are part of wsiflow."""
