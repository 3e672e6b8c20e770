"""The real step beside a plan: the run's own optimizer, the order of Lightning's loop; and random models to compare the
two on."""

from __future__ import annotations

import random

import torch
from harness.memory import peak_bytes
from torch import Tensor

from hybridlm.cli.compose import compose_config
from hybridlm.config.run import RunConfig
from hybridlm.memory.timeline import StepSettings
from hybridlm.memory.workload import Workload
from hybridlm.model.build import fresh_model
from hybridlm.optim.optimizer import HybridOptimizer, model_groups

DOCUMENT = 64  # tokens of one, where documents are told apart


class RealStep:
    """A step on random ids. As in Lightning's loop, the gradients of the step before are there until the first
    backward."""

    def __init__(self, work: Workload, step: StepSettings) -> None:
        self.work, self.step = work, step
        self.model = fresh_model(work.model, work.vocab, seed=0, device="cpu")
        self.model.checkpoint_blocks, self.model.loss_rows = step.checkpoint_blocks, step.rows
        if work.precision == "bf16-true":
            self.model.round_parameters(torch.bfloat16)
        if work.precision == "64-true":
            self.model.double()
        self.optimizer = HybridOptimizer(model_groups(self.model, work.optim), work.optim)

    def _ids(self) -> Tensor:
        return torch.randint(self.work.vocab, (self.step.batch_size, self.work.seq_len))

    def _loss(self) -> Tensor:
        rows = self.step.batch_size
        documents = (torch.arange(self.work.seq_len) // DOCUMENT).repeat(rows, 1) if self.work.documents else None
        with self.work.autocast(self.model):
            output = self.model(self._ids(), doc_ids=documents, targets=self._ids())
            assert output.loss_sum is not None
            total = output.loss_sum if output.aux is None else output.loss_sum + output.aux * output.n_tokens
            return total * 1.0

    def __call__(self) -> None:
        for micro in range(self.step.accumulate):
            loss = self._loss()
            if micro == 0:
                self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def peak(self) -> int:
        """The most that torch's allocator holds, with everything that stays."""
        self()
        stays = [*self.model.parameters(), *self.model.buffers()]
        stays += [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        self.optimizer.zero_grad()

        def under_way() -> None:
            for parameter in self.model.parameters():  # made here, so that their end is recorded, too
                parameter.grad = torch.zeros_like(parameter)
            self()

        return sum(tensor.numel() * tensor.element_size() for tensor in stays) + peak_bytes(under_way)


def random_config(seed: int, *overrides: str) -> RunConfig:
    """A model of four to seven layers of any kinds, with an FFN of any kind after each."""
    draw = random.Random(seed)
    mixers, ffns = ("T", "M1", "M2", "M3", "L"), ("mlp", "moe", "none")
    pattern = " ".join(f"{draw.choice(mixers)}:{draw.choice(ffns)}" for _ in range(draw.randint(4, 7)))
    choices = [
        f"model.pattern={pattern}",
        f"model.d_model={draw.choice((128, 192, 256))}",
        "model.attention.n_heads=4",
        f"model.attention.rope={draw.choice(('true', 'false'))}",
        f"model.attention.n_kv_heads={draw.choice((1, 2, 4))}",
        f"model.mamba3.mimo_rank={draw.choice(('null', '2'))}",
        "model.mla.n_heads=4",
        f"model.moe.n_experts={draw.choice((4, 8))}",
        f"model.moe.router={draw.choice(('softmax', 'sigmoid'))}",
        f"model.tie_embeddings={draw.choice(('true', 'false'))}",
        f"optim={draw.choice(('muon', 'adamw', 'lion', 'sgd'))}",
        f"data.seq_len={draw.choice((128, 200, 256))}",
        f"data.tokenizer.vocab_size={draw.choice((1024, 4096, 8192))}",
        f"trainer.precision={draw.choice(('32-true', 'bf16-mixed', 'bf16-true'))}",
    ]
    return compose_config(["hardware=cpu", *choices, *overrides])


def random_step(seed: int) -> StepSettings:
    draw = random.Random(f"cut {seed}")
    return StepSettings(
        draw.choice((2, 4, 8)), draw.choice((1, 1, 3)), draw.choice((0, 0, 1, 2)), draw.choice((128, 512))
    )
