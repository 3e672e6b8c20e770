"""The page of ``train --help``: common tasks, the groups with their options, and every field with its value and a
sentence."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from hybridlm.config.problems import section_type, show
from hybridlm.config.run import RunConfig
from hybridlm.config.section import Section

_WIDTH, _INDENT = 110, 36

COMMON = """hybridlm trains small hybrid language models: attention and Mamba layers in any order.

  python train.py [group=option ...] [field=value ...]    the same as: hybridlm train ...

Common tasks:

  python train.py                                         the default model on the default text
  python train.py data=files data.path='notes/**/*.txt'   your own text
  python train.py model.pattern=TMTM                      another order of layers: T attention, M mamba
  python train.py model=transformer size=d12              an architecture at a size
  python train.py trainer.max_steps=5000 optim.lr=1e-3    longer, with another learning rate
  python train.py data.seq_len=512 data.global_batch=32   longer windows, other batches
  python train.py hydra.run.dir=outputs/mine              into a folder of your choice
  python train.py ckpt=last trainer.max_steps=2000        continue where the newest run stopped
  python train.py experiments=smoke                       with the settings of a file
  python train.py logger=wandb logger.offline=false       log to W&B as well
  hybridlm plan size=d12 hardware=rtx4060                 what fits, how fast and how long, on any card
  hybridlm check model.pattern='(M3 L:moe)*4'             verify a model
  hybridlm sweep optim.lr=1e-3,3e-3 --seeds 3 --dry-run   several runs (python train.py -m: with Hydra)
  hybridlm generate last --prompt 'def '                  generate text with the newest run; or: chat last

--cfg job prints the composed configuration; --hydra-help lists Hydra's own flags.
docs/pattern.md explains model.pattern.
"""


def help_page(groups: Mapping[str, Sequence[str]], tree: Mapping[str, object]) -> str:
    """groups: options by group; tree: the configuration as plain values, shown as the fields' values."""
    rows = [_entry(f"  {group}=...", ", ".join(options)) for group, options in groups.items()]
    fields = "\n".join(_section(RunConfig, (), tree))
    return (
        f"{COMMON}\nGroups and their options:\n\n{chr(10).join(rows)}\n\nFields with their values in this"
        f" configuration:\n{fields}\n"
    )


def _section(section: type[Section], path: tuple[str, ...], tree: object) -> Iterator[str]:
    """The lines of a section: its fields, then the sections inside it."""
    values = tree if isinstance(tree, Mapping) else {}
    own = [name for name, info in section.model_fields.items() if section_type(info.annotation) is None]
    if path and own:
        title = (section.__doc__ or "").strip().splitlines()[0].replace("``", "")
        yield "\n" + textwrap.fill(title, _WIDTH, break_on_hyphens=False)
    elif own:
        yield ""
    for name in own:
        info = section.model_fields[name]
        yield _entry(f"  {'.'.join((*path, name))}={_value(values.get(name, info.default))}", info.description or "")
    for name, info in section.model_fields.items():
        inner = section_type(info.annotation)
        if inner is not None:
            yield from _section(inner, (*path, name), values.get(name))


def _value(value: object) -> str:
    """As written on a command line, in quotes if a shell would split it."""
    text = show(value)
    return text[1:-1] if isinstance(value, str) and not re.search(r"[ '\"]", value) else text


def _entry(left: str, right: str) -> str:
    """Two columns; where the first is too long, the second begins below it."""
    lines = textwrap.wrap(right, _WIDTH - _INDENT, break_on_hyphens=False) or [""]
    first = f"{left:{_INDENT}}{lines[0]}" if len(left) < _INDENT else f"{left}\n{'':{_INDENT}}{lines[0]}"
    return "\n".join([first.rstrip(), *(f"{'':{_INDENT}}{line}" for line in lines[1:])])
