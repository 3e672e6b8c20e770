"""Room for more ids in weights that were trained with fewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hybridlm.model.lm import HybridLM


def with_more_ids(weights: Mapping[str, Tensor], model: HybridLM, new: range) -> dict[str, Tensor]:
    """``weights`` in the shapes of ``model``, which has as many ids or more. new: the ids that they have not learned,
    behind the others; empty: none.

    In the embedding and in the head, the rows of new ids and all added rows are the mean of the rows in front of
    ``new``: an id that is as likely as the average one moves the distribution least (Hewitt 2021, "Initializing New
    Word Embeddings for Pretrained Language Models").
    """
    rows = {name: parameter.shape[0] for name, parameter in model.named_parameters()}
    return {
        name: _grown(tensor, rows[name], new) if name in ("embedding.weight", "lm_head.weight") else tensor
        for name, tensor in weights.items()
    }


def _grown(table: Tensor, rows: int, new: range) -> Tensor:
    if rows == len(table) and not new:
        return table
    mean = table[: new.start].mean(0)
    result = mean.repeat(rows, 1)
    result[: len(table)] = table
    result[new.start : new.stop] = mean
    return result
