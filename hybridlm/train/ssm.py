"""What a log reports of the mixers: the metrics that each declares (``Mixer.metrics``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hybridlm.model.block import Block

if TYPE_CHECKING:
    from hybridlm.model.lm import HybridLM
    from hybridlm.train.metrics import Metrics


def mixer_metrics(model: HybridLM) -> Metrics:
    """``group/LAYER/name`` of every layer that has some. Must be called on every rank."""
    metrics: Metrics = {}
    for layer, block in enumerate(model.blocks):
        for name, value in cast(Block, block).mixer.metrics().items():
            metrics[f"/{layer}/".join(name.split("/"))] = float(value)
    return metrics
