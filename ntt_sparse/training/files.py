"""Small files that are either the old or the new one, whenever the process dies."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces the content of a file in one move."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of a file in one move."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
