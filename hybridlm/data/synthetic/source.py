"""A generated task as windows: every example is a function of split and number, and none is in both splits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from hybridlm.config.data import DataConfig
from hybridlm.config.synthetic import SyntheticConfig, shortest, words
from hybridlm.data.corpus import Prepared
from hybridlm.data.synthetic.draws import Draws, row_keys
from hybridlm.data.synthetic.tasks import TASKS, Example
from hybridlm.data.tokenizer import symbol_tokenizer
from hybridlm.data.windows.order import IGNORE, mix, shuffled
from hybridlm.data.windows.window_sources import WindowBatch
from hybridlm.errors import ConfigError

Split = Literal["train", "val"]
_HELD_OUT = 8  # one in so many of all possible examples belongs to validation, by its content
_ATTEMPTS = 1000  # to draw an example of the right split; 7/8 to that power is nothing


class GeneratedWindows:
    """The examples of one split, one in a window of one length; in training each once a pass, in another order in each.
    They are numbered without end.

    A hash of their content decides which of all possible examples are held out, so the splits are disjoint under any
    seed.
    """

    def __init__(self, section: SyntheticConfig, split: Split, length: int, seed: int = 0) -> None:
        """length: columns of a window; with ``section.min_length`` training examples may be shorter, padded with id 0.
        seed: of the order."""
        self.windows = self.numbers = section.examples if split == "train" else section.val_examples
        self._section, self._task, self._split = section, TASKS[section.task], split
        self.seq_len, self._seed = length, seed
        self._least = max(shortest(section), section.min_length or length) if split == "train" else length
        facts = section.model_dump(include={"task", "vocab_size", "n_pairs", "n_items", "modulus", "seed"})
        self._purpose = f"{json.dumps(facts, sort_keys=True)}/{split}/{length}"

    def choose(self, positions: np.ndarray) -> np.ndarray:
        return shuffled(positions, count=self.windows, seed=self._seed)

    def rows(self, numbers: np.ndarray) -> WindowBatch:
        """ConfigError: there are too few different examples."""
        ids = np.zeros((len(numbers), self.seq_len), dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        lengths = self._lengths(numbers)
        for length in np.unique(lengths).tolist():
            mine = lengths == length
            ids[mine, :length], targets[mine, :length] = self._of_length(numbers[mine], length)
        return WindowBatch(ids, targets)

    def targets(self, numbers: np.ndarray) -> np.ndarray:
        """Number of targets of each of these examples, (B,) int64."""
        lengths, which = np.unique(self._lengths(numbers), return_inverse=True)
        return np.array([self._task.answers(self._section, length) for length in lengths.tolist()], dtype=np.int64)[
            which
        ]

    def _lengths(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64: tokens of each example without padding."""
        fitting = np.arange(self._least, self.seq_len + 1)
        if self._task.even:
            fitting = fitting // 2 * 2
        fitting = fitting[fitting >= self._least] if len(fitting) > 1 else fitting  # the next one that fits is longer
        if len(fitting) == 1:
            return np.full(len(numbers), fitting[0])
        drawn = Draws(row_keys(f"{self._purpose}/length", numbers)).below(len(fitting), 1)[:, 0]
        return np.take(fitting, drawn)

    def _of_length(self, numbers: np.ndarray, length: int) -> Example:
        ids, targets = (np.empty((len(numbers), length), dtype=np.int64) for _ in range(2))
        missing = np.arange(len(numbers))
        for attempt in range(_ATTEMPTS):
            made = self._task.make(
                self._section, Draws(row_keys(f"{self._purpose}/{length}", numbers[missing], attempt)), length
            )
            good = _held_out(made[0]) == (self._split == "val")
            ids[missing[good]], targets[missing[good]] = made[0][good], made[1][good]
            missing = missing[~good]
            if not missing.size:
                return ids, targets
        raise ConfigError(
            f"data.synthetic: there are too few different examples of {length} tokens, none is left for {self._split};"
            " use longer ones (data.seq_len, data.synthetic.eval_lengths, min_length) or more symbols"
        )


def _held_out(ids: np.ndarray) -> np.ndarray:
    """(B,) bool of examples (B, n): whether they belong to validation."""
    places = np.arange(1, ids.shape[1] + 1, dtype=np.uint64) << np.uint64(32)
    held_out: np.ndarray = (
        mix(mix(ids.astype(np.uint64) + places).sum(axis=1, dtype=np.uint64)) % np.uint64(_HELD_OUT) == 0
    )
    return held_out


def as_text(ids: np.ndarray, targets: np.ndarray, words: Sequence[str], given: np.ndarray | None = None) -> str:
    """The words of an example (T,) without padding, each answer in brackets where it is asked for: ``k3 v8 . k3[v8]``.

    given: (T,) what a model answered, added where it is wrong: ``k3[v8 not v2]``.
    """
    parts = []
    last = np.flatnonzero(ids)[-1]
    for place, (token, target) in enumerate(zip(ids[: last + 1].tolist(), targets.tolist(), strict=False)):
        wrong = "" if given is None or given[place] == target else f" not {words[given[place]]}"
        parts.append(words[token] + ("" if target == IGNORE else f"[{words[target]}{wrong}]"))
    return " ".join(parts)


def held_out(config: DataConfig) -> list[GeneratedWindows]:
    """The windows to validate on: of the length of training, then of each other length of ``eval_lengths``."""
    return [GeneratedWindows(config.synthetic, "val", length, 0) for length in validation_lengths(config)]


def validation_lengths(config: DataConfig) -> list[int]:
    """``data.seq_len``, then the other ``eval_lengths`` in their order."""
    return list(dict.fromkeys([config.seq_len, *config.synthetic.eval_lengths]))


def shown_examples(config: DataConfig, count: int) -> list[str]:
    """The first training examples as text, each answer in brackets where it is asked for."""
    rows = GeneratedWindows(config.synthetic, "train", config.seq_len, 0).rows(np.arange(count))
    return [as_text(ids, targets, words(config.synthetic)) for ids, targets in zip(rows.ids, rows.targets, strict=True)]


def open_synthetic(
    config: DataConfig, data_folder: Callable[[], Path], report: Callable[[str], None], whole: bool
) -> Prepared:
    """``data.source=synthetic``: nothing but the tokenizer, since windows are generated. ``report`` gets a line about
    the task."""
    section = config.synthetic
    lengths = ", ".join(f"{length:,}" for length in validation_lengths(config))
    least = f"{section.min_length:,} to " if section.min_length else ""
    report(
        f"synthetic: {section.task}, {section.examples:,} examples of {least}{config.seq_len:,} tokens,"
        f" {len(words(section)):,} ids; {section.val_examples:,} held out of each length ({lengths})"
    )
    return Prepared((), symbol_tokenizer(words(section)))
