"""The Python API beside ``hybridlm.train``: configurations, models, and trained runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.errors import UserError

if TYPE_CHECKING:
    import torch

    from hybridlm.config.run import RunConfig
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM
    from hybridlm.runs.checkpoint import LoadedRun

_CHUNK = 512  # tokens read at a time


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration of these overrides, the same as on the command line.

    Args:
        overrides: such as ``["model=mamba2", "size=tiny", "optim.lr=1e-3", "model.pattern=(TM)*3"]``.

    Returns:
        Frozen sections (``config.model``, ``config.data``, ``config.optim``, ...); ``config.model.layers`` are the
        resolved layers, ``config.batch`` is the split of a step's batch.

    Raises:
        ConfigError: one line in ``problems`` for each thing that is wrong.

    Example:
        >>> config = hybridlm.compose(["model=transformer", "size=tiny"])
        >>> [layer.kind for layer in config.model.layers]
    """
    from hybridlm.cli.compose import compose_config

    return compose_config(overrides)


def build(config: RunConfig, *, device: str | torch.device = "meta") -> HybridLM:
    """The untrained model of a configuration, a ``torch.nn.Module``.

    Args:
        config: of ``compose``.
        device: where its weights are drawn, from ``config.seed``; "meta": none are, which takes no memory, for counting
            parameters and FLOPs.

    Raises:
        ConfigError: model.vocab_size is smaller than the tokenizer's vocabulary.

    Example:
        >>> model = hybridlm.build(hybridlm.compose(["size=tiny"]))
        >>> sum(parameter.numel() for parameter in model.parameters())
    """
    import torch

    from hybridlm.memory.vocabulary import planned_vocabulary
    from hybridlm.model.build import build_model, fresh_model

    vocabulary = planned_vocabulary(config).ids
    if torch.device(device).type == "meta":
        return build_model(config.model, vocabulary)
    return fresh_model(config.model, vocabulary, seed=config.seed, device=device)


def load(run: str | Path = "last", *, ema: bool = False, device: str | torch.device | None = None) -> TrainedModel:
    """A trained model with its tokenizer, ready to use.

    Args:
        run: "last" (the newest run under outputs/), "best" (its best validation), a run folder, or a checkpoint or
            safetensors file in one.
        ema: the running average of the weights (callbacks=ema) instead of the last ones.
        device: default: the GPU if there is one.

    Raises:
        UserError: there is no such run, or its files are damaged or not what they should be. No code in them runs.

    Example:
        >>> model = hybridlm.load("outputs/first")
        >>> model.generate("def ", max_new_tokens=20, temperature=0)
        >>> model.loss("def f(x): return x")
    """
    import torch

    from hybridlm.machine.device import inference_device
    from hybridlm.runs.checkpoint import load_run

    return TrainedModel(load_run(str(run), inference_device() if device is None else torch.device(device), ema=ema))


class TrainedModel:
    """A trained model. ``model`` is the ``torch.nn.Module`` in evaluation mode; ``tokenizer`` encodes and decodes text;
    ``folder`` and ``step`` say where it is from."""

    def __init__(self, run: LoadedRun) -> None:
        from hybridlm.generate.engine import Engine

        self.model: HybridLM = run.model
        self.tokenizer: Tokenizer = run.tokenizer
        self.folder, self.step = run.folder.path, run.step
        self._engine = Engine(run.model, run.tokenizer)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """The continuation of ``prompt``, without it; it ends at the end of a document, before a ``stop`` text, or
        after ``max_new_tokens``. The options are those of `hybridlm generate`; temperature 0 is greedy.

        Raises:
            UserError: an option is out of range.
        """
        from hybridlm.generate.sampling import Sampling

        sampling = Sampling(
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed=seed,
            stop=tuple(stop),
            stop_ids=(self.tokenizer.eos_id,),
            max_new_tokens=max_new_tokens,
        )
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        return self._engine.generate([ids], sampling)[0].text

    def loss(self, text: str) -> float:
        """Cross-entropy of ``text`` as a document of its own, in nats per token: each token given all before it, the
        first one given the separator of documents.

        Raises:
            UserError: the text has no tokens.
        """
        import torch

        ids = [self.tokenizer.eos_id, *self.tokenizer.encode(text)]
        if len(ids) == 1:
            raise UserError("loss: the text has no tokens")
        total, cache = 0.0, self.model.new_cache(1, len(ids))
        row = torch.tensor([ids], device=self.model.embedding.weight.device)
        with torch.inference_mode():
            for start in range(0, len(ids) - 1, _CHUNK):
                end = min(start + _CHUNK, len(ids) - 1)
                output = self.model(row[:, start:end], cache, targets=row[:, start + 1 : end + 1])
                total += float(output.loss_sum)
        return total / (len(ids) - 1)
