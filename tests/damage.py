"""Damage published files, which nobody may write to, as a disk or a careless program does."""

from pathlib import Path


def overwrite(path: Path, content: str | bytes) -> None:
    """Write other content into a published file, under all of its names."""
    path.chmod(0o644)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
