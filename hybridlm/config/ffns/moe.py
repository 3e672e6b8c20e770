"""The mixture of experts: section and spec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from hybridlm.config.ffns.mlp import MLPSpec, hidden_width
from hybridlm.config.layers import FFNSection, Spec, Stream, divisors, rounded
from hybridlm.config.problems import broken


@dataclass(frozen=True)
class MoESpec(Spec):
    """Mixture of ``n_experts`` experts of width ``d_expert``; ``d_shared`` is the joint width of the shared ones (0:
    none)."""

    layer: ClassVar[str] = "moe.MoE"

    n_experts: int
    top_k: int
    d_expert: int
    d_shared: int
    shared_gate: bool
    activation: Literal["swiglu", "relu2"]
    router: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_expert_groups: int
    topk_groups: int
    balance_loss_weight: float
    z_loss_weight: float
    bias_update_rate: float

    @property
    def shared(self) -> MLPSpec | None:
        """The dense FFN that the shared experts are together."""
        return MLPSpec(self.d_model, self.d_shared, self.activation) if self.d_shared else None

    def narrowed(self, d_model: int) -> MoESpec:
        return replace(self, d_model=d_model, d_expert=min(32, self.d_expert), d_shared=min(32, self.d_shared))


class MoEConfig(FFNSection):
    """Mixture of experts (``model.moe``)."""

    title: ClassVar[str] = "mixture of experts"
    spec: ClassVar[type[Spec]] = MoESpec

    n_experts: int = Field(8, ge=1, description="routed experts E")
    top_k: int = Field(2, ge=1, description="experts that each token goes to")
    d_expert: int | None = Field(
        None,
        ge=1,
        description="hidden width of an expert; null: expand * d_model rounded up to a multiple of multiple_of",
    )
    expand: float = Field(
        4 / 3, gt=0, description="hidden width of an expert as a multiple of d_model where d_expert is null"
    )
    multiple_of: int = Field(32, ge=1, description="a derived d_expert is rounded up to a multiple of this")
    n_shared_experts: int = Field(
        0, ge=0, description="experts that every token goes to, as one FFN of their joint width"
    )
    d_shared: int | None = Field(
        None, ge=1, description="joint width of the shared experts; null: n_shared_experts times that of the others"
    )
    shared_gate: bool = Field(
        False, description="the shared experts' output is multiplied by a sigmoid gate per token (Qwen3-Next)"
    )
    activation: Literal["swiglu", "relu2"] = Field("swiglu", description="of the experts: swiglu or squared ReLU")
    router: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="softmax (Mixtral) or sigmoid with selection bias (DeepSeek-V3)"
    )
    norm_topk_prob: bool = Field(True, description="the weights of the chosen experts are divided by their sum")
    routed_scaling_factor: float = Field(1.0, gt=0, description="multiplies the weights of the chosen experts")
    n_expert_groups: int = Field(
        1, ge=1, description="groups of experts, of which each token keeps topk_groups (sigmoid router)"
    )
    topk_groups: int = Field(1, ge=1, description="groups of experts that a token may choose from")
    balance_loss_weight: float = Field(
        0.01, ge=0, description="weight of the balance loss, which is 1 when all experts are used equally"
    )
    z_loss_weight: float = Field(
        0.001, ge=0, description="weight of the mean squared log-sum-exp of the router's logits"
    )
    bias_update_rate: float = Field(
        1e-3, ge=0, description="step of the selection bias after each optimizer step (sigmoid router); 0: off"
    )

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        experts, groups, kept = self.n_experts, self.n_expert_groups, self.topk_groups
        d_expert = self.d_expert or hidden_width(self.expand, model.d_model, self.multiple_of)
        size, grouped = experts // groups, f"{where}.n_expert_groups = {groups}"
        of_choice = broken(
            (self.top_k > experts, f"{where}.top_k = {self.top_k}: more than {where}.n_experts = {experts}"),
        )
        of_groups = broken(
            (
                experts % groups,
                f"{grouped}: does not divide the {experts} experts; nearest divisors: {divisors(experts, groups)}",
            ),
            (kept > groups, f"{where}.topk_groups = {kept}: more than {grouped}"),
            (groups > 1 and self.router == "softmax", f"{grouped}: groups need {where}.router=sigmoid"),
            (
                groups > 1 and size < 2,
                f"{grouped}: a group's score is the sum of its best two, so a group needs at least 2 experts",
            ),
            (
                kept * size < self.top_k <= experts,
                f"{where}.top_k = {self.top_k}: more than the {kept * size} experts of {kept} of {groups} groups of"
                f" {size}",
            ),
        )
        d_shared = self.n_shared_experts and (self.d_shared or self.n_shared_experts * d_expert)
        numbers = {"d_expert": d_expert, "d_shared": d_shared, "shared_gate": self.shared_gate and d_shared > 0}
        return numbers, of_choice + of_groups[:1]

    def widened(self, model: Stream, factor: float, multiple: int) -> MoEConfig:
        return self.model_copy(update={"d_expert": rounded(self.resolve(model, "").d_expert * factor, multiple)})
