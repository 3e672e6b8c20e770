"""The architectures of transformers, one line each: a model is exported as the first that represents it exactly."""

from __future__ import annotations

from hybridlm.interop.architecture import Architecture
from hybridlm.interop.architectures.bamba import Bamba
from hybridlm.interop.architectures.deepseek import DeepseekV3
from hybridlm.interop.architectures.dense import Arcee, Llama, Qwen3
from hybridlm.interop.architectures.granite import GraniteMoeHybrid
from hybridlm.interop.architectures.kimi import KimiLinear
from hybridlm.interop.architectures.mamba import Mamba, Mamba2
from hybridlm.interop.architectures.nemotron_h import NemotronH
from hybridlm.interop.architectures.qwen3_5 import Qwen3Next, Qwen35

ARCHITECTURES: tuple[Architecture, ...] = (
    Llama(),
    Qwen3(),
    Arcee(),
    Mamba(),
    Mamba2(),
    GraniteMoeHybrid(),
    Bamba(),
    NemotronH(),
    DeepseekV3(),
    Qwen35(),
    Qwen3Next(),
    KimiLinear(),
)
