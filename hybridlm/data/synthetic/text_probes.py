"""Probes of a text model, made of random tokens of its own vocabulary: does it recall what is in its window?

A text model has not been trained on them, so what counts is how much better it does than on unpredictable tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from hybridlm.data.synthetic.draws import Draws, row_keys
from hybridlm.data.synthetic.tasks import unasked

_SHOTS = 4  # lists in the copying probe, each with its copy; the last copy is measured
_FEWEST = 2  # ordinary tokens that a vocabulary needs: the two separators of copying


class TextProbe(NamedTuple):
    """ids: (B, T). targets: what is predictable from what came before; baseline: what is not. Both (B, T), -100
    elsewhere; all int64."""

    ids: np.ndarray
    targets: np.ndarray
    baseline: np.ndarray


def induction(tokens: np.ndarray, batch: int, length: int, seed: int) -> TextProbe:
    """A block of random tokens twice (Olsson et al. 2022). Measured is the second copy from its second token on,
    against the first copy.

    tokens: (n,) int64, the ids to draw from; length: of both copies together, at least 4, the last column of an odd one
    left out.
    """
    half = length // 2
    draws = Draws(row_keys(f"text/induction/{seed}/{length}", np.arange(batch)))
    block = tokens[draws.below(len(tokens), half)]
    ids = np.concatenate([block, block], axis=1)
    following = unasked(ids)
    following[:, :-1] = ids[:, 1:]
    targets, baseline = unasked(ids), unasked(ids)
    targets[:, half:-1], baseline[:, : half - 1] = following[:, half:-1], following[:, : half - 1]
    return TextProbe(ids, targets, baseline)


def copying(tokens: np.ndarray, batch: int, length: int, seed: int) -> TextProbe:
    """Lists of random tokens, each followed by a separator, its copy and another separator. Measured is the copy of the
    last one, against that list itself. The separators are two random tokens that are in no list.

    tokens: (n,) int64, at least 3; length: at least 16, what does not divide is left out.
    """
    size = length // (2 * _SHOTS) - 1  # tokens of a list
    draws = Draws(row_keys(f"text/copying/{seed}/{length}", np.arange(batch)))
    separators = draws.chosen(_FEWEST, len(tokens))
    # The places of the other tokens, in which those of the separators are stepped over.
    lists = draws.below(len(tokens) - _FEWEST, _SHOTS * size)
    for place in np.sort(separators, axis=1).T:
        lists += lists >= place[:, None]
    shots = tokens[lists].reshape(batch, _SHOTS, size)
    first, second = (
        np.broadcast_to(tokens[separators[:, k]][:, None, None], (batch, _SHOTS, 1)) for k in range(_FEWEST)
    )
    ids = np.concatenate([shots, first, shots, second], axis=2).reshape(batch, -1)
    targets, baseline = unasked(ids), unasked(ids)
    copy = ids.shape[1] - size - 1  # where the last copy begins
    targets[:, copy - 1 : -2] = ids[:, copy:-1]
    baseline[:, copy - size - 1 : copy - 2] = ids[:, copy - size : copy - 1]
    return TextProbe(ids, targets, baseline)


TEXT_PROBES: Mapping[str, Callable[[np.ndarray, int, int, int], TextProbe]] = {
    "induction": induction,
    "copying": copying,
}
SHORTEST = 32  # tokens of a meaningful probe


def ordinary_tokens(token_bytes: np.ndarray) -> np.ndarray:
    """The ids (n,) int64 that stand for text, of ``Tokenizer.token_bytes()``: special and unused ones are left out."""
    return np.flatnonzero(token_bytes)
