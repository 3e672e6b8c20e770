"""The registry of mixers: one line per kind, in the order of the model section and of help pages.

A line names the section's class and its module here; the kind is called like the module, and so is the module of its
layer in ``hybridlm.layers``.
"""

from __future__ import annotations

from hybridlm.config.layers import MixerSection, registered

MIXERS = registered(
    __name__,
    MixerSection,
    (
        "attention.AttentionConfig",
        "mamba1.Mamba1Config",
        "mamba2.Mamba2Config",
        "mamba3.Mamba3Config",
        "mla.MLAConfig",
        "gdn.GDNConfig",
        "kda.KDAConfig",
    ),
)
