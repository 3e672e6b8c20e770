"""The gate passes what is right, and each of its rows fails a layer that is broken in the way the row is there for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridlm.cli.compose import compose_config
from hybridlm.eval import gate as module
from hybridlm.eval.gate_subject import Subject, compare_gradients, relative
from hybridlm.layers.attention import Attention
from hybridlm.layers.mamba1 import Mamba1
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mamba3 import Mamba3
from hybridlm.layers.mla import MLA
from hybridlm.layers.mlp import MLP
from hybridlm.layers.moe import MoE

TINY = [
    "model.d_model=16",
    "model.n_layers=null",
    "model.attention.n_heads=2",
    "model.mamba1.chunk=4",
    "model.mamba1.d_state=3",
    "model.mamba2.head_dim=8",
    "model.mamba2.d_state=4",
    "model.mamba2.chunk=5",
    "model.mamba3.head_dim=8",
    "model.mamba3.d_state=4",
    "model.mamba3.chunk=5",
    "model.mla.n_heads=2",
    "model.mla.qk_nope_head_dim=4",
    "model.mla.qk_rope_head_dim=2",
    "model.mla.v_head_dim=4",
    "model.mlp.d_ff=24",
    "model.moe.n_experts=4",
    "model.moe.d_expert=8",
]


def gate(pattern: str, *overrides: str) -> list[module.Row]:
    return list(module.gate(Subject.of(compose_config([*TINY, f"model.pattern={pattern}", *overrides]))))


def rows(pattern: str, *overrides: str):
    return {row.name: row for row in gate(pattern, *overrides)}


def failing(pattern: str, *overrides: str) -> set[str]:
    return {name for name, row in rows(pattern, *overrides).items() if row.status == "fail"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["M:mlp T M2"],
        ["M1 M1:mlp", "model.mamba1.bias=true"],
        ["M3"],
        ["L M3:none", "model.mla.q_lora_rank=5"],
        ["T:moe L:moe"],
        ["M2:moe", "model.moe.router=sigmoid", "model.moe.n_shared_experts=1", "model.moe.activation=relu2"],
        ["STT:none", "model.variants={S: {mixer: attention, window: 4, n_kv_heads: 1, rope: true, qk_norm: true}}"],
        ["T", "model.attention.window=1"],
        [
            "XY",
            "model.variants={X: {mixer: mamba3, mimo_rank: 2, outproj_norm: true}, Y: {mixer: mamba3, use_conv: true}}",
        ],
        [
            "MT",
            "model.tie_embeddings=false",
            "model.logit_softcap=15",
            "model.residual_scale=0.3",
            "model.init.residual=zero",
        ],
        [
            "M2 M1",
            "model.mamba2.dt_range=[0.00001,0.1]",
            "model.mamba1.dt_range=[0.01,0.01]",
            "model.mamba2.dt_limit=[0.1,0.5]",
        ],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_what_is_right_passes(arguments):
    found = rows(*arguments)
    assert {name: (row.error, row.note) for name, row in found.items() if row.status == "fail"} == {}
    assert found["experts"].status == ("pass" if "moe" in arguments[0] else "n/a")
    assert all(math.isfinite(row.error) and row.error <= row.limit for row in found.values())


def test_numbers_follow_from_the_seed():
    first, again = ([(row.error, row.status) for row in gate("M:mlp T")] for _ in range(2))
    assert first == again
    assert first != [(row.error, row.status) for row in gate("M:mlp T", "seed=1")]


# --- layers that are broken in one way each ---


class LooksAhead(Attention):
    def forward(self, x, seq, cache=None):
        y = super().forward(x, seq, cache)
        return y + 1e-3 * x.roll(-1, 1) if x.shape[1] > 1 else y


class ForgetsTheWindow(Mamba2):
    """Its convolution starts anew in every call."""

    def forward(self, x, seq, cache=None):
        if cache is not None:
            cache["conv"].zero_()
        return super().forward(x, seq, cache)


class ForgetsTheWindowInDecode(Mamba2):
    def forward(self, x, seq, cache=None):
        if cache is not None and x.shape[1] == 1:
            cache["conv"].zero_()
        return super().forward(x, seq, cache)


class LosesTheStateInPieces(Mamba2):
    """Keeps its state in decode, but not when a piece of several tokens comes after another."""

    def forward(self, x, seq, cache=None):
        if cache is not None and x.shape[1] > 1:
            cache["ssm"].zero_()
        return super().forward(x, seq, cache)


class CountsFromZero(Attention):
    """Rotates each call's tokens as if nothing stood before them."""

    def forward(self, x, seq, cache=None):
        moved = type(seq)(seq.positions - seq.past, seq.past, seq.starts, seq.valid, seq.held, seq.doc_ids)
        return super().forward(x, moved, cache)


class ReadsPadding(Mamba2):
    def forward(self, x, seq, cache=None):
        return super().forward(x, type(seq)(seq.positions, seq.past, seq.starts, None, seq.held, seq.doc_ids), cache)


class IgnoresStarts(Mamba2):
    def forward(self, x, seq, cache=None):
        return super().forward(x, type(seq)(seq.positions, seq.past, None, seq.valid, seq.held, seq.doc_ids), cache)


class IgnoresDocuments(Attention):
    def forward(self, x, seq, cache=None):
        return super().forward(x, type(seq)(seq.positions, seq.past, seq.starts, seq.valid, seq.held, None), cache)


class Counts(MLP):
    """Remembers how often it was called, so that a second computation is another one."""

    calls = 0

    def forward(self, x, valid=None):
        self.calls += 1
        return super().forward(x * (1 + 1e-5 * self.calls))[0], None


class LeavesOneOut(Mamba2):
    def reset_parameters(self, init):
        kept = self.D.detach().clone()
        super().reset_parameters(init)
        with torch.no_grad():
            self.D.copy_(kept)


class ForgetsAParameter(MLP):
    def param_specs(self):
        return {name: spec for name, spec in super().param_specs().items() if "up" not in name}


class WrongRows(Mamba2):
    def __init__(self, spec):
        super().__init__(spec)
        self.row_blocks = (*self.row_blocks[:-1], self.row_blocks[-1] + 1)

    def forward(self, x, seq, cache=None):
        raise NotImplementedError


class SmallState(Mamba2):
    def state_bytes(self, context, batch, dtype):
        return super().state_bytes(context, batch, dtype) - 4


class WindowOfOneMore(Attention):
    def state_bytes(self, context, batch, dtype):
        column = 2 * batch * self.spec.n_kv_heads * self.spec.head_dim * dtype.itemsize
        return super().state_bytes(context, batch, dtype) + (column if context >= self.spec.window else 0)


class HalfOfTheProducts(Mamba2):
    """A multiply-add counted as one."""

    def flops(self, context, phase):
        return super().flops(context, phase) / 2


class OfTheWholeText(MLA):
    def flops(self, context, phase):
        return super().flops(context, phase) * (1 if phase == "decode" else context)


class CheapDecode(MLA):
    def flops(self, context, phase):
        return super().flops(context, phase) / (3 if phase == "decode" else 1)


class OnePass(MLP):
    def flops(self, phase):
        return super().flops("prefill")


class Detached(MLP):
    def forward(self, x, valid=None):
        return F.linear(super().forward(x)[0], self.down_proj.weight.new_ones(x.shape[-1], x.shape[-1])).detach(), None


class Unused(MLP):
    def __init__(self, spec):
        super().__init__(spec)
        self.extra_proj = nn.Linear(spec.d_model, spec.d_ff, bias=False)


class _WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.001 * dy


class WrongBackward(MLP):
    def forward(self, x, valid=None):
        return _WrongSlope.apply(super().forward(x)[0]), None


class CountsPadding(MoE):
    def forward(self, x, valid=None):
        return super().forward(x, None)


class Unbalanced(MoE):
    """Its balance loss is that of transformers: top_k where all experts are used alike."""

    def forward(self, x, valid=None):
        y, stats = super().forward(x, valid)
        return y, stats._replace(balance_loss=self.spec.top_k * stats.balance_loss)


BROKEN = [
    (LooksAhead, "causality", "T"),
    (ForgetsTheWindow, "decode", "M"),
    (ForgetsTheWindowInDecode, "decode", "M"),
    (CountsFromZero, "decode", "T:none"),
    (CountsFromZero, "chunked prefill", "T:none"),
    (LosesTheStateInPieces, "chunked prefill", "M"),
    (ReadsPadding, "left padding", "M"),
    (IgnoresStarts, "documents", "M"),
    (IgnoresDocuments, "documents", "T"),
    (Counts, "checkpointing", "T"),
    (LeavesOneOut, "initial weights", "M"),
    (ForgetsAParameter, "parameters", "T"),
    (WrongRows, "parameters", "M"),
    (SmallState, "state bytes", "M"),
    (WindowOfOneMore, "state bytes", "T"),
    (HalfOfTheProducts, "FLOPs", "M"),
    (OfTheWholeText, "FLOPs", "L"),
    (CheapDecode, "FLOPs", "L"),
    (OnePass, "FLOPs", "T"),
    (Detached, "gradients", "T"),
    (Unused, "gradients", "T"),
    (WrongBackward, "derivative", "T"),
    (CountsPadding, "experts", "T:moe"),
    (Unbalanced, "experts", "T:moe"),
]
KINDS = {
    Attention: "attention",
    MLA: "mla",
    Mamba1: "mamba1",
    Mamba2: "mamba2",
    Mamba3: "mamba3",
    MLP: "mlp",
    MoE: "moe",
}
OVERRIDES = {
    "CountsFromZero": ["model.attention.rope=true"],
    "WindowOfOneMore": ["model.attention.window=4"],
}


@pytest.mark.parametrize(
    ("broken", "row", "pattern"), BROKEN, ids=[f"{broken.__name__}-{row}" for broken, row, _ in BROKEN]
)
def test_a_broken_layer_fails_its_row(monkeypatch, broken, row, pattern):
    """The row alone is run, with an intact layer of another kind beside the broken one, and it names the broken one's
    kind."""
    (base,) = broken.__bases__
    kind = KINDS[base]
    other = "M2:none" if kind != "mamba2" else "L:none"
    arguments = [f"{other} {pattern}", *OVERRIDES.get(broken.__name__, [])]
    monkeypatch.setattr("hybridlm.eval.gate._CHECKS", one_check(row))
    assert [result.status for result in gate(*arguments)] == ["pass"]
    monkeypatch.setattr(f"hybridlm.layers.{kind}.{base.__name__}", broken)
    (result,) = gate(*arguments)
    assert (result.name, result.status) == (row, "fail")
    assert not result.error <= result.limit
    assert f"to blame: {kind}" in result.note


def one_check(name):
    (check,) = [check for check in module._CHECKS if check.name == name]
    return (check,)


def test_an_error_that_is_no_number_never_passes(monkeypatch):
    check = module.Check("x", "y", 1.0, lambda subject: [(0.5, "a"), (math.nan, "here"), (math.inf, "b"), (0.7, "c")])
    monkeypatch.setattr(module, "_CHECKS", (check,))
    (row,) = gate("T")
    assert row.status == "fail"
    assert row.note.startswith("here; ")
    one = torch.ones(3)
    for bad in (math.nan, math.inf):
        assert relative(one * bad, one) == relative(one, one * bad) == math.inf
        for found, expected in (({"a": one * bad}, {"a": one}), ({"a": None}, {"a": one}), ({"a": one}, {"a": None})):
            ((error, what),) = compare_gradients(found, expected, "x")
            assert not error <= 1e300
            assert what == "x: gradient of a"
    assert relative(one, one) == relative(one[:0], one[:0]) == 0.0
    assert relative(one, torch.zeros(3)) == math.inf
    assert relative(one[:2], one) == math.inf


def test_a_layer_that_raises_is_a_failed_row(monkeypatch):
    class Refuses(Attention):
        def forward(self, x, seq, cache=None):
            raise RuntimeError("no such\nthing")

    monkeypatch.setattr("hybridlm.layers.attention.Attention", Refuses)
    found = rows("M2 T")
    assert {
        row.status for name, row in found.items() if name in ("causality", "FLOPs", "derivative", "state bytes")
    } == {"fail"}
    assert "RuntimeError: no such thing; to blame: attention (layer 1)" in found["decode"].note
    assert found["parameters"].status == "pass"
