"""The language model: embedding, blocks, head, loss. One forward serves training, evaluation, prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridlm.layers.ffn import RouterStats
from hybridlm.layers.init import Init, ParamSpec
from hybridlm.layers.linear import Linear
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.block import Block
from hybridlm.model.cache import ModelCache
from hybridlm.model.columns import padding_first, sequence_info
from hybridlm.ops.cross_entropy import IGNORE, ROWS, cap_logits, linear_cross_entropy, linear_token_losses
from hybridlm.ops.dispatch import autocast_on
from hybridlm.ops.kernels.choice import ALL_TORCH
from hybridlm.ops.linear import linear
from hybridlm.ops.norm import as_dtype, at_least_fp32, rms_norm

if TYPE_CHECKING:
    from hybridlm.config.model import ModelConfig


@dataclass
class LMOutput:
    """logits: (B, kept, V) where targets were not given; loss_sum: summed loss in nats and n_tokens, the targets that
    count, where they were. losses, likeliest: (B, T) of each target, where requested. router: statistics of
    each MoE layer by index; aux: the sum of their weighted losses, None without such layers."""

    logits: Tensor | None = None
    loss_sum: Tensor | None = None
    n_tokens: Tensor | None = None
    losses: Tensor | None = None
    likeliest: Tensor | None = None
    aux: Tensor | None = None
    router: dict[int, RouterStats] = field(default_factory=dict)


class HybridLM(nn.Module):
    """A causal language model over any sequence of blocks."""

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], vocab_size: int, init: Init) -> None:
        super().__init__()
        self.config, self.vocab_size, self.init = config, vocab_size, init
        self.kernels = ALL_TORCH  # the backend of each operator
        # Every so many blocks, one is checkpointed: it keeps only its input and is recomputed in the backward. 0: none.
        self.checkpoint_blocks = 0
        self.loss_rows = ROWS  # of logits that exist at once in the loss
        padded = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        # Weights given: on "meta" nn.Embedding's own drawing would import torch's compiler, seconds for nothing.
        self.embedding = nn.Embedding(padded, config.d_model, _weight=torch.empty(padded, config.d_model))
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.d_model)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, padded, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(padded V, D), the embedding's own where the two are tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        ids: Tensor,
        cache: ModelCache | None = None,
        *,
        doc_ids: Tensor | None = None,
        valid: Tensor | None = None,
        targets: Tensor | None = None,
        each: bool = False,
        keep: Literal["all", "last"] | int = "all",
    ) -> LMOutput:
        """ids: (B, T) token ids. With ``targets`` (B, T; -100 does not count) the output holds the loss and no logits,
        which are never built whole; without, the logits of the columns that ``keep`` names ("all", "last", or the last
        n). each: also the loss of every target in nats and whether it is the likeliest id.

        cache: read, and advanced by the tokens. doc_ids: (B, T) document of each token: nothing reaches from one
        document into another; a row's first token continues what the cache holds if its document is the row's last
        one (0 where none was given). None: everything continues. valid: (B, T) False at padding, anywhere in a row: it
        changes no state, is never a target, and its logits mean nothing; its ids must still be valid ids. Both may be
        left out of later calls with the same cache.
        """
        back = None
        if valid is not None:
            order, back = padding_first(valid)
            targets = None if targets is None else targets.masked_fill(~valid, IGNORE)
            ids, valid = ids.gather(1, order), valid.gather(1, order)
            doc_ids = None if doc_ids is None else doc_ids.gather(1, order)
        seq = sequence_info(ids.shape[1], cache, doc_ids, valid, ids)
        if self.kernels != ALL_TORCH:
            seq = replace(seq, kernels=self.kernels)
        output = LMOutput()
        x = self._blocks(ids, seq, cache, output)
        if cache is not None:
            cache.advance(seq)
        if back is not None:
            x = x.gather(1, back.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if targets is None and keep != "all":
            x = x[:, x.shape[1] - (1 if keep == "last" else keep) :]
        x = rms_norm(x, self.norm.weight, self.config.norm_eps)
        if targets is None:
            output.logits = self._logits(x)
        else:
            self._loss(x, targets, each, output)
        return output

    def _loss(self, x: Tensor, targets: Tensor, each: bool, output: LMOutput) -> None:
        """The loss of the targets (B, T) after the normalised stream ``x`` (B, T, D), into ``output``."""
        output.n_tokens = (targets != IGNORE).sum()
        hidden, scale, softcap = self._head_input(x).flatten(0, 1), self.config.logit_scale, self.config.logit_softcap
        flat, weight, rows = targets.flatten(), self.head_weight, self.loss_rows
        if each:
            losses, likeliest = linear_token_losses(
                hidden, weight, flat, vocab=self.vocab_size, scale=scale, softcap=softcap, rows=rows
            )
            output.losses, output.likeliest = losses.view(targets.shape), likeliest.view(targets.shape)
            output.loss_sum = losses.sum()
        else:
            output.loss_sum = linear_cross_entropy(
                hidden,
                self.head_weight,
                flat,
                vocab=self.vocab_size,
                scale=scale,
                softcap=softcap,
                rows=self.loss_rows,
                backend=self.kernels.loss,
            )

    def _blocks(self, ids: Tensor, seq: SequenceInfo, cache: ModelCache | None, output: LMOutput) -> Tensor:
        """The residual stream (B, T, D) after the last block; what routers report goes into ``output``."""
        x: Tensor = self.embedding(ids)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        for i, block in enumerate(self.blocks):
            router: RouterStats | None
            if cache is None and self.checkpoint_blocks and i % self.checkpoint_blocks == 0 and torch.is_grad_enabled():
                x, router = checkpoint(
                    block, x, seq, use_reentrant=False, preserve_rng_state=False
                )  # nothing in a block is random
            else:
                x, router = block(x, seq, None if cache is None else cache.layers[i])
            if router is not None:
                output.router[i] = router
                output.aux = router.aux if output.aux is None else output.aux + router.aux
        return x

    @staticmethod
    def _head_input(x: Tensor) -> Tensor:
        """Autocast does not reach into the fused loss: the hidden state is cast here, as it would be in front of a
        Linear."""
        return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype == torch.float32 and autocast_on(x) else x

    def _logits(self, x: Tensor) -> Tensor:
        logits = linear(x, self.head_weight)[..., : self.vocab_size]
        return cap_logits(as_dtype(logits, at_least_fp32(x.dtype)), self.config.logit_scale, self.config.logit_softcap)

    def new_cache(
        self, batch: int, max_len: int, dtype: torch.dtype | None = None, *, device: torch.device | str | None = None
    ) -> ModelCache:
        """An empty cache for ``batch`` rows of up to ``max_len`` tokens; ``dtype`` of activations (the weights') and
        ``device`` (theirs; on "meta" nothing is allocated)."""
        weight = self.embedding.weight
        dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
        layers = [block.mixer.new_cache(batch, max_len, dtype=dtype, device=device) for block in self.blocks]  # type: ignore[union-attr,operator]
        return ModelCache(layers, batch, device)

    def reset_parameters(self) -> None:
        """Draws fresh values for every parameter, once, from torch's generator."""
        settings = self.config.init
        nn.init.normal_(self.embedding.weight, std=settings.embedding_std)
        for block in self.blocks:
            block.reset_parameters(self.init)  # type: ignore[operator]
        self.norm.reset_parameters()
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=settings.head_std or settings.std or self.config.d_model**-0.5)

    def round_parameters(self, dtype: torch.dtype) -> None:
        """Gives ``dtype`` to the parameters that may be rounded, in place."""
        specs = self.param_specs()
        for name, parameter in self.named_parameters():
            if specs[name].dtype == "model":
                parameter.data = parameter.data.to(dtype)

    def param_specs(self) -> dict[str, ParamSpec]:
        """What each parameter declares, by its name in the model. Raises if a parameter is not declared, or one is that
        does not exist."""
        specs = {
            "embedding.weight": ParamSpec(decay=False, role="embedding"),
            "norm.weight": ParamSpec(decay=False, role="vector"),
        }
        if self.lm_head is not None:
            specs["lm_head.weight"] = ParamSpec(decay=True, role="head")
        for i, block in enumerate(self.blocks):
            specs |= {f"blocks.{i}.{name}": spec for name, spec in block.param_specs().items()}  # type: ignore[operator]
        names = {name for name, _ in self.named_parameters()}
        if names != specs.keys():
            raise RuntimeError(
                f"parameters without a declaration: {sorted(names - specs.keys())}; unknown:"
                f" {sorted(specs.keys() - names)}"
            )
        return specs
