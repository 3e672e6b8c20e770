"""Text sampled from the model, during a run and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning

from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.train.compiled import eager
from hybridlm.train.lightning_module import model_of
from hybridlm.train.run_files import write_or_warn

if TYPE_CHECKING:
    from hybridlm.config.logging import SamplesConfig
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.loggers import Remote


def sampled(model: HybridLM, tokenizer: Tokenizer, config: SamplesConfig, seed: int) -> list[str]:
    """Each prompt with its continuation. The model must be in evaluation mode."""
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
        stop_ids=(tokenizer.eos_id,),
        max_new_tokens=config.tokens,
    )
    written = Engine(model, tokenizer).generate([tokenizer.encode(prompt) for prompt in config.prompts], sampling)
    return [prompt + completion.text for prompt, completion in zip(config.prompts, written, strict=True)]


def write_samples(path: Path, texts: Sequence[str], say: Callable[[str], None]) -> None:
    """``say`` prints a line on the first rank if it fails."""
    write_or_warn(path, "\n\n----------------\n\n".join(texts) + "\n", say)


class SampleText(lightning.Callback):
    """Continues the prompts after every validation whose step ``interval`` divides, into samples/step-00000100.txt.
    Runs on rank 0 only."""

    def __init__(
        self,
        config: SamplesConfig,
        seed: int,
        interval: int,
        tokenizer: Tokenizer,
        folder: RunFolder,
        remote: Remote,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._seed, self._interval, self._say = config, seed, interval, say
        self._tokenizer, self._folder, self._remote = tokenizer, folder, remote

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step, model = trainer.global_step, model_of(pl_module)
        if trainer.state.fn != "fit" or step % self._interval != 0 or not trainer.is_global_zero:
            return
        training = model.training
        model.eval()
        with eager(model):  # the cache grows with every token
            texts = sampled(model, self._tokenizer, self._config, self._seed)
        model.train(training)
        write_samples(self._folder.samples_at(step), texts, self._say)
        self._remote.samples(step, self._config.prompts, texts)
