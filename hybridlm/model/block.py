"""One layer: a mixer and an optional FFN, each preceded by a norm and added to the residual stream (pre-norm)."""

from __future__ import annotations

from torch import Tensor, nn

from hybridlm.layers.cache import LayerCache
from hybridlm.layers.ffn import FFN, RouterStats
from hybridlm.layers.init import VECTOR, Init, ParamSpec
from hybridlm.layers.mixer import Mixer
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.norm import rms_norm


class Block(nn.Module):
    """``x += scale * mixer(norm(x)); x += scale * ffn(norm(x))``."""

    def __init__(self, mixer: Mixer, ffn: FFN | None, d_model: int, *, eps: float, residual_scale: float) -> None:
        super().__init__()
        self.eps, self.residual_scale = eps, residual_scale
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = mixer
        self.ffn_norm = None if ffn is None else RMSNorm(d_model)
        self.ffn = ffn

    def forward(
        self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """x: (B, T, D). Returns the new residual stream and, of a router, its statistics."""
        x = self._add(x, self.mixer(rms_norm(x, self.mixer_norm.weight, self.eps), seq, cache))
        if self.ffn is None or self.ffn_norm is None:
            return x, None
        y, router = self.ffn(rms_norm(x, self.ffn_norm.weight, self.eps), seq.valid)
        return self._add(x, y), router

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.residual_scale == 1.0 else x + self.residual_scale * y

    def reset_parameters(self, init: Init) -> None:
        self.mixer_norm.reset_parameters()
        self.mixer.reset_parameters(init)
        if self.ffn is not None and self.ffn_norm is not None:
            self.ffn_norm.reset_parameters()
            self.ffn.reset_parameters(init)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Every parameter of the block by its name in it."""
        specs = {"mixer_norm.weight": VECTOR}
        specs |= {f"mixer.{name}": spec for name, spec in self.mixer.param_specs().items()}
        if self.ffn is not None:
            specs["ffn_norm.weight"] = VECTOR
            specs |= {f"ffn.{name}": spec for name, spec in self.ffn.param_specs().items()}
        return specs
