"""Validation reads packed documents as training does: each by itself where they are kept apart."""

from __future__ import annotations

import types

import pytest
import torch
from streams import EOS, some_documents, split

from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.mamba2 import Mamba2Config
from hybridlm.config.model import ModelConfig
from hybridlm.config.optim import OptimConfig
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.data.windows.loader import ValLoader
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.window_sources import PackedWindows
from hybridlm.model.build import fresh_model
from hybridlm.train.lightning_module import LitLM

CONFIG = ModelConfig(
    d_model=32,
    pattern="M2:none T:none",
    n_layers=2,
    attention=AttentionConfig(n_heads=2),
    mamba2=Mamba2Config(head_dim=16, d_state=8, chunk=16),
)


@pytest.mark.parametrize("isolate", [True, False], ids=["apart", "together"])
def test_the_loss_of_packed_validation_is_that_of_documents_alone_where_they_are_apart(tmp_path, isolate):
    documents = some_documents(9, seed=2, longest=30)
    text = split(tmp_path / "val", documents)
    packed = PackedStream(text.stream, 32, eos_id=EOS, folder=tmp_path / "packed")
    machine = types.SimpleNamespace(max_steps=1, accumulate=1)
    model = fresh_model(CONFIG, 257, seed=0, device="cpu")
    module = LitLM(model, OptimConfig(), machine, facts={}, sharded=False)
    module.on_validation_epoch_start()
    loader = ValLoader(
        [PackedWindows(packed, 0, isolate=isolate)],
        batch_size=4,
        token_bytes=byte_tokenizer().token_bytes(),
        rank=0,
        world_size=1,
    )
    assert len(packed) % 4  # so rows without targets fill up
    alone = 0.0
    with torch.no_grad():
        for index, batch in enumerate(loader):
            module.validation_step(batch, index)
        for ids in documents:
            row = torch.tensor([[EOS, *ids, EOS]])
            alone += float(model(row[:, :-1], targets=row[:, 1:]).loss_sum)
    nats, tokens, text_bytes = module._val.tolist()
    assert tokens == sum(len(ids) + 1 for ids in documents)
    assert text_bytes == text.text_bytes == sum(map(len, documents))
    assert (nats == pytest.approx(alone, rel=1e-5)) == isolate
