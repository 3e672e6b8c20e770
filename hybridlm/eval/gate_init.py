"""The gate's row about fresh weights: every parameter is drawn, and from the distribution that its kind of layer asks
for.

The expectations are written here a second time, from the papers and mamba_ssm's parameter names, not asked of the
layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.config.layers import LayerSpec
from hybridlm.config.model import InitConfig
from hybridlm.eval.gate_subject import Plan, Worst, build_layers
from hybridlm.machine.device import CPU
from hybridlm.model.block import Block
from hybridlm.model.lm import HybridLM

LIMIT = 1.0  # errors are in units of what chance allows
_SIGMAS = 6.0  # a deviation of a mean or a standard deviation that chance does not give
_CHANCE = 1e-7  # of a Kolmogorov-Smirnov distance beyond its bound
_SAMPLES, _MOST_DRAWN = 256, 2e7  # steps and decays are drawn again until there are so many, or so many numbers in all
_TOO_WIDE = 1.5e8  # parameters from which layers are drawn narrower
_STEP_FLOOR = 1e-4  # smallest initial step size, of every Mamba
_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")
_ONES = ("D", "B_bias", "C_bias", "mimo_z")
_SHARES = ("mimo_x", "mimo_o")  # 1 / rank


def initial_weights(layers: Sequence[LayerSpec], full: HybridLM, seed: int) -> Worst:
    """The distinct layers of ``full``, with its depth, filled with NaN and drawn."""
    worst = Worst()
    model = build_layers(layers, full.config, full)
    if sum(parameter.numel() for parameter in model.parameters()) > _TOO_WIDE:
        narrow = Plan(0, 0, width=min(full.config.d_model, 256))
        layers = [narrow.apply(spec) for spec in layers]
        model = build_layers(layers, full.config, full)
    model = model.to_empty(device=CPU)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
        model.reset_parameters()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            worst.see(0.0 if bool(tensor.isfinite().all()) else torch.inf, f"{name} is not drawn, or not finite")
        _outside_blocks(model, worst)
        for i, (spec, block) in enumerate(zip(layers, model.blocks, strict=True)):
            _block(f"blocks.{i}", spec, cast(Block, block), full, worst)
    return worst


def _outside_blocks(model: HybridLM, worst: Worst) -> None:
    init = model.config.init
    _normal(model.embedding.weight, init.embedding_std, "embedding", worst)
    _constant(model.norm.weight, 1.0, "the last norm", worst)
    if model.lm_head is not None:
        std = init.head_std or init.std or model.config.d_model**-0.5
        _normal(model.lm_head.weight, std, "lm_head", worst)


def _block(where: str, spec: LayerSpec, block: Block, full: HybridLM, worst: Worst) -> None:
    params: Any = spec.params
    declared = block.param_specs()
    samples: dict[str, list[Tensor]] = {}
    for name, parameter in block.named_parameters():
        place, last = f"{where}.{name}", name.rpartition(".")[2]
        owner = name.split(".")[-2] if "." in name else ""
        if "norm" in owner:
            _constant(parameter, 1.0, place, worst)
        elif owner == "conv1d":
            _uniform(parameter, params.d_conv**-0.5, place, worst)
        elif name == "mixer.dt_proj.weight":
            _uniform(parameter, params.dt_rank**-0.5, place, worst)
        elif last == "dt_bias" or name == "mixer.dt_proj.bias" or (last == "A_log" and parameter.dim() == 1):
            samples[name] = [parameter.detach().clone()]
        elif last == "A_log":
            expected = torch.arange(1, params.d_state + 1, dtype=torch.float64).log()
            worst.see(float((parameter.double() - expected).abs().max()) / 1e-5, f"{place}: not log 1..N")
        elif last in _ONES:
            _constant(parameter, 1.0, place, worst)
        elif last in _SHARES:
            _constant(parameter, 1.0 / params.rank, place, worst)
        elif last == "bias":
            _constant(parameter, 0.0, place, worst)
        elif declared[name].role == "matrix" or name == "ffn.gate.weight":
            _normal(
                parameter,
                _std(parameter, full.config.init, full.init.n_layers, residual=name.endswith(_RESIDUAL)),
                place,
                worst,
            )
        else:
            worst.see(torch.inf, f"{place}: the gate knows no distribution for it")
    for name, buffer in block.named_buffers():
        _constant(buffer, 0.0, f"{where}.{name}", worst)
    _steps_and_decays(where, params, block, full, samples, worst)


def _std(parameter: Tensor, init: InitConfig, depth: int, *, residual: bool) -> float:
    std = parameter.shape[-1] ** -0.5 if init.std is None else init.std
    if not residual or init.residual == "none":
        return std
    return 0.0 if init.residual == "zero" else std / math.sqrt(2 * depth)


def _steps_and_decays(
    where: str, params: Any, block: Block, full: HybridLM, samples: dict[str, list[Tensor]], worst: Worst
) -> None:
    """softplus(bias) is log-uniform on dt_range and at least the floor; -A of Mamba-2 uniform on a_range."""
    if not samples:
        return
    parameters = dict(block.named_parameters())
    drawn, size = 0, sum(parameter.numel() for parameter in block.mixer.parameters())
    while min(len(parts) * parts[0].numel() for parts in samples.values()) < _SAMPLES and drawn < _MOST_DRAWN:
        block.mixer.reset_parameters(full.init)
        drawn += size
        for name, parts in samples.items():
            parts.append(parameters[name].detach().clone())
    for name, parts in samples.items():
        values = torch.cat([part.flatten() for part in parts]).double()
        if name.endswith("A_log"):
            _distribution(values.exp(), params.a_range, 0.0, False, f"{where}.{name}", worst)
        else:
            _distribution(F.softplus(values), params.dt_range, _STEP_FLOOR, True, f"{where}.{name}", worst)


def _distribution(
    values: Tensor, span: tuple[float, float], floor: float, logarithmic: bool, where: str, worst: Worst
) -> None:
    """(Log-)uniform on ``span``, raised to ``floor``, as far as so many samples tell (Dvoretzky-Kiefer-Wolfowitz
    bound)."""
    low, high = (max(edge, floor) for edge in span)
    slack = 1e-4  # a float32's way through a logarithm and back
    outside = max(float((low / values).max()), float((values / high).max())) - 1.0
    worst.see(outside / slack, f"{where}: outside {low:g} to {high:g}")
    if high <= low * (1 + slack):
        return
    values = values.sort().values.clamp(low, high)
    count = len(values)
    if logarithmic:
        expected = (values.log() - math.log(span[0])) / (math.log(span[1]) - math.log(span[0]))
    else:
        expected = (values - span[0]) / (span[1] - span[0])
    upper = torch.arange(1, count + 1, dtype=torch.float64) / count
    free = values > low * (1 + slack)  # what was raised to the lower edge is a step in the distribution
    distance = torch.where(
        free, torch.maximum((upper - expected).abs(), (upper - 1 / count - expected).abs()), 0.0
    ).max()
    bound = math.sqrt(math.log(2 / _CHANCE) / (2 * count))
    worst.see(float(distance) / bound, f"{where}: distribution of {count} samples")


def _constant(parameter: Tensor, value: float, where: str, worst: Worst) -> None:
    worst.see(float((parameter.double() - value).abs().max()) / 1e-6, f"{where}: not {value:g}")


def _normal(parameter: Tensor, std: float, where: str, worst: Worst) -> None:
    """Mean and standard deviation of as many independent normal numbers, and none too far out."""
    if std == 0.0:
        _constant(parameter, 0.0, where, worst)
        return
    count = parameter.numel()
    values = parameter.double()
    worst.see(abs(float(values.mean())) / (_SIGMAS * std / math.sqrt(count)), f"{where}: mean")
    measured = float(values.square().mean().sqrt())
    worst.see(
        abs(measured / std - 1) / max(1e-6, _SIGMAS / math.sqrt(2 * count)),
        f"{where}: deviation {measured:.4g}, expected {std:.4g}",
    )
    worst.see(
        float(values.abs().max()) / ((_SIGMAS + 2) * std), f"{where}: a number beyond {_SIGMAS + 2:.0f} deviations"
    )


def _uniform(parameter: Tensor, bound: float, where: str, worst: Worst) -> None:
    """Uniform on (-bound, bound): none outside, and the deviation of as many independent numbers."""
    count, values = parameter.numel(), parameter.double()
    worst.see((float(values.abs().max()) / bound - 1.0) / 1e-6, f"{where}: outside +-{bound:.4g}")
    worst.see(abs(float(values.mean())) / (_SIGMAS * bound / math.sqrt(3 * count)), f"{where}: mean")
    measured = (
        float(values.square().mean()) * 3 / bound**2
    )  # a mean of numbers in [0, 3] with expectation 1 and deviation sqrt(4 / 5)
    worst.see(abs(measured - 1) / (_SIGMAS * math.sqrt(0.8 / count)), f"{where}: variance")
