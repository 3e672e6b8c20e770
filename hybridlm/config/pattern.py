"""The pattern grammar: ``model.pattern`` to one item per layer.

T transformer ...    a kind of mixer, by its letter or word in ``config/mixers``
M mamba              the Mamba that model.ssm names
S                    a letter of model.variants     T:moe       another FFN than model.ffn_after's
T*12  (TM)*10        repeats                        T*60% M*40% shares of n_layers
TM with n_layers=20  the pattern cycles             null        all attention
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from hybridlm.config.ffns import FFN_KINDS
from hybridlm.config.mixers import MIXERS
from hybridlm.errors import ConfigError

MAX_LAYERS = 1000
_FAMILY = "M"  # the one letter that stands for several kinds, M1, M2, ...: model.ssm says which
_KINDS = {mixer.letter: kind for kind, mixer in MIXERS.items()}
_NUMBERED = {letter: kind for letter, kind in _KINDS.items() if letter.startswith(_FAMILY)}
_WORDS = {"mamba": _FAMILY} | {mixer.word or kind: mixer.letter for kind, mixer in MIXERS.items()}
SSMS = tuple(_NUMBERED.values())
RESERVED_LETTERS = tuple(dict.fromkeys(letter[0] for letter in _KINDS))  # a variant cannot take these
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<word>[a-z][a-z0-9]*)|(?P<letter>M[0-9]+|[A-Z])|(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<mark>.)",
    re.DOTALL,
)


class PatternItem(NamedTuple):
    """One layer: its letter with ``M`` made explicit (``T``, ``M2``, ``S``), its mixer's kind, and its FFN's kind."""

    letter: str
    kind: str
    ffn: str


@dataclass(frozen=True)
class Letters:
    """What the letters mean: ``M`` (``ssm``), the FFN by kind (``ffn_after``), and variants as letter -> mixer kind."""

    ssm: str = "mamba2"
    ffn_after: Mapping[str, str] = field(default_factory=lambda: {kind: mixer.ffn for kind, mixer in MIXERS.items()})
    variants: Mapping[str, str] = field(default_factory=dict)

    def kind(self, symbol: str) -> str | None:
        """The kind of mixer that ``symbol`` means."""
        return self.ssm if symbol == _FAMILY else _KINDS.get(symbol) or self.variants.get(symbol)

    def legal(self) -> str:
        numbered = f"{_FAMILY} ({self.ssm}), {', '.join(_NUMBERED)}"
        names = dict.fromkeys(
            numbered if letter in _NUMBERED else f"{letter} ({word})"
            for word, letter in _WORDS.items()
            if word != "mamba"
        )
        own = (f"{letter} ({kind})" for letter, kind in sorted(self.variants.items()))
        return ", ".join((*names, *own))


class _Element(NamedTuple):
    """One item or group with its repeats spelled out, or one item with its share (percent) of the layers."""

    items: tuple[PatternItem, ...]
    share: Fraction | None
    text: str


class _Parser:
    def __init__(self, text: str, shown: str, letters: Letters) -> None:
        self.text, self.shown, self.letters = text, shown, letters
        self.tokens = [token for token in _TOKEN.finditer(text) if token.lastgroup != "space"]
        self.at = 0

    def error(self, token: re.Match[str] | None, message: str) -> ConfigError:
        position = (token.start() if token else len(self.text)) + 1
        return _wrong(self.shown, f"position {position}: {message}")

    def take(self, text: str | None = None) -> re.Match[str] | None:
        """The next token; None at the end, or where it is not ``text``."""
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        if token is None or text not in (None, token.group()):
            return None
        self.at += 1
        return token

    def elements(self, group: re.Match[str] | None = None) -> list[_Element]:
        """Up to the end, or to the parenthesis that closes ``group``."""
        found: list[_Element] = []
        while not (group and self.take(")")):
            token = self.take()
            if token is None and group:
                raise self.error(group, "'(' is never closed")
            if token is None:
                break
            found.append(self.element(token, group is not None))
            if sum(len(element.items) for element in found) > MAX_LAYERS:
                raise self.error(token, f"more than {MAX_LAYERS:,} layers")
        if group and not found:
            raise self.error(group, "an empty group")
        return found

    def element(self, first: re.Match[str], grouped: bool) -> _Element:
        group = first.group() == "("
        if group and grouped:
            raise self.error(first, "a group inside a group; write the inner one out")
        items = tuple(item for one in self.elements(first) for item in one.items) if group else (self.item(first),)
        count, share = self.repeat()
        if share is not None and (group or grouped):
            raise self.error(first, "a share (%) on or in a group; shares are of single letters, as in T*60% M*40%")
        return _Element(items * count, share, self.text[first.start() : self.tokens[self.at - 1].end()])

    def item(self, token: re.Match[str]) -> PatternItem:
        symbol = _WORDS.get(token.group(), token.group())
        kind = self.letters.kind(symbol)
        if kind is None:
            raise self.error(token, f"{self.reason(token)}; legal letters: {self.letters.legal()}")
        ffn = self.letters.ffn_after[kind]
        if colon := self.take(":"):
            named = self.take()
            ffn = named.group() if named else ""
            if ffn not in FFN_KINDS:
                raise self.error(named or colon, f"{ffn!r} is not an FFN; legal after ':': {', '.join(FFN_KINDS)}")
        return PatternItem(MIXERS[kind].letter if symbol == _FAMILY else symbol, kind, ffn)

    def reason(self, token: re.Match[str]) -> str:
        """Why a token is not a layer."""
        text = token.group()
        known = all(self.letters.kind(letter) for letter in re.findall(r"[A-Z]\d?", text.upper()))
        hints = {
            "number": f"a count is written T*{text}",
            "letter": f"a count is written M*{text[1:]}"
            if len(text) > 1
            else f"define it with model.variants={{{text}: {{mixer: attention, window: 256}}}}, or see the list",
            "word": f"{f'letters are upper case: {text.upper()!r}; ' if known else ''}legal words: {', '.join(_WORDS)}",
        }
        marks = {
            ")": "')' without '('",
            "*": "'*' without a letter or group right before it",
            ":": "':' without a letter right before it; in a group put it on each letter, as in (T:moe M)*2",
            ",": "',' is not a layer; separate items by spaces, or write a list [T, M]",
        }
        hint = hints.get(token.lastgroup or "")
        return marks.get(text, f"{text!r} is not a layer{f'; {hint}' if hint else ''}")

    def repeat(self) -> tuple[int, Fraction | None]:
        """What follows ``*``: a count, or a share in percent."""
        if not self.take("*"):
            return 1, None
        token = self.take()
        if token is None or token.lastgroup != "number":
            raise self.error(token, "'*' needs a count such as *12, or a share such as *60%")
        text = token.group()
        if self.take("%"):
            share = Fraction(text[:32])
            if not 0 < share <= 100:
                raise self.error(token, f"a share of {text}% is not above 0 and up to 100")
            return 1, share
        if "." in text or not text.strip("0"):
            raise self.error(token, f"'*{text[:8]}' is not a valid count; counts are whole numbers from 1")
        if len(text.lstrip("0")) > len(str(MAX_LAYERS)) or int(text) > MAX_LAYERS:
            raise self.error(token, f"more than {MAX_LAYERS:,} layers")
        return int(text), None


def _wrong(shown: str, message: str) -> ConfigError:
    return ConfigError(f"model.pattern = {shown}: {message}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _counts(elements: list[_Element], n_layers: int | None, shown: str) -> list[int]:
    """Layers of each share, largest remainder first, so that they sum to ``n_layers``."""
    shares = [element.share for element in elements if element.share is not None]
    if len(shares) < len(elements):
        plain = next(element.text for element in elements if element.share is None)
        raise _wrong(shown, f"{plain!r} is mixed with shares (%); give every item a share, or none")
    if n_layers is None:
        raise _wrong(shown, "shares (%) need model.n_layers, which is null")
    total = sum(shares, Fraction(0))
    if abs(total - 100) > Fraction(1, 2):  # 33.3% three times is meant as a whole
        raise _wrong(shown, f"the shares sum to {float(total):g}%, not to 100%")
    exact = [share / total * n_layers for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: n_layers - sum(counts)]:
        counts[i] += 1
    return counts


def parse(
    pattern: str | Sequence[str] | None, n_layers: int | None, letters: Letters
) -> tuple[tuple[PatternItem, ...], str | None]:
    """The layers that ``pattern`` means, cycled to ``n_layers`` (None: as long as the pattern); and one line where
    that cuts the cycle or leaves a share without a layer.

    Raises:
        ConfigError: one line with the position (from 1), what was found, and what is legal.
    """
    if pattern is None and n_layers is None:
        raise ConfigError(
            "model.pattern and model.n_layers are both null: set one, such as model.n_layers=12 or model.pattern=TM*6"
        )
    parts = ["T"] if pattern is None else [pattern] if isinstance(pattern, str) else pattern
    shown = _shown(pattern)
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise _wrong(shown, "expected text such as TM*6, a list of them, or null for all attention")
    elements: list[_Element] = []
    for number, part in enumerate(parts, 1):
        where = shown if part is pattern else f"{_shown(part)} (item {number} of the list)"
        elements += _Parser(part, where, letters).elements()
    items = tuple(item for element in elements for item in element.items)
    if not items:
        raise _wrong(shown, f"position 1: no layers; null means all attention; legal letters: {letters.legal()}")
    if any(element.share is not None for element in elements):
        counts = _counts(elements, n_layers, shown)
        none = [element.text for element, count in zip(elements, counts, strict=True) if not count]
        note = f"model.pattern = {shown}: {', '.join(none)} of {n_layers} layers rounds to zero layers"
        chosen = (element.items * count for element, count in zip(elements, counts, strict=True))
        return tuple(item for some in chosen for item in some), note if none else None
    depth = n_layers or len(items)
    after = depth % len(items)
    note = f"model.pattern = {shown}: {depth} layers cut its cycle of {len(items)} after {after}"
    return (items * -(-depth // len(items)))[:depth], note if after else None
