"""A generated task as windows: numbered, in the endless order of training or consecutively for validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hybridlm.config.data import DataConfig
from hybridlm.config.synthetic import SyntheticConfig, words
from hybridlm.data.corpus import Prepared
from hybridlm.data.synthetic.examples import Examples, Split, as_text
from hybridlm.data.tokenizer import symbol_tokenizer
from hybridlm.data.windows.order import shuffled
from hybridlm.data.windows.window_sources import WindowBatch


class GeneratedWindows:
    """The examples of one split and length, one in a window; in training each once a pass, in another order in each."""

    def __init__(self, section: SyntheticConfig, split: Split, length: int, seed: int) -> None:
        """seed: of the order."""
        self.windows = self.numbers = section.examples if split == "train" else section.val_examples
        self.seq_len = length
        self._examples, self._seed = Examples(section, split, length), seed

    def choose(self, positions: np.ndarray) -> np.ndarray:
        return shuffled(positions, count=self.windows, seed=self._seed)

    def rows(self, chosen: np.ndarray) -> WindowBatch:
        return WindowBatch(*self._examples.make(chosen))

    def targets(self, chosen: np.ndarray) -> np.ndarray:
        return self._examples.answers(chosen)


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


def open_synthetic(config: DataConfig, folder: Path, report: Callable[[str], None], whole: bool) -> Prepared:
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
