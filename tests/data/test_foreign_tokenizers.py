"""Tokenizers of other models, made small here: every text comes back, every byte is counted, every refusal says why in
one line."""

import hashlib
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.tokenizer import StreamDecoder, Tokenizer, byte_tokenizer, cuts, load_tokenizer, train_bpe
from hybridlm.data.tokenizer import tokenizer as module
from hybridlm.data.tokenizer.foreign import EOS
from hybridlm.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    f"def f{i}(x):\n    return 'type' + \"naïve\"\n\n\tself._value = don't; {i * 37}\r\n the Hello World\n" * 3
    for i in range(30)
]
COUNT = 350  # ids of the small byte-level models
BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]
SPECIALS = ["</s>", "<s>", "<unk>", "<0x0A>", "<0xE2>", EOS, "<|im_end|>", "<|x|>"]
TRICKY = [*SPECIALS, "▁", "▁▁", "  ", " ", "\n", "☃", "e", "<", "0", "self", "\u0301", "é"]
texts = st.text() | st.lists(st.sampled_from(TRICKY), max_size=8).map("".join) | st.sampled_from(TEXTS)


def special(token, content, **more):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": content, **plain, **more}


def byte_level(eos=EOS, pattern=CL100K, size=COUNT):
    """A byte-level BPE as Llama 3 and Qwen write it: the ids of special tokens come after the model's."""
    library = LibraryTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    )
    facts = json.loads(library.to_str())
    count = len(facts["model"]["vocab"])
    facts["added_tokens"] = [
        special(count, "<|begin|>"),
        special(count + 1, eos),
        special(count + 2, "<|x|>", special=False),
    ]
    return facts


def sentencepiece(size=400):
    """As Llama 2 has it: BPE of text with ▁ for blanks, byte tokens, a blank before every text, <s> before its ids."""
    library = LibraryTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=50
    )
    library.train_from_iterator((line for text in TEXTS for line in text.split("\n")), trainer)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    facts = json.loads(library.to_str())
    vocab = facts["model"]["vocab"]
    for content in BYTE_TOKENS:
        vocab[content] = len(vocab)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    facts["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    facts["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    return facts


def metaspace(size=400):
    """As newer Mistrals have it: Metaspace in place of the normalizer."""
    facts = sentencepiece(size)
    facts["normalizer"] = None
    facts["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return facts


def unigram():
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], *[[content, 0.0] for content in BYTE_TOKENS]]
    words = ["▁", "▁the", "▁return", "self", "value", "e", "t", "s", "<", "0", "x", "▁▁▁▁", "lo", "Hel"]
    pieces += [[word, -1.0 - place / 10] for place, word in enumerate(words)]
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": pieces},
    }


def write(folder, facts, name="tokenizer.json", **files):
    """``facts`` in a folder that is made for it, beside other JSON files."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(facts), encoding="utf-8")
    for other, content in files.items():
        (folder / f"{other}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    sources = {"bytes": byte_level(), "eos": byte_level("<|im_end|>")}
    sources |= {"o200k": byte_level(pattern=O200K), "gpt2": byte_level(pattern=GPT2)}
    sources |= {"bpe": sentencepiece(), "metaspace": metaspace(), "unigram": unigram()}
    return {name: load_tokenizer(write(folder, facts, f"{name}.json")) for name, facts in sources.items()}


NAMES = ["bytes", "eos", "bpe", "metaspace", "unigram", "o200k", "gpt2"]
every = pytest.mark.parametrize("name", NAMES)


def refused(path, *words):
    """``path`` is refused in one line that names it and holds ``words``."""
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert len(str(caught.value).splitlines()) == 1
    for word in [*words, path.name if path.suffix != ".model" else path.parent.name]:
        assert word in str(caught.value), str(caught.value)


@every
@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_any_text_comes_back_and_its_bytes_are_counted(loaded, name, text):
    tokenizer = loaded[name]
    ids = tokenizer.encode(text)
    assert tokenizer.lossless
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.feed([token]) for token in ids) + decoder.flush() == text


@every
def test_saved_and_loaded_is_the_same(loaded, name, tmp_path):
    tokenizer = loaded[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    plain = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for again in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        load_tokenizer(tmp_path / "tokenizer.json"),
        load_tokenizer(tmp_path),
    ):
        assert (again.fingerprint, again.vocab_size, again.eos_id) == (
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.eos_id,
        )
        assert all(again.encode(text) == tokenizer.encode(text) for text in (*TEXTS, *TRICKY))
        assert np.array_equal(again.token_bytes(), tokenizer.token_bytes())
    assert plain.encode(TEXTS[0]).ids == tokenizer.encode(
        TEXTS[0]
    )  # by default with special tokens: none are left to add


@every
@pytest.mark.parametrize("limit", [1, 7, 50])
def test_long_texts_cut_in_pieces_have_the_ids_of_the_whole(loaded, name, monkeypatch, limit):
    long = [*TEXTS, "", "a\n\nb\n\n\nc\nd", ";\n/x;\n\n/y\n", "a </s> ▁ b\nc" * 9]
    whole = [ids.tolist() for ids in loaded[name].encode_documents(long)]
    monkeypatch.setattr(module, "PIECE_CHARS", limit)
    monkeypatch.setattr(cuts, "BATCH_CHARS", 60)
    assert [ids.tolist() for ids in loaded[name].encode_documents(long)] == whole


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet="a1/ ;,.\n\r\t\u00a0\u2028\u0301é☃'s", max_size=30), limit=st.integers(1, 5))
@pytest.mark.parametrize("name", ["bytes", "o200k", "gpt2", "bpe", "unigram"])
def test_a_cut_never_changes_ids(loaded, name, text, limit):
    tokenizer = loaded[name]
    assert tokenizer._cuts
    cut = cuts.cut(text, limit, tokenizer._cuts)
    assert [token for piece in cut for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_text_is_not_cut_where_a_token_spans_line_ends(tmp_path):
    facts = sentencepiece()
    vocab = facts["model"]["vocab"]
    vocab |= {"\n": len(vocab), "\nt": len(vocab) + 1}
    facts["model"]["merges"].append(["\n", "t"])
    tokenizer = load_tokenizer(write(tmp_path, facts))
    assert not [place for place in tokenizer._cuts if "n" in place.pattern]
    assert tokenizer.encode("a\nt")[-1] == vocab["\nt"]


def test_a_sentencepiece_text_gets_no_leading_space_and_no_bos(loaded):
    for name in ("bpe", "metaspace", "unigram"):
        tokenizer = loaded[name]
        assert tokenizer.bytes_of(tokenizer.encode(" the")[0])[:1] == b" "
        assert tokenizer.bytes_of(tokenizer.encode("the")[0])[:1] != b" "
        assert tokenizer.bytes_of(1) == tokenizer.bytes_of(0) == b""  # <s>, <unk>
        assert tokenizer.eos_id == 2
        assert {tokenizer.bytes_of(token) for token in range(3, tokenizer.vocab_size)} >= {
            bytes([value]) for value in range(256)
        }
        assert tokenizer.decode(tokenizer.encode("▁ ▁")) == "▁ ▁"


def test_our_own_tokenizer_is_loaded_unchanged(tmp_path):
    for tokenizer in (train_bpe(TEXTS, 400), byte_tokenizer()):
        tokenizer.save(tmp_path / "tokenizer.json")
        assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint


CHAT = ("<|user|>", "<|end|>")


@pytest.fixture(scope="module")
def with_chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    sources = {"bytes": byte_level(), "bpe": sentencepiece(), "metaspace": metaspace(), "unigram": unigram()}
    return {name: load_tokenizer(write(folder, facts, f"{name}.json"), CHAT) for name, facts in sources.items()}


@pytest.mark.parametrize("name", ["bytes", "bpe", "metaspace", "unigram"])
@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from([*CHAT, *TRICKY, "<|", "user"]), max_size=8).map("".join) | texts)
def test_added_special_tokens_follow_the_others_and_give_no_text(loaded, with_chat, name, text):
    before, tokenizer = loaded[name], with_chat[name]
    assert [tokenizer.special_id(content) for content in CHAT] == [before.vocab_size, before.vocab_size + 1]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (before.vocab_size + 2, before.eos_id)
    ids = tokenizer.encode(text)
    assert ids == before.encode(text)
    assert max(ids, default=0) < before.vocab_size
    assert tokenizer.decode([before.vocab_size, *ids, before.vocab_size + 1]) == text
    assert np.array_equal(tokenizer.token_bytes(), [*before.token_bytes(), 0, 0])


@pytest.mark.parametrize("name", ["bytes", "bpe", "metaspace", "unigram"])
def test_added_special_tokens_are_saved_and_found_again(with_chat, name, tmp_path):
    tokenizer = with_chat[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    for again in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        load_tokenizer(tmp_path, CHAT),
        load_tokenizer(tmp_path, CHAT[::-1]),
    ):
        assert again.fingerprint == tokenizer.fingerprint
        assert [again.special_name(again.special_id(content)) for content in CHAT] == [*CHAT]
        assert again.encode("a <|user|> b") == tokenizer.encode("a <|user|> b")


def test_existing_special_tokens_keep_their_ids(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, byte_level()), ("<|new|>", "<|begin|>", EOS))
    assert [tokenizer.special_id(content) for content in ("<|begin|>", EOS, "<|new|>")] == [COUNT, COUNT + 1, COUNT + 3]
    assert tokenizer.fingerprint == load_tokenizer(write(tmp_path, byte_level()), ("<|new|>",)).fingerprint
    assert (
        load_tokenizer(write(tmp_path, byte_level()), ("<|begin|>",)).fingerprint
        == load_tokenizer(write(tmp_path, byte_level())).fingerprint
    )
    assert load_tokenizer(write(tmp_path, sentencepiece()), ("<unk>", "<s>")).special_id("<s>") == 1


def test_special_tokens_follow_gaps_and_ids_out_of_order(tmp_path):
    facts = byte_level()
    facts["added_tokens"][2]["id"] = 600
    facts["model"]["vocab"]["zz"] = 700
    tokenizer = load_tokenizer(write(tmp_path, facts), CHAT)
    assert [tokenizer.special_id(content) for content in CHAT] == [701, 702]
    assert (tokenizer.bytes_of(600), tokenizer.bytes_of(700), tokenizer.vocab_size) == (b"<|x|>", b"zz", 703)
    assert [tokenizer.special_name(token) for token in (500, 600, 701)] == [None, None, "<|user|>"]
    assert tokenizer.decode(tokenizer.encode("<|user|>a<|end|>")) == "<|user|>a<|end|>"
    assert not {701, 702} & set(tokenizer.encode("<|user|>a<|end|>"))
    tokenizer.save(tmp_path / "saved.json")
    assert Tokenizer.load(tmp_path / "saved.json").special_id("<|end|>") == 702


def test_special_token_names_that_are_ordinary_tokens_are_refused(tmp_path):
    for facts, name in (
        (byte_level(), "<|x|>"),
        (byte_level(), "ue"),
        (byte_level(), "Ġreturn"),
        (sentencepiece(), "<0x0A>"),
    ):
        with pytest.raises(
            UserError, match=r"data\.tokenizer\.special_tokens: .* is an ordinary token of .*tokenizer\.json"
        ) as caught:
            load_tokenizer(write(tmp_path, facts), ("<|new|>", name))
        assert repr(name) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    for name in ("", "☃"):
        with pytest.raises(UserError, match=r"data\.tokenizer\.special_tokens"):
            load_tokenizer(write(tmp_path, byte_level()), (name,))


def test_nfc_changes_texts_and_the_bytes_are_those_of_the_normal_form(tmp_path):
    facts = byte_level("<|im_end|>")
    facts["normalizer"] = {"type": "NFC"}
    tokenizer = load_tokenizer(write(tmp_path, facts))
    assert not tokenizer.lossless
    for text in ("e\u0301", "naïve", "\u1100\u1161\u11a8 ☃"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
        assert tokenizer.token_bytes()[ids].sum() == len(unicodedata.normalize("NFC", text).encode())


def test_a_bare_file_has_the_first_end_of_document_name_that_it_knows(tmp_path):
    for name in ("<|end_of_text|>", "<|im_end|>", "</s>", "<eos>"):
        facts = byte_level(name)
        facts["added_tokens"] += [] if name == "<eos>" else [special(COUNT + 3, "<eos>")]
        tokenizer = load_tokenizer(write(tmp_path, facts))
        assert tokenizer.eos_id == COUNT + 1
        assert tokenizer.bytes_of(tokenizer.eos_id) == b""
    refused(write(tmp_path, byte_level("<stop>")), "no end-of-document token", "<|end_of_text|>", "<|begin|>, <stop>")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<stop>"}},
        {"tokenizer_config": {"eos_token": {"content": "<stop>", "lstrip": False}}},
    ],
    ids=str,
)
def test_a_folder_names_its_end_of_document_token(tmp_path, files):
    facts = byte_level("<stop>")
    path = write(tmp_path / "folder", facts, **files)
    tokenizer = load_tokenizer(path.parent)
    assert tokenizer.eos_id == COUNT + 1
    tokenizer.save(tmp_path / "saved.json")
    assert Tokenizer.load(tmp_path / "saved.json").eos_id == COUNT + 1


def test_an_end_of_document_token_is_made_special(tmp_path):
    facts = byte_level("<stop>")
    facts["added_tokens"][1] |= {"special": False, "rstrip": True}
    path = write(tmp_path / "folder", facts, tokenizer_config={"eos_token": "<stop>"})
    tokenizer = load_tokenizer(path.parent)
    assert tokenizer.bytes_of(tokenizer.eos_id) == b""
    assert tokenizer.decode(tokenizer.encode("a <stop>  b")) == "a <stop>  b"
    del facts["added_tokens"][1]
    facts["model"]["vocab"]["</s>"] = 500
    tokenizer = load_tokenizer(write(tmp_path, facts))
    assert tokenizer.eos_id == 500
    assert tokenizer.eos_id not in tokenizer.encode("a</s>")


@pytest.mark.parametrize("name", ["vocab.json", "o200k_base.tiktoken", "tokenizer.model"])
def test_forms_that_are_not_read_name_the_call_that_converts_them(tmp_path, name):
    (tmp_path / name).write_text("{}")
    refused(tmp_path if name == "vocab.json" else tmp_path / name, "save_pretrained")


def test_added_tokens_keep_their_ids_and_gaps_are_unused(tmp_path):
    facts = byte_level()
    facts["added_tokens"][2]["id"] = 600
    tokenizer = load_tokenizer(write(tmp_path, facts))
    assert tokenizer.vocab_size == 601
    assert tokenizer.bytes_of(600) == b"<|x|>"
    assert tokenizer.encode("a<|x|>")[-1] == 600
    assert not tokenizer.token_bytes()[502:600].any()
    tokenizer.save(tmp_path / "saved.json")
    assert np.array_equal(Tokenizer.load(tmp_path / "saved.json").token_bytes(), tokenizer.token_bytes())
    facts["added_tokens"][2]["id"] = 1 << 30
    refused(write(tmp_path, facts), "largest id is 1073741824", "1048576")


def test_added_tokens_swallow_no_spaces(tmp_path):
    facts = byte_level()
    facts["added_tokens"][2] |= {"lstrip": True, "rstrip": True}
    tokenizer = load_tokenizer(write(tmp_path, facts))
    assert tokenizer.decode(tokenizer.encode("a  <|x|>\n b")) == "a  <|x|>\n b"


def test_a_special_token_spelled_in_a_text_is_text(tmp_path):
    facts = byte_level("</s>")
    vocab = facts["model"]["vocab"]
    vocab |= {"</": 500, "</s": 501, "</s>": 502}
    facts["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    facts["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False, "trim_offsets": True}
    facts["added_tokens"] = [special(502, "</s>")]
    for whole in (False, True):
        facts["model"]["ignore_merges"] = whole
        tokenizer = load_tokenizer(write(tmp_path, facts))
        for text in ("</s>", "a</s></s>", "<</s>\n"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    facts["added_tokens"] = [special(502, "</s>"), special(vocab["x"], "x")]
    refused(write(tmp_path, facts), "'x' cannot be distinguished")


def edit(facts, **changes):
    """``facts`` with fields replaced; ``model__x`` is the field x of the model."""
    for key, value in changes.items():
        where = facts["model"] if key.startswith("model__") else facts
        where[key.removeprefix("model__")] = value
    return facts


def without(facts, content):
    facts["model"]["vocab"].pop(content)
    facts["model"]["merges"] = [pair for pair in facts["model"]["merges"] if content not in ("".join(pair), *pair)]
    return facts


PIECES = {"a": 0, "</s>": 1}
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "a",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
    "vocab": PIECES,
}
METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": True}
REMOVED = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
BYTES_ALONE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (lambda: edit(sentencepiece(), model=WORDPIECE, added_tokens=[]), "its model is WordPiece"),
        (lambda: edit(sentencepiece(), model__byte_fallback=False), "no byte fallback"),
        (lambda: edit(unigram(), model__byte_fallback=False), "no byte fallback"),
        (lambda: edit(unigram(), pre_tokenizer=BYTES_ALONE), "its model is Unigram"),
        (lambda: without(sentencepiece(), "<0x41>"), "no token for 1 bytes (one is '<0x41>')"),
        (lambda: without(byte_level(), "Z"), "no token for 1 bytes (one is 'Z')"),
        (lambda: edit(byte_level(), normalizer={"type": "Lowercase"}), "its normalizer Lowercase changes texts"),
        (lambda: edit(byte_level(), normalizer={"type": "NFKC"}), "its normalizer NFKC changes texts"),
        (
            lambda: edit(sentencepiece(), normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
            "normalizer Replace",
        ),
        (lambda: edit(sentencepiece(), normalizer=None), "does not write spaces as ▁"),
        (lambda: edit(metaspace(), pre_tokenizer=METASPACE), "does not write spaces as ▁"),
        (
            lambda: edit(metaspace(), pre_tokenizer={"type": "WhitespaceSplit"}),
            "pre-tokenizer WhitespaceSplit does not keep",
        ),
        (
            lambda: edit(byte_level(), pre_tokenizer={"type": "Sequence", "pretokenizers": [REMOVED, BYTES_ALONE]}),
            "pre-tokenizer Split",
        ),
        (lambda: edit(byte_level(), model__end_of_word_suffix="</w>"), "word-boundary markers"),
        (
            lambda: edit(byte_level(), pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES_ALONE] * 2}),
            "does not give back the text",
        ),
        (
            lambda: edit(byte_level(), added_tokens=[special(500, EOS), special(500, "<b>")]),
            "its id 500 has two tokens",
        ),
        (lambda: edit(unigram(), added_tokens=[special(2, "</s>"), special(999, "<b>")]), "'<b>' an id other than 999"),
        (lambda: {"a": 1}, "it has no 'model'"),
        (lambda: [], "not a JSON object"),
    ],
)
def test_lossy_tokenizers_are_refused(tmp_path, facts, word):
    refused(write(tmp_path, facts()), word)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    refused(tmp_path / "missing.json", "cannot be read")
    (tmp_path / "cut.json").write_text(json.dumps(byte_level())[:-9], encoding="utf-8")
    refused(tmp_path / "cut.json", "not JSON")
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\xff")
    refused(tmp_path / "binary.json", "not UTF-8 text")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no tokenizer.json", "save_pretrained")
    path = write(tmp_path / "eos", byte_level(), tokenizer_config={"eos_token": "<stop>"})
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: its end-of-document token '<stop>' is not in the vocabulary"
    ):
        load_tokenizer(path.parent)


def test_load_refuses_tokenizers_that_need_changes(tmp_path):
    with pytest.raises(UserError, match="its normalizer Prepend changes texts"):
        Tokenizer.load(write(tmp_path, sentencepiece()))
    with pytest.raises(UserError, match="puts a space before texts"):
        Tokenizer.load(write(tmp_path, metaspace()))


def test_a_token_that_a_template_only_lists_does_not_end_documents(tmp_path):
    """And ours, which lists its own, is read back as it was, whichever other ends it has."""
    library = train_bpe(["some words"], 300, ("<pad>", "</s>"))._library
    library.post_processor = processors.TemplateProcessing(
        single="$A:0", pair="$A:0 $B:1", special_tokens=[("<pad>", 1)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").special_name(0) == "<|endoftext|>"
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    named = load_tokenizer(tmp_path)
    named.save(tmp_path / "own.json")
    again = load_tokenizer(tmp_path / "own.json")
    assert named.special_name(named.eos_id) == again.special_name(again.eos_id) == "</s>"
    assert named.fingerprint == again.fingerprint


def test_a_tokenizer_of_an_old_run_keeps_its_fingerprint(tmp_path):
    """Files of ours once had no mark at the end of document that they list."""
    library = train_bpe(["some words"], 300, ("</s>",))._library
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    library.post_processor = processors.TemplateProcessing(
        single="$A:0", pair="$A:0 $B:1", special_tokens=[("</s>", 1)]
    )
    run = tmp_path / "run"
    run.mkdir()
    library.save(str(run / "tokenizer.json"))
    (run / "config.yaml").write_text("seed: 0")
    old = Tokenizer.load(run / "tokenizer.json")
    assert old.special_name(old.eos_id) == "</s>"
    facts = json.loads((run / "tokenizer.json").read_text())
    as_it_was = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert old.fingerprint == hashlib.sha256(as_it_was.encode()).hexdigest()
    assert load_tokenizer(tmp_path).fingerprint == old.fingerprint
    again = load_tokenizer(run / "tokenizer.json")
    assert (again.eos_id, again.fingerprint) == (old.eos_id, old.fingerprint)
