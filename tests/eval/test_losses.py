"""Loss on whole documents: every token once, windows that slide, and the sums of the validation during training where
windows coincide."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.windows.loader import ValLoader
from hybridlm.data.windows.order import IGNORE
from hybridlm.data.windows.splits import val_windows
from hybridlm.errors import UserError
from hybridlm.eval.losses import Documents, TextLoss, slide, text_loss
from hybridlm.model.build import fresh_model


@pytest.fixture(scope="module")
def prepared(tiny):
    return prepare(compose_config(tiny).data)


@pytest.fixture(scope="module")
def model(tiny, prepared):
    return fresh_model(compose_config(tiny).model, prepared.tokenizer.vocab_size, seed=1, device="cpu").double().eval()


def measured(model, prepared, context, stride, batch=3, limit=None):
    documents = Documents(prepared.parts[0].val, prepared.tokenizer.eos_id, limit)
    return text_loss(model, documents, prepared.tokenizer.token_bytes(), context, stride=stride, batch=batch)


def documents_of(prepared):
    """The ids of each document, the separators around it included, cut by hand."""
    stream = prepared.parts[0].val.stream
    ids = stream.read(0, len(stream)).tolist()
    places = [i for i, token in enumerate(ids) if token == prepared.tokenizer.eos_id]
    return [ids[a : b + 1] for a, b in pairwise(places)]


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (4, 1), (4, 3), (4, 4), (7, 2), (50, 50)])
def test_every_pair_counts_in_one_window(context, stride):
    lengths = np.array([1, 2, 3, 4, 5, 7, 8, 9, 49, 50, 51, 100])
    seen = [[0] * length for length in lengths]
    for document, first, size, skipped in slide(lengths, context, stride).tolist():
        assert 1 <= size <= context
        assert skipped < size
        for place in range(first + skipped, first + size):
            seen[document][place] += 1
            assert place < context or place - first >= context - stride, "enough stands before it"
    assert all(count == 1 for counts in seen for count in counts)


@pytest.mark.parametrize(("context", "stride"), [(48, 48), (48, 20)])
def test_it_equals_a_loop_over_single_tokens(model, prepared, context, stride):
    """Each target predicted by a forward of its own, from the tokens that its window holds."""
    nats, counts, by_place = 0.0, 0, {}
    token_bytes = prepared.tokenizer.token_bytes()
    text_bytes = 0
    for document in documents_of(prepared)[:1]:
        for target in range(1, len(document)):
            # The first window takes the targets 1 to context; every later one the next ``stride``.
            window = 0 if target <= context else math.ceil((target - context) / stride)
            inputs = document[window * stride : target]
            by_place.setdefault(len(inputs), []).append((inputs, document[target]))
            counts, text_bytes = counts + 1, text_bytes + int(token_bytes[document[target]])
    with torch.inference_mode():
        for pairs in by_place.values():
            for first in range(0, len(pairs), 64):
                some = pairs[first : first + 64]
                logits = model(torch.tensor([ids for ids, _ in some]), keep="last").logits[:, -1]
                nats -= float(logits.log_softmax(-1).gather(1, torch.tensor([[token] for _, token in some])).sum())
    split, whole = prepared.parts[0].val, measured(model, prepared, context, stride)
    documents = Documents(split, prepared.tokenizer.eos_id)
    documents.places = documents.places[:1]
    found = text_loss(model, documents, token_bytes, context, stride=stride, batch=5)
    assert (found.tokens.sum(), found.text_bytes) == (counts, text_bytes)
    assert found.nats.sum() == pytest.approx(nats, rel=1e-9)
    assert whole.tokens.sum() == len(split.stream) - 1
    assert whole.text_bytes == split.text_bytes


def test_a_window_that_holds_whole_documents_is_one_forward_each(model, prepared):
    nats = 0.0
    with torch.inference_mode():
        for document in documents_of(prepared):
            logits = model(torch.tensor([document[:-1]])).logits[0]
            nats -= float(logits.log_softmax(-1).gather(1, torch.tensor(document[1:]).unsqueeze(1)).sum())
    assert measured(model, prepared, 4096, 2048).nats.sum() == pytest.approx(nats, rel=1e-9)


def test_it_is_the_validation_of_training_where_windows_coincide(model, prepared, tiny):
    """Side by side, with packing and isolation: the same pieces of documents, so the same sums and the same bits per
    byte."""
    config = compose_config([*tiny, "data.packing=true", "data.isolate=true"])
    loader = ValLoader(
        val_windows(prepared, config.data),
        batch_size=2,
        token_bytes=prepared.tokenizer.token_bytes(),
        rank=0,
        world_size=1,
    )
    nats = tokens = text_bytes = 0.0
    with torch.inference_mode():
        for batch in loader:
            output = model(batch["ids"], doc_ids=batch["doc_ids"], targets=batch["targets"])
            nats, tokens, text_bytes = (
                nats + float(output.loss_sum),
                tokens + int(output.n_tokens),
                text_bytes + int(batch["n_bytes"]),
            )
    found = measured(model, prepared, config.data.val_seq_len, config.data.val_seq_len)
    assert (found.tokens.sum(), found.text_bytes) == (tokens, text_bytes)
    assert found.nats.sum() == pytest.approx(nats, rel=1e-10)
    assert found.metrics()["bpb"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-10)


def test_more_context_is_over_the_same_tokens_and_the_batch_does_not_matter(model, prepared):
    short, long = measured(model, prepared, 8, 4), measured(model, prepared, 64, 32)
    assert (short.tokens.sum(), short.text_bytes) == (long.tokens.sum(), long.text_bytes)
    assert measured(model, prepared, 64, 32, batch=1).nats.sum() == pytest.approx(long.nats.sum(), rel=1e-9)


def test_the_curve_adds_up_and_names_its_buckets(model, prepared):
    found = measured(model, prepared, 50, 25)
    curve, metrics = found.curve(), found.metrics()
    assert [(row["first"], row["last"]) for row in curve] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
        (33, 50),
    ]
    assert sum(row["tokens"] for row in curve) == metrics["tokens"]
    nats = math.fsum(row["loss"] * row["tokens"] for row in curve)
    assert nats / metrics["tokens"] == pytest.approx(metrics["loss"], rel=1e-9)
    assert curve[0]["tokens"] == metrics["documents"], "one target of each document has the separator alone before it"


def test_documents_are_spread_over_the_text(prepared, model):
    whole = Documents(prepared.parts[0].val, prepared.tokenizer.eos_id)
    two = Documents(prepared.parts[0].val, prepared.tokenizer.eos_id, limit=2)
    assert len(two.places) == 2
    assert two.places[0].tolist() == whole.places[0].tolist()
    assert two.places[1, 0] > whole.places[0, 0]
    assert measured(model, prepared, 64, 32, limit=2).documents == 2


def test_texts_merge_to_the_sums(model, prepared):
    one, both = measured(model, prepared, 16, 8), measured(model, prepared, 16, 8)
    both.merge(one)
    assert both.metrics()["tokens"] == 2 * one.metrics()["tokens"]
    assert both.metrics()["documents"] == 2 * one.documents
    assert both.metrics()["loss"] == pytest.approx(one.metrics()["loss"])
    assert [row["tokens"] for row in both.curve()] == [2 * row["tokens"] for row in one.curve()]
    longer = measured(model, prepared, 32, 16)
    one.merge(longer)
    assert one.longest == 32
    assert one.metrics()["tokens"] == 2 * longer.metrics()["tokens"]


def test_conversations_count_what_is_learned(tiny, corpus, tmp_path):
    overrides = [line for line in tiny if not line.startswith(("data=", "data.path", "data.out", "data.tokenizer"))]
    chat = ["data=chat", f"data.path={corpus}/chats.jsonl", f"data.out={tmp_path}", "data.tokenizer.kind=bytes"]
    prepared = prepare(compose_config([*overrides, *chat]).data)
    stream = prepared.parts[0].val.stream
    documents = Documents(prepared.parts[0].val, prepared.tokenizer.eos_id)
    counted = sum(int((documents.read(windows)[1] != IGNORE).sum()) for windows in documents.batches(32, 16, 4))
    assert 0 < counted == int(stream.read_learned(1, len(stream) - 1).sum()) < len(stream) - 1


def test_a_text_without_targets_is_refused(prepared):
    split = prepared.parts[0].val
    assert len(Documents(split, prepared.tokenizer.eos_id).places) == split.documents
    with pytest.raises(UserError, match="no token"):
        TextLoss().metrics()
