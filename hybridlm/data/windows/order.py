"""Which tokens are in which batch: pure functions of numbers, without state and without tensors.

Training reads one endless sequence of windows, position 0, 1, 2, ...: pass after pass over the corpus, each with a new
phase of the cuts and a new permutation. Optimizer step b takes positions [b * global_batch, (b + 1) * global_batch);
ranks and micro-batches only slice that range. So the data of a step depend on (seed, b) only, and seeking to any step
is free.
"""

from __future__ import annotations

import hashlib

import numpy as np

from hybridlm.errors import ConfigError

IGNORE = -100  # target of a position that does not count
_ROUNDS = 6


def window_count(n_tokens: int, seq_len: int) -> int:
    """Training windows of one pass: seq_len inputs each, sharing one token with the next. ConfigError: the corpus is
    shorter than one.

    Up to seq_len tokens at the ends are left out of a pass, depending on its phase; the count is the same in every
    pass.
    """
    if n_tokens < seq_len + 1:
        raise ConfigError(
            f"the training text has {n_tokens} tokens, but a window needs data.seq_len + 1 = {seq_len + 1}: lower it or"
            " add text"
        )
    return max(1, (n_tokens - seq_len) // seq_len)


def window_starts(positions: np.ndarray, *, n_tokens: int, seq_len: int, seed: int) -> np.ndarray:
    """First token (int64) of the windows at ``positions`` (int64, any shape) of the endless training sequence."""
    count = window_count(n_tokens, seq_len)
    phases = min(seq_len, n_tokens - count * seq_len)
    passes, which = np.unique(np.asarray(positions, dtype=np.int64) // count, return_inverse=True)
    phase = np.array([int(keys(seed, int(epoch))[-1] % np.uint64(phases)) for epoch in passes], dtype=np.int64)
    starts: np.ndarray = phase[which].reshape(np.shape(positions))
    starts += seq_len * shuffled(positions, count=count, seed=seed)
    return starts


def shuffled(positions: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """Which of ``count`` things (int64) are at ``positions`` (int64, any shape) of an endless sequence that has each
    once per pass."""
    passes, places = np.divmod(np.asarray(positions, dtype=np.int64), count)
    chosen = np.empty_like(places)
    for epoch in np.unique(passes):
        mine = passes == epoch
        chosen[mine] = permute(places[mine], count, keys(seed, int(epoch))[:-1])
    return chosen


def spread(places: np.ndarray, chosen: int, count: int) -> np.ndarray:
    """Which of ``count`` things (int64) are at ``places`` (int64, below ``chosen``) if ``chosen`` of them are taken
    evenly."""
    return places * count // chosen


def permute(index: np.ndarray, count: int, round_keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of [0, count), at each of ``index`` (int64, 1-D); ``round_keys`` (rounds,) uint64.

    A balanced Feistel network over the next power of four (Luby and Rackoff 1988), iterated until the value is in range
    (Black and Rogaway 2002): a permutation of any size, evaluated at one place without memory or the places before
    it.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = _feistel(index.astype(np.uint64), half, mask, round_keys)
    outside = values >= count
    while outside.any():  # under four turns on average, as the domain is under four times the range
        values[outside] = _feistel(values[outside], half, mask, round_keys)
        outside = values >= count
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, mask: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    left, right = values >> half, values & mask
    for key in round_keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half) | right


def mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of ``value``; arrays overflow without a
    warning."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def keys(seed: int, epoch: int, purpose: str = "windows") -> np.ndarray:
    """Round keys for ``permute`` and, last, an extra number: the phase of the windows."""
    digest = hashlib.shake_256(f"{purpose}/{seed}/{epoch}".encode()).digest(8 * (_ROUNDS + 1))
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
