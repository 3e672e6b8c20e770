"""The projection that every layer is built of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hybridlm.ops.linear import linear, split_linear


class Linear(nn.Linear):
    """torch's own, but for how a few tokens are computed: see ``ops.linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """The output cut into ``sizes`` channels: see ``ops.linear.split_linear``."""
        return split_linear(x, self.weight, self.bias, sizes)
