"""The registry of feed-forward networks: one line per kind, as for the mixers."""

from __future__ import annotations

from hybridlm.config.layers import FFNSection, registered

FFNS = registered(
    __name__,
    FFNSection,
    (
        "mlp.MLPConfig",
        "moe.MoEConfig",
    ),
)
FFN_KINDS = ("none", *FFNS)
