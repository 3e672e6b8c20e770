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

from hybridlm.config.ffns import FFN_KINDS
from hybridlm.config.mixers import MIXERS
from hybridlm.errors import ConfigError

MAX_LAYERS = 1000
_FAMILY = "M"  # the one letter that stands for several kinds, M1, M2, ...: model.ssm says which
_KINDS = {mixer.letter: kind for kind, mixer in MIXERS.items()}
_NUMBERED = {letter: kind for letter, kind in _KINDS.items() if letter.startswith(_FAMILY)}
_WORDS = {"mamba": _FAMILY} | {mixer.word: mixer.letter for mixer in MIXERS.values()}
SSMS = tuple(_NUMBERED.values())
RESERVED_LETTERS = tuple(dict.fromkeys(letter[0] for letter in _KINDS))  # a variant cannot take these
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<word>[a-z][a-z0-9]*)|(?P<letter>[A-Z])|(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<mark>[():*%])|(?P<other>.)",
    re.DOTALL,
)


class PatternError(ConfigError):
    """A pattern that means nothing. The message names the position (from 1), what was found, and what is legal."""


@dataclass(frozen=True)
class PatternItem:
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

    def item(self, symbol: str, ffn: str | None) -> PatternItem | None:
        """The layer that ``symbol`` means, or None."""
        letter = MIXERS[self.ssm].letter if symbol == _FAMILY else symbol
        kind = _KINDS.get(letter) or self.variants.get(letter)
        return None if kind is None else PatternItem(letter, kind, ffn or self.ffn_after[kind])

    def legal(self) -> str:
        shown = {letter: f"{letter} ({mixer.word})" for letter, mixer in zip(_KINDS, MIXERS.values(), strict=True)}
        numbered = f"{_FAMILY} ({self.ssm}), {', '.join(_NUMBERED)}"
        names = dict.fromkeys(numbered if letter in _NUMBERED else shown[letter] for letter in _KINDS)
        own = (f"{letter} ({kind})" for letter, kind in sorted(self.variants.items()))
        return ", ".join((*names, *own))


@dataclass(frozen=True)
class _Element:
    """One item or group with its repeats spelled out, or one item with its share (percent) of the layers."""

    items: tuple[PatternItem, ...]
    share: Fraction | None
    text: str


class _Parser:
    def __init__(self, text: str, shown: str, letters: Letters) -> None:
        self.text, self.shown, self.letters = text, shown, letters
        self.tokens = [token for token in _TOKEN.finditer(text) if token.lastgroup != "space"]
        self.at = 0

    def error(self, token: re.Match[str] | None, message: str) -> PatternError:
        position = (token.start() if token else len(self.text)) + 1
        return PatternError(f"model.pattern = {self.shown}: position {position}: {message}")

    def peek(self, text: str | None = None) -> re.Match[str] | None:
        """The next token, or None at the end or where it is not ``text``."""
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        return token if text is None or (token and token.group() == text) else None

    def take(self, text: str | None = None) -> re.Match[str] | None:
        token = self.peek(text)
        self.at += token is not None
        return token

    def elements(self, grouped: bool = False) -> list[_Element]:
        """Up to the end, or to the parenthesis that closes a group."""
        found: list[_Element] = []
        while (token := self.peek()) is not None and not (grouped and token.group() == ")"):
            found.append(self.element(grouped))
            if sum(len(element.items) for element in found) > MAX_LAYERS:
                raise self.error(token, f"more than {MAX_LAYERS:,} layers")
        return found

    def element(self, grouped: bool) -> _Element:
        first = self.tokens[self.at]
        group = first.group() == "("
        if group and grouped:
            raise self.error(first, "a group inside a group; write the inner one out")
        items = self.group() if group else (self.item(),)
        count, share = self.repeat(group)
        if share is not None and grouped:
            raise self.error(first, "a share (%) inside a group; shares cannot be grouped, as in T*60% M*40%")
        return _Element(items * count, share, self.text[first.start() : self.tokens[self.at - 1].end()])

    def group(self) -> tuple[PatternItem, ...]:
        opening = self.take("(")
        items = tuple(item for element in self.elements(grouped=True) for item in element.items)
        if not self.take(")"):
            raise self.error(opening, "'(' is never closed")
        if not items:
            raise self.error(opening, "an empty group")
        if colon := self.peek(":"):
            raise self.error(colon, "an FFN suffix on a group; put it on each letter, as in (T:moe M)*2")
        return items

    def item(self) -> PatternItem:
        token = self.tokens[self.at]
        symbol = self.symbol()
        item = self.letters.item(symbol, self.suffix())
        if item is None:
            hint = f"; or define it: model.variants={{{symbol}: {{mixer: attention, window: 256}}}}"
            raise self.error(token, f"{symbol!r} is not a layer; legal letters: {self.letters.legal()}{hint}")
        return item

    def symbol(self) -> str:
        token = self.tokens[self.at]
        self.at += 1
        text = token.group()
        if token.lastgroup == "word":
            return self.word(token)
        if token.lastgroup != "letter":
            reasons = {
                ")": "')' without '('",
                "*": "'*' without a letter or group before it",
                ":": "':' without a letter before it",
                ",": "',' is not a layer; separate items by spaces, or write a list [T, M]",
            }
            count = f"; a count is written T*{text}" if token.lastgroup == "number" else ""
            reason = reasons.get(text, f"{text!r} is not a layer{count}")
            raise self.error(token, f"{reason}; legal letters: {self.letters.legal()}")
        number = self.peek()
        if text != _FAMILY or number is None or number.lastgroup != "number" or number.start() != token.end():
            return text
        self.at += 1
        if text + number.group() not in _NUMBERED:
            legal = f"the Mambas are {', '.join(_NUMBERED)}, and a count is written {text}*{number.group()}"
            raise self.error(token, f"{text + number.group()!r} is not a layer; {legal}")
        return text + number.group()

    def word(self, token: re.Match[str]) -> str:
        text = token.group()
        if text not in _WORDS:
            known = all(self.letters.item(letter, None) for letter in re.findall(r"[A-Z]\d?", text.upper()))
            hint = f"letters are upper case: {text.upper()!r}; " if known else ""
            legal = f"legal words: {', '.join(_WORDS)}; legal letters: {self.letters.legal()}"
            raise self.error(token, f"{text!r} is not a layer; {hint}{legal}")
        return _WORDS[text]

    def suffix(self) -> str | None:
        if not (colon := self.take(":")):
            return None
        token = self.take()
        ffn = token.group() if token else ""
        if ffn not in FFN_KINDS:
            raise self.error(token or colon, f"{ffn!r} is not an FFN; legal after ':': {', '.join(FFN_KINDS)}")
        return ffn

    def repeat(self, group: bool) -> tuple[int, Fraction | None]:
        """What follows ``*``: a count, or a share in percent."""
        if not self.take("*"):
            return 1, None
        token = self.take()
        if token is None or token.lastgroup != "number":
            raise self.error(token, "'*' needs a count such as *12, or a share such as *60%")
        text, percent = token.group(), self.take("%")
        if percent and group:
            raise self.error(percent, "a share (%) on a group; shares are of single letters, as in T*60% M*40%")
        if percent and not 0 < Fraction(text[:32]) <= 100:
            raise self.error(token, f"a share of {text}% is not above 0 and up to 100")
        if not percent and ("." in text or not text.strip("0")):
            raise self.error(token, f"'*{text[:8]}' is not a valid count; counts are whole numbers from 1")
        if star := self.peek("*"):
            raise self.error(star, "an item or group takes one '*' only")
        if percent:
            return 1, Fraction(text[:32])
        if len(text.lstrip("0")) > len(str(MAX_LAYERS)) or int(text) > MAX_LAYERS:
            raise self.error(token, f"more than {MAX_LAYERS:,} layers")
        return int(text), None


def _elements(pattern: str | Sequence[str], letters: Letters) -> list[_Element]:
    if isinstance(pattern, str):
        found = _Parser(pattern, _shown(pattern), letters).elements()
    elif isinstance(pattern, Sequence) and all(isinstance(item, str) for item in pattern):
        found = []
        for index, item in enumerate(pattern):
            found += _Parser(item, f"{_shown(item)} (item {index + 1} of the list)", letters).elements()
    else:
        raise PatternError(
            f"model.pattern = {_shown(pattern)}: expected text such as TM*6, a list of them, or null for all attention"
        )
    if not found:
        what = "no layers; null means all attention"
        raise PatternError(f"model.pattern = {_shown(pattern)}: position 1: {what}; legal letters: {letters.legal()}")
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _shares(elements: list[_Element], n_layers: int | None, shown: str) -> list[int]:
    """Layers of each share, largest remainder first, so that they sum to ``n_layers``."""
    plain = next((element for element in elements if element.share is None), None)
    if plain is not None:
        raise PatternError(
            f"model.pattern = {shown}: {plain.text!r} is mixed with shares (%); give every item a share, or none"
        )
    if n_layers is None:
        raise PatternError(f"model.pattern = {shown}: shares (%) need model.n_layers, which is null")
    shares = [element.share or Fraction(0) for element in elements]
    total = sum(shares, Fraction(0))
    if abs(total - 100) > Fraction(1, 2):  # 33.3% three times is meant as a whole
        raise PatternError(f"model.pattern = {shown}: the shares sum to {float(total):g}%, not to 100%")
    exact = [share / total * n_layers for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: n_layers - sum(counts)]:
        counts[i] += 1
    return counts


def parse_with_note(
    pattern: str | Sequence[str] | None, n_layers: int | None, letters: Letters
) -> tuple[tuple[PatternItem, ...], str | None]:
    if pattern is None:
        if n_layers is None:
            raise PatternError(
                "model.pattern and model.n_layers are both null: set one, such as model.n_layers=12 or"
                " model.pattern=TM*6"
            )
        pattern = "T"
    elements = _elements(pattern, letters)
    if any(element.share is not None for element in elements):
        counts = _shares(elements, n_layers, _shown(pattern))
        none = [element.text for element, count in zip(elements, counts, strict=True) if count == 0]
        note = (
            f"model.pattern = {_shown(pattern)}: {', '.join(none)} of {n_layers} layers rounds to zero layers"
            if none
            else None
        )
        return (
            tuple(item for element, count in zip(elements, counts, strict=True) for item in element.items * count),
            note,
        )
    items = tuple(item for element in elements for item in element.items)
    if n_layers is None or n_layers == len(items):
        return items, None
    note = None
    if n_layers % len(items):
        note = (
            f"model.pattern = {_shown(pattern)}: {n_layers} layers cut its cycle of {len(items)} after"
            f" {n_layers % len(items)}"
        )
    return (items * -(-n_layers // len(items)))[:n_layers], note


def parse_pattern(
    pattern: str | Sequence[str] | None, n_layers: int | None = None, letters: Letters | None = None
) -> tuple[PatternItem, ...]:
    """The layers that ``pattern`` means, cycled to ``n_layers`` (None: as long as the pattern).

    Raises:
        PatternError: one line with the position (from 1), what was found, and what is legal.
    """
    return parse_with_note(pattern, n_layers, letters or Letters())[0]


def pattern_note(
    pattern: str | Sequence[str] | None, n_layers: int | None = None, letters: Letters | None = None
) -> str | None:
    """One line where ``n_layers`` cuts the pattern's cycle or leaves a share without a layer, otherwise None. Raises
    PatternError."""
    return parse_with_note(pattern, n_layers, letters or Letters())[1]
