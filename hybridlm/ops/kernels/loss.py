"""The head and its cross-entropy through Liger (Hsu et al. 2024, arXiv 2410.10989)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.kernels.graph import outside_graphs
from hybridlm.ops.norm import as_dtype


@outside_graphs
def kernel_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab: int, ignore: int, softcap: float | None
) -> Tensor:
    """``ops.linear_cross_entropy`` at a scale of 1: the sum in float32. The rows of padded ids are cut off, and get a
    gradient of zero."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        hidden,
        as_dtype(weight, hidden.dtype)[:vocab],
        targets,
        None,  # bias
        None,  # ce_weight
        ignore,
        0.0,  # lse_square_scale
        0.0,  # label_smoothing
        "sum",
        softcap,
        False,  # return_z_loss
        torch.float32,  # accum_dtype: of the weight's gradient over the chunks
    )[0]
    return loss
