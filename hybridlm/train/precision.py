"""Training in pure bfloat16 ("bf16-true"), except for the parameters that must not be rounded.

Lightning's own plugin casts every parameter, including Mamba's decay rates and step biases, and makes bfloat16 torch's
default dtype, so that states and statistics are computed in it. Here a parameter's declaration (``ParamSpec.dtype``)
decides, and the default dtype stays: layers decide what must be at least fp32. Weights have no fp32 master copy;
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
        """Rounds the parameters of the HybridLM in ``module`` that may be rounded, once, before the optimizer is
        built."""
        for model in module.modules():
            if isinstance(model, HybridLM):
                model.round_parameters(torch.bfloat16)
        return module
