"""The loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from liger_kernel import calls


class LigerFusedLinearCrossEntropyFunction:
    """In liger-kernel an autograd function; here autograd does it."""

    @staticmethod
    def apply(
        _input,
        weight,
        target,
        bias=None,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        accum_dtype=None,
    ):
        calls.append("LigerFusedLinearCrossEntropyFunction")
        assert bias is None
        assert ce_weight is None
        assert (lse_square_scale, label_smoothing, return_z_loss) == (0.0, 0.0, False)
        assert accum_dtype == torch.float32
        assert _input.dtype == weight.dtype
        logits = _input.float() @ weight.float().t()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction), None, None, None
