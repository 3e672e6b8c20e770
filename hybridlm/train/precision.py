"""Training in bfloat16 throughout ("bf16-true"), except for the parameters that must not be rounded.

Lightning's own plugin casts every parameter, decay rates and step biases of Mamba too, and makes bfloat16 torch's
default dtype, so that states and statistics come out in it. Here a parameter's declaration (``ParamSpec.dtype``)
decides, and the default stays as it is: layers say themselves what has to be at least fp32. Weights have no fp32 copy;
moments are fp32 (see ``optim``), and updates are rounded to the nearest bfloat16, which loses those below 1/512 of a
weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from hybridlm.model.lm import HybridLM


class BFloat16(Precision):
    """bfloat16 weights and activations with fp32 islands."""

    precision: Literal["bf16-true"] = "bf16-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Rounds what may be rounded of the HybridLM that ``module`` holds, once, before the optimizer sees the
        parameters."""
        for model in module.modules():
            if isinstance(model, HybridLM):
                model.round_parameters(torch.bfloat16)
        return module


def own_plugins(precision: str) -> list[Precision]:
    """The plugins of ours for ``trainer.precision``; none where Lightning's are right."""
    return [BFloat16()] if precision == BFloat16.precision else []
