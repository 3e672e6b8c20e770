"""Synthetic tasks (``data.synthetic``): the question, the number of symbols, and the words that the ids stand for.

An example is ``data.seq_len`` tokens long. Everything here is known without generating anything, so that a model can be
planned for it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hybridlm.config.problems import broken
from hybridlm.config.section import Section, to_tuple

SyntheticTask = Literal[
    "mqar",
    "copying",
    "selective_copying",
    "induction",
    "parity",
    "modular_arithmetic",
    "modular_arithmetic_brackets",
    "needle",
]
PAD = "<|endoftext|>"  # id 0 of every task: fills the rest of a window after an example that is shorter


class SyntheticConfig(Section):
    """A generated task (``data.synthetic``); docs/data.md has a line and the chance level of each."""

    task: SyntheticTask = Field("mqar", description="the task")
    vocab_size: int = Field(
        64,
        ge=2,
        le=1_000_000,
        description="number of symbols; mqar: half are keys, half are values; unused by the counting tasks",
    )
    n_pairs: int = Field(
        4,
        ge=1,
        description="mqar: keys with a value, all of them queried; needle: needles, one of which is queried",
    )
    n_items: int = Field(
        4, ge=1, description="selective_copying: symbols to remember; needle: symbols of a needle's value"
    )
    modulus: int = Field(5, ge=2, le=100, description="modulus of the modular arithmetic tasks")
    min_length: int | None = Field(
        None, ge=1, description="shortest training example; the longest has data.seq_len; null: all have data.seq_len"
    )
    eval_lengths: Annotated[tuple[int, ...], BeforeValidator(to_tuple)] = Field(
        (), description="more validation lengths, which may exceed data.seq_len"
    )
    examples: int = Field(100_000, ge=1, description="training examples, each seen once per pass")
    val_examples: int = Field(512, ge=1, description="held-out examples of each length")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="seed of the examples; the order of training depends on the run's seed"
    )


def words(section: SyntheticConfig) -> tuple[str, ...]:
    """The word of every id of the task: PAD, its markers, its symbols."""
    keys = section.vocab_size // 2
    symbols = tuple(f"s{number}" for number in range(section.vocab_size))
    digits = tuple(str(number) for number in range(section.modulus))
    keys_and_values = (*(f"k{i}" for i in range(keys)), *(f"v{i}" for i in range(section.vocab_size - keys)))
    of_task: dict[str, tuple[str, ...]] = {
        "mqar": keys_and_values,
        "copying": ("copy", *symbols),
        "selective_copying": (".", "?", *symbols),
        "induction": ("*", *symbols),
        "parity": ("0", "1"),
        "modular_arithmetic": ("+", "-", "*", "=", *digits),
        "modular_arithmetic_brackets": ("+", "-", "*", "=", "(", ")", *digits),
        "needle": ("needle", "?", *symbols),
    }
    return (PAD, *of_task[section.task])


def shortest(section: SyntheticConfig) -> int:
    """Tokens of the shortest example that the task has room in."""
    of_task = {
        "mqar": 4 * section.n_pairs,  # pairs, and a query with the place behind it for each
        "selective_copying": 2 * section.n_items,
        "induction": 3,
        "parity": 1,
        "needle": section.n_pairs * (2 + section.n_items) + section.n_items + 1,
    }
    return of_task.get(section.task, 2)  # copying: a symbol and the marker; modular arithmetic: a digit and =


def synthetic_problems(section: SyntheticConfig, seq_len: int) -> list[str]:
    """What does not fit together; one line for each rule that is broken."""
    where, task, least, shorter = "data.synthetic", section.task, shortest(section), section.min_length
    keys = {"mqar": section.vocab_size // 2, "needle": section.vocab_size}.get(task)
    lengths = {
        "data.seq_len": seq_len,
        f"{where}.eval_lengths": min(section.eval_lengths, default=least),
        f"{where}.min_length": least if shorter is None else shorter,
    }
    return broken(
        (
            keys is not None and section.n_pairs > keys,
            f"{where}.n_pairs = {section.n_pairs}: vocab_size {section.vocab_size} has {keys} keys for task={task}",
        ),
        (
            shorter is not None and shorter > seq_len,
            f"{where}.min_length = {shorter}: more than data.seq_len = {seq_len}, the longest",
        ),
        *(
            (
                length < least,
                f"{name} = {length}: an example of task={task} takes {least} tokens or more with these numbers of"
                " pairs and items",
            )
            for name, length in lengths.items()
        ),
        (
            len(set(section.eval_lengths)) < len(section.eval_lengths),
            f"{where}.eval_lengths = {list(section.eval_lengths)}: a length is listed twice",
        ),
    )
