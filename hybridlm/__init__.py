"""Train and use small hybrid language models (attention, Mamba and other layers in any order) from Python.

>>> import hybridlm
>>> config = hybridlm.compose(["model=hybrid_small", "size=tiny", "trainer.max_steps=20"])
>>> run = hybridlm.train(config)                      # a run folder, as `hybridlm train` writes it
>>> model = hybridlm.load(run.folder)
>>> model.generate("def ", max_new_tokens=20)

Names are loaded on first use: importing the package takes milliseconds and does not import torch. docs/python.md shows
more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridlm.api import TrainedModel as TrainedModel
    from hybridlm.api import build as build
    from hybridlm.api import compose as compose
    from hybridlm.api import load as load
    from hybridlm.errors import ConfigError as ConfigError
    from hybridlm.errors import RunFailed as RunFailed
    from hybridlm.errors import UserError as UserError
    from hybridlm.train.in_process import TrainedRun as TrainedRun
    from hybridlm.train.in_process import train as train

    __version__: str

_HOMES = {
    **dict.fromkeys(("TrainedModel", "build", "compose", "load"), "hybridlm.api"),
    **dict.fromkeys(("ConfigError", "RunFailed", "UserError"), "hybridlm.errors"),
    **dict.fromkeys(("TrainedRun", "train"), "hybridlm.train.in_process"),
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    import importlib
    import importlib.metadata

    if name == "__version__":
        return importlib.metadata.version("hybridlm")
    if name not in _HOMES:
        raise AttributeError(f"module 'hybridlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
