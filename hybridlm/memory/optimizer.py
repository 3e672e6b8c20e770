"""The optimizer's part of a step: the run's own optimizer updates all weights of the run's model, on "meta" tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from hybridlm.memory.microbatch import gradient_bytes
from hybridlm.memory.tracker import tracked
from hybridlm.memory.workload import Workload
from hybridlm.optim.eight_bit import eight_bit_state_bytes
from hybridlm.optim.optimizer import HybridOptimizer, model_groups
from hybridlm.optim.updates import fresh_state


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes, unsharded. transient: of temporaries during the update."""

    weights: int
    gradients: int
    state: int
    transient: int
    average: int  # a running average of the weights in float32
    average_transient: int  # of its update, where weights have another dtype
    largest_block: int  # bytes of the largest layer's weights
    outside: int  # bytes of the weights of embedding, norm and head


@lru_cache(maxsize=64)
def trace_optimizer(work: Workload) -> OptimizerMemory:
    """``optim=adamw8bit`` updates weights in place inside bitsandbytes, so that only clipping has temporaries."""
    eight_bit = work.optim.name == "adamw8bit"
    optim = work.optim.model_copy(update={"name": "sgd"}) if eight_bit else work.optim
    with tracked(work.gpu, autocast=False) as tracker:
        model = work.built(work.layers)
        tracker.hold([*model.parameters(), *model.buffers()])
        weights = tracker.held
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        gradients, before = tracker.held - weights, tracker.held
        optimizer = HybridOptimizer(model_groups(model, optim), optim)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] |= fresh_state(group["algorithm"], parameter)
        state, held = tracker.held - before, tracker.held
        tracker.restart()
        optimizer.step()
        parameters = list(model.parameters())
        if eight_bit:
            state = sum(eight_bit_state_bytes(parameter) for parameter in parameters)
        others = [parameter.numel() for parameter in parameters if parameter.dtype != torch.float32]
        blocks = [gradient_bytes(block) for block in model.blocks]
        return OptimizerMemory(
            weights=weights,
            gradients=gradients,
            state=state,
            transient=tracker.peak - held,
            average=4 * sum(parameter.numel() for parameter in parameters),
            average_transient=4 * sum(others),
            largest_block=max(blocks),
            outside=weights - sum(blocks),
        )
