"""The kernels section: which compiled kernels a run may use in place of the torch operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, create_model

from hybridlm.config.mixers import MIXERS
from hybridlm.config.section import Section

Setting = Literal["auto", "torch", "cuda"]
AUTO, TORCH, CUDA = get_args(Setting)
_OF_MIXERS = {kind: mixer for kind, mixer in MIXERS.items() if mixer.kernel is not None}
# What has a setting of its own, with the package that holds its kernel.
PACKAGES = {
    "conv": "causal-conv1d",
    **{kind: mixer.kernel for kind, mixer in _OF_MIXERS.items()},
    "loss": "liger-kernel",
}


class _Settings(Section):
    default: Setting = Field(
        "auto",
        description=(
            "auto: a compiled kernel where one works on this machine; torch: never; cuda: required, the run is refused"
            " without it"
        ),
    )
    conv: Setting | None = Field(None, description="short causal convolutions (causal-conv1d); null: the default")


if TYPE_CHECKING:
    _WithMixers = _Settings
else:
    _about = "the scan of {} ({}); null: the default"
    _fields = {
        kind: (Setting | None, Field(None, description=_about.format(mixer.title, mixer.kernel)))
        for kind, mixer in _OF_MIXERS.items()
    }
    _WithMixers = create_model("_WithMixers", __base__=_Settings, **_fields)


class KernelsConfig(_WithMixers):
    """Compiled kernels (``kernels``). On a command line ``kernels=cuda`` is short for ``kernels.default=cuda``."""

    loss: Setting | None = Field(None, description="head and cross-entropy in one (liger-kernel); null: the default")

    def of(self, name: str) -> tuple[Setting, str]:
        """The setting that holds for a kernel of ``PACKAGES``, and the field that gives it."""
        own: Setting | None = getattr(self, name)
        return (self.default, "kernels.default") if own is None else (own, f"kernels.{name}")
