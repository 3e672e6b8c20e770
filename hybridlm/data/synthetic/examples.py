"""The examples of a task: by split and number, the same whoever asks, and none of them in both splits."""

from __future__ import annotations

import json
from typing import Literal, Protocol

import numpy as np

from hybridlm.config.synthetic import SyntheticConfig, shortest
from hybridlm.data.synthetic.counting import BracketArithmetic, ModularArithmetic, Parity
from hybridlm.data.synthetic.draws import Draws, row_keys
from hybridlm.data.synthetic.recall import MQAR, Copying, Example, Induction, Needle, SelectiveCopying
from hybridlm.data.windows.order import IGNORE, mix
from hybridlm.errors import ConfigError

Split = Literal["train", "val"]
_HELD_OUT = 8  # one in so many of all possible examples belongs to validation, by its content
_ATTEMPTS = 1000  # to draw an example of the right split; 7/8 to that power is nothing


class Task(Protocol):
    """A kind of example."""

    def fit(self, length: int) -> int:
        """Tokens of the longest example that is no longer than ``length``."""

    def answers(self, length: int) -> int:
        """Targets of an example of ``length`` tokens, one of those that ``fit`` gives."""

    def make(self, draws: Draws, length: int) -> Example:
        """ids and targets (B, length) int64, an example for each row of ``draws``."""


def task_of(section: SyntheticConfig) -> Task:
    """The task that ``section`` names."""
    match section.task:
        case "mqar":
            return MQAR(section.vocab_size, section.n_pairs)
        case "copying":
            return Copying(section.vocab_size)
        case "selective_copying":
            return SelectiveCopying(section.vocab_size, section.n_items)
        case "induction":
            return Induction(section.vocab_size)
        case "parity":
            return Parity()
        case "modular_arithmetic":
            return ModularArithmetic(section.modulus)
        case "modular_arithmetic_brackets":
            return BracketArithmetic(section.modulus)
        case "needle":
            return Needle(section.vocab_size, section.n_pairs, section.n_items)


class Examples:
    """The examples of one split in windows of one length, numbered from 0 without an end; can be sent to another
    process.

    Which of all possible examples are held out, a hash of their content says, so the splits cannot meet, whatever the
    seeds.
    """

    def __init__(self, section: SyntheticConfig, split: Split, length: int) -> None:
        """length: columns of a window; training examples are shorter where ``section.min_length`` says so, and filled
        up with id 0."""
        self._task, self._split, self.length = task_of(section), split, length
        self._least = max(shortest(section), section.min_length or length) if split == "train" else length
        facts = section.model_dump(include={"task", "vocab_size", "n_pairs", "n_items", "modulus", "seed"})
        self._purpose = f"{json.dumps(facts, sort_keys=True)}/{split}/{length}"

    def make(self, numbers: np.ndarray) -> Example:
        """ids and targets, both (B, length) int64, of the examples with ``numbers`` (B,) int64. ConfigError: there are
        too few to hold out some."""
        ids = np.zeros((len(numbers), self.length), dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        lengths = self._lengths(numbers)
        for length in np.unique(lengths).tolist():
            mine = lengths == length
            ids[mine, :length], targets[mine, :length] = self._of_length(numbers[mine], length)
        return ids, targets

    def answers(self, numbers: np.ndarray) -> np.ndarray:
        """Targets of each of these examples, (B,) int64."""
        lengths, which = np.unique(self._lengths(numbers), return_inverse=True)
        return np.array([self._task.answers(length) for length in lengths.tolist()], dtype=np.int64)[which]

    def _lengths(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64: tokens of each example, its filling left out."""
        if self._least == self.length:
            return np.full(len(numbers), self._task.fit(self.length), dtype=np.int64)
        fitting = np.array([self._task.fit(length) for length in range(self._least, self.length + 1)], dtype=np.int64)
        if fitting[0] < self._least:  # the next one that fits is longer
            fitting = fitting[1:]
        drawn: np.ndarray = fitting[Draws(row_keys(f"{self._purpose}/length", numbers)).below(len(fitting), 1)[:, 0]]
        return drawn

    def _of_length(self, numbers: np.ndarray, length: int) -> Example:
        ids, targets = (np.empty((len(numbers), length), dtype=np.int64) for _ in range(2))
        missing = np.arange(len(numbers))
        for attempt in range(_ATTEMPTS):
            made = self._task.make(Draws(row_keys(f"{self._purpose}/{length}", numbers[missing], attempt)), length)
            good = _held_out(made[0]) == (self._split == "val")
            ids[missing[good]], targets[missing[good]] = made[0][good], made[1][good]
            missing = missing[~good]
            if not missing.size:
                return ids, targets
        raise ConfigError(
            f"data.synthetic: of so few different examples of {length} tokens none is left for {self._split}; take"
            " longer ones (data.seq_len, data.synthetic.eval_lengths, min_length) or more symbols"
        )


def _held_out(ids: np.ndarray) -> np.ndarray:
    """(B,) bool of examples (B, n): whether they belong to validation."""
    places = np.arange(1, ids.shape[1] + 1, dtype=np.uint64) << np.uint64(32)
    return mix(mix(ids.astype(np.uint64) + places).sum(axis=1, dtype=np.uint64)) % np.uint64(_HELD_OUT) == 0
