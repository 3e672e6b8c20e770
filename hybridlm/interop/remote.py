"""Models that no architecture of transformers represents: they travel with their own code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from hybridlm.config.ffns import FFNS
from hybridlm.config.layers import Spec
from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.interop.architecture import Architecture, Need
from hybridlm.interop.bundle import FILE, bundle
from hybridlm.interop.links import Link, same
from hybridlm.model.build import build_model

_NOT_TOLD = {"name", "sizes", "vocab_multiple"}  # of the model section: what changes nothing that is computed


class RemoteCode(Architecture):
    """Any model, by ``trust_remote_code``: the classes of ``remote_wrapper``."""

    name: ClassVar[str] = "HybridLMForCausalLM"
    model_type: ClassVar[str] = "hybridlm"

    def needs(self, model: ModelConfig) -> Iterator[Need]:
        return iter(())

    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        names: dict[Spec, str] = {}
        for layer in model.layers:
            for kind, spec in ((layer.kind, layer.params), (layer.ffn_kind, layer.ffn)):
                if spec is not None and spec not in names:
                    count = sum(type(other) is type(spec) for other in names)
                    names[spec] = f"{kind}_{count + 1}" if count else kind
        config = {
            "auto_map": {auto: f"{FILE.removesuffix('.py')}.{name}" for auto, name in self._classes().items()},
            "vocab_size": vocab,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "parts": {name: {"kind": spec.layer} | asdict(spec) for spec, name in names.items()},
            "blocks": [[names[layer.params], names[layer.ffn] if layer.ffn else None] for layer in model.layers],
            "tie_word_embeddings": model.tie_embeddings,
            "initialization": model.init.model_dump(),
            "source": model.model_dump(exclude=_NOT_TOLD | ({*MIXERS, *FFNS} - model.kinds)),
            **{name: getattr(model, name) for name in ("norm_eps", "embedding_scale", "residual_scale")},
            **{name: getattr(model, name) for name in ("logit_scale", "logit_softcap")},
        }
        plain: dict[str, Any] = json.loads(json.dumps(_finite(config), allow_nan=False))
        return plain

    def _classes(self) -> dict[str, str]:
        return {"AutoConfig": "HybridLMConfig", "AutoModelForCausalLM": self.name}

    def links(self, model: ModelConfig) -> Iterable[Link]:
        return [same(name, f"model.{name}") for name in build_model(model, 2).state_dict()]

    def files(self, model: ModelConfig) -> dict[str, str]:
        layers = [spec for layer in model.layers for spec in (layer.params, layer.ffn)]
        return {FILE: bundle(spec for spec in layers if spec is not None)}

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config["source"])


def _finite(value: Any) -> Any:
    """Infinity as YAML spells it: JSON has none."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return ".inf" if value == math.inf else value
