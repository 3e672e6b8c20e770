"""Runs the default job and puts what it prints into README.md, between the two transcript marks. `make transcript`
calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKS = re.compile(r"(<!-- transcript: make transcript -->\n).*?(<!-- end of transcript -->)", re.DOTALL)


def main() -> None:
    """Runs `python train.py` from the repository's root and rewrites the README."""
    process = subprocess.run([sys.executable, "train.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    printed = process.stdout.replace(str(ROOT), ".").replace(str(Path.home()), "~").rstrip()
    text = README.read_text(encoding="utf-8")
    if not MARKS.search(text):
        sys.exit("README.md has no transcript marks")
    block = f"```text\n$ python train.py\n{printed}\n```\n"
    README.write_text(MARKS.sub(lambda match: match[1] + block + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
