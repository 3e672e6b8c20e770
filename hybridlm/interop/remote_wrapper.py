"""The model as a class of transformers: what ``trust_remote_code=True`` loads.

``bundle`` puts this module, with all that it reaches, into one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridlm.layers.init import Init
from hybridlm.model.block import Block
from hybridlm.model.cache import ModelCache
from hybridlm.model.lm import HybridLM
from hybridlm.ops.cross_entropy import IGNORE

KINDS: dict[str, tuple[type[Any], type[Any]]] = {}  # of layers: the class of the spec, and that of the layer
_STEP = 256  # tokens by which a cache grows
# The output's field, and the name under which generate() hands the cache on: once past_key_values, now cache.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class HybridLMConfig(PretrainedConfig):
    """What the model is built of.

    parts: the numbers of each kind of mixer and FFN, by a name, with its ``kind``. blocks: of each layer the names of
    its mixer and of its FFN, None where it has none. initialization: how fresh weights are drawn. source: the section
    of hybridlm's configuration, with which ``hybridlm import`` builds the model again.
    """

    model_type = "hybridlm"
    attribute_map = {"d_model": "hidden_size", "tie_embeddings": "tie_word_embeddings"}
    vocab_multiple = 1  # the embedding has as many rows as there are ids

    def __init__(
        self,
        vocab_size: int = 2,
        hidden_size: int = 1,
        parts: Mapping[str, Mapping[str, Any]] | None = None,
        blocks: Sequence[tuple[str, str | None]] = (),
        norm_eps: float = 1e-5,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        initialization: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.parts = parts or {}
        self.blocks = blocks
        self.num_hidden_layers = len(blocks)
        self.norm_eps = norm_eps
        self.embedding_scale = embedding_scale
        self.residual_scale = residual_scale
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.initialization = initialization or {
            "std": None,
            "embedding_std": 0.02,
            "head_std": None,
            "residual": "depth",
        }
        self.source = source
        self.use_cache = use_cache
        kwargs.pop("num_hidden_layers", None)
        super().__init__(**kwargs | {"tie_word_embeddings": tie_word_embeddings})

    @property
    def init(self) -> SimpleNamespace:
        return SimpleNamespace(**self.initialization)


class HybridLMCache:
    """The state of every layer between two forwards; it makes room as it needs it. columns: tokens and padding that it
    has seen."""

    is_linear = (False,)  # generate() may count on get_seq_length
    is_compileable = False

    def __init__(self, layers: ModelCache) -> None:
        self.layers, self.columns = layers, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.layers = self.layers.select(beam_idx)


class HybridLMForCausalLM(PreTrainedModel, GenerationMixin):
    """hybridlm's model with its head."""

    config_class = HybridLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch, so that accumulated steps weigh tokens alike
    _no_split_modules = ["HybridLM"]
    _is_stateful = True  # a state cannot be taken back, as assisted generation would have to

    def __init__(self, config: HybridLMConfig) -> None:
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"the code of this model needs transformers 5, this is {transformers.__version__}")
        super().__init__(config)
        self.gradient_checkpointing = False
        init = Init(config.init.std, config.init.residual, len(config.blocks))
        blocks = [_block(config, mixer, ffn) for mixer, ffn in config.blocks]
        self.model = HybridLM(cast(Any, config), blocks, config.vocab_size, init)
        exact = [name for name, spec in self.model.param_specs().items() if spec.dtype == "fp32"]
        for name in exact:
            parameter = self.model.get_parameter(name)
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in exact}
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: HybridLMCache | None = None,
        cache: HybridLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids: (B, T). attention_mask: (B, T), or with the columns of earlier calls in front: 0 at padding, which
        may stand anywhere in a row. cache, or past_key_values, its older name: what an earlier call returned; it is
        changed in place. labels: (B, T), shifted here; -100 does not count, nor does what follows padding. The loss is
        their mean in nats, or their sum over ``num_items_in_batch``, in training with what routers add. logits_to_keep:
        0 all columns, n the last n, or the columns."""
        cache = past_key_values if cache is None else cache
        batch, length = input_ids.shape
        seen = 0 if cache is None else cache.columns
        valid = None if attention_mask is None else _valid(attention_mask, length, seen)
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = HybridLMCache(self.model.new_cache(batch, _STEP))
        if cache is not None:
            needed = cache.layers.past + length
            cache.layers.grow(-(-needed // _STEP) * _STEP)
            cache.columns += length
        self.model.checkpoint_blocks = int(self.gradient_checkpointing and self.training)
        few = labels is None and isinstance(logits_to_keep, int) and logits_to_keep
        output = self.model(
            input_ids, None if cache is None else cache.layers, valid=valid, keep=min(few, length) if few else "all"
        )
        loss = None
        if labels is not None:
            loss = _loss(output.logits, labels, valid, num_items_in_batch)
            if self.training and output.aux is not None:
                loss = loss + output.aux
        logits = output.logits if isinstance(logits_to_keep, int) else output.logits[:, logits_to_keep]
        fields: dict[str, Any] = {"loss": loss, "logits": logits, _CACHE: cache}
        found = CausalLMOutputWithPast(**fields)
        return found if return_dict or (return_dict is None and self.config.return_dict) else found.to_tuple()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What generate() gives to ``forward``."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(cast(Any, input_ids), **kwargs)
        inputs.pop("cache_position", None)  # of early versions of transformers 5; the cache knows it
        return {name: value for name, value in inputs.items() if value is not None}

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.embedding
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.embedding, self.model.vocab_size = value, value.num_embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        head: nn.Module | None = self.model.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = new_embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws what no checkpoint has given, as in training with hybridlm."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        given = [tensor for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
        if len(given) < len(tensors):
            kept = [tensor.clone() for tensor in given]
            self.model.reset_parameters()
            for tensor, value in zip(given, kept, strict=True):
                tensor.copy_(value)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes the cache


def _block(config: HybridLMConfig, mixer: str, ffn: str | None) -> Block:
    after = None if ffn is None else _layer(config.parts[ffn])
    eps, scale = config.norm_eps, config.residual_scale
    return Block(_layer(config.parts[mixer]), after, config.d_model, eps=eps, residual_scale=scale)


def _layer(part: Mapping[str, Any]) -> Any:
    spec, layer = KINDS[part["kind"]]
    return layer(spec(**{name: _value(value) for name, value in part.items() if name != "kind"}))


def _value(value: Any) -> Any:
    """Of JSON, which has neither tuples nor infinity."""
    if isinstance(value, list):
        return tuple(_value(item) for item in value)
    return float("inf") if value == ".inf" else value


def _valid(mask: Tensor, length: int, seen: int) -> Tensor | None:
    """(B, T) where a column is a token; None: everywhere."""
    if mask.dim() != 2 or mask.shape[1] not in (length, seen + length):
        expected = " or ".join(f"(B, {columns})" for columns in sorted({length, seen + length}))
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: expected {expected}")
    valid = mask[:, -length:] != 0
    return None if bool(valid.all()) else valid


def _loss(logits: Tensor, labels: Tensor, valid: Tensor | None, count: Tensor | int | None) -> Tensor:
    """Mean loss of the labels, each predicted by the column before it."""
    targets = labels[:, 1:]
    if valid is not None:
        targets = targets.masked_fill(~(valid[:, 1:] & valid[:, :-1]), IGNORE)
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss / ((targets != IGNORE).sum().clamp_min(1) if count is None else count)
