"""Networks that are part of wsiflow."""
