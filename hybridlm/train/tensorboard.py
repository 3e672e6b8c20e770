"""TensorBoard's event files in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.train.metrics import Metrics


class TensorBoard:
    """Writes to ``folder``. A resumed run adds a file that takes the place of the steps after the checkpoint it went on
    from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, rows: Sequence[Metrics]) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=int(rows[-1]["step"]) + 1 if rows else None)  # type: ignore[arg-type]
        return f"tensorboard --logdir {self._folder}"

    def log(self, row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        for i, text in enumerate(texts):
            self._writer.add_text(f"samples/{i + 1}", text, step)

    def summary(self, facts: dict[str, Any]) -> None:
        lines = [f"    {name}: {value}" for name, value in facts.items()]
        self._writer.add_text("summary", "\n".join(lines), 0)

    def close(self) -> str:
        self._writer.close()
        return ""
