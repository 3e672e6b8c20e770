"""The errors that tests/planted_errors.py plants, each with the tests that must notice it.

The first 29 are the ones by which the golden tensors were chosen; the others are mistakes that a change of this code
could bring.
"""

from __future__ import annotations

from typing import NamedTuple


class Plant(NamedTuple):
    """changes: (file in hybridlm/, what stands there, what is put in its place); tests: arguments of pytest."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def _golden(kind: str) -> tuple[str, ...]:
    return ("tests/layers/test_golden.py", "-k", kind)


def _one(name: str, file: str, old: str, new: str, *tests: str) -> Plant:
    return Plant(name, ((file, old, new),), tests)


_M3, _TRAPEZOID, _TILES = "layers/mamba3.py", "ops/trapezoid.py", "ops/mimo_tiles.py"
_PREVIOUS = "previous_weight(dt, mix, seq.starts)"
MAMBA3 = [
    _one(
        "mamba3: beta without alpha",
        _M3,
        f"mix * dt, {_PREVIOUS}",
        f"mix * dt, {_PREVIOUS} * (decay * dt).exp()",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: lambda swapped", _M3, "mix = others[0].sigmoid()", "mix = 1 - others[0].sigmoid()", *_golden("mamba3")
    ),
    _one(
        "mamba3: Euler", _M3, f"own, previous = mix * dt, {_PREVIOUS}", "own, previous = dt, 0 * dt", *_golden("mamba3")
    ),
    _one(
        "mamba3: previous dt in beta",
        _TRAPEZOID,
        "weight = (1 - mix) * dt",
        "weight = (1 - mix) * dt.roll(1, 1)",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: angle without pi",
        _TRAPEZOID,
        "math.pi * rate.to(dt.dtype).tanh()",
        "rate.to(dt.dtype).tanh()",
        *_golden("mamba3"),
    ),
    _one("mamba3: angle without tanh", _TRAPEZOID, "rate.to(dt.dtype).tanh()", "rate.to(dt.dtype)", *_golden("mamba3")),
    _one(
        "mamba3: angle without dt",
        _TRAPEZOID,
        "* dt.transpose(1, 2).unsqueeze(2)",
        "* dt.sign().transpose(1, 2).unsqueeze(2)",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: angle with the mean dt of the heads",
        _TRAPEZOID,
        "* dt.transpose(1, 2).unsqueeze(2)",
        "* dt.mean(-1, True).expand_as(dt).transpose(1, 2).unsqueeze(2)",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: sign of the angle", _TRAPEZOID, "turn = math.pi * rate", "turn = -math.pi * rate", *_golden("mamba3")
    ),
    _one(
        "mamba3: bias before the norm",
        _TILES,
        "        if self.cos is None:\n            return biased\n        return rotate_(",
        "        biased = biased * (biased.square().mean(1, keepdim=True) + 1e-5).rsqrt()\n        if self.cos is None:\n            return biased\n        return rotate_(",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: B and C biases left out",
        _TILES,
        "rank * length) + wide\n",
        "rank * length) + 0 * wide\n",
        *_golden("mamba3"),
    ),
    _one("mamba3: B and C swapped", _M3, "x, B, C = xBC.split(", "x, C, B = xBC.split(", *_golden("mamba3")),
    _one(
        "mamba3: z and x swapped",
        _M3,
        "        if self._kernel_takes(",
        "        E = spec.d_inner\n        z, xBC = xBC[..., :E], torch.cat((z, xBC[..., E:]), -1)\n        if self._kernel_takes(",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: dt and A swapped",
        _M3,
        "dt_rate, decay_rate, *others = ",
        "decay_rate, dt_rate, *others = ",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: SISO rotates half-split",
        _M3,
        "adjacent = spec.mimo_rank is None\n",
        "adjacent = False\n",
        *_golden("mamba3_siso"),
    ),
    _one(
        "mamba3: MIMO rotates neighbours",
        _M3,
        "adjacent = spec.mimo_rank is None\n",
        "adjacent = True\n",
        *_golden("mamba3_mimo"),
    ),
    _one(
        "mamba3: MIMO rotates within the first half",
        _TILES,
        "tensor.shape[dim] // 2, n_angles)",
        "n_angles, n_angles)",
        *_golden("mamba3_mimo"),
    ),
    _one(
        "mamba3: the other activation of A",
        _M3,
        'spec.a_activation == "softplus"',
        'spec.a_activation != "softplus"',
        *_golden("mamba3"),
    ),
    _one("mamba3: another floor of A", _M3, "clamp_min(spec.a_floor)", "clamp_min(1e-4)", *_golden("mamba3")),
    _one(
        "mamba3: groups tiled over the heads",
        _TILES,
        "which[head // per_group]",
        "which[head % which.shape[0]]",
        *_golden("mamba3"),
    ),
    _one(
        "mamba3: a block's bias gradient replaces the others'",
        "ops/mimo_backward.py",
        "grads.B_bias[h] += dk",
        "grads.B_bias[h] = dk",
        "tests/ops/test_mimo.py",
    ),
    Plant(
        "mamba3: D without mimo_x",
        (
            ("ops/mimo.py", "        scores.diagonal(dim1=1, dim2=2).add_(D[h])\n", ""),
            (
                "ops/mimo.py",
                "        out.addcmul_(torch.bmm(c, states",
                "        out.view(tiles.x.shape[1], -1, rank, length, width).add_(D[h] * tiles.x[h].unsqueeze(2))\n        out.addcmul_(torch.bmm(c, states",
            ),
        ),
        _golden("mamba3_mimo"),
    ),
    Plant(
        "mamba3: gate before the norm",
        (
            (
                _M3,
                "        if spec.outproj_norm:\n            y = F.rms_norm(",
                "        if spec.outproj_norm and spec.mimo_rank is not None:\n            y = F.rms_norm(",
            ),
            (
                _M3,
                "[:, : z.shape[1]] * F.silu(z.to(y.dtype))",
                "[:, : z.shape[1]] * F.silu(z.to(y.dtype)) if not spec.outproj_norm else F.rms_norm(y.permute(2, 1, 4, 3, 0, 5).flatten(1, 3)[:, : z.shape[1]] * F.silu(z), (spec.head_dim,), None, spec.norm_eps) * self.norm.weight.view(spec.n_heads, -1)",
            ),
        ),
        _golden("mamba3_siso"),
    ),
    _one(
        "mamba3: norm across the ranks",
        _M3,
        "y = F.rms_norm(y, (spec.head_dim,), None, spec.norm_eps)",
        "y = y * (y.square().mean((3, 5), keepdim=True) + spec.norm_eps).rsqrt()",
        *_golden("mamba3_mimo"),
    ),
]
_M2 = "layers/mamba2.py"
MAMBA2 = [
    _one(
        "mamba2: norm over all groups",
        _M2,
        "groups=spec.n_groups, norm_before_gate",
        "groups=1, norm_before_gate",
        *_golden("mamba2"),
    ),
    _one(
        "mamba2: norm and gate in the other order",
        _M2,
        "groups=spec.n_groups, norm_before_gate=spec.norm_before_gate",
        "groups=spec.n_groups, norm_before_gate=not spec.norm_before_gate",
        *_golden("mamba2"),
    ),
    _one("mamba2: dt not clamped", _M2, ".clamp(*spec.dt_limit)", "", *_golden("mamba2")),
    _one(
        "mamba2: convolution without SiLU",
        "ops/conv.py",
        "return torch.nn.functional.silu(out), out",
        "return out.clone(), out",
        *_golden("mamba2"),
    ),
    _one(
        "mamba2: convolution flipped",
        "ops/conv.py",
        "return weight[:, 0].t().contiguous()",
        "return weight[:, 0].t().flip(0).contiguous()",
        *_golden("mamba2"),
    ),
    Plant(
        "mamba2: groups tiled over the heads",
        (
            (
                _M2,
                "        y, ssm_state = ssd(\n            inner.unflatten(-1, (spec.n_heads, spec.head_dim)),\n            dt,\n            -self.A_log.to(wide).exp(),",
                "        tiled = torch.arange(spec.n_heads).view(-1, spec.n_groups).t().flatten()\n        y, ssm_state = ssd(\n            inner.unflatten(-1, (spec.n_heads, spec.head_dim))[:, :, tiled],\n            dt[..., tiled],\n            -self.A_log.to(wide).exp()[tiled],",
            ),
            (_M2, "self.D, initial_state", "self.D[tiled], initial_state"),
            (
                _M2,
                "        if cache is not None:\n",
                "        y = y[:, :, tiled.argsort()]\n        if cache is not None:\n",
            ),
        ),
        _golden("mamba2"),
    ),
]
_CONTRACT, _DOCUMENTS, _PADDING = (
    f"tests/layers/test_mixer_{name}.py" for name in ("contract", "documents", "padding")
)
_ATTENTION, _MLA, _M1 = "layers/attention.py", "layers/mla.py", "layers/mamba1.py"
OTHER_MIXERS = [
    _one(
        "attention: query heads tiled over key heads",
        "ops/attention.py",
        "return x if group == 1 or not x.is_cuda else x.repeat_interleave(group, dim=1)",
        "return x if group == 1 else x.repeat(1, group, 1, 1)",
        *_golden("attn"),
    ),
    _one(
        "attention: window one token too long",
        "ops/attention.py",
        "position > last - window",
        "position >= last - window",
        _CONTRACT,
        "-k",
        "window",
    ),
    _one(
        "attention: QK-norm left out for keys",
        _ATTENTION,
        "rms_norm(k, self.k_norm.weight, spec.norm_eps)",
        "k",
        *_golden("attn"),
    ),
    _one(
        "attention: values rotated too",
        _ATTENTION,
        "q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)",
        "q, k, v = (apply_rotary(part, cos, sin) for part in (q, k, v))",
        *_golden("attn"),
    ),
    _one(
        "mla: latent cached before its norm",
        _MLA,
        "        latent = rms_norm(latent, self.kv_a_layernorm.weight, LATENT_NORM_EPS)  # (B, T, c)\n",
        "",
        *_golden("mla"),
    ),
    _one(
        "mla: the other layout of the rotation",
        _MLA,
        "q_rope = apply_rotary(q_rope, cos, sin, interleaved=spec.rope_interleave)",
        "q_rope = apply_rotary(q_rope, cos, sin, interleaved=not spec.rope_interleave)",
        *_golden("mla"),
    ),
    _one(
        "mla: absorbed form without the shared key",
        _MLA,
        "to_key), q_rope), -1)",
        "to_key), 0 * q_rope), -1)",
        *_golden("mla"),
    ),
    _one("mla: epsilon of the latent norms", _MLA, "LATENT_NORM_EPS = 1e-6", "LATENT_NORM_EPS = 1e-2", *_golden("mla")),
    _one(
        "mamba1: x and z swapped",
        _M1,
        "inner, z = self.in_proj.split(",
        "z, inner = self.in_proj.split(",
        *_golden("mamba1"),
    ),
    _one(
        "mamba1: A without its exponential",
        _M1,
        "-self.A_log.to(at_least_fp32(x.dtype)).exp(),",
        "-self.A_log.to(at_least_fp32(x.dtype)).abs(),",
        *_golden("mamba1"),
    ),
    _one(
        "mamba1: step without dt on the input",
        "ops/selective_scan.py",
        "(dt * x).unsqueeze(-1) * B.unsqueeze(1)",
        "x.unsqueeze(-1) * B.unsqueeze(1)",
        _CONTRACT,
        "-k",
        "mamba1 and any_cut",
    ),
    _one(
        "mamba1: chunks begin with nothing",
        "ops/selective_scan_blocks.py",
        "torch.addcmul(left[:, j], begin[:, j], whole[:, j])",
        "left[:, j]",
        "tests/ops/test_selective_scan.py",
    ),
    _one(
        "mamba1: skip left out",
        "ops/selective_scan_blocks.py",
        "return y.addcmul_(cut.x, D.to(y.dtype)), states",
        "return y, states",
        *_golden("mamba1"),
    ),
]
_MOE = ("tests/layers/test_moe.py",)
MOE = [
    _one(
        "moe: weights taken with the selection bias",
        "ops/router.py",
        "_weights(scores, experts, normalize, scale), scores /",
        "_weights(selection, experts, normalize, scale), scores /",
        *_golden("moe"),
    ),
    _one("moe: weights never renormalised", "ops/router.py", "    if normalize:\n", "    if False:\n", *_golden("moe")),
    _one(
        "moe: a group scores by its best one",
        "ops/router.py",
        "grouped.topk(2, dim=-1).values.sum(-1)",
        "grouped.amax(-1)",
        *_golden("moe"),
    ),
    _one(
        "moe: scaling factor left out",
        "ops/router.py",
        "return weights if scale == 1.0 else weights * scale",
        "return weights",
        *_golden("moe"),
    ),
    _one(
        "moe: balance loss of k when balanced",
        "ops/router.py",
        "share = counts.to(probabilities.dtype) / counts.sum().clamp_min(1)",
        "share = counts.to(probabilities.dtype) / len(probabilities)",
        *_MOE,
    ),
    _one("moe: padding counts", "layers/moe.py", "None if valid is None else valid.flatten())", "None)", *_MOE),
    _one(
        "moe: shared experts left out",
        "layers/moe.py",
        "y = y + self.shared_experts(x)[0]",
        "y = y + 0 * self.shared_experts(x)[0]",
        *_golden("moe"),
    ),
    _one(
        "moe: gate and up swapped",
        "ops/experts.py",
        "    gate, up = hidden.chunk(2, dim=-1)\n    dhidden",
        "    up, gate = hidden.chunk(2, dim=-1)\n    dhidden",
        *_golden("moe"),
    ),
]
CACHES = [
    _one(
        "cache: convolution's state not kept",
        "layers/conv.py",
        'cache.update({"conv": state})',
        "pass",
        _CONTRACT,
        "-k",
        "mamba2 and any_cut",
    ),
    _one(
        "cache: bounded one forgets a token too early",
        "layers/cache.py",
        "stay = min(seen.shape[1], self.capacity)",
        "stay = min(seen.shape[1], self.capacity - 1)",
        _CONTRACT,
        "-k",
        "window and any_cut",
    ),
    _one(
        "cache: Mamba-3's previous token not kept",
        _M3,
        'new["v"] = steps.x[:, -1]',
        'new["v"] = steps.x[:, 0]',
        _CONTRACT,
        "-k",
        "mamba3 and any_cut",
    ),
    _one(
        "cache: Mamba-3's angle not kept",
        _M3,
        '            new["angle"] = theta\n',
        '            new["angle"] = theta * 0\n',
        _CONTRACT,
        "-k",
        "mamba3 and any_cut",
    ),
    _one(
        "cache: positions begin anew in every chunk",
        "layers/sequence.py",
        "torch.arange(past, past + length, device=device)",
        "torch.arange(length, device=device)",
        "tests/model/test_lm.py",
    ),
]
DOCUMENTS = [
    _one(
        "documents: convolution reaches across",
        "layers/conv.py",
        "None if seq.doc_ids is None else seq.positions",
        "None",
        _DOCUMENTS,
        "-k",
        "mamba2",
    ),
    _one(
        "documents: state carried into the next",
        "ops/ssd_chunks.py",
        "carry = decay.masked_fill(document > 0, -torch.inf).exp2_()",
        "carry = decay.exp2()",
        "tests/ops/test_scan_documents.py",
    ),
    _one("documents: Mamba-1's state goes on", _M1, "starts=seq.starts,", "starts=None,", _DOCUMENTS, "-k", "mamba1"),
    _one(
        "documents: trapezoid looks ahead into the next",
        _TRAPEZOID,
        "return weight if starts is None else weight.masked_fill(starts.unsqueeze(-1), 0.0)",
        "return weight",
        "tests/ops/test_trapezoid.py",
        "-k",
        "looked_ahead",
    ),
    _one(
        "documents: rotation goes on",
        _M3,
        'None if cache is None else cache["angle"], seq.starts)',
        'None if cache is None else cache["angle"], None)',
        _DOCUMENTS,
        "-k",
        "mamba3",
    ),
    _one(
        "documents: attention sees other documents",
        "layers/sequence.py",
        "first = torch.zeros_like(query) if self.doc_ids is None else",
        "first = torch.zeros_like(query) if True else",
        _DOCUMENTS,
        "-k",
        "attention or mla",
    ),
    _one(
        "documents: positions go on",
        "model/columns.py",
        "place = torch.where(began >= 0, rank - began, place)",
        "place = place * 1",
        "tests/model/test_documents.py",
    ),
    _one(
        "padding: takes time in Mamba-2",
        _M2,
        "dt = dt.masked_fill(~seq.valid.unsqueeze(-1), 0.0)",
        "dt = dt * 1",
        _PADDING,
        "-k",
        "mamba2",
    ),
    _one(
        "padding: takes time in Mamba-1",
        _M1,
        "return dt if valid is None else dt.masked_fill(valid.logical_not().unsqueeze(-1), 0.0)",
        "return dt",
        _PADDING,
        "-k",
        "mamba1",
    ),
    _one(
        "padding: Mamba-3's state of an empty row changes",
        _M3,
        "        if seq.valid is not None:\n            some",
        "        if False:\n            some",
        _PADDING,
        "-k",
        "mamba3",
    ),
    _one(
        "padding: attention sees it",
        "layers/sequence.py",
        "(key >= first.clamp_min(0))",
        "(key >= first.clamp_min(0) - 1)",
        _PADDING,
        "-k",
        "attention or mla",
    ),
]
_LOSS, _HARNESS, _MEASUREMENT = (
    "tests/eval/test_losses.py",
    "tests/eval/test_harness.py",
    "tests/bench/test_measurement.py",
)
MEASUREMENTS = [
    _one(
        "eval: targets counted by two windows",
        "eval/losses.py",
        "counted[:skipped] = False",
        "counted[:0] = False",
        _LOSS,
    ),
    _one(
        "eval: the separator left out",
        "eval/losses.py",
        "begin + starts[:-1], np.diff(starts)",
        "begin + starts[:-1] + 1, np.diff(starts) - 1",
        _LOSS,
    ),
    _one("harness: a long context cut at its end", "eval/harness.py", "[-kept:])", "[:kept])", _HARNESS),
    _one("harness: no token before the text", "eval/harness.py", "else [self.tok.eos_id, *ids]", "else ids", _HARNESS),
    _one(
        "harness: greedy if the last token is",
        "eval/losses.py",
        "(targets == IGNORE)).all(1)",
        "(targets == IGNORE))[:, -1]",
        _HARNESS,
    ),
    _one(
        "bench: the warm-up counts",
        "bench/measurement.py",
        "elif number:\n",
        "elif number >= 0:\n",
        _MEASUREMENT,
    ),
]
_GDN, _KDA = "layers/gdn.py", "layers/kda.py"


def _core(kind: str) -> tuple[str, ...]:
    return ("tests/layers/test_golden.py", "-k", f"test_output_and_gradients and {kind}")


DELTA = [
    Plant("gdn: beta not doubled", ((_GDN, "beta = 2 * beta", "beta = 1 * beta"),), _core("neg_eigval")),
    Plant(
        "gdn: a decay with the bias after softplus",
        (
            (
                _GDN,
                "F.softplus(as_dtype(self.a_proj(x), wide) + as_dtype(self.dt_bias, wide))",
                "F.softplus(as_dtype(self.a_proj(x), wide)) + as_dtype(self.dt_bias, wide)",
            ),
        ),
        _core("gdn"),
    ),
    Plant("gdn: gate before the norm", ((_GDN, "norm_before_gate=True", "norm_before_gate=False"),), _core("gdn")),
    Plant("gdn: no gate", ((_GDN, "if not spec.use_gate:", "if spec.use_gate or not spec.use_gate:"),), _core("gdn")),
    Plant(
        "gdn: queries and keys swapped",
        ((_GDN, "q, k, v = qkv.split_with_sizes", "k, q, v = qkv.split_with_sizes"),),
        _core("gdn"),
    ),
    Plant(
        "gdn: padding decays the state",
        (
            (
                _GDN,
                "log_decay = log_decay.masked_fill(~seq.valid.view(*seq.valid.shape, *(1,) * (log_decay.dim() - 2)), 0.0)",
                "pass",
            ),
        ),
        ("tests/layers/test_mixer_padding.py", "-k", "bit_for_bit and gdn"),
    ),
    Plant(
        "gdn: padding writes",
        ((_GDN, "beta = beta.masked_fill(~seq.valid.unsqueeze(-1), 0.0)", "pass"),),
        ("tests/layers/test_mixer_padding.py", "-k", "bit_for_bit and gdn"),
    ),
    Plant(
        "gdn: documents keep the state",
        ((_GDN, "starts=seq.starts", "starts=None"),),
        ("tests/layers/test_mixer_documents.py", "-k", "test_a_document_does_not_depend and gdn"),
    ),
    Plant(
        "gdn: the state is rounded to the activations",
        (
            (
                _GDN,
                "torch.zeros(shape, dtype=at_least_fp32(dtype), device=device)",
                "torch.zeros(shape, dtype=dtype, device=device)",
            ),
        ),
        ("tests/layers/test_gdn.py", "-k", "state"),
    ),
    Plant(
        "gdn: value heads read key heads in turn",
        (
            (
                "ops/delta_chunks.py",
                "kq.repeat_interleave(heads // k.shape[2], 2)",
                "kq.repeat(1, 1, heads // k.shape[2], 1, 1, 1)",
            ),
        ),
        _core("gdn_gva"),
    ),
    Plant(
        "kda: SiLU for the gate",
        (
            (
                _KDA,
                "gate: Tensor = as_dtype(self.g_b_proj(self.g_a_proj(x)), wide).sigmoid()",
                "gate: Tensor = F.silu(as_dtype(self.g_b_proj(self.g_a_proj(x)), wide))",
            ),
        ),
        _core("kda"),
    ),
    Plant(
        "kda: lower bound without A", ((_KDA, "(speed * rate).sigmoid()", "rate.sigmoid()"),), _core("kda_lower_bound")
    ),
    Plant(
        "kda: a bias of the decay per head",
        (
            (
                _KDA,
                "as_dtype(self.dt_bias, wide)",
                "as_dtype(self.dt_bias, wide).view(spec.n_v_heads, -1).mean(1, keepdim=True).expand(-1, spec.head_k_dim).flatten()",
            ),
        ),
        _core("kda"),
    ),
]
PLANTS = [*MAMBA3, *MAMBA2, *OTHER_MIXERS, *MOE, *DELTA, *CACHES, *DOCUMENTS, *MEASUREMENTS]
