"""Training: Lightning runs the loop; the files here connect our parts to it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``hybridlm.train`` is this package once a module of it is imported, and a function of the Python API before: so
    the package can be called, too."""

    def __call__(self, config: Any, folder: Any = None, *, resume: bool = False) -> Any:
        from hybridlm.train.in_process import train

        return train(config, folder, resume=resume)


sys.modules[__name__].__class__ = _Callable
