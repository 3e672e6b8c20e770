"""How the windows of one optimizer step are divided: the one rule, and everything that follows from it."""

from __future__ import annotations

import math
from typing import NamedTuple

from hybridlm.errors import ConfigError


class BatchSplit(NamedTuple):
    """``windows = micro_batch x accumulate x ranks``, None where a number is still open (``auto``).

    windows: sequences of one optimizer step, over all ranks (``data.global_batch``); micro_batch: sequences of one
    forward pass (``data.batch_size``); accumulate: micro-batches per rank and step (``trainer.accumulate``); ranks:
    processes.
    """

    windows: int | None
    micro_batch: int | None
    accumulate: int | None
    ranks: int | None

    @property
    def problem(self) -> str | None:
        """One line where the known numbers cannot be completed to whole ones; None: they can."""
        if self.windows is None:
            return None
        factors = {
            "data.batch_size": self.micro_batch,
            "trainer.accumulate": self.accumulate,
            "trainer.devices": self.ranks,
        }
        known = {name: number for name, number in factors.items() if number is not None}
        product = math.prod(known.values())
        all_known = len(known) == len(factors)
        if product == self.windows or (not all_known and self.windows % product == 0):
            return None
        terms = " x ".join(f"{name} ({number})" for name, number in known.items())
        relation = "is not" if all_known else "is not a multiple of"
        remedy = "leave one of them auto" if all_known else f"take a multiple of {product}, or data.global_batch=auto"
        total = f" = {product}" if len(known) > 1 else ""
        return f"data.global_batch = {self.windows}: {relation} {terms}{total}; {remedy}"

    def windows_on(self, ranks: int, budget: int) -> int:
        """``windows`` over ``ranks``: where they are open, ``budget`` rounded up to a multiple of the fixed numbers, or
        just their product where micro-batch and accumulation are both fixed. ConfigError: the numbers do not fit
        together."""
        fixed = [number for number in (self.micro_batch, self.accumulate) if number is not None]
        part = math.prod(fixed) * ranks
        chosen = part if len(fixed) == 2 else math.ceil(budget / part) * part
        split = self._replace(ranks=ranks, windows=chosen if self.windows is None else self.windows)
        if (problem := split.problem) is not None:
            raise ConfigError(problem)
        return split.windows or chosen

    def complete(self, windows: int, ranks: int) -> tuple[int, int]:
        """(micro_batch, accumulate) for the ``windows_on`` these ranks: the largest micro-batch where it is open."""
        micro_batch = self.micro_batch or windows // (ranks * (self.accumulate or 1))
        return micro_batch, self.accumulate or windows // (ranks * micro_batch)
