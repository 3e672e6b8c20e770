"""README.md of an exported folder: what the model is, what it was trained on, and how to run it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from hybridlm.files.plain import Unreadable, read_json, read_yaml
from hybridlm.model.count import count_text, layer_table
from hybridlm.runs.checkpoint import LoadedRun

_FIGURES = {
    "tokens": "tokens trained on",
    "val/bpb": "bits per byte, held-out text",
    "val/loss": "loss per token, held-out text",
    "val/accuracy": "accuracy, held-out examples",
    "gzip_bpb": "gzip -9 on the same text, bits per byte",
}


def card(run: LoadedRun, name: str, readers: tuple[str, ...], context: int, *, remote: bool = False) -> str:
    """Markdown with the metadata that the hub reads. name: the architecture; readers: programs that read the folder;
    remote: it comes with code of its own."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    trust = ", trust_remote_code=True" if remote else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [hybridlm]",
        "---",
        f"# {run.model.config.name}",
        "",
        f"{count_text(parameters)} parameters, `{name}`, trained with hybridlm (step {run.step:,}). Read by:"
        f" {', '.join(readers)}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
        'ids = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False)',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))",
        "```",
        "",
        "## Layers",
        "",
        "```text",
        layer_table(run.model, context).rstrip(),
        "```",
        "",
        *_training(run),
    ]
    return "\n".join(lines) + "\n"


def _training(run: LoadedRun) -> list[str]:
    """Data, command and figures, as far as the run recorded them."""
    lines = ["## Training", ""]
    data = _read(read_yaml, run.folder.config).get("data", {})
    if isinstance(data, Mapping):
        shown = {key: data.get(key) for key in ("source", "format", "seq_len") if data.get(key) is not None}
        lines.append(f"Data: `{json.dumps(shown, ensure_ascii=False)}`.")
    if overrides := run.folder.overrides():
        lines += ["", "```sh", f"hybridlm train {shlex.join(overrides)}", "```"]
    summary = _read(read_json, run.folder.summary)
    figures = [(text, summary[key]) for key, text in _FIGURES.items() if isinstance(summary.get(key), int | float)]
    if figures:
        lines += ["", "| figure | value |", "|---|---|"]
        for text, value in figures:
            number = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
            lines.append(f"| {text} | {number} |")
    return lines


def _read(reader: Any, path: Any) -> Mapping[str, Any]:
    """The mapping in a file of the run folder, which may be a stranger's; empty where there is none."""
    try:
        content = reader(path)
    except Unreadable:
        return {}
    return content if isinstance(content, dict) else {}
