"""The plan of a run: how its step is cut, what that needs, and whether it fits. No data is read and no weight is
drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.config.steps import never_reached
from hybridlm.errors import ConfigError
from hybridlm.machine.description import global_batch_of, planned_processes, planned_steps, precision_of
from hybridlm.machine.device import CPU, CUDA, DeviceFacts
from hybridlm.machine.limits import usable_bytes
from hybridlm.machine.profiles import planned_device, planned_rates
from hybridlm.machine.rates import cpu_tflops, peak_name, peak_of, tf32_allowed
from hybridlm.memory.choice import Limit, Steps, choose, possible_cuts, roughly
from hybridlm.memory.inference import Inference, inference_of
from hybridlm.memory.speed import Rates, tokens_per_second
from hybridlm.memory.timeline import Cut, Peak, Shares
from hybridlm.memory.updates import Update, follow_update
from hybridlm.memory.vocabulary import Vocabulary, planned_vocabulary
from hybridlm.memory.workload import Workload
from hybridlm.model.build import build_model
from hybridlm.model.count import parameters

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig

# What an allocator takes beyond the peak, a share and MiB. On CUDA not measured yet. On a CPU glibc keeps freed blocks
# below 32 MiB (benchmarks/results/plan_memory.md), and oneDNN compiles a kernel for each shape of a product in 16 bits:
# 0.2 to 0.5 GiB were seen.
_CUDA_MARGIN, _CPU_MARGIN, _CPU_NARROW_MARGIN = (0.12, 128), (0.25, 64), (0.25, 640)
_NARROW = ("bf16-mixed", "bf16-true")
# torch's own default for each handle, of which the forward's thread and the backward's have one
# (aten/src/ATen/cuda/CublasHandlePool.cpp).
_CUBLAS, _CUBLAS_HOPPER = 8 * 2**20 + 128 * 2**10, 32 * 2**20
_HOPPER = (9, 0)
_HANDLES = 2


@dataclass(frozen=True)
class Plan:
    """One device's part of a run. Bytes; ``reserved_bytes`` is the peak with its margin; estimates are in tokens per
    second of all devices."""

    device: str
    devices: int
    precision: str
    seq_len: int
    max_steps: int
    never_reached: str | None
    global_batch: int
    batch_size: int
    accumulate: int
    checkpoint_blocks: int
    loss_rows: int
    layers: int
    parameters: int
    vocabulary: Vocabulary
    peak: Peak
    reserved_bytes: int
    limit_bytes: int | None
    fits: bool
    tokens_per_s: float | None
    compiled: bool

    @property
    def peak_bytes(self) -> int:
        """To be compared with what torch's allocator held at most."""
        return self.peak.bytes

    @property
    def parts(self) -> dict[str, int]:
        """What holds the peak."""
        return self.peak.parts

    @property
    def tokens(self) -> int:
        """That the whole run trains on."""
        return self.max_steps * self.global_batch * self.seq_len

    @property
    def seconds(self) -> float | None:
        """An estimate of all its steps, validations aside; None: the device's rates are unknown."""
        return None if self.tokens_per_s is None else self.tokens / self.tokens_per_s

    def applied(self, config: RunConfig) -> RunConfig:
        """``config`` with what the plan chose in the place of ``auto``."""
        data = config.data.model_copy(update={"batch_size": self.batch_size})
        chosen = {
            "accumulate": self.accumulate,
            "checkpoint_blocks": self.checkpoint_blocks,
            "loss_rows": self.loss_rows,
        }
        return config.model_copy(update={"data": data, "trainer": config.trainer.model_copy(update=chosen)})


@dataclass(frozen=True)
class Ground:
    """What a plan stands on."""

    facts: DeviceFacts
    devices: int
    max_steps: int
    windows: int  # of one device in a step
    vocabulary: Vocabulary
    steps: Steps
    cuts: list[Cut]
    limit: Limit

    @staticmethod
    def of(config: RunConfig) -> Ground:
        """For the device that the profile names or, where it names none, for this machine's. ConfigError: numbers
        clash, or a tokenizer's file cannot be read."""
        facts = planned_device(config.hardware)
        devices, max_steps = planned_processes(config, facts), planned_steps(config, facts)
        windows = _windows(config, global_batch_of(config, facts.kind, devices), devices)
        work, vocabulary = workload_of(config, facts)
        update, trainer = follow_update(work), config.trainer
        steps = Steps(work, build_model(config.model, work.vocab), update, _shares(config, facts, update, devices))
        open_to = (config.data.batch_size, trainer.accumulate, trainer.checkpoint_blocks, trainer.loss_rows)
        cuts = possible_cuts(windows, len(work.layers), *open_to)
        return Ground(
            facts,
            devices,
            max_steps,
            windows,
            vocabulary,
            steps,
            cuts,
            margin_of(work, _usable(config, facts, devices)),
        )

    def rough(self, config: RunConfig) -> tuple[int, float | None, float] | None:
        """Bytes with the margin of the smallest cut; tokens per second and relative time with about the largest
        micro-batch that fits; None: nothing does."""
        found = roughly(self.steps, self.cuts, self.limit)
        if found is None:
            return None
        cut, least = found
        return self.limit.reserved(least), self._speed(config, cut), self.steps.time(cut)

    def _speed(self, config: RunConfig, cut: Cut) -> float | None:
        """Tokens per second of all devices."""
        work = self.steps.work
        speed = tokens_per_second(self.steps.model, work, cut, self.steps.update, rates_of(config, work.precision))
        return None if speed is None else speed * self.devices

    def plan(self, config: RunConfig) -> Plan:
        steps, work = self.steps, self.steps.work
        cut, peak, fits = choose(steps, self.cuts, self.limit)
        return Plan(
            device=self.facts.name,
            devices=self.devices,
            precision=work.precision,
            seq_len=work.seq_len,
            max_steps=self.max_steps,
            never_reached=never_reached(config, self.max_steps),
            global_batch=self.windows * self.devices,
            batch_size=cut.batch_size,
            accumulate=cut.accumulate,
            checkpoint_blocks=cut.checkpoint_blocks,
            loss_rows=cut.rows,
            layers=len(work.layers),
            parameters=parameters(steps.model),
            vocabulary=self.vocabulary,
            peak=peak,
            reserved_bytes=self.limit.reserved(peak.bytes),
            limit_bytes=self.limit.bytes,
            fits=fits,
            tokens_per_s=self._speed(config, cut),
            compiled=config.trainer.compile,
        )


def plan_run(config: RunConfig) -> Plan:
    """The plan of ``config``; one that does not fit is returned with ``fits`` False. ConfigError as of
    ``Ground.of``."""
    return Ground.of(config).plan(config)


def plan_inference(config: RunConfig) -> Inference:
    """What the model needs to generate on the planned device, by context."""
    work, _ = workload_of(config, planned_device(config.hardware))
    return inference_of(work, rates_of(config, work.precision))


def step_peak(config: RunConfig, cut: Cut) -> Peak:
    """The peak of a step of ``config`` on one device that is cut so."""
    facts = planned_device(config.hardware)
    work, _ = workload_of(config, facts)
    update = follow_update(work)
    return Steps(work, build_model(config.model, work.vocab), update, _shares(config, facts, update, 1)).peak(cut)


def _windows(config: RunConfig, global_batch: int, devices: int) -> int:
    """Of one device in a step. ConfigError: they cannot be cut as the user says."""
    fixed = {"data.batch_size": config.data.batch_size, "trainer.accumulate": config.trainer.accumulate}
    known = {name: number for name, number in fixed.items() if isinstance(number, int)}
    product, all_known = math.prod(known.values()) * devices, len(known) == len(fixed)
    if global_batch % product or (all_known and product != global_batch):
        terms = " x ".join(f"{name} ({number})" for name, number in (*known.items(), ("devices", devices)))
        relation = "is not" if all_known else "is not a multiple of"
        remedy = "leave one of them auto" if all_known else f"take a multiple of {product}, or data.global_batch=auto"
        raise ConfigError(f"data.global_batch = {global_batch}: {relation} {terms}; {remedy}")
    return global_batch // devices


def workload_of(config: RunConfig, facts: DeviceFacts) -> tuple[Workload, Vocabulary]:
    """What one device has to do, and the vocabulary that it is planned with."""
    vocabulary = planned_vocabulary(config)
    documents = config.data.packing and config.data.isolate
    work = Workload(
        config.model, config.optim, vocabulary.ids, config.data.seq_len, precision_of(config, facts), facts.kind == CUDA, documents
    )
    return work, vocabulary


def _capability(facts: DeviceFacts) -> tuple[int, int] | None:
    if facts.kind != CUDA:
        return None
    major, _, minor = (facts.capability or "8.0").partition(".")
    return int(major), int(minor)


def _shares(config: RunConfig, facts: DeviceFacts, update: Update, devices: int) -> Shares:
    """DDP keeps a second copy of the gradients in its buckets. FSDP2 cuts everything over the devices and gathers the
    embedding, norm and head for the whole step and two layers at a time, with their gradients."""
    capability = _capability(facts)
    handles = 0 if capability is None else _HANDLES * (_CUBLAS_HOPPER if capability >= _HOPPER else _CUBLAS)
    sharded = config.trainer.strategy == "fsdp2" and devices > 1
    exchange = 0
    if sharded:
        exchange = update.outside + 4 * update.largest_block
    elif devices > 1:
        exchange = update.gradients
    return Shares(devices if sharded else 1, exchange, handles, averaged=config.callbacks.ema.decay is not None)


def margin_of(work: Workload, usable: int | None = None) -> Limit:
    """What the allocator of a device takes besides the peak, with ``usable`` bytes in all."""
    share, spare = _CPU_NARROW_MARGIN if work.precision in _NARROW else _CPU_MARGIN
    if work.gpu:
        share, spare = _CUDA_MARGIN
    return Limit(usable, share, spare * 2**20)


def _usable(config: RunConfig, facts: DeviceFacts, devices: int) -> int | None:
    usable = usable_bytes(facts, config.hardware.memory_gb)
    return (
        usable if usable is None or facts.kind == CUDA else usable // devices
    )  # a machine's processes share its memory


def rates_of(config: RunConfig, precision: str) -> Rates:
    """Of the planned device in this precision: a profile's, or, of this machine's CPU, which no profile knows, a
    measured one."""
    peaks, bandwidth = planned_rates(config.hardware)
    name = peak_name(precision, tf32_allowed())
    peak = None if name is None else peak_of(peaks, name)
    if peak is None and name in ("fp32", "tf32") and planned_device(config.hardware).kind == CPU:
        peak = cpu_tflops()
    return Rates(None if peak is None else peak * 1e12, None if bandwidth is None else bandwidth * 1e9)
