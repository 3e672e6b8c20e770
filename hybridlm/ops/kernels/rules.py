"""What each compiled kernel supports. A rule returns the reason against it, as shown to the user, or None.

The same rules are read before training, of the layers' widths, and at each call. The limits are those that the packages
check themselves or write down: causal-conv1d 1.6.2 (csrc/causal_conv1d.cpp), mamba-ssm 2.3.2
(csrc/selective_scan/selective_scan.cpp, ops/triton/ssd_combined.py, ops/triton/mamba3/mamba3_siso_combined.py,
ops/tilelang/mamba3/mamba3_mimo.py), liger-kernel 0.8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HALF = (torch.float16, torch.bfloat16)
MIMO_ROWS = 64  # rows of a tile, chunk x rank, that the MIMO kernel takes at most
# d_state and head_dim that its authors have tested, without the two pairs that they know not to compile
# (mamba3_mimo.py).
MIMO_WIDTHS = {(n, p) for n in (16, 32, 64, 128, 256) for p in (32, 64, 128)} - {(16, 32), (256, 128)}
_KIB = 1024


@dataclass(frozen=True)
class Sizes:
    """Of a trial. The 40 tokens of a row are not a whole number of chunks."""

    batch: int = 2
    time: int = 40
    channels: int = 32
    heads: int = 2
    head_dim: int = 16
    groups: int = 1
    d_state: int = 16
    width: int = 4
    rank: int = 4  # of Mamba-3 MIMO
    angles: int = 4  # of Mamba-3


@dataclass(frozen=True)
class KernelUse:
    """What a run needs of its kernels. dtype: of activations; documents: layers must keep documents apart;
    shared_memory_kb: of a block on the card, None: unknown."""

    dtype: torch.dtype
    documents: bool
    shared_memory_kb: float | None = None


@dataclass(frozen=True)
class Need:
    """One compiled kernel that a layer can use. setting: its field in the kernels section; field: of KernelChoice;
    kernel: of ``probe.KERNELS``; reason: what rules it out, None: nothing; sizes: of the layer, where the kernel is
    compiled for its widths, so that it may work for some and not for others; whole: field and kernel of the whole
    layer in one, which is used where this kernel and the convolution's are."""

    setting: str
    field: str
    kernel: str
    reason: str | None
    sizes: tuple[Sizes, ...] = ()
    whole: tuple[str, str] | None = None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_float64(dtype: torch.dtype) -> str | None:
    return "it does not support float64" if dtype == torch.float64 else None


def _tensor_cores(dtype: torch.dtype) -> str | None:
    """Triton's matrix products round float32 to TF32 on every card that has it."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "it rounds float32 products to TF32 (10 bits); it is for bfloat16 and float16"
    return _not_float64(dtype)


def conv_refusal(
    channels: int,
    width: int,
    dtype: torch.dtype,
    *,
    documents: bool = False,
    state: bool = False,
    padding: bool = False,
) -> str | None:
    """causal_conv1d_fn over (B, T, channels)."""
    if not 2 <= width <= 4:
        return f"it supports a width of 2 to 4, not {width}"
    if channels % 8:
        return f"it needs a multiple of 8 channels, not {channels}"
    if padding:
        return "it does not support padding"
    if documents and state:
        return "it cannot both continue from a state and separate documents"
    return _not_float64(dtype)


def conv_need(channels: int, width: int, use: KernelUse) -> Need:
    """causal-conv1d, for a layer with a short convolution over ``channels``."""
    return Need("conv", "conv", "causal-conv1d", conv_refusal(channels, width, use.dtype))


def mamba1_refusal(d_state: int, dtype: torch.dtype, *, documents: bool = False, state: bool = False) -> str | None:
    """selective_scan_fn."""
    if d_state > 256:
        return f"it supports at most 256 states per channel, not {d_state}"
    if documents:
        return "it cannot separate documents (data.isolate)"
    if state:
        return "it does not support an initial state"
    return _not_float64(dtype)


def mamba2_refusal(d_state: int, dtype: torch.dtype) -> str | None:
    """mamba_chunk_scan_combined: documents, states and their gradients are all within it."""
    if d_state > 256:
        return f"it supports at most 256 states per head, not {d_state}"
    return _tensor_cores(dtype)


def mamba2_layer_refusal(
    conv_channels: int, d_conv: int, d_state: int, dtype: torch.dtype, *, state: bool = False, padding: bool = False
) -> str | None:
    """mamba_split_conv1d_scan_combined: a whole layer behind its input projection, without a state before or after
    it."""
    if state:
        return "it does not return the convolution's state"
    return conv_refusal(conv_channels, d_conv, dtype, padding=padding) or mamba2_refusal(d_state, dtype)


def mamba3_refusal(
    d_state: int,
    head_dim: int,
    n_angles: int,
    dtype: torch.dtype,
    *,
    trapezoidal: bool,
    state: bool = False,
    padding: bool = False,
) -> str | None:
    """What both Mamba-3 kernels ask for."""
    if not trapezoidal:
        return "it only has the trapezoidal recurrence"
    if n_angles == 0 or n_angles % 2:
        return f"it needs an even number of angles, not {n_angles}"
    for name, width in (("d_state", d_state), ("head_dim", head_dim)):
        if width < 16 or width & (width - 1):
            return f"it needs a {name} that is a power of two from 16 on, not {width}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {dtype_name(dtype)}"
    if state or padding:
        return "it supports neither an initial state nor padding"
    return None


def mimo_chunk(rank: int) -> int:
    """The chunk that mamba_ssm recommends, 64 / R."""
    return max(MIMO_ROWS // rank, 1)


def mimo_shared_kib(d_state: int, head_dim: int, rank: int, n_angles: int) -> float:
    """Shared memory of a block of the MIMO backward, KiB: the tiles that it declares, before its compiler lets some of
    them share."""
    rows, chunk = mimo_chunk(rank) * rank, mimo_chunk(rank)
    wide = (
        7 * rows * d_state
        + 3 * rows * head_dim
        + 2 * d_state * head_dim
        + 2 * chunk * head_dim
        + rows * rows
        + chunk * rank * rank
    )
    return (2 * wide + 4 * (rows * rows + rows * n_angles)) / _KIB


def mimo_refusal(
    d_state: int,
    head_dim: int,
    rank: int,
    n_angles: int,
    *,
    heads: int,
    groups: int,
    gated: bool,
    length: int | None = None,
    shared_memory_kb: float | None = None,
) -> str | None:
    """mamba3_mimo beyond ``mamba3_refusal``. groups: of B and C; gated: no norm stands between scan and gate; length:
    tokens of a row; shared_memory_kb: what a block may have on the card; None: not looked at."""
    chunk = mimo_chunk(rank)
    if groups not in (1, heads):
        return f"its backward supports one group of B and C or one for each head, not {groups}"
    if (d_state, head_dim) not in MIMO_WIDTHS:
        return f"it is not tested by its authors with d_state {d_state} and head_dim {head_dim}, or it does not compile"
    if not gated:
        return "it is not used with outproj_norm"
    if chunk < 8 or rank & (rank - 1):
        return f"it supports a rank of 1, 2, 4 or 8, not {rank}"
    if n_angles not in (d_state // 2, d_state // 4):
        return f"it rotates half or all of the {d_state} states, not {2 * n_angles}"
    if length is not None and length % chunk:
        return f"it needs whole chunks of {chunk} tokens, not {length}"
    needed = mimo_shared_kib(d_state, head_dim, rank, n_angles)
    if shared_memory_kb is not None and needed > shared_memory_kb:
        return f"its backward needs {needed:.0f} KiB of shared memory per block, the card has {shared_memory_kb:.0f}"
    return None


def loss_refusal(dtype: torch.dtype, *, scale: float, sharded: bool = False) -> str | None:
    """Liger's fused linear cross-entropy."""
    if scale != 1.0:
        return f"it does not support logit_scale ({scale:g})"
    if dtype == torch.float16:
        return "it computes gradients before loss scaling, where float16 underflows"
    if sharded:
        return "it does not support a sharded weight"
    return _not_float64(dtype)
