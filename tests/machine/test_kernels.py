"""Which kernels a run uses, on described cards: what falls back says why in one line, what is asked for and not there
is refused."""

from __future__ import annotations

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.config.kernels import KernelsConfig
from hybridlm.config.overrides import repair
from hybridlm.errors import UserError
from hybridlm.machine.description import resolve_machine
from hybridlm.machine.device import DeviceFacts, cpu_facts
from hybridlm.machine.kernels import KernelWork, choose_kernels, chosen, refuse_missing, summary, verdicts
from hybridlm.ops.kernels.choice import ALL_TORCH, CUDA, KernelChoice
from hybridlm.ops.kernels.probe import Probe

HERE = torch.device("cpu")  # where nothing is run: the probes are given
H100 = DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 79.0, "9.0", 227, True)
RTX3070 = DeviceFacts("cuda", "NVIDIA GeForce RTX 3070", 8.0, "8.6", 99, True)


def prober(**missing: str):
    """Every kernel works but those of the packages named."""
    asked = []
    packages = {"causal-conv1d": "conv", "linear cross-entropy": "liger"}

    def probe(name, device, dtype, sizes):
        asked.append(name)
        reason = missing.get(packages.get(name, "mamba"))
        return Probe(name, reason is None, reason, 0.0, None)

    probe.asked = asked
    return probe


def work(pattern: str, *settings: str, dtype=torch.bfloat16, documents=False, scale=1.0) -> KernelWork:
    model = compose_config([f"model.pattern={pattern}", "model.n_layers=null", *settings]).model
    return KernelWork(model.layers, dtype, documents, scale)


def reasons(job: KernelWork, card=H100, settings=None, probe=None) -> dict[str, str | None]:
    found = verdicts(job, settings or KernelsConfig(), card, HERE, probe or prober())
    return {verdict.kernel: verdict.reason for verdict in found}


def test_all_that_works_is_used():
    job = work("M1 M2 M3 X T", "model.variants={X: {mixer: mamba3, mimo_rank: 4}}", "model.mamba3.d_state=128")
    probe = prober()
    found = verdicts(job, KernelsConfig(), H100, HERE, probe)
    assert chosen(found, job.dtype, HERE, probe) == KernelChoice(CUDA, CUDA, CUDA, CUDA, CUDA, CUDA, CUDA)
    assert summary(found) == "causal-conv1d, selective scan, SSD scan, Mamba-3 SISO, Mamba-3 MIMO, linear cross-entropy"
    assert len(probe.asked) == len(set(probe.asked)) == 7


def test_only_kernels_that_layers_could_use_are_run():
    probe = prober()
    assert reasons(work("T"), probe=probe) == {"linear cross-entropy": None}
    assert probe.asked == ["linear cross-entropy"]


def test_what_is_missing_falls_back_in_one_line():
    job = work("M2 T")
    probe = prober(mamba="mamba-ssm is not installed")
    found = verdicts(job, KernelsConfig(), H100, HERE, probe)
    assert summary(found) == "causal-conv1d, linear cross-entropy (torch for SSD scan: mamba-ssm is not installed)"
    assert chosen(found, job.dtype, HERE, probe) == KernelChoice(conv=CUDA, loss=CUDA)
    refuse_missing(found, KernelsConfig())


def test_a_layer_in_one_kernel_needs_both_its_parts():
    job = work("M2")
    probe = prober(conv="causal-conv1d is not installed")
    assert chosen(verdicts(job, KernelsConfig(), H100, HERE, probe), job.dtype, HERE, probe) == KernelChoice(
        mamba2=CUDA, loss=CUDA
    )
    settings = KernelsConfig(conv="torch")
    found = verdicts(job, settings, H100, HERE, prober())
    assert chosen(found, job.dtype, HERE, prober()).mamba2_layer != CUDA
    assert found[0].reason == "kernels.conv = torch"


@pytest.mark.parametrize(
    ("job", "card", "kernel", "reason"),
    [
        (work("M1", documents=True), H100, "selective scan", "it cannot separate documents (data.isolate)"),
        (work("M2", documents=True), H100, "SSD scan", None),
        (
            work("M2", dtype=torch.float32),
            H100,
            "SSD scan",
            "it rounds float32 products to TF32 (10 bits); it is for bfloat16 and float16",
        ),
        (work("M2", "model.mamba2.d_conv=6"), H100, "causal-conv1d", "it supports a width of 2 to 4, not 6"),
        (work("M3", dtype=torch.float16), H100, "Mamba-3 SISO", "it computes in bfloat16, not float16"),
        (work("M3", "model.mamba3.trapezoidal=false"), H100, "Mamba-3 SISO", "it only has the trapezoidal recurrence"),
        (
            work("M3", "model.mamba3.mimo_rank=4", "model.mamba3.d_state=128"),
            RTX3070,
            "Mamba-3 MIMO",
            "its backward needs 204 KiB of shared memory per block, the card has 99",
        ),
        (work("M3", "model.mamba3.mimo_rank=4", "model.mamba3.d_state=128"), H100, "Mamba-3 MIMO", None),
        (work("M2"), cpu_facts(), "SSD scan", "needs a CUDA device"),
        (work("T", scale=0.5), H100, "linear cross-entropy", "it does not support logit_scale (0.5)"),
    ],
)
def test_what_a_kernel_cannot_honour_is_not_asked_of_it(job, card, kernel, reason):
    probe = prober()
    assert reasons(job, card, probe=probe)[kernel] == reason
    assert (kernel in probe.asked) == (reason is None)


def test_a_kernel_is_run_at_the_widths_of_every_layer():
    """It is compiled for them: what works at small ones may ask a card for more than it has at others."""
    asked = []

    def probe(name, device, dtype, sizes):
        asked.append((name, sizes and (sizes.head_dim, sizes.d_state)))
        narrow = sizes is None or sizes.head_dim < 128
        return Probe(name, narrow, None if narrow else "out of resource: shared memory", 0.0, None)

    wide = "model.variants={X: {mixer: mamba2, head_dim: 128, d_state: 128}}"
    found = verdicts(work("M2 X", wide, "model.d_model=256"), KernelsConfig(), H100, HERE, probe)
    assert {verdict.kernel: verdict.reason for verdict in found}["SSD scan"] == "out of resource: shared memory"
    assert [sizes for name, sizes in asked if name == "SSD scan"] == [(64, 64), (128, 128)]
    assert chosen(found, torch.bfloat16, HERE, probe) == KernelChoice(conv=CUDA, loss=CUDA)
    asked.clear()
    found = verdicts(work("M2"), KernelsConfig(), H100, HERE, probe)
    assert chosen(found, torch.bfloat16, HERE, probe).mamba2_layer == CUDA
    assert ("Mamba-2 layer", (64, 64)) in asked


def test_what_is_asked_for_and_missing_is_refused():
    probe = prober(
        mamba="mamba-ssm is not installed", conv="causal-conv1d fails when it runs (RuntimeError: no kernel image)"
    )
    job, settings = work("M2 M1", documents=True), KernelsConfig(default="cuda", loss="torch")
    with pytest.raises(UserError) as error:
        refuse_missing(verdicts(job, settings, H100, HERE, probe), settings)
    for problem, parts in zip(
        error.value.problems,
        [
            ("kernels.default = 'cuda'", "causal-conv1d", "(RuntimeError: no kernel image)", "hybridlm doctor"),
            ("kernels.default = 'cuda'", "selective scan", "data.isolate", "kernels.mamba1=auto"),
            ("kernels.default = 'cuda'", "SSD scan", "mamba-ssm is not installed", "kernels.default=auto"),
        ],
        strict=True,
    ):
        assert all(part in problem for part in parts)
    settings = KernelsConfig(mamba1="cuda")
    with pytest.raises(UserError, match=r"^kernels\.mamba1 = 'cuda': .*; use kernels\.mamba1=auto$"):
        refuse_missing(verdicts(job, settings, H100, HERE, probe), settings)


def test_a_cpu_run_takes_torch_without_a_word():
    said = []
    config = compose_config(["hardware=cpu"])
    assert choose_kernels(config, resolve_machine(config), said.append) == ALL_TORCH
    assert said == []


def test_the_short_form():
    assert repair(["kernels=cuda", "kernels.mamba2=torch"], {"model"}) == [
        "++kernels.default=cuda",
        "++kernels.mamba2=torch",
    ]
    assert compose_config(["kernels=torch"]).kernels == KernelsConfig(default="torch")
    assert compose_config(["kernels={default: torch, loss: auto}"]).kernels == KernelsConfig(
        default="torch", loss="auto"
    )
    with pytest.raises(UserError, match=r"^kernels\.default = 'gpu': not one of auto, torch, cuda$"):
        compose_config(["kernels=gpu"])
    with pytest.raises(UserError, match=r"kernels\.mamba = 'torch': unknown key; did you mean kernels\.mamba"):
        compose_config(["kernels.mamba=torch"])


def test_a_forced_kernel_is_refused_before_data_is_prepared(tiny, capfd, tmp_path):
    with pytest.raises(SystemExit) as end:
        main([*tiny, "kernels.mamba2=cuda", "data.path=/nowhere/*.txt", f"hydra.run.dir={tmp_path}/run"])
    assert end.value.code == 2
    reason = "no compiled kernel for mamba2 (SSD scan): needs a CUDA device"
    assert capfd.readouterr().err == f"config error: kernels.mamba2 = 'cuda': {reason}; use kernels.mamba2=auto\n"
