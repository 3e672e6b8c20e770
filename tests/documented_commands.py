"""The commands of README.md and the docs, as they stand in their fenced blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    {ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/README.md"), *ROOT.glob("benchmarks/*.md")}
    - {ROOT / "docs/adding_a_mixer.md"}  # followed by test_adding_a_mixer.py
)
_FUNCTION = re.compile(r'(\w+)\(\) \{ (.*) "\$@"; \}')  # a shell function that only puts words in front


class Block(NamedTuple):
    """where: page:line; tag: the word behind the fence, sh where there is none."""

    where: str
    tag: str
    text: str


class Command(NamedTuple):
    """words: as a shell splits them, without what a pipe brings and what stands in front of a program; output: lines
    that follow it."""

    where: str
    line: str
    words: tuple[str, ...]
    output: str = ""


def blocks() -> Iterator[Block]:
    for page in PAGES:
        tag, start, lines = None, 0, list[str]()
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if not line.startswith("```"):
                lines.append(line)
            elif tag is None:
                tag, start, lines = line[3:].strip() or "sh", number, []
            else:
                yield Block(f"{page.relative_to(ROOT)}:{start}", tag, "\n".join(lines))
                tag = None


def commands() -> list[Command]:
    found: list[Command] = []
    for block in blocks():
        aliases: dict[str, list[str]] = {}
        if block.tag == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                line, _, output = part.partition("\n")
                found.append(Command(block.where, line, _words(line, {}), output.strip()))
        if block.tag == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                if function := _FUNCTION.fullmatch(line.strip()):
                    aliases[function[1]] = shlex.split(function[2])
                elif words := _words(line, aliases):
                    found.append(Command(block.where, line.strip(), words))
    return found


def _words(line: str, aliases: dict[str, list[str]]) -> tuple[str, ...]:
    line = re.sub(r"\$'(.*?)'", lambda quoted: shlex.quote(quoted[1].encode().decode("unicode_escape")), line)
    words = shlex.split(line, comments=True)
    if "|" in words:
        words = words[words.index("|") + 1 :]
    if words[:1] in (["srun"], ["exec"]):  # with options of their own
        words = words[next(i for i, word in enumerate(words) if word in ("python", "hybridlm")) :]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return (*aliases.get(words[0], [words[0]]), *words[1:]) if words else ()
