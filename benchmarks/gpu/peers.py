"""Training beside mamba_ssm's own model and transformers' models of the same shape, in turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from gpu.models import hf_model, mamba_ssm_model, our_shape
from gpu.part import Bar, Part, Row, at_least, pick
from gpu.setting import Setting
from gpu.step import TrainStep, hf_loss, logits_loss, our_loss, rate
from harness.step import parameters
from harness.turns import take_turns
from torch import Tensor, nn

SHAPE = (8, 2048)
# case: our pattern, the peer, the peer's loss
PAIRS: dict[str, tuple[str, Callable[[Setting], nn.Module], Callable[..., Tensor]]] = {
    "mamba_ssm Mamba-2": ("M2:none", mamba_ssm_model, logits_loss),
    "HF Mamba2": ("M2:none", partial(hf_model, name="HF Mamba2"), hf_loss),
    "HF Llama": ("T:mlp", partial(hf_model, name="HF Llama"), hf_loss),
    "HF Bamba": ("M2:mlp*3 T:mlp", partial(hf_model, name="HF Bamba"), hf_loss),
}
CASE_SECONDS = 30  # of the rounds of a case
TOLERANCE = 0.05  # of the numbers of parameters


def _measure(setting: Setting, case: str) -> Iterator[Row]:
    pattern, peer, loss = PAIRS[case]
    batch = SHAPE[0] if setting.memory_gb >= 22 else 2
    shape = (1 if setting.dry else batch, setting.length(SHAPE[1]))
    steps = {
        case: TrainStep(setting, peer(setting), shape, loss),
        "hybridlm": TrainStep(setting, our_shape(setting, pattern), shape, our_loss),
    }
    counts = {name: parameters(step.model) for name, step in steps.items()}
    if max(counts.values()) > (1 + TOLERANCE) * min(counts.values()):
        raise RuntimeError(f"models of different sizes: {counts}")
    for step in steps.values():
        step()
    times = take_turns(steps, setting.affordable(steps, CASE_SECONDS))
    ratio = times.ratio(case, "hybridlm")
    for name, step in steps.items():
        row: Row = {"case": case, "model": name, "parameters": counts[name], **rate(setting, step, times, name)}
        if name == "hybridlm":
            row |= {"over the peer": ratio.median, "its range": f"{ratio.low:.2f} to {ratio.high:.2f}"}
        yield row


PART = Part(
    "peers",
    "training at T = 2048, 768 wide, 12 layers, eager, against mamba_ssm's MambaLMHeadModel and transformers' Mamba2,"
    " Llama and Bamba of the same parameters; each with its own loss",
    120,
    lambda setting: list(PAIRS),
    _measure,
    [
        Bar(
            "Mamba-2 stack training against mamba_ssm's own model, T = 2048",
            ">= 1.0x (goal 1.1x)",
            at_least(1.0),
            lambda rows: pick(rows, "over the peer", {"case": "mamba_ssm Mamba-2", "model": "hybridlm"}),
        )
    ],
)
