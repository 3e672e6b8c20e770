"""Pairs of preferences: what is one, which tokens of it are learned, and how it is read as windows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import load_config
from hybridlm.data.chat import template_of
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.preparing.split import position
from hybridlm.data.reading.documents import Bad, Document, Turn
from hybridlm.data.reading.preferences import PreferenceRecords
from hybridlm.data.reading.readers import read_parquet
from hybridlm.data.windows.order import IGNORE
from hybridlm.data.windows.splits import train_source, val_windows
from hybridlm.errors import ConfigError

ASK, GOOD, BAD = Turn("user", "a"), Turn("assistant", "yes"), Turn("assistant", "no")


def messages(*turns):
    return [turn._asdict() for turn in turns]


def record(**fields):
    return PreferenceRecords().document("a.jsonl:3", fields)


@pytest.mark.parametrize(
    ("fields", "context", "rejected"),
    [
        ({"prompt": "a", "chosen": "yes", "rejected": "no"}, (ASK,), (BAD,)),
        ({"question": "a", "chosen": "yes", "rejected": "no", "system": ""}, (ASK,), (BAD,)),
        (
            {"prompt": "a", "chosen": "yes", "rejected": "no", "system": "s"},
            (Turn("system", "s"), ASK),
            (BAD,),
        ),
        ({"prompt": messages(ASK), "chosen": messages(GOOD), "rejected": messages(BAD)}, (ASK,), (BAD,)),
        ({"prompt": "a", "chosen": messages(ASK, GOOD), "rejected": messages(ASK, BAD)}, (ASK,), (BAD,)),
        (
            {"chosen": messages(ASK, BAD, ASK, GOOD), "rejected": messages(ASK, BAD, ASK, BAD, ASK, BAD)},
            (ASK, BAD, ASK),
            (BAD, ASK, BAD),
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: a\n\nAssistant: no"},
            (ASK,),
            (BAD,),
        ),
    ],
)
def test_every_form_of_a_pair_is_read(fields, context, rejected):
    found = record(**fields)
    assert isinstance(found, Document), found
    assert (found.turns, found.rejected) == ((*context, GOOD), (*context, *rejected))
    assert found.context == len(context)
    assert found.digest != Document("", "", turns=found.turns).digest


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "a", "chosen": "yes"}, "no 'rejected'"),
        ({"text": "a"}, "no 'chosen'"),
        ({"prompt": "a", "chosen": "yes", "rejected": "yes"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "yes"}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": "yes", "rejected": 3}, "'rejected' is not a list"),
        ({"chosen": "yes", "rejected": "no"}, "no prompt, and 'chosen' is no transcript of Human and Assistant"),
        (
            {"chosen": messages(ASK, GOOD), "rejected": messages(Turn("user", "b"), GOOD)},
            "chosen and rejected differ in more than answers",
        ),
        (
            {"chosen": messages(ASK, GOOD), "rejected": messages(ASK, GOOD, ASK)},
            "chosen and rejected differ in more than answers",
        ),
        ({"chosen": messages(ASK, GOOD), "rejected": [{"role": "critic", "content": "a"}]}, "unknown role 'critic'"),
    ],
)
def test_records_that_are_no_pairs_are_reported(fields, said):
    found = record(**fields)
    assert isinstance(found, Bad)
    assert found.what == said


def test_pairs_of_one_prompt_are_on_one_side():
    one, two = (record(prompt="a", chosen=chosen, rejected="no") for chosen in ("yes", "maybe"))
    assert position(one) == position(two) != position(record(prompt="b", chosen="yes", rejected="no"))
    assert one.digest != two.digest


def test_a_table_is_read_as_lines_are(tmp_path):
    rows = [
        {"prompt": "a", "chosen": messages(ASK, GOOD), "rejected": messages(ASK, BAD), "score": 3},
        {"prompt": None, "chosen": messages(ASK, BAD), "rejected": messages(ASK, GOOD), "score": 4},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as file:
        found = list(read_parquet("a", file, PreferenceRecords()))
    assert [(one.turns, one.rejected) for one in found] == [((ASK, GOOD), (ASK, BAD)), ((ASK, BAD), (ASK, GOOD))]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("pairs")
    records = [{"prompt": f"say {i}", "chosen": f"{i} " * (i % 7 + 1), "rejected": f"not {i}"} for i in range(60)]
    records += [
        {"prompt": "long", "chosen": "x" * 200, "rejected": "y"},
        {"prompt": "same", "chosen": "x", "rejected": "x"},
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return compose_config(
        [
            "data=preferences",
            f"data.path={place}/pairs.jsonl",
            f"data.out={place}/prepared",
            "data.tokenizer.kind=bytes",
            "data.seq_len=48",
            "data.val_fraction=0.3",
            "optim=dpo",
        ]
    ).data


def test_a_window_is_two_rows_that_are_learned_from_the_answer_on(config):
    lines = []
    prepared = prepare(config, lines.append)
    assert any("1 of 62" in line and "the same" in line for line in lines)
    tokenizer, template = prepared.tokenizer, template_of(prepared.tokenizer)
    train, (val,) = train_source(prepared, config, 0), val_windows(prepared, config)
    assert train.too_long + val.too_long == 1
    assert train.numbers + val.numbers == 60
    seen = set()
    for windows in (train, val):
        rows = windows.rows(np.arange(windows.numbers))
        assert windows.targets(np.arange(windows.numbers)).tolist() == [1] * windows.numbers
        for pair in range(windows.numbers):
            texts = []
            for row in (2 * pair, 2 * pair + 1):
                ids, targets = rows.ids[row].tolist(), rows.targets[row]
                assert ids[0] == tokenizer.eos_id
                answer = ids.index(template.prefixes["assistant"][0])
                learned = np.flatnonzero(targets != IGNORE)
                assert learned.tolist() == list(range(answer, answer + len(learned)))
                assert targets[learned[-1]] == template.end_id
                texts.append((tokenizer.decode(ids[:answer]), tokenizer.decode(targets[learned[:-1]].tolist())))
            (asked, chosen), (also, rejected) = texts
            number = int(asked.removeprefix("say "))
            assert (also, chosen, rejected) == (asked, f"{number} " * (number % 7 + 1), f"not {number}")
            seen.add(number)
    assert seen == set(range(60))
    assert sorted(train.choose(np.arange(train.windows)).tolist()) == list(range(train.windows))


def test_a_pair_is_never_split_between_files(config, tmp_path):
    small = config.model_copy(update={"out": str(tmp_path), "shard_mb": 1})
    records = [{"prompt": f"say {i}", "chosen": "z" * 900, "rejected": f"{i}" * 300} for i in range(3000)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    small = small.model_copy(update={"path": str(tmp_path / "many.jsonl"), "seq_len": 2048, "prepare_workers": 1})
    prepared = prepare(small)
    stream = prepared.parts[0].train.stream
    assert len(stream.pieces) > 1
    assert all(piece.documents % 2 == 0 for piece in stream.pieces)
    assert train_source(prepared, small, 0).numbers + val_windows(prepared, small)[0].numbers == 3000


def test_windows_too_short_for_every_pair_are_refused(config):
    prepared = prepare(config)
    with pytest.raises(ConfigError, match="none of"):
        train_source(prepared, config.model_copy(update={"seq_len": 8}), 0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data": {"packing": True}}, "data.packing"),
        ({"data": {"source": "stdlib", "path": None}}, "data.format"),
        (
            {"data": {"source": "mixture", "path": None, "parts": {"a": {"source": "files", "path": "x"}}}},
            "data.format",
        ),
        ({"data": {"format": "chat"}}, "optim.objective"),
    ],
)
def test_what_does_not_go_with_preferences_is_refused(config, change, field):
    tree = {"data": config.model_dump() | change["data"], "optim": {"objective": "dpo"}}
    with pytest.raises(ConfigError) as refused:
        load_config(tree)
    assert any(problem.startswith(field) for problem in refused.value.problems)
