"""Files of a run that it can go on without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybridlm.files.durable import replaced


def write_or_say(path: Path, text: str, say: Callable[[str], None]) -> None:
    """Writes ``text``, also into a folder that is to be made. A failure is told by ``say`` in a line, and ends
    nothing."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replaced(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        say(f"warning     {path}: cannot be written ({error.strerror or error})")
