"""TensorBoard's event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.train.run_files import Row


class TensorBoard:
    """Writes to ``folder``. A resumed run adds a file that replaces the steps after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, rows: Sequence[Row]) -> str:
        from torch.utils.tensorboard import SummaryWriter

        last = rows[-1]["step"] if rows else None
        self._writer = SummaryWriter(str(self._folder), purge_step=last + 1 if isinstance(last, int) else None)
        return f"tensorboard --logdir {self._folder}"

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        for i, text in enumerate(texts):
            self._writer.add_text(f"samples/{i + 1}", text, step)

    def summary(self, summary: Mapping[str, Any]) -> None:
        lines = [f"    {name}: {value}" for name, value in summary.items()]
        self._writer.add_text("summary", "\n".join(lines), 0)

    def close(self) -> None:
        self._writer.close()
