"""The evaluations that `hybridlm eval` was asked for, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from hybridlm.config.data import DataConfig
from hybridlm.data.corpus import Prepared
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.synthetic.source import GeneratedWindows
from hybridlm.errors import UserError
from hybridlm.eval.command import Evaluation
from hybridlm.eval.losses import Documents, TextLoss, synthetic_metrics, text_loss
from hybridlm.eval.probes import EXAMPLES, run_probes
from hybridlm.eval.results import Record
from hybridlm.eval.tasks import run_tasks
from hybridlm.runs.checkpoint import LoadedRun
from hybridlm.runs.resume import recorded

_TEXT = ("source", "path", "val_path", "hf", "parts", "text_field")  # fields of data that name the text


def evaluated(
    asked: Evaluation, data: DataConfig, contexts: Sequence[int], tasks: dict[str, Any], loaded: LoadedRun
) -> Iterator[Record]:
    """A record of each. tasks: as of ``load_tasks``. UserError: the data or a task cannot be used."""
    record = partial(Record, checkpoint=loaded.checkpoint.name, step=loaded.step, ema=asked.ema)
    model, tokenizer, longest = loaded.model, loaded.tokenizer, max(contexts)
    settings: dict[str, Any] = {"split": asked.split, "limit": asked.limit, "data": list(asked.overrides)}
    prepared = _prepared(asked, data, loaded) if asked.loss and data.source != "synthetic" else None
    for context in contexts if asked.loss else ():
        here = settings | {"context": context}
        if prepared is None:
            windows = GeneratedWindows(data.synthetic, asked.split, context, 0)
            metrics = synthetic_metrics(model, windows, asked.batch, asked.limit)
            yield record(what=f"answers/{data.synthetic.task}", settings=here, metrics=metrics)
            continue
        here["stride"] = stride = asked.stride or max(1, context // 2)
        total, token_bytes = TextLoss(), tokenizer.token_bytes()
        for part in prepared.parts:
            documents = Documents(part.val if asked.split == "val" else part.train, tokenizer.eos_id, asked.limit)
            label = f"{part.name}, {context} tokens"
            loss = text_loss(model, documents, token_bytes, context, stride=stride, batch=asked.batch, label=label)
            total.merge(loss)
            if len(prepared.parts) > 1:
                yield record(what="loss", settings=here | {"part": part.name}, metrics=loss.metrics())
        yield record(what="loss", settings=here, metrics=total.metrics(), curve=total.curve())
    for name, curve in run_probes(model, tokenizer, longest, asked.batch).items() if asked.probes else ():
        settings = {"context": longest, "rows": EXAMPLES}
        yield record(what=f"probe/{name}", settings=settings, metrics=curve[-1], curve=curve)
    if asked.tasks:
        settings = {"context": longest, "limit": asked.limit, "fewshot": asked.num_fewshot}
        scores = run_tasks(model, tokenizer, tasks, longest, asked.batch, asked.limit, asked.num_fewshot)
        for name, metrics in scores.items():
            yield record(what=f"task/{name}", settings=settings, metrics=metrics)


def _prepared(asked: Evaluation, data: DataConfig, loaded: LoadedRun) -> Prepared:
    """The run's data, or the text that was named instead, in the run's tokens. Text other than the run's is evaluated
    as a whole, unless the command line says what is held out."""
    before, tokenizer = recorded(loaded.folder).data, loaded.folder.tokenizer
    other = any(getattr(data, name) != getattr(before, name) for name in _TEXT)
    whole = other and not any(line.lstrip("+").startswith("data.val_fraction") for line in asked.overrides)
    words = " ".join(asked.overrides or loaded.folder.overrides())
    try:
        prepared = prepare(data, report=lambda line: print(f"data  {line}", file=sys.stderr, flush=True), whole=whole)
    except UserError as error:
        raise UserError(
            f"{error}; the loss needs the run's data: prepare it again with `hybridlm prepare {words}`, name other text"
            " (hybridlm eval RUN data=files data.path=...), or skip the loss with --no-loss"
        ) from None
    if prepared.tokenizer.fingerprint == loaded.tokenizer.fingerprint:
        return prepared
    if asked.overrides:
        raise UserError(
            f"{words}: gives different tokens than the run's tokenizer ({tokenizer}); one trained on plain text has no"
            " tokens for conversations"
        )
    raise UserError(
        f"{tokenizer}: the run's tokenizer differs from the one its data give now; has the text changed? Use the run's"
        f" own: hybridlm eval RUN data.tokenizer.kind=file data.tokenizer.path={tokenizer}"
    )
