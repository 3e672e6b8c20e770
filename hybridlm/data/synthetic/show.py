"""An example as a line that a person can read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridlm.data.windows.order import IGNORE


def as_text(ids: np.ndarray, targets: np.ndarray, words: Sequence[str], given: np.ndarray | None = None) -> str:
    """The words of an example (T,), behind each asked place the answer in brackets, filling left out: ``k3 v8 .
    k3[v8]``.

    given: (T,) what a model answered; where that is wrong it stands there too: ``k3[v8 not v2]``.
    """
    parts = []
    last = np.flatnonzero(ids)[-1]
    for place, (token, target) in enumerate(zip(ids[: last + 1].tolist(), targets.tolist(), strict=False)):
        wrong = "" if given is None or given[place] == target else f" not {words[given[place]]}"
        parts.append(words[token] + ("" if target == IGNORE else f"[{words[target]}{wrong}]"))
    return " ".join(parts)
