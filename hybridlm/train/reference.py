"""Log-probabilities of preferences under the weights that training starts from, computed once and kept beside the
prepared data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from filelock import FileLock

from hybridlm.config.run import RunConfig
from hybridlm.data.corpus import Prepared, TextSplit
from hybridlm.data.keep import cache_name, keep_json, kept_json, unwritable
from hybridlm.data.windows.pairs import PairWindows
from hybridlm.errors import UserError
from hybridlm.machine.description import Machine
from hybridlm.machine.device import CPU
from hybridlm.memory.workload import AUTOCAST
from hybridlm.model.build import fresh_model
from hybridlm.model.lm import HybridLM
from hybridlm.ops.kernels.choice import KernelChoice
from hybridlm.train.initial import GivenWeights, given_weights
from hybridlm.train.objective import log_probabilities


def with_reference(
    prepared: Prepared,
    config: RunConfig,
    machine: Machine,
    kernels: KernelChoice,
    given: GivenWeights | None,
    digest: str,
    say: Callable[[str], None],
) -> Prepared:
    """``prepared``, a corpus of preferences, with their log-probabilities under the weights of ``config.init_from``:
    those that an earlier start has kept for the same weights, windows, number of ids and precision, else computed here.
    given: the weights, None: read if they are needed; digest: of them.

    UserError: they are needed and are not there any more, or the folder of the data cannot be written.
    """
    (part,) = prepared.parts

    @cache
    def model() -> HybridLM:
        return _model(config, machine, kernels, given, prepared.tokenizer.vocab_size, digest)

    def known(name: str, split: TextSplit, seq_len: int) -> TextSplit:
        windows = PairWindows(split, seq_len, 0)
        key = cache_name(digest, seq_len, machine.precision, config.model.vocab_size)
        path = part.folder / f"{name}-reference-{key}.json"
        left = f", {windows.too_long:,} longer than {seq_len} tokens left out" if windows.too_long else ""
        say(f"data        {name}: {windows.numbers:,} pairs{left}")
        try:
            with FileLock(path.with_suffix(".lock")):  # of several processes one computes
                numbers = kept_json(path).get("log_probabilities")
                if numbers is None or len(numbers) != windows.numbers:
                    began = time.monotonic()
                    numbers = _computed(model(), windows, machine).tolist()
                    keep_json(path, {"log_probabilities": numbers})
                    say(f"reference   log-probabilities of {name} in {time.monotonic() - began:.1f} s: {path}")
        except OSError as error:
            raise unwritable(part.folder, error) from None
        return replace(split, reference=np.array(numbers, dtype=np.float64))

    seq_len = config.data.seq_len
    train = known("train", part.train, seq_len)
    val = known("val", part.val, config.data.val_seq_len or seq_len)
    return replace(prepared, parts=(replace(part, train=train, val=val),))


def _model(
    config: RunConfig, machine: Machine, kernels: KernelChoice, given: GivenWeights | None, ids: int, digest: str
) -> HybridLM:
    """The weights that training starts from, on the device and in the precision of training."""
    if given is None:
        given = _given_again(config, digest)
    model = fresh_model(config.model, ids, seed=config.seed, device=CPU)
    given.load_into(model, ids)
    model.kernels = kernels
    if machine.precision == "bf16-true":
        model.round_parameters(torch.bfloat16)
    return (model.double() if machine.precision == "64-true" else model).to(machine.device).eval()


def _given_again(config: RunConfig, digest: str) -> GivenWeights:
    """The weights of ``config.init_from``, for a run that resumes. UserError: they are not what they were."""
    try:
        given = given_weights(config)
        problem = "" if given.digest == digest else "it has changed since"
    except UserError as error:
        problem = error.problems[0]
    if problem:
        raise UserError(
            f"init_from = {config.init_from}: the log-probabilities under these weights are no longer kept beside the"
            f" prepared data, and cannot be computed again ({problem})"
        )
    return given


@torch.no_grad()
def _computed(model: HybridLM, windows: PairWindows, machine: Machine) -> np.ndarray:
    """(pairs, 2) float64: of chosen and rejected."""
    dtype, found = AUTOCAST.get(machine.precision), []
    for first in range(0, windows.numbers, machine.batch_size):
        rows = windows.rows(np.arange(first, min(first + machine.batch_size, windows.numbers)))
        ids, targets = (torch.from_numpy(array).to(machine.device) for array in (rows.ids, rows.targets))
        with torch.autocast(machine.device, dtype=dtype, enabled=dtype is not None):
            found.append(log_probabilities(model(ids, targets=targets, each=True)).view(-1, 2).cpu())
    return torch.cat(found).numpy()
