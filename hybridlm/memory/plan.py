"""The plan of a run: how its step is split up, how much memory that needs, and whether it fits. Reads no data and
initialises no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.config.steps import never_reached
from hybridlm.machine.description import global_batch_of, planned_processes, planned_steps, precision_of
from hybridlm.machine.device import CPU, CUDA, DeviceFacts, usable_bytes
from hybridlm.machine.profiles import cpu_tflops, peak_name, peak_of, planned_device, planned_rates, tf32_allowed
from hybridlm.memory.optimizer import OptimizerMemory, trace_optimizer
from hybridlm.memory.search import MemoryLimit, StepModel, choose, possible_settings, roughly
from hybridlm.memory.speed import Inference, Rates, inference_of, tokens_per_second
from hybridlm.memory.timeline import DeviceShare, Peak, StepSettings
from hybridlm.memory.vocabulary import Vocabulary, planned_vocabulary
from hybridlm.memory.workload import Workload
from hybridlm.model.build import build_model
from hybridlm.model.count import parameters

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.model.lm import HybridLM

# What an allocator reserves beyond the peak, a share and MiB. On CUDA not measured yet. On a CPU glibc keeps freed
# blocks below 32 MiB (benchmarks/results/plan_memory.md), and oneDNN compiles a kernel for each shape of a 16-bit
# product: 0.2 to 0.5 GiB were measured.
_CUDA_MARGIN, _CPU_MARGIN, _CPU_NARROW_MARGIN = (0.12, 128), (0.25, 64), (0.25, 640)
_NARROW = ("bf16-mixed", "bf16-true")
# torch's default for each handle; the forward's thread and the backward's have one each
# (aten/src/ATen/cuda/CublasHandlePool.cpp).
_CUBLAS, _CUBLAS_HOPPER = 8 * 2**20 + 128 * 2**10, 32 * 2**20
_HOPPER = 9.0  # compute capability
_HANDLES = 2


@dataclass(frozen=True)
class Plan:
    """The plan of one process. ``reserved_bytes``: the peak with its margin; ``tokens_per_s``: an estimate for all
    devices together."""

    device: str
    devices: int
    precision: str
    seq_len: int
    sequences: int
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
    def tokens(self) -> int:
        """Of the whole run."""
        return self.max_steps * self.global_batch * self.sequences * self.seq_len

    @property
    def unit(self) -> str:
        """What a batch is counted in."""
        return "sequences" if self.sequences == 1 else "pairs of sequences"

    @property
    def seconds(self) -> float | None:
        """Estimated time of all steps, without validation; None: the device's peaks are unknown."""
        return None if self.tokens_per_s is None else self.tokens / self.tokens_per_s

    def applied(self, config: RunConfig) -> RunConfig:
        """``config`` with ``auto`` replaced by the plan's settings."""
        data = config.data.model_copy(update={"batch_size": self.batch_size})
        chosen = {
            "accumulate": self.accumulate,
            "checkpoint_blocks": self.checkpoint_blocks,
            "loss_rows": self.loss_rows,
        }
        return config.model_copy(update={"data": data, "trainer": config.trainer.model_copy(update=chosen)})


class Planner:
    """The device and the options that a plan chooses from."""

    def __init__(self, config: RunConfig, built: HybridLM | None = None) -> None:
        """For the profile's device or, if it names none, this machine's. built: the model on "meta", used if its
        vocabulary is the planned one. Raises ConfigError where numbers contradict each other or a tokenizer file
        cannot be read."""
        self._config = config
        self._facts = facts = planned_device(config.hardware)
        self._devices, self._max_steps = planned_processes(config, facts), planned_steps(config, facts)
        self._windows = global_batch_of(config, facts.kind, self._devices) // self._devices
        work, self._vocabulary = workload_of(config, facts)
        update, trainer = trace_optimizer(work), config.trainer
        same = built is not None and built.config is config.model and built.vocab_size == work.vocab
        model = built if built is not None and same else build_model(config.model, work.vocab)
        self.steps = StepModel(work, model, update, _shares(config, facts, update, self._devices))
        open_to = (config.data.batch_size, trainer.accumulate, trainer.checkpoint_blocks, trainer.loss_rows)
        self._options = possible_settings(self._windows, len(work.layers), *open_to)
        usable = usable_bytes(facts, config.hardware.memory_gb)
        if usable is not None and facts.kind == CPU:
            usable //= self._devices  # the processes share the machine's memory
        on_cpu = _CPU_NARROW_MARGIN if work.precision in _NARROW else _CPU_MARGIN
        margin, spare = _CUDA_MARGIN if work.gpu else on_cpu
        self.limit = MemoryLimit(usable, margin, spare * 2**20)

    def rough(self) -> tuple[int, float | None, float] | None:
        """Bytes of the smallest option, with the margin; tokens per second and relative time with about the largest
        micro-batch that fits. None: no option fits."""
        found = roughly(self.steps, self._options, self.limit)
        if found is None:
            return None
        step, least = found
        return self.limit.reserved(least), self._speed(step), self.steps.time(step)

    def _speed(self, step: StepSettings) -> float | None:
        """Tokens per second of all devices."""
        work = self.steps.work
        rates = rates_of(self._config, work.precision)
        speed = tokens_per_second(self.steps.model, work, step, self.steps.update, rates)
        return None if speed is None else speed * self._devices

    def plan(self) -> Plan:
        steps, work, config = self.steps, self.steps.work, self._config
        step, peak, fits = choose(steps, self._options, self.limit)
        return Plan(
            device=self._facts.name,
            devices=self._devices,
            precision=work.precision,
            seq_len=work.seq_len,
            sequences=work.sequences,
            max_steps=self._max_steps,
            never_reached=never_reached(config, self._max_steps),
            global_batch=self._windows * self._devices,
            batch_size=step.batch_size,
            accumulate=step.accumulate,
            checkpoint_blocks=step.checkpoint_blocks,
            loss_rows=step.rows,
            layers=len(work.layers),
            parameters=parameters(steps.model),
            vocabulary=self._vocabulary,
            peak=peak,
            reserved_bytes=self.limit.reserved(peak.bytes),
            limit_bytes=self.limit.bytes,
            fits=fits,
            tokens_per_s=self._speed(step),
            compiled=config.trainer.compile,
        )


def plan_run(config: RunConfig) -> Plan:
    """The plan of ``config``, with ``fits`` False if nothing fits. Raises as ``Planner``."""
    return Planner(config).plan()


def plan_inference(config: RunConfig, model: HybridLM | None = None) -> Inference:
    """What the model needs to generate text on the planned device, by context length. model: on "meta"; None: built
    here."""
    work, _ = workload_of(config, planned_device(config.hardware))
    return inference_of(work, rates_of(config, work.precision), model or build_model(work.model, work.vocab))


def workload_of(config: RunConfig, facts: DeviceFacts) -> tuple[Workload, Vocabulary]:
    """The work of one process, and the vocabulary that it is planned with."""
    vocabulary = planned_vocabulary(config)
    documents = config.data.packing and config.data.isolate
    work = Workload(
        config.model,
        config.optim,
        vocabulary.ids,
        config.data.seq_len,
        precision_of(config, facts),
        facts.kind == CUDA,
        documents,
        config.data.sequences,
    )
    return work, vocabulary


def _shares(config: RunConfig, facts: DeviceFacts, update: OptimizerMemory, devices: int) -> DeviceShare:
    """DDP keeps a second copy of the gradients in its buckets. FSDP2 shards everything and gathers embedding,
    norm and head for the whole step and two layers at a time, with their gradients."""
    libraries = 0
    if facts.kind == CUDA:
        libraries = _HANDLES * (_CUBLAS_HOPPER if float(facts.capability or 0) >= _HOPPER else _CUBLAS)
    sharded = config.trainer.strategy == "fsdp2" and devices > 1
    exchange = 0
    if sharded:
        exchange = update.outside + 4 * update.largest_block
    elif devices > 1:
        exchange = update.gradients
    return DeviceShare(devices if sharded else 1, exchange, libraries, averaged=config.callbacks.ema.decay is not None)


def rates_of(config: RunConfig, precision: str) -> Rates:
    """Peaks of the planned device in this precision: the profile's or, for this machine's CPU, measured."""
    peaks, bandwidth = planned_rates(config.hardware)
    name = peak_name(precision, tf32_allowed())
    peak = None if name is None else peak_of(peaks, name)
    if peak is None and name in ("fp32", "tf32") and planned_device(config.hardware).kind == CPU:
        peak = cpu_tflops()
    return Rates(None if peak is None else peak * 1e12, None if bandwidth is None else bandwidth * 1e9)
