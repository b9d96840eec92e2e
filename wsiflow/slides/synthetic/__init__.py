"""Slides that are drawn, with lesions that are known."""
