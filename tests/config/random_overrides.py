"""Command lines as nobody would write them, from a seed: keys and values of every odd kind beside ordinary ones."""

from __future__ import annotations

import random

from hybridlm.config.groups import groups
from hybridlm.config.run import RunConfig

_GROUPS = groups()
_FIELDS = [
    f"{name}.{inner}" if hasattr(field.annotation, "model_fields") else name
    for name, field in RunConfig.model_fields.items()
    for inner in (getattr(field.annotation, "model_fields", None) or {"": None})
]
_DEEP = [
    "model.mamba2.d_state",
    "callbacks.samples.prompts",
    "data.tokenizer.path",
    "data.parts.a.source",
    "model.variants.S.mixer",
]
_HYDRA = [
    "hydra",
    "hydra.run.dir",
    "hydra.job",
    "hydra.job.name",
    "hydra.verbose",
    "hydra.searchpath",
    "hydra.callbacks",
    "hydra.mode",
]
_HYDRA += [
    "hydra/launcher",
    "hydra/job_logging",
    "hydra.output_subdir",
    "hydra.nothing",
    "hydra.sweep.dir",
    "hydra.job_logging.root",
]
_KEYS = [
    "",
    " ",
    ".",
    "..",
    "a..b",
    ".a",
    "a.",
    "@",
    "a@b",
    "data@model",
    "/",
    "a/b",
    "model/",
    "日本",
    "a b",
    "\x1b[31m",
    "a\nb",
    "model[0]",
]
_VALUES = [
    "",
    " ",
    "null",
    "???",
    "true",
    "-1",
    "0",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1_000",
    "0x10",
    "1.5",
    "'",
    '"',
    "''",
    "\\",
    "$",
    "${",
    "}",
]
_VALUES += [
    "[1]",
    "[[1]]",
    "[]",
    "{}",
    "{a: 1}",
    "{a: {b: [1, {c: 2}]}}",
    "[",
    "]",
    "{",
    "(",
    ")",
    "a,b",
    ",",
    "[,]",
    "{,}",
    "{:}",
    "a=b",
    "=",
    "==",
    "#",
]
_VALUES += [
    "${seed}",
    "${oc.env:HOME}",
    "${oc.env:NOWHERE}",
    "${nothing}",
    "${model}",
    "${hydra:job.name}",
    "${now:%Y}",
    "${a.${b}}",
    "\\${seed}",
]
_VALUES += [
    "choice(1,2)",
    "range(0,3)",
    "interval(0,1)",
    "glob(*)",
    "shuffle(1,2)",
    "sort(2,1)",
    "int(x)",
    "str(1)",
    "float(a)",
    "bool(2)",
    "extend_list(1)",
]
_VALUES += [
    "日本語",
    "é",
    "\x1b[2J",
    "\x00",
    "a\nb",
    "\t",
    "\u202e",
    "\ud800",
    "😀",
    "../../x",
    "/etc/passwd",
    "~",
    "*",
    "a" * 300,
    "T*0",
    "(TM)*6",
    "M" * 2000,
]
_VALUES += [
    "9" * 5000,
    "1." + "0" * 5000,
    "[" * 100,
    "{" * 100,
    "(" * 100,
    "[" * 100 + "]" * 100,
    "{a: " * 30 + "1" + "}" * 30,
    "'" * 99,
    "x" * 100_000,
]


def random_overrides(seed: int) -> list[str]:
    """One to five overrides."""
    draw = random.Random(seed)
    return [_override(draw) for _ in range(draw.choice((1, 1, 2, 3, 5)))]


def _override(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.3:
        key = draw.choice(list(_GROUPS))
        value = draw.choice(_GROUPS[key] + ["nothing", "../x", "999"]) if draw.random() < 0.5 else draw.choice(_VALUES)
    elif kind < 0.75:
        key, value = draw.choice(_FIELDS + _DEEP), draw.choice(_VALUES)
    elif kind < 0.9:
        key, value = draw.choice(_HYDRA), draw.choice(_VALUES)
    else:
        key, value = draw.choice(_KEYS), draw.choice(_VALUES)
    sign = draw.choice(("", "", "", "+", "++", "~", "~", "+++"))
    return f"{sign}{key}" if draw.random() < 0.05 else f"{sign}{key}={value}"
