import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models

from hybridlm.data.tokenizer import StreamDecoder, Tokenizer, byte_tokenizer, cuts, train_bpe
from hybridlm.data.tokenizer import tokenizer as module
from hybridlm.data.tokenizer.foreign import EOS
from hybridlm.errors import UserError

TEXTS = [
    f"def f{i}(x):\n    if x == {i * 37}:\n        return 'type' + \"naïve ☃\"\n\n\tself._value = don't\r\n" * 3
    for i in range(30)
]
BPE = train_bpe(TEXTS, 400)
BYTES = byte_tokenizer()
SPECIALS = ("<|user|>", "<|end|>", "\n☃ x\n")
BPE_MORE = train_bpe(TEXTS, 400, SPECIALS)
BYTES_MORE = byte_tokenizer(SPECIALS)
both = pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])


@both
@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet="defx \n\r\t01_'☃é\u0301") | st.sampled_from(TEXTS))
def test_any_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids


@both
@settings(max_examples=100, deadline=None)
@given(text=st.text(), cuts=st.lists(st.integers(1, 3), max_size=50))
def test_a_stream_of_ids_gives_the_same_text_and_no_broken_character(tokenizer, text, cuts):
    ids, decoder, pieces = tokenizer.encode(text), StreamDecoder(tokenizer), []
    while ids:
        size = cuts.pop() if cuts else 1
        pieces.append(decoder.feed(ids[:size]))
        ids = ids[size:]
    assert "".join(pieces) + decoder.flush() == text
    assert all(text.count("\ufffd") or "\ufffd" not in piece for piece in pieces)


def test_stream_decoder_shows_an_unfinished_character_only_at_the_end():
    decoder = StreamDecoder(BYTES)
    snowman = BYTES.encode("☃")
    assert [decoder.feed([token]) for token in snowman] == ["", "", "☃"]
    assert decoder.feed(snowman[:2]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(BYTES.encode("a")) == "a"


@both
def test_special_tokens_give_no_text_and_text_gives_no_special_tokens(tokenizer):
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a"), tokenizer.eos_id]) == "a"
    ids = tokenizer.encode(f"a{EOS}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{EOS}b"


@both
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = f"x = 12345 {EOS} ☃\n"
    assert (loaded.fingerprint, loaded.vocab_size, loaded.eos_id) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eos_id,
    )
    assert loaded.encode(text) == tokenizer.encode(text)
    assert np.array_equal(loaded.token_bytes(), tokenizer.token_bytes())


def test_byte_ids_are_the_bytes():
    assert BYTES.vocab_size == 257
    assert BYTES.encode("aé☃") == list("aé☃".encode())
    assert BYTES.eos_id == 256


def test_training_is_deterministic_and_the_texts_matter():
    assert train_bpe(TEXTS, 400).fingerprint == BPE.fingerprint
    assert train_bpe([*TEXTS[:-1], "other words of another kind\n" * 9], 400).fingerprint != BPE.fingerprint


def test_bpe_has_every_byte_and_at_most_the_size_asked_for():
    assert BPE.vocab_size <= 400
    assert {BPE.bytes_of(token) for token in range(BPE.vocab_size)} >= {bytes([value]) for value in range(256)}
    assert train_bpe(["ab"], 5000).vocab_size == 257  # no pair occurs twice
    with pytest.raises(UserError, match="vocab_size=256"):
        train_bpe(TEXTS, 256)


def test_numbers_and_indentation_are_cut_well():
    tokenizer = train_bpe(["        return 1234567\n        yield 'type'\n" * 50], 600)
    pieces = [
        tokenizer.bytes_of(token).decode()
        for token in tokenizer.encode("        return 1234567\n        yield 'type'\n")
    ]
    assert pieces == ["       ", " return", " ", "123", "456", "7", "\n", "       ", " yield", " '", "type", "'\n"]


def test_text_can_be_cut_by_llama_3s_pattern():
    texts = ["x = f'type'\n" * 50]
    own, llama3 = (train_bpe(texts, 300, split=split) for split in ("hybridlm", "llama3"))
    pieces = [[one.bytes_of(token).decode() for token in one.encode("f'type'")] for one in (own, llama3)]
    assert pieces == [["f", "'type", "'"], ["f", "'t", "ype", "'"]]
    assert own.fingerprint != llama3.fingerprint
    assert train_bpe(texts, 300, split="llama3").fingerprint == llama3.fingerprint
    for text in TEXTS:
        assert llama3.decode(llama3.encode(text)) == text
        parts = cuts.cut(text, 7, cuts.places_to_cut(llama3.facts(), [b""]))
        assert [token for part in parts for token in llama3.encode(part)] == llama3.encode(text)


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_long_texts_cut_in_pieces_have_the_ids_of_the_whole(monkeypatch, limit):
    whole = [BPE.encode(text) for text in [*TEXTS, "", "\n\n x", "no line end " * 20]]
    monkeypatch.setattr(module, "PIECE_CHARS", limit)
    monkeypatch.setattr(cuts, "BATCH_CHARS", 60)
    assert [ids.tolist() for ids in BPE.encode_documents([*TEXTS, "", "\n\n x", "no line end " * 20])] == whole


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab1_ ',.:\n\r\t\u00a0\u2028\u0085\u0301é☃你\uff0c", max_size=40), limit=st.integers(1, 10)
)
def test_a_cut_never_changes_ids(text, limit):
    assert [token for piece in cuts.cut(text, limit, cuts.OWN_CUTS) for token in BPE.encode(piece)] == BPE.encode(text)


def test_ids_outside_the_vocabulary_are_refused():
    for token in (-1, 257):
        with pytest.raises(ValueError, match="outside the vocabulary of 257"):
            BYTES.decode([token])


def test_load_refuses_other_files(tmp_path):
    BPE.save(tmp_path / "good.json")
    text = (tmp_path / "good.json").read_text(encoding="utf-8")
    word_level = LibraryTokenizer(models.WordLevel({"a": 0, "☃": 1, EOS: 2}, unk_token="a"))
    word_level.decoder = decoders.ByteLevel()
    without_eos = json.loads(text)
    without_eos["added_tokens"] = []
    del without_eos["model"]["vocab"][EOS]
    cases = {
        "cut": text[: len(text) // 2],
        "empty": "",
        "list": "[]",
        "words": word_level.to_str(),
        "no_eos": json.dumps(without_eos),
    }
    for name, content in cases.items():
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\xff")
    for name in [*cases, "binary", "missing"]:
        with pytest.raises(UserError, match=rf"{name}\.json") as caught:
            Tokenizer.load(tmp_path / f"{name}.json")
        assert len(str(caught.value).splitlines()) == 1, name


def test_special_tokens_follow_the_first_and_count_as_ids():
    assert [BYTES_MORE.special_id(name) for name in (EOS, *SPECIALS)] == [256, 257, 258, 259]
    assert [BPE_MORE.special_id(name) for name in (EOS, *SPECIALS)] == [0, 1, 2, 3]
    assert (BYTES_MORE.vocab_size, train_bpe(TEXTS, 300, SPECIALS).vocab_size) == (260, 300)
    assert {BPE_MORE.bytes_of(token) for token in range(4, BPE_MORE.vocab_size)} >= {
        bytes([value]) for value in range(256)
    }
    assert train_bpe(["ab"], 5000, SPECIALS).vocab_size == 260
    with pytest.raises(UserError, match=r"vocab_size=259: expected 260 \(256 bytes and <\|endoftext\|>, <\|user\|>"):
        train_bpe(TEXTS, 259, SPECIALS)


def test_without_special_tokens_a_tokenizer_is_unchanged():
    """The default job's ids hang on it: <|endoftext|>, then the letters of bytes in their order."""
    assert BPE.eos_id == 0
    assert [BPE.bytes_of(token) for token in range(1, 4)] == [b"!", b'"', b"#"]
    assert train_bpe(TEXTS, 400, (EOS,)).fingerprint == BPE.fingerprint
    assert byte_tokenizer((EOS,)).fingerprint == BYTES.fingerprint


@pytest.mark.parametrize("tokenizer", [BPE_MORE, BYTES_MORE], ids=["bpe", "bytes"])
@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from([EOS, *SPECIALS, "<|", "user", " a", "\n", "☃"]), max_size=8).map("".join) | st.text()
)
def test_additional_special_tokens_give_no_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.special_name(token) for token in ids)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode([tokenizer.special_id("<|user|>"), *ids, tokenizer.special_id("<|end|>")]) == text


def test_only_special_ids_have_a_name():
    assert [BPE_MORE.special_id(name) for name in ("return", "Ġreturn", "!", "<|x|>", "")] == [None] * 5
    assert [BYTES_MORE.special_name(token) for token in (0, 255, 256, 257, 259)] == [
        None,
        None,
        EOS,
        "<|user|>",
        SPECIALS[2],
    ]
    with pytest.raises(ValueError, match="outside the vocabulary of 260"):
        BYTES_MORE.special_name(260)


def test_special_tokens_are_saved(tmp_path):
    for tokenizer in (BPE_MORE, BYTES_MORE):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.fingerprint == tokenizer.fingerprint
        assert [loaded.special_id(name) for name in SPECIALS] == [tokenizer.special_id(name) for name in SPECIALS]
        assert loaded.encode("a<|user|>") == tokenizer.encode("a<|user|>")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("",), "'' is empty"),
        (("<|user|>", "x"), "'x' is text that many documents contain"),
        ((" \n",), r"' \\n' is text that many documents contain"),
        (("<|user|>", "<|end|>", "<|user|>"), r"'<\|user\|>' is listed twice"),
        (("<\ud800>",), "half a surrogate pair"),
    ],
)
def test_unusable_special_token_names_are_refused(names, said):
    for make in (lambda: train_bpe(TEXTS, 400, names), lambda: byte_tokenizer(names)):
        with pytest.raises(UserError, match=rf"data\.tokenizer\.special_tokens: .*{said}.*") as caught:
            make()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["return", "Ġreturn"]
)  # the letter of the blank: the model would take ' return' for it
def test_a_name_that_training_makes_a_token_of_text_is_refused(name):
    with pytest.raises(UserError, match=rf"special_tokens: '{name}' became an ordinary token of this corpus"):
        train_bpe(["return\n return\n" * 50], 400, (name,))
    assert train_bpe(["ab"], 400, (name,)).special_id(name) == 1
