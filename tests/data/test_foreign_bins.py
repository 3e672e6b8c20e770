import json
import tracemalloc

import numpy as np
import pytest

from hybridlm.data.files.bins import BinWriter
from hybridlm.data.files.foreign_bins import open_foreign
from hybridlm.errors import UserError

VOCAB = 50257
DTYPES = {"u16": "<u2", "u32": "<u4"}
KINDS = {"u16": (20240520, 1), "u32": (20240801, 7)}  # llm.c: magic, version
IDS = [50256, 40000, 464, 45000, 1, 0, 50000, 33000]


def array(ids, dtype):
    return np.array(ids).astype(DTYPES[dtype])


def raw(ids, dtype):
    return array(ids, dtype).tobytes()


def headed(ids, dtype, **fields):
    header = np.zeros(256, dtype="<i4")
    values = {"magic": KINDS[dtype][0], "version": KINDS[dtype][1], "count": len(ids), **fields}
    header[:3] = values["magic"], values["version"], values["count"]
    return header.tobytes() + raw(ids, dtype)


def own(path, vocab_size=VOCAB, ids=(1, 2, 3)):
    with BinWriter(path, eos_id=0, vocab_size=vocab_size, tokenizer="f" * 64) as writer:
        writer.add(np.array(ids), 9)
        writer.finish()


def save(path, data):
    path.unlink(missing_ok=True)  # ext4 flushes a file that is written over, which takes a millisecond
    path.write_bytes(data)
    return path


def flipped(data, place, mask):
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def refusal(path, dtype=None, vocab_size=None):
    with pytest.raises(UserError) as caught:
        open_foreign(path, dtype=dtype, vocab_size=vocab_size)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert str(path) in line
    return line


def assert_read(piece, expected, form):
    assert (piece.offset, piece.documents is not None) == (1024 if form == "llm.c" else 0, form == "own")
    assert piece.tokens().dtype == expected.dtype
    assert piece.tokens().tolist() == expected.tolist()
    assert not piece.tokens().flags.writeable


@pytest.mark.parametrize("vocab_size", [None, VOCAB])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_reads_back(tmp_path, dtype, vocab_size):
    expected = array(IDS, dtype)
    path = save(tmp_path / "raw.bin", raw(IDS, dtype))
    assert_read(open_foreign(path, dtype=dtype, vocab_size=vocab_size), expected, "raw")
    path = save(tmp_path / "headed.bin", headed(IDS, dtype))
    for given in (None, dtype):
        assert_read(open_foreign(path, dtype=given, vocab_size=vocab_size), expected, "llm.c")
    largest = VOCAB if dtype == "u16" else 65536
    own(tmp_path / "own.bin", largest, [1, 2, 3])
    for given in (None, dtype):
        file = open_foreign(tmp_path / "own.bin", dtype=given, vocab_size=vocab_size)
        assert_read(file, array([0, 1, 2, 3, 0], dtype), "own")
        assert file.path == tmp_path / "own.bin"


def test_large_ids_need_u32(tmp_path):
    ids = [128255, 65536, 3, 0]
    assert_read(
        open_foreign(save(tmp_path / "a.bin", raw(ids, "u32")), dtype="u32", vocab_size=128256),
        array(ids, "u32"),
        "raw",
    )
    assert_read(
        open_foreign(save(tmp_path / "b.bin", headed(ids, "u32")), dtype=None, vocab_size=128256),
        array(ids, "u32"),
        "llm.c",
    )


def test_the_json_of_another_program_is_not_a_sidecar(tmp_path):
    path = save(tmp_path / "train.bin", raw(IDS, "u16"))
    for text in ('{"text": "once"}', "[", ""):
        path.with_suffix(".json").write_text(text)
        assert open_foreign(path, dtype="u16", vocab_size=VOCAB).tokens().tolist() == IDS
        assert "no sidecar" in refusal(path)
    path = save(tmp_path / "tokens.json", raw(IDS, "u16"))
    assert open_foreign(path, dtype="u16", vocab_size=VOCAB).tokens().tolist() == IDS


LATE = [5] * 9 + [VOCAB]
# The content, data.dtype, the vocabulary's size and what the refusal says.
REFUSED = {
    "empty": (b"", "u16", None, "is empty: 0 bytes"),
    "no_dtype": (
        raw(IDS, "u16"),
        None,
        VOCAB,
        r"data.dtype must be u16 or u32: its 16 bytes fit u16 \(8 tokens\) and u32 \(4 tokens\)$",
    ),
    "no_dtype_pairs": (raw([1, 2, 3], "u16"), None, VOCAB, r"its 6 bytes fit u16 \(3 tokens\)$"),
    "no_dtype_odd": (b"abc", None, None, "its 3 bytes fit neither u16 nor u32"),
    "odd_u16": (b"abc", "u16", None, "not a multiple of 2 bytes, as data.dtype u16 requires: its 3 bytes fit neither"),
    "odd_u32": (
        raw([1, 2, 3], "u16"),
        "u32",
        None,
        r"not a multiple of 4 bytes, as data.dtype u32 requires: its 6 bytes fit u16 \(3 tokens\)",
    ),
    "u16_id": (
        raw(LATE, "u16"),
        "u16",
        VOCAB,
        r"id 50257 at token 9 \(byte 18\) is outside the vocabulary of 50257: expected 0 to 50256$",
    ),
    "u32_id": (
        raw(LATE, "u32"),
        "u32",
        VOCAB,
        r"id 50257 at token 9 \(byte 36\) is outside the vocabulary of 50257: expected 0 to 50256$",
    ),
    "u32_one_bad_id": (raw([5, 70000, 6], "u32"), "u32", VOCAB, r"id 70000 at token 1 \(byte 4\) is outside .* 50256$"),
    "u32_large_id": (
        raw([5, 1 << 31, 6], "u32"),
        "u32",
        None,
        r"id 2147483648 at token 1 \(byte 4\) is implausible: .* 2147483647$",
    ),
    "u16_as_u32": (
        raw(IDS, "u16"),
        "u32",
        VOCAB,
        r"id 2621490256 at token 0 .* 50256; the file looks like u16: set data.dtype to u16$",
    ),
    "u16_as_u32_blind": (
        raw(IDS, "u16"),
        "u32",
        None,
        "id 2621490256 at token 0 .* implausible.*; the file looks like u16: set",
    ),
    "u16_as_u32_llama": (
        raw(IDS, "u16"),
        "u32",
        128256,
        "outside the vocabulary of 128256: .*; the file looks like u16: set",
    ),
    "u32_as_u16": (
        raw(IDS, "u32"),
        "u16",
        VOCAB,
        "looks like u32, not u16: every second 16-bit word is zero; set data.dtype to u32",
    ),
    "u32_as_u16_blind": (raw(IDS, "u32"), "u16", None, "looks like u32, not u16: every second 16-bit word is zero"),
    "u32_as_u16_llama": (
        raw([128255, 9, 8], "u32"),
        "u16",
        128256,
        "looks like u32, not u16: every second 16-bit word is at most 1;",
    ),
    "gpt2_version": (
        headed(IDS, "u16", version=2),
        None,
        None,
        r"\(llm.c, GPT-2 magic 20240520\) has version 2 at byte 4; expected 1$",
    ),
    "llama_version": (
        headed(IDS, "u32", version=1),
        None,
        None,
        r"\(llm.c, Llama-3 magic 20240801\) has version 1 at byte 4; expected 7$",
    ),
    "header_cut": (
        headed(IDS, "u16")[:1023],
        None,
        None,
        "truncated in its header: it has 1023 bytes, the header alone has 1024",
    ),
    "tokens_cut": (
        headed(IDS, "u16")[:-2],
        None,
        None,
        "token count 8 at byte 8, but 14 bytes after its header, at 2 per token",
    ),
    "half_token": (
        headed(IDS, "u32")[:-1],
        None,
        None,
        "token count 8 at byte 8, but 31 bytes after its header, at 4 per token",
    ),
    "longer": (headed(IDS, "u16") + b"\0", None, None, "token count 8 at byte 8, but 17 bytes"),
    "negative_count": (headed(IDS, "u16", count=-8), None, None, "token count -8 at byte 8, but 16 bytes"),
    "no_tokens": (headed([], "u16"), None, None, "is empty: 0 tokens after its header"),
    "gpt2_is_u16": (
        headed(IDS, "u16"),
        "u32",
        None,
        r"data.dtype is u32, but by the magic 20240520 .* holds u16: .* set u16$",
    ),
    "llama_is_u32": (
        headed(IDS, "u32"),
        "u16",
        None,
        r"data.dtype is u16, but by the magic 20240801 .* holds u32: .* set u32$",
    ),
    "gpt2_id": (
        headed(LATE, "u16"),
        None,
        VOCAB,
        r"id 50257 at token 9 \(byte 1042\) is outside the vocabulary of 50257",
    ),
    "llama_id": (
        headed(LATE, "u32"),
        None,
        VOCAB,
        r"id 50257 at token 9 \(byte 1060\) is outside the vocabulary of 50257",
    ),
    "other_magic": (
        headed(IDS, "u16", magic=20250211),
        "u16",
        None,
        "the magic 20250211 at byte 0; expected 20240520 .* or 20240801",
    ),
    "other_magic_u32": (headed(IDS, "u32", magic=7), "u32", None, "a header like llm.c's, but the magic 7 at byte 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_where_and_what_is_legal(tmp_path, name):
    data, dtype, vocab_size, message = REFUSED[name]
    path = save(tmp_path / "a.bin", data)
    refusal(path, dtype, vocab_size)
    with pytest.raises(UserError, match=message):
        open_foreign(path, dtype=dtype, vocab_size=vocab_size)


def test_unreadable_files_are_refused(tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none.bin", "u16")
    assert "not a regular file" in refusal(tmp_path, "u16")


def test_our_own_files_are_checked_against_sidecar_dtype_and_vocabulary(tmp_path):
    path = tmp_path / "own.bin"
    own(path)
    assert "data.dtype is u32, but by its sidecar" in refusal(path, "u32")
    assert "id 3 at token 3 (byte 6) is outside the vocabulary of 3" in refusal(path, vocab_size=3)
    save(path, flipped(path.read_bytes(), 2, 1))
    assert "SHA-256" in refusal(path)
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "count": "5"}))
    with pytest.raises(UserError, match=r"sidecar .* is damaged .*: count"):
        open_foreign(path, dtype=None, vocab_size=None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_header_cut_anywhere_is_refused(tmp_path, dtype):
    data = headed(IDS, dtype)
    for size in range(1024):
        path = save(tmp_path / "a.bin", data[:size])
        line = refusal(path)
        assert ("is empty" if size == 0 else "must be u16 or u32" if size < 4 else "truncated in its header") in line
        refusal(path, dtype, VOCAB)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flip_in_a_used_field_is_refused(tmp_path, dtype):
    data = headed(IDS, dtype)
    for place in range(12):
        for mask in [1 << bit for bit in range(8)] + [0xFF]:
            path = save(tmp_path / "a.bin", flipped(data, place, mask))
            for given in (None, dtype):
                for vocab_size in (None, VOCAB):
                    refusal(path, given, vocab_size)


def test_damage_and_wrong_widths_are_refused_or_read_literally(tmp_path):
    """Whatever opens holds the tokens that stand in the file, in the width they were written with."""
    rng = np.random.default_rng(7)
    outcomes = {"read": 0, "refused": 0}
    own(tmp_path / "own.bin", ids=range(1, 60))
    intact = (tmp_path / "own.bin").read_bytes()
    for _ in range(1500):
        form, width, damage = (
            rng.choice(["raw", "llm.c", "own"]),
            rng.choice(["u16", "u32"]),
            rng.choice(["none", "flip", "cut"]),
        )
        ids = rng.integers(0, VOCAB, size=64)
        if form == "own":
            path, data, width = tmp_path / "own.bin", intact, "u16"
        else:
            path, data = tmp_path / "a.bin", raw(ids, width) if form == "raw" else headed(ids, width)
        if damage == "flip":
            data = flipped(data, int(rng.integers(len(data))), int(rng.integers(1, 256)))
        elif damage == "cut":
            data = data[: int(rng.integers(4, len(data)))]  # of a shorter one the magic is cut off
        save(path, data)
        # A flip may leave one upper half of an id nonzero, and then nothing betrays a width that is wrong too.
        dtype = rng.choice(["u16", "u32", None] if damage == "none" else [width, None])
        line = ""
        try:
            file = open_foreign(path, dtype=dtype, vocab_size=rng.choice([None, VOCAB]))
        except UserError as error:
            line = str(error)
        if line:
            assert len(line.splitlines()) == 1
            outcomes["refused"] += 1
            continue
        body = data[1024:] if form == "llm.c" else data
        assert_read(file, np.frombuffer(body, dtype=DTYPES[width]), form)
        outcomes["read"] += 1
    assert sum(outcomes.values()) > 1000
    assert min(outcomes.values()) > 300


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_bad_id_is_found_across_blocks(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("hybridlm.data.files.foreign_bins._BLOCK", 8)
    width = array([0], dtype).itemsize
    open_foreign(save(tmp_path / "a.bin", headed([99] * 25, dtype)), dtype=None, vocab_size=100)
    for position in range(25):
        tokens = [99] * position + [100] + [300] * (24 - position)
        line = refusal(save(tmp_path / "a.bin", headed(tokens, dtype)), vocab_size=100)
        byte = 1024 + position * width
        assert f"id 100 at token {position} (byte {byte}) is outside the vocabulary of 100" in line


def test_a_vocabulary_larger_than_the_width_holds_every_id(tmp_path):
    path = save(tmp_path / "a.bin", headed([65535], "u16"))
    for vocab_size in (65536, 128256):
        open_foreign(path, dtype=None, vocab_size=vocab_size)
    assert "id 65535 at token 0" in refusal(path, vocab_size=65535)


def test_checking_takes_memory_for_one_block_only(tmp_path):
    path = tmp_path / "a.bin"
    with path.open("wb") as file:  # sparse: 64 MiB of zeros but for the last id
        file.seek((1 << 26) - 4)
        file.write(raw([9], "u32"))
    tracemalloc.start()
    line = refusal(path, "u32", 9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"id 9 at token {(1 << 24) - 1} (byte {(1 << 26) - 4})" in line
    assert peak < 16 << 20
