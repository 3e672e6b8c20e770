"""The projection that every layer is built of."""

from __future__ import annotations

from torch import Tensor, nn

from hybridlm.ops.linear import linear


class Linear(nn.Linear):
    """torch's own, but for how a few tokens are computed: see ``ops.linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
