"""The weights that a new run starts from (``init_from``), checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hybridlm.config.run import RunConfig
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.sealed import digest
from hybridlm.model.growth import with_more_ids
from hybridlm.model.lm import HybridLM
from hybridlm.runs.checkpoint import KEY, read_content, rebuilt, refuse_misfits, refuse_unfinite, weights_of
from hybridlm.runs.initial import architecture_changes, source_of


class GivenWeights(NamedTuple):
    """path: the file; step: of the run that they come from; digest: SHA-256 over all of them; tokenizer: theirs, from
    tokenizer_path; model: theirs, on "meta"."""

    path: Path
    step: int
    digest: str
    tokenizer: Tokenizer
    tokenizer_path: Path
    model: HybridLM

    @property
    def line(self) -> str:
        return f"from {self.path}, step {self.step:,}, sha256 {self.digest[:12]}"

    def added_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """The special tokens that ``tokenizer`` has behind those of the weights. UserError: its ids mean other text
        than those that the weights have learned."""
        behind = range(self.tokenizer.vocab_size, tokenizer.vocab_size)
        added = [name for token in behind if (name := tokenizer.special_name(token)) is not None]
        same = load_tokenizer(self.tokenizer_path, added) if added else self.tokenizer
        if tokenizer.fingerprint != same.fingerprint:
            raise UserError(
                f"init_from = {self.path}: was trained with another tokenizer,"
                f" {_difference(self.tokenizer, tokenizer)}; without data.tokenizer the run takes that of the weights"
            )
        return added

    def load_into(self, model: HybridLM, ids: int) -> None:
        """Replaces the weights of ``model``, in its dtype. ids: of the run's tokenizer; the rows of those that the
        weights have not learned are the mean of the others. ConfigError: the model has fewer ids than the weights."""
        if model.vocab_size < self.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {self.path} has {self.model.vocab_size:,} ids, this run {model.vocab_size:,}; set"
                f" model.vocab_size={self.model.vocab_size}"
            )
        weights = weights_of(read_content(self.path, verified=True))
        model.load_state_dict(with_more_ids(weights, model, range(self.tokenizer.vocab_size, ids)))


def given_weights(config: RunConfig) -> GivenWeights:
    """Those of ``config.init_from``. UserError: they cannot be read, are of another architecture than the run, or the
    tokenizer beside them is not theirs."""
    assert config.init_from is not None
    source = source_of(config.init_from)
    content = read_content(source.checkpoint)
    ours, weights = content[KEY], weights_of(content)
    model = rebuilt(ours, source.checkpoint, config.model)
    if changes := architecture_changes(model.config, config.model):
        raise UserError(
            f"init_from = {source.checkpoint}: has another architecture than this run; {', '.join(changes)}"
        )
    refuse_misfits(model, weights, source.checkpoint)
    refuse_unfinite(weights, source.checkpoint)
    place = source.folder.tokenizer
    tokenizer = Tokenizer.load(place)
    if tokenizer.fingerprint != ours["tokenizer"]:
        raise UserError(f"{place}: not the tokenizer of {source.checkpoint}")
    return GivenWeights(source.checkpoint, int(content["global_step"]), digest("", weights), tokenizer, place, model)


def _difference(theirs: Tokenizer, ours: Tokenizer) -> str:
    """In words, for two that are not the same."""
    if theirs.vocab_size != ours.vocab_size:
        return f"of {theirs.vocab_size:,} ids, not {ours.vocab_size:,}"
    for token in range(ours.vocab_size):
        pair = [(one.bytes_of(token), one.special_name(token)) for one in (theirs, ours)]
        if pair[0] != pair[1]:
            return f"where id {token} is {pair[0][0] or pair[0][1]!r}, not {pair[1][0] or pair[1][1]!r}"
    return "which splits text differently"
