"""How many ids the model will know, before the data is prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hybridlm.config.synthetic import words
from hybridlm.data.tokenizer import byte_tokenizer, load_tokenizer
from hybridlm.files.home import expanded

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig


class Vocabulary(NamedTuple):
    """ids: the model's, without padding; bound: they are an upper bound: a small corpus may give fewer."""

    ids: int
    bound: bool


def planned_vocabulary(config: RunConfig) -> Vocabulary:
    """The size of the run's tokenizer, or ``model.vocab_size``. Raises ConfigError where a tokenizer file cannot be
    used."""
    settings = config.data.tokenizer
    if config.model.vocab_size is not None:
        return Vocabulary(config.model.vocab_size, bound=False)
    if config.data.source == "synthetic":
        return Vocabulary(len(words(config.data.synthetic)), bound=False)
    if settings.kind == "file" and settings.path is not None:
        return Vocabulary(load_tokenizer(expanded(settings.path), settings.special_tokens).vocab_size, bound=False)
    if settings.kind == "bytes":
        return Vocabulary(byte_tokenizer(settings.special_tokens).vocab_size, bound=False)
    return Vocabulary(settings.vocab_size, bound=True)
