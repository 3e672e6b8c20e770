"""What a log says of the Mamba layers: how far they step, and how far they look back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridlm.layers.mamba1 import Mamba1
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mamba3 import Mamba3

if TYPE_CHECKING:
    from hybridlm.model.lm import HybridLM
    from hybridlm.train.metrics import Metrics


def ssm_layers(model: HybridLM) -> dict[int, nn.Module]:
    """The Mamba mixers by the index of their layer."""
    return {i: block.mixer for i, block in enumerate(model.blocks) if isinstance(block.mixer, (Mamba1, Mamba2, Mamba3))}


@torch.no_grad()
def ssm_metrics(layers: dict[int, nn.Module]) -> Metrics:
    """Of each layer the step sizes that its bias alone gives (softplus of it; tokens add to it): the mean over heads
    (channels in Mamba-1), and the largest. A layer whose steps shrink to nothing has stopped to read; one whose steps
    grow forgets. Every rank has to ask."""
    metrics: Metrics = {}
    for layer, mixer in layers.items():
        step = F.softplus(_whole(mixer.dt_proj.bias if isinstance(mixer, Mamba1) else mixer.dt_bias).float())
        metrics |= {f"ssm/{layer}/dt_mean": float(step.mean()), f"ssm/{layer}/dt_max": float(step.max())}
    return metrics


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
