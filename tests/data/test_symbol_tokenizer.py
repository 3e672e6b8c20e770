"""The tokenizer of a synthetic task: a word for each id, saved and loaded like any other."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.config.synthetic import SyntheticConfig, words
from hybridlm.data.tokenizer import StreamDecoder, Tokenizer, symbol_tokenizer
from hybridlm.data.tokenizer.tokenizer import SymbolTokenizer
from hybridlm.errors import UserError

WORDS = words(SyntheticConfig(task="modular_arithmetic_brackets"))


def test_ids_are_the_positions_of_the_words():
    tokenizer = symbol_tokenizer(WORDS)
    ids = tokenizer.encode("( 3 * 4 ) =")
    assert [WORDS[token] for token in ids] == ["(", "3", "*", "4", ")", "="]
    assert tokenizer.decode([*ids, 0]) == " ( 3 * 4 ) ="
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.token_bytes().sum()) == (len(WORDS), 0, 0)
    assert (tokenizer.special_name(0), tokenizer.special_id("<|endoftext|>"), tokenizer.special_id("=")) == (
        "<|endoftext|>",
        0,
        None,
    )
    assert [ids.tolist() for ids in tokenizer.encode_documents(["", "="])] == [[], [WORDS.index("=")]]
    assert StreamDecoder(tokenizer).feed([WORDS.index("4")]) == " 4"


def test_a_saved_tokenizer_is_loaded_with_its_own_class(tmp_path):
    tokenizer = symbol_tokenizer(WORDS)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert isinstance(loaded, SymbolTokenizer)
    assert (loaded.fingerprint, loaded.encode("1 + 2")) == (tokenizer.fingerprint, tokenizer.encode("1 + 2"))
    assert LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("1 + 2").ids == tokenizer.encode("1 + 2")
    assert tokenizer.fingerprint != symbol_tokenizer([*WORDS, "x"]).fingerprint


@pytest.mark.parametrize("text", ["1 + x", "1+2", "<|endoftext|>"])
def test_an_unknown_word_is_a_one_line_error(text):
    with pytest.raises(UserError, match=r"is not a word .*: \+, -, \*, =") as error:
        symbol_tokenizer(WORDS).encode(text)
    assert len(error.value.problems) == 1


def test_a_file_of_other_words_is_refused(tmp_path):
    tokenizer = symbol_tokenizer(WORDS)
    facts = json.loads(tokenizer._library.to_str())
    facts["model"]["vocab"]["="] = 77
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="its words are not numbered from 0"):
        Tokenizer.load(tmp_path / "tokenizer.json")
