"""The kernels section: which compiled kernels a run may use in place of our own torch operators."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from hybridlm.config.section import Section

Setting = Literal["auto", "torch", "cuda"]
AUTO, TORCH, CUDA = get_args(Setting)
KINDS = ("conv", "mamba1", "mamba2", "mamba3", "loss")


class KernelsConfig(Section):
    """Compiled kernels (``kernels``). On a command line ``kernels=cuda`` is short for ``kernels.default=cuda``."""

    default: Setting = Field(
        "auto",
        description=(
            "auto: a compiled kernel where one works here; torch: none; cuda: it must be there, else the run is refused"
        ),
    )
    conv: Setting | None = Field(
        None, description="the short convolution of every Mamba (causal-conv1d); null: the default"
    )
    mamba1: Setting | None = Field(None, description="Mamba-1's scan (mamba-ssm); null: the default")
    mamba2: Setting | None = Field(None, description="Mamba-2's scan (mamba-ssm); null: the default")
    mamba3: Setting | None = Field(None, description="Mamba-3's scan (mamba-ssm); null: the default")
    loss: Setting | None = Field(None, description="head and cross-entropy in one (liger-kernel); null: the default")

    def of(self, kind: str) -> tuple[Setting, str]:
        """What holds for a kind of ``KINDS``, and the field that says so."""
        own: Setting | None = getattr(self, kind)
        return (self.default, "kernels.default") if own is None else (own, f"kernels.{kind}")
