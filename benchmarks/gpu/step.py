"""One training step of any model on the card: forward under autocast, loss, backward, fused AdamW, and a wait for the
card."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu.models import kernels_of
from gpu.part import Row
from gpu.setting import Setting
from harness.turns import Times
from torch import Tensor, nn

from hybridlm.model.count import flops_per_token
from hybridlm.model.lm import HybridLM


def our_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    output = model(ids, targets=targets)
    mean: Tensor = output.loss_sum / targets.numel()
    return mean if output.aux is None else mean + output.aux


def hf_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """As transformers computes it from labels, which it shifts itself."""
    loss: Tensor = model(input_ids=ids, labels=targets, use_cache=False).loss
    return loss


def logits_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Of a model that has no loss of its own (mamba_ssm's): torch's cross-entropy in fp32, as its training scripts
    do."""
    return torch.nn.functional.cross_entropy(model(ids).logits.float().flatten(0, 1), targets.flatten())


class TrainStep:
    """A model with its optimizer and a batch of random ids; calling it is one step."""

    def __init__(
        self, setting: Setting, model: nn.Module, shape: tuple[int, int], loss: Callable[..., Tensor] = our_loss
    ) -> None:
        self.setting, self.model, self._loss = setting, model.train(), loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        self.ids, self.targets = (
            torch.randint(setting.vocab, shape, generator=generator).to(setting.device) for _ in range(2)
        )

    def backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.setting.device.type, self.setting.dtype):
            loss = self._loss(self.model, self.ids, self.targets)
        loss.backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        self.setting.synchronize()


def rate(setting: Setting, step: TrainStep, times: Times, name: str) -> Row:
    """tokens/s of the median round with its range, and, of our models, the share of the card's peak and the kernels."""
    tokens = step.ids.numel()
    median, seconds = times.median(name), times.seconds[name]
    row: Row = {"tokens_per_s": tokens / median, "least": tokens / max(seconds), "most": tokens / min(seconds)}
    if isinstance(step.model, HybridLM):
        flops = flops_per_token(step.model, step.ids.shape[1], "train")
        row["kernels"] = kernels_of(step.model)
        row["mfu"] = flops * tokens / median / (setting.peak_tflops * 1e12)
    return row
