"""The weights that a new run starts from (``init_from``), checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hybridlm.config.run import RunConfig
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.sealed import digest
from hybridlm.model.lm import HybridLM
from hybridlm.runs.checkpoint import KEY, read_content, rebuilt, refuse_misfits, refuse_unfinite, weights_of
from hybridlm.runs.initial import architecture_changes, source_of


class GivenWeights(NamedTuple):
    """path: the file; step: of the run that they come from; digest: SHA-256 over all of them; tokenizer: theirs; model:
    theirs, on "meta"."""

    path: Path
    step: int
    digest: str
    tokenizer: Tokenizer
    model: HybridLM

    @property
    def line(self) -> str:
        return f"from {self.path}, step {self.step:,}, sha256 {self.digest[:12]}"

    def refuse_other_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError: ids would mean other text than those that the weights have learned."""
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"init_from = {self.path}: was trained with another tokenizer,"
                f" {_difference(self.tokenizer, tokenizer)}; without data.tokenizer the run takes that of the weights"
            )

    def load_into(self, model: HybridLM) -> None:
        """Replaces the weights of ``model``, in its dtype. ConfigError: it has another number of ids."""
        if model.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {self.path} has {self.model.vocab_size:,} ids, this run {model.vocab_size:,}; set"
                f" model.vocab_size={self.model.vocab_size}"
            )
        model.load_state_dict(weights_of(read_content(self.path, verified=True)))


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
    tokenizer = Tokenizer.load(source.folder.tokenizer)
    if tokenizer.fingerprint != ours["tokenizer"]:
        raise UserError(f"{source.folder.tokenizer}: not the tokenizer of {source.checkpoint}")
    return GivenWeights(source.checkpoint, int(content["global_step"]), digest("", weights), tokenizer, model)


def _difference(theirs: Tokenizer, ours: Tokenizer) -> str:
    """In words, for two that are not the same."""
    if theirs.vocab_size != ours.vocab_size:
        return f"of {theirs.vocab_size:,} ids, not {ours.vocab_size:,}"
    for token in range(ours.vocab_size):
        pair = [(one.bytes_of(token), one.special_name(token)) for one in (theirs, ours)]
        if pair[0] != pair[1]:
            return f"where id {token} is {pair[0][0] or pair[0][1]!r}, not {pair[1][0] or pair[1][1]!r}"
    return "which splits text differently"
