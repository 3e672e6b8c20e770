"""What mixers and FFNs have in common: how their parameters are drawn and declared, and what they cost."""

from __future__ import annotations

from abc import ABC
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from hybridlm.layers.init import Init, ParamSpec, declared, reset_convolution
from hybridlm.layers.norm import RMSNorm

if TYPE_CHECKING:
    from hybridlm.config.layers import Spec

Phase = Literal["train", "prefill", "decode"]
PASSES: dict[Phase, int] = {"train": 3, "prefill": 1, "decode": 1}  # a backward costs two forwards
_RESIDUAL = ("o_proj", "out_proj", "down_proj")  # the projections back into the residual stream


class Layer(nn.Module, ABC):
    """A mixer or an FFN, built from its spec alone: ``Layer(spec)``."""

    def reset_parameters(self, init: Init) -> None:
        """Draws fresh values for every parameter, in a fixed order.

        Done here: projections that are children of this module (those called o_proj, out_proj or down_proj like all
        that add to the residual stream), their biases (zero), norms (one), depthwise convolutions, and children that
        draw their own. A layer with other parameters draws these afterwards.
        """
        for name, module in self.named_children():
            if isinstance(module, nn.Linear):
                draw = init.residual_matrix if name in _RESIDUAL else init.matrix
                draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
            elif not isinstance(module, nn.Conv1d):
                module.reset_parameters(init)  # type: ignore[operator]
        for module in self.children():
            if isinstance(module, nn.Conv1d):
                reset_convolution(module)

    def param_specs(self) -> dict[str, ParamSpec]:
        """One entry for every parameter, by its name in this module.

        Decided here by name and shape: a parameter of this module itself (A_log, dt_bias, D, ...) is a vector in fp32
        without decay, the 2-d weight of a child is a matrix with decay, and everything else (norms, biases,
        convolutions) is a vector without decay. A layer overrides the entries for which this is wrong, such as a
        fused projection, whose row blocks only the layer knows.
        """
        return {name: declared(name, parameter) for name, parameter in self.named_parameters()}


def layer_class(spec: Spec) -> Any:
    """The class of the layer that ``spec`` describes, a Mixer or an FFN; an instance is made of the spec alone."""
    module, name = spec.layer.split(".")
    return getattr(import_module(f"hybridlm.layers.{module}"), name)


def linear_flops(*layers: nn.Linear) -> float:
    """Forward FLOPs per token of these projections."""
    return float(sum(2 * layer.in_features * layer.out_features for layer in layers))
