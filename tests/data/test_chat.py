"""Conversations: what is one, how it is written, and that the assistant's words and nothing else are learned."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pyarrow import parquet

from hybridlm.cli.compose import compose_config
from hybridlm.data.chat import encode_conversations, template_of
from hybridlm.data.coloured_tokens import coloured, legend
from hybridlm.data.reading.conversations import ChatRecords
from hybridlm.data.reading.documents import Bad, Document, Turn
from hybridlm.data.reading.readers import read_lines, read_parquet
from hybridlm.data.tokenizer import byte_tokenizer, cuts, load_tokenizer, train_bpe
from hybridlm.data.tokenizer.foreign import EOS
from hybridlm.errors import UserError

OURS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS = ["user\nWhat is 12 + 30?\n\nThe answer is 42.\n    return 'naïve ☃'\n" * 20]
TOKENIZERS = {
    "bytes": byte_tokenizer(OURS),
    "bpe": train_bpe(WORDS, 330, OURS),
    "chatml": train_bpe(WORDS, 330, CHATML),
    "llama": train_bpe(WORDS, 330, LLAMA),
}
# What stands in front of and behind a content.
WRITTEN = {
    "bytes": ("<|{}|>", "<|end|>", ""),
    "bpe": ("<|{}|>", "<|end|>", ""),
    "chatml": ("<|im_start|>{}\n", "<|im_end|>", "\n"),
    "llama": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
}
every = pytest.mark.parametrize("name", TOKENIZERS)
characters = st.characters(exclude_categories=["Cs"])
contents = st.text(characters, min_size=1) | st.sampled_from(
    [*OURS, *CHATML, *LLAMA, EOS, "\n", " a", "\n\n", "the <|end|>\n answer"]
)
talks = st.tuples(
    st.lists(st.builds(Turn, st.just("system"), contents), max_size=1),
    st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), contents), min_size=1, max_size=6),
).map(lambda parts: tuple(parts[0] + parts[1]))
TALK = (
    Turn("system", "Be brief."),
    Turn("user", "What is 12 + 30?"),
    Turn("assistant", "42"),
    Turn("user", "☃"),
    Turn("assistant", "naïve\n"),
)


def talk(turns):
    return Document("a.jsonl:1", "", turns=turns)


def encoded(name, *conversations):
    tokenizer = TOKENIZERS[name]
    return list(encode_conversations(map(talk, conversations), tokenizer, template_of(tokenizer)))


def shown(name, ids):
    """The text of ``ids`` with special tokens as their names."""
    tokenizer, parts, held = TOKENIZERS[name], [], []
    for token in [*ids, None]:
        if token is None or tokenizer.special_name(token):
            parts += [tokenizer.decode(held), "" if token is None else tokenizer.special_name(token)]
            held = []
        else:
            held.append(token)
    return "".join(parts)


def written(name, turns):
    before, end, tail = WRITTEN[name]
    return "".join(before.format(role) + content + end + tail for role, content in turns)


def rendered(name, turns, **more):
    """As transformers renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message):
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(template_of(TOKENIZERS[name]).jinja())
    return template.render(messages=[turn._asdict() for turn in turns], **more)


def record(**fields):
    return ChatRecords().document("a.jsonl:3", fields)


def message(role="assistant", content="yes"):
    return {"role": role, "content": content}


def test_messages_and_pairs_are_conversations():
    records = pickle.loads(pickle.dumps(ChatRecords()))
    found = records.document(
        "a.jsonl:3", {"messages": [{**turn._asdict(), "id": 7} for turn in TALK], "prompt": None, "lang": "en"}
    )
    assert found == Document("a.jsonl:3", "", turns=TALK)
    pair = record(prompt="a", response="b", source="web")
    assert pair == Document("a.jsonl:3", "", turns=(Turn("user", "a"), Turn("assistant", "b")))
    assert pair.digest == record(messages=[message("user", "a"), message("assistant", "b")]).digest
    assert isinstance(record(messages=[message(), message()]), Document)  # turns need not alternate


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
GIVEN = "<tool_response>\n{}\n</tool_response>"


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        ({"messages": [message("developer", "s"), message(content="b")]}, [("system", "s"), ("assistant", "b")]),
        (
            {
                "messages": [
                    message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]),
                    message(),
                ]
            },
            [("user", "abc"), ("assistant", "yes")],
        ),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": [message("user", "a")], "completion": [message(content="b")]}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "x", "output": "b"}, [("user", "a\n\nx"), ("assistant", "b")]),
        (
            {
                "messages": [
                    message("user", "a"),
                    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "2"},
                    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "3"}]},
                    message(content="b"),
                ]
            },
            [
                ("user", "a"),
                ("assistant", f"{CALLED}\n{CALLED}"),
                ("user", f"{GIVEN.format('2')}\n{GIVEN.format('3')}"),
                ("assistant", "b"),
            ],
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "now", "function_call": CALL["function"]},
                    message("function", "2"),
                    message(),
                ]
            },
            [("assistant", f"now\n{CALLED}"), ("user", GIVEN.format("2")), ("assistant", "yes")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "now"},
                    {"from": "function_call", "value": "f"},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            [
                ("user", "a"),
                ("assistant", "now\n<tool_call>\nf\n</tool_call>"),
                ("user", GIVEN.format("2")),
                ("assistant", "b"),
            ],
        ),
    ],
)
def test_every_form_of_a_conversation_is_read(fields, turns):
    assert record(**fields) == Document("a.jsonl:3", "", turns=tuple(Turn(*turn) for turn in turns))


@pytest.mark.parametrize("name", ["chatparts", "chattool", "sharegpt"])
def test_forms_of_other_programs_are_read_from_files(name, tmp_path):
    path = Path(__file__).parent / f"conversations/{name}.jsonl"
    with path.open("rb") as lines:
        found = list(read_lines("a", lines, ChatRecords()))
    assert len(found) == 6
    assert all(isinstance(one, Document) for one in found)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as file:
        table = list(read_parquet("a", file, ChatRecords()))
    assert [one.turns for one in table] == [one.turns for one in found]


FIELDS = "no messages, conversations, prompt with response, or instruction with output"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, f"{FIELDS} (it has none)"),
        ({"prompt": "a", "id": 1}, f"{FIELDS} (it has prompt, id)"),
        ({"prompt": "a", "response": None}, "'response' is not text (null)"),
        ({"prompt": ["a"], "response": "b"}, "'prompt' is not text (list)"),
        ({"prompt": "", "response": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "response": "\ud800"}, "'response' is not text (half a surrogate pair)"),
        ({"messages": None}, f"{FIELDS} (it has messages)"),
        ({"messages": message()}, "'messages' is not a list (dict)"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [message(), "hi"]}, "a message is not an object (message 2: str)"),
        ({"messages": [{"name": "gpt", "value": "a"}]}, "a message has no 'role' (message 1: it has name, value)"),
        ({"messages": [{"role": "user"}]}, "a message has no 'content' (message 1: it has role)"),
        ({"messages": [message(3)]}, "unknown role '3' (message 1; docs/data.md lists the known roles)"),
        (
            {"messages": [message(), message("critic")]},
            "unknown role 'critic' (message 2; docs/data.md lists the known roles)",
        ),
        (
            {"messages": [message("x" * 99)]},
            f"unknown role '{'x' * 40}' (message 1; docs/data.md lists the known roles)",
        ),
        (
            {"messages": [message("user"), message("system"), message()]},
            "role 'system' after the first message (message 2)",
        ),
        (
            {"messages": [message("user"), message(content=None)]},
            "the content of a message is not text (message 2: null)",
        ),
        (
            {"messages": [message("user", [{"type": "text"}])]},
            "the content of a message is not text (message 1: a part of type text)",
        ),
        (
            {"messages": [message("user", [{"type": "image_url", "image_url": {}}]), message()]},
            "the content of a message is not text (message 1: a part of type image_url)",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a tool call has no name (message 1)"),
        (
            {"messages": [message(content="\udfff")]},
            "the content of a message is not text (message 1: half a surrogate pair)",
        ),
        ({"messages": [message(content="")]}, "the content of a message is empty (message 1)"),
        ({"messages": [message("system"), message("user")]}, "no assistant message (2 of other roles)"),
    ],
    ids=str,
)
def test_records_that_are_not_conversations_are_reported(fields, said):
    found = record(**fields)
    assert isinstance(found, Bad)
    assert str(found) == f"a.jsonl:3: {said}"
    assert found.what == said.partition(" (")[0]


@every
@settings(max_examples=150, deadline=None)
@given(turns=talks)
def test_only_assistant_contents_and_their_ends_are_learned(name, turns):
    ((ids, learned),) = encoded(name, turns)
    assert (ids.dtype, learned.dtype, ids.shape) == (np.uint32, np.bool_, learned.shape)
    assert shown(name, ids) == written(name, turns)
    _, end, tail = WRITTEN[name]
    answers = [content for role, content in turns if role == "assistant"]
    assert TOKENIZERS[name].decode(ids[learned]) == "".join(answers)
    assert shown(name, ids[learned]) == "".join(content + end for content in answers)
    before = WRITTEN[name][0]
    read = [before.format(role) + ("" if role == "assistant" else content + end) + tail for role, content in turns]
    assert shown(name, ids[~learned]) == "".join(read)
    assert TOKENIZERS[name].eos_id not in ids


@every
@settings(max_examples=50, deadline=None)
@given(turns=talks)
def test_a_content_has_the_same_ids_anywhere(name, turns):
    ((ids, _),) = encoded(name, turns)
    tokenizer, template = TOKENIZERS[name], template_of(TOKENIZERS[name])
    alone = [
        [*template.prefixes[role], *tokenizer.encode(content), template.end_id, *template.tail]
        for role, content in turns
    ]
    assert ids.tolist() == [token for part in alone for token in part]


@every
@settings(max_examples=50, deadline=None)
@given(turns=talks)
def test_a_prompt_is_what_training_saw_before_an_answer(name, turns):
    template = template_of(TOKENIZERS[name])
    answered = (*turns, Turn("assistant", "yes"))
    ((ids, learned),) = encoded(name, answered)
    prompt = template.encode_prompt(turns, TOKENIZERS[name])
    answer = ids[len(prompt) : len(ids) - len(template.tail)].tolist()
    assert ids[: len(prompt)].tolist() == prompt
    assert answer == [*TOKENIZERS[name].encode("yes"), template.end_id]
    assert learned[len(prompt) :].tolist() == [True] * len(answer) + [False] * len(template.tail)


@every
@settings(max_examples=50, deadline=None)
@given(several=st.lists(talks, max_size=6), size=st.integers(1, 30))
def test_many_conversations_are_those_one_by_one(name, several, size):
    alone = [encoded(name, turns)[0] for turns in several]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "BATCH_CHARS", size)
        together = encoded(name, *several)
    assert len(together) == len(alone)
    for (ids, learned), (expected_ids, expected) in zip(together, alone, strict=True):
        assert np.array_equal(ids, expected_ids)
        assert np.array_equal(learned, expected)


def test_conversations_are_read_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(cuts, "BATCH_CHARS", 400)
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield talk(
                (Turn("user", "a"), Turn("assistant", "b"))
            )  # short ones are counted as more than their characters

    stream = encode_conversations(endless(), TOKENIZERS["bpe"], template_of(TOKENIZERS["bpe"]))
    for count in range(1, 40):
        next(stream)
        assert len(read) <= count + 10


def test_a_text_among_conversations_is_a_value_error():
    tokenizer = TOKENIZERS["bytes"]
    with pytest.raises(ValueError, match="a is not a conversation"):
        list(encode_conversations([Document("a", "text")], tokenizer, template_of(tokenizer)))


def test_the_first_style_with_all_its_tokens_is_used():
    for tokens, end in ((OURS + CHATML, "<|end|>"), (LLAMA + CHATML, "<|im_end|>"), (OURS[:3] + LLAMA, "<|eot_id|>")):
        tokenizer = byte_tokenizer(tokens)
        assert template_of(tokenizer).end_id == tokenizer.special_id(end)


def test_a_tokenizer_without_a_template_is_refused_in_one_line():
    for tokenizer in (byte_tokenizer(), byte_tokenizer(OURS[:3]), byte_tokenizer(CHATML[:1])):
        with pytest.raises(UserError) as caught:
            template_of(tokenizer)
        said = str(caught.value)
        assert len(said.splitlines()) == 1
        assert all(word in said for word in ["data.tokenizer.special_tokens", *OURS, *CHATML, *LLAMA])


def test_a_token_that_ends_documents_cannot_end_messages(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_tokenizer(CHATML).save(path)
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] != EOS]
    facts["model"]["vocab"] |= {"unused": 256}  # so that the others keep their ids
    path.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match=r"<\|im_end\|> of ChatML's template also ends this tokenizer's documents"):
        template_of(load_tokenizer(path))
    assert template_of(load_tokenizer(path, OURS)).style.end == "<|end|>"


@every
@settings(max_examples=50, deadline=None)
@given(turns=talks)
def test_jinja_renders_the_same_text(name, turns):
    assert rendered(name, turns) == written(name, turns)
    assert rendered(name, turns, add_generation_prompt=False) == written(name, turns)
    assert rendered(name, turns, add_generation_prompt=True) == written(name, turns) + WRITTEN[name][0].format(
        "assistant"
    )


@every
def test_jinja_refuses_invalid_conversations(name):
    for turns in ([Turn("tool", "a")], [Turn("user", "a"), Turn("system", "b")]):
        with pytest.raises(TemplateError, match="roles are system, user, assistant"):
            rendered(name, turns)


@every
def test_transformers_gives_the_same_ids(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZERS[name].save(tmp_path / "tokenizer.json")
    template = template_of(TOKENIZERS[name])
    template.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == template.jinja().encode()
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for turns in (
        TALK,
        TALK[1:3],
        (Turn("user", "a\n\n"), Turn("assistant", "  b \n")),
        (Turn("assistant", "\u0301x\r\n"),),
    ):
        ((ids, _),) = encoded(name, turns)
        messages = [turn._asdict() for turn in turns]
        assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == ids.tolist()
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert prompt == template.encode_prompt(turns, TOKENIZERS[name])


def test_learned_tokens_are_bright_and_context_is_dim():
    ((ids, learned),) = encoded("bytes", (Turn("user", "a b"), Turn("assistant", "c\n")))
    text = coloured([TOKENIZERS["bytes"].eos_id, *ids], TOKENIZERS["bytes"], [False, *learned])
    assert text.plain == "<eos><|user|>a·b<|end|><|assistant|>c⏎\n<|end|>"
    styles = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert [style for _, style in styles[:7]] == ["red", "red", *["bright_black"] * 3, "red", "red"]
    assert [token for token, style in styles if " on " in style] == ["c", "⏎\n", "<|end|>"]
    assert styles[-1] == ("<|end|>", "bold white on red")
    assert styles[-2][1] != styles[-3][1]
    with pytest.raises(ValueError, match="shorter"):
        coloured(ids, TOKENIZERS["bytes"], learned[1:])


def test_without_a_mask_every_token_is_bright():
    ids = [*encoded("bytes", TALK[1:3])[0][0], 999]
    assert all(" on " in span.style for span in coloured(ids[:-1], TOKENIZERS["bytes"]).spans)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        coloured(ids, TOKENIZERS["bytes"])


def test_the_legend_shows_every_style_in_one_line():
    assert "\n" not in legend().plain
    assert "learned" in legend().plain
    ((ids, learned),) = encoded("bytes", TALK)
    assert {span.style for span in legend().spans} == {
        span.style for span in coloured(ids, TOKENIZERS["bytes"], learned).spans
    }


def test_the_yaml_composes_and_its_tokens_have_a_template():
    data = compose_config(["data=chat", "data.path=chats/*.jsonl"]).data
    assert (data.source, data.format, data.packing, data.on_bad) == ("files", "chat", True, "skip")
    assert data.tokenizer.special_tokens == OURS
    assert template_of(byte_tokenizer(data.tokenizer.special_tokens)).style.end == "<|end|>"
