"""Exports every preset at size=tiny, as it is and with model/style=portable, to every target, and puts the table of
what came of it into docs/export.md between its two marks.

PYTHONPATH=tests python docs/export_table.py    # rewrite the table; llama-cpp-python, if installed, runs the GGUF files
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from untrained import untrained_run

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import groups
from hybridlm.config.mixers import MIXERS
from hybridlm.errors import UserError
from hybridlm.interop.export import Exported, export_code, export_hf
from hybridlm.interop.gguf.export import export_gguf
from hybridlm.runs.checkpoint import LoadedRun, load_run

PAGE = Path(__file__).resolve().parent / "export.md"
MARKS = re.compile(
    r"(<!-- table: PYTHONPATH=tests python docs/export_table.py -->\n).*?(<!-- end of table -->)", re.DOTALL
)
STYLES = ("preset", "portable")
TARGETS: dict[str, Callable[[LoadedRun, Path], Exported]] = {
    "`--to hf`": export_hf,
    "`--to gguf`": export_gguf,
    "`--to hf-code`": export_code,
}


def cell(export: Callable[[LoadedRun, Path], Exported], run: Path, target: Path) -> str:
    """The architecture and the differences of logits and of cached decoding; or what stands in the way."""
    try:
        done = export(load_run(str(run), torch.device("cpu")), target)
    except UserError as error:
        return f"no: {', '.join(dict.fromkeys(map(short, error.problems[1:])))}"
    name = done.name.removesuffix("ForCausalLM").removesuffix(", f32")
    found = done.agreement
    return f"{name}, not run" if found is None else f"{name}, {found.logits:.1e} / {found.decode:.1e}"


def short(problem: str) -> str:
    """``model.logit_softcap = 15.0: ...`` as the field alone, ``layer 3 = mamba3: ...`` as the kind of layer."""
    field, _, rest = problem.partition(" = ")
    kind = rest.partition(":")[0]
    return f"{MIXERS[kind].title}" if kind in MIXERS else field.removeprefix("model.")


def rows() -> list[tuple[str, ...]]:
    found = []
    for preset in groups()["model"]:
        seen: set[object] = set()
        for style in STYLES:
            model = compose_config([f"model={preset}", f"model/style={style}", "size=tiny"]).model
            about = (model.layers, model.logit_softcap, model.norm_eps)
            if about in seen:
                continue
            seen.add(about)
            with tempfile.TemporaryDirectory() as place:
                run = untrained_run(Path(place, "run"), model, every=True)
                cells = [cell(export, run, Path(place, f"to{i}")) for i, export in enumerate(TARGETS.values())]
            found.append((f"`{preset}`", f"`{style}`", *cells))
            print(*found[-1], sep=" | ", flush=True)
    return found


def table() -> str:
    head = ("`model=`", "`model/style=`", *TARGETS)
    lines = [f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows()]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = table()
    PAGE.write_text(
        MARKS.sub(lambda marks: marks[1] + text + marks[2], PAGE.read_text(encoding="utf-8")), encoding="utf-8"
    )
