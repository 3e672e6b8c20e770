"""Conversations on top of a text run: its tokenizer grows by the tokens of a template, its embedding by their rows."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.config.load import from_yaml
from hybridlm.data.chat import template_of
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.windows.order import IGNORE
from hybridlm.data.windows.splits import train_source
from hybridlm.memory.plan import plan_run
from hybridlm.runs.checkpoint import load_run, read_checkpoint, weights_of
from hybridlm.runs.run_folder import RunFolder

NAMES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


@pytest.fixture(scope="module")
def chat(tiny, corpus):
    keep = ("data.out", "data.val_f", "data.global", "hardware", "trainer")
    settings = [line for line in tiny if line.startswith(keep)]
    return [*settings, "data=chat", f"data.path={corpus}/chats.jsonl", "data.seq_len=128", "callbacks=none"]


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A run on text, its tokenizer without special tokens."""
    place = tmp_path_factory.mktemp("place")
    with redirect_stdout(io.StringIO()):
        main(
            [
                *tiny,
                "callbacks=none",
                "trainer.max_steps=4",
                "model.tie_embeddings=false",
                f"hydra.run.dir={place}/text",
            ]
        )
    return RunFolder(place / "text")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments):
    with redirect_stdout(io.StringIO()) as printed:
        main(list(arguments))
    return printed.getvalue()


STILL = ["optim.lr=1e-30", "optim.muon.lr=1e-30", "trainer.max_steps=1"]


def test_missing_tokens_are_added_and_their_rows_are_the_mean(source, chat, place):
    printed = train(*chat, f"init_from={source.path}", "hydra.run.dir=new", *STILL)
    assert [line for line in printed.splitlines() if line.startswith("weights ") and "ids 257 to 260" in line]
    old, new = load_run(str(source.path), torch.device("cpu")), load_run("new", torch.device("cpu"))
    assert [new.tokenizer.special_id(name) for name in NAMES] == [257, 258, 259, 260]
    assert (place / "new/chat_template.jinja").exists()
    for name in ("embedding", "lm_head"):
        before, after = getattr(old.model, name).weight, getattr(new.model, name).weight
        assert torch.equal(before[:257], after[:257])
        assert torch.allclose(after[257:261], before[:257].mean(0), atol=1e-6)
    config = from_yaml(RunFolder(place / "new").config.read_text())
    assert plan_run(config).vocabulary.ids == 261


def test_a_run_that_has_grown_resumes_and_can_be_started_from(source, chat, place):
    shutil.copytree(source.path, place / "text")
    whole = [*chat, "init_from=text", "trainer.max_steps=6", "optim.schedule=constant"]
    train(*whole, "hydra.run.dir=whole")
    train(*whole, "hydra.run.dir=new", "trainer.max_steps=3")
    shutil.rmtree(place / "text")
    train("ckpt=new", "trainer.max_steps=6")
    ends = [weights_of(read_checkpoint(RunFolder(place / name).step_checkpoint(6))) for name in ("whole", "new")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert "were added" not in train(*chat, "init_from=new", "hydra.run.dir=next", "trainer.max_steps=1")


def test_a_vocabulary_with_a_fixed_size_grows_only_if_it_has_no_room(source, chat, tiny, place):
    for size, grown in ((257, 261), (300, 300)):
        train(*tiny, "callbacks=none", f"model.vocab_size={size}", "trainer.max_steps=1", f"hydra.run.dir=t{size}")
        train(*chat, f"init_from=t{size}", f"hydra.run.dir=c{size}", *STILL)
        new = load_run(f"c{size}", torch.device("cpu"))
        assert new.model.vocab_size == grown
        rows = new.model.embedding.weight
        assert torch.allclose(rows[257:261], rows[:257].mean(0).expand(4, -1), atol=1e-6)


def test_tokens_of_another_template_are_used_if_the_weights_have_them(chat, tiny, place):
    theirs = "data.tokenizer.special_tokens=['<|im_start|>','<|im_end|>']"
    train(*tiny, "callbacks=none", theirs, "trainer.max_steps=1", "hydra.run.dir=text")
    assert compose_config([*chat, "init_from=text"]).data.tokenizer.special_tokens == ()
    named = compose_config([*chat, "init_from=text", f"data.tokenizer.special_tokens={list(NAMES)}"])
    assert (named.data.tokenizer.kind, named.data.tokenizer.special_tokens) == ("file", NAMES)


def test_text_and_conversations_are_mixed_with_the_masks_of_each(source, corpus, chat, place):
    parts = "{talk: {source: files, format: chat, path: CHATS}, text: {source: files, path: TEXT, weight: 2}}"
    parts = parts.replace("CHATS", f"{corpus}/chats.jsonl").replace("TEXT", f"{corpus}/*.txt")
    settings = [line for line in chat if not line.startswith(("data=", "data.path"))]
    mixed = [*settings, "data=mixture", f"data.parts={parts}", "data.packing=true", "data.val_seq_len=128"]
    train(*mixed, f"init_from={source.path}", "hydra.run.dir=new", "trainer.max_steps=2")
    config = from_yaml(RunFolder(place / "new").config.read_text())
    prepared = prepare(config.data)
    template = template_of(prepared.tokenizer)
    windows = train_source(prepared, config.data, 0)
    rows, talks = windows.rows(windows.choose(np.arange(60))), 0
    for ids, targets, doc_ids in zip(*rows[:3], strict=True):
        for document in range(doc_ids.max() + 1):
            mine = doc_ids == document
            learned = targets[mine] != IGNORE
            if template.prefixes["user"][0] not in ids[mine]:
                assert learned.all()
                continue
            talks += 1
            assert ids[mine][0] == prepared.tokenizer.eos_id
            answer = ids[mine].tolist().index(template.prefixes["assistant"][0])
            # from the answer's first token to the token that ends it; not the end of the document
            assert learned.tolist() == [answer <= place < mine.sum() - 1 for place in range(mine.sum())]
    assert talks > 20
    metrics = [json.loads(line) for line in (place / "new/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["val/bpb"]) for row in metrics if "val/bpb" in row)


def test_a_line_says_what_the_records_were(chat, place):
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    records = [
        *[{"messages": turns}] * 3,
        {"messages": [turns[0], call]},
        *[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]}] * 2,
        {"instruction": "a", "context": "b", "response": "d"},
        {"instruction": "a", "input": "", "output": "d"},
        {"prompt": "a", "completion": "e"},
    ]
    (place / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = []
    prepare(compose_config([*chat, f"data.path={place}/mixed.jsonl", f"data.out={place}/p"]).data, lines.append)
    found = next(line for line in lines if "ShareGPT" in line)
    for kind in ("4 x messages", "2 x ShareGPT", "1 x Alpaca", "1 x prompt and completion", "1 x Dolly"):
        assert kind in found
    assert "1 x with tool calls" in found
    assert not os.path.exists("new")
