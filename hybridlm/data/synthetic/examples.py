"""The examples of a task, a function of split and number; none is in both splits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from hybridlm.config.synthetic import SyntheticConfig, SyntheticTask, shortest
from hybridlm.data.synthetic import counting, recall
from hybridlm.data.synthetic.draws import Draws, row_keys
from hybridlm.data.synthetic.recall import Example
from hybridlm.data.windows.order import IGNORE, mix
from hybridlm.errors import ConfigError

Split = Literal["train", "val"]
_HELD_OUT = 8  # one in so many of all possible examples belongs to validation, by its content
_ATTEMPTS = 1000  # to draw an example of the right split; 7/8 to that power is nothing


class Task(NamedTuple):
    """make: see ``recall``; answers: the number of targets in an example of so many tokens; even: whether its tokens
    are an even number."""

    make: Callable[[SyntheticConfig, Draws, int], Example]
    answers: Callable[[SyntheticConfig, int], int] = lambda section, length: 1
    even: bool = False


TASKS: dict[SyntheticTask, Task] = {
    "mqar": Task(recall.mqar, lambda section, length: section.n_pairs),
    "copying": Task(recall.copying, lambda section, length: length // 2, even=True),
    "selective_copying": Task(recall.selective_copying, lambda section, length: section.n_items),
    "induction": Task(recall.induction),
    "parity": Task(counting.parity, lambda section, length: length),
    "modular_arithmetic": Task(counting.modular_arithmetic, even=True),
    "modular_arithmetic_brackets": Task(counting.modular_arithmetic_brackets),
    "needle": Task(recall.needle, lambda section, length: section.n_items),
}


class Examples:
    """The examples of one split in windows of one length, numbered from 0 without end.

    A hash of their content decides which of all possible examples are held out, so the splits are disjoint under any
    seed.
    """

    def __init__(self, section: SyntheticConfig, split: Split, length: int) -> None:
        """length: columns of a window; with ``section.min_length`` training examples may be shorter, padded with id
        0."""
        self._section, self._task, self._split, self.length = section, TASKS[section.task], split, length
        self._least = max(shortest(section), section.min_length or length) if split == "train" else length
        facts = section.model_dump(include={"task", "vocab_size", "n_pairs", "n_items", "modulus", "seed"})
        self._purpose = f"{json.dumps(facts, sort_keys=True)}/{split}/{length}"

    def make(self, numbers: np.ndarray) -> Example:
        """ids and targets, both (B, length) int64, of the examples with ``numbers`` (B,) int64. ConfigError: there are
        too few different ones."""
        ids = np.zeros((len(numbers), self.length), dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        lengths = self._lengths(numbers)
        for length in np.unique(lengths).tolist():
            mine = lengths == length
            ids[mine, :length], targets[mine, :length] = self._of_length(numbers[mine], length)
        return ids, targets

    def answers(self, numbers: np.ndarray) -> np.ndarray:
        """Number of targets of each of these examples, (B,) int64."""
        lengths, which = np.unique(self._lengths(numbers), return_inverse=True)
        return np.array([self._task.answers(self._section, length) for length in lengths.tolist()], dtype=np.int64)[
            which
        ]

    def _lengths(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64: tokens of each example without padding."""
        fitting = np.arange(self._least, self.length + 1)
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
