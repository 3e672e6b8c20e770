import gzip
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hybridlm.config.data import DataConfig, PartConfig, TokenizerConfig
from hybridlm.data.corpus import Prepared, TextSplit
from hybridlm.data.preparing import build, corpus_tokenizer, pool
from hybridlm.data.preparing.build import Manifest
from hybridlm.data.preparing.prepare import data_folder, prepare
from hybridlm.data.preparing.split import position
from hybridlm.data.reading.documents import Document
from hybridlm.data.tokenizer import byte_tokenizer, cuts
from hybridlm.errors import UserError

BPE = TokenizerConfig(kind="bpe", vocab_size=300)
BYTES = TokenizerConfig(kind="bytes", vocab_size=4096)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / f"text/{i:02}.txt").write_text(
            f"document {i}: some words, the same words, é and ☃\n" * (i + 1), encoding="utf-8"
        )
    return tmp_path


def config(folder, **changes):
    values = {
        "source": "files",
        "path": f"{folder}/text/*.txt",
        "out": f"{folder}/out",
        "tokenizer": BPE,
        "val_fraction": 0.2,
        **changes,
    }
    return DataConfig(**values)


def expected_text(folder, *, val, below=0.2):
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(folder, "text").glob("*.txt"))]
    return [text for text in texts if (place_of(text) < below) == val]


def place_of(text: str) -> float:
    return position(Document("", text))


def tokens_of(split: TextSplit) -> list[int]:
    return split.stream.read(0, len(split.stream)).tolist()


def texts_of(prepared: Prepared, split: TextSplit) -> list[str]:
    tokens, eos = tokens_of(split), prepared.tokenizer.eos_id
    borders = [place for place, token in enumerate(tokens) if token == eos]
    assert tokens[0] == tokens[-1] == eos
    return [prepared.tokenizer.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(borders)]


def files_of(folder: Path) -> dict[str, bytes]:
    """What a prepared folder holds, but for when its hashes were looked at last."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "verified.json"}


def folders(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name not in ("locks", "scans", "tokenizers"))


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_the_streams_hold_every_document_and_the_counts_are_true(corpus, tokenizer):
    prepared = prepare(config(corpus, tokenizer=tokenizer))
    (part,) = prepared.parts
    for split, val in ((part.train, False), (part.val, True)):
        texts = expected_text(corpus, val=val)
        assert texts_of(prepared, split) == texts
        size = len("".join(texts).encode())
        assert split.documents == len(texts)
        assert split.text_bytes == size == prepared.tokenizer.token_bytes()[tokens_of(split)].sum()
    assert part.train.gzip_bytes is None
    assert 0 < part.val.xz_bytes < size
    assert 0 < part.val.gzip_bytes < size
    manifest = Manifest.model_validate_json((part.folder / "manifest.json").read_bytes())
    assert manifest.documents == 40
    for meta in (*manifest.train.values(), *manifest.val.values()):
        assert (meta.tokenizer, meta.vocab_size) == (prepared.tokenizer.fingerprint, prepared.tokenizer.vocab_size)


def test_bpe_learns_from_the_training_documents_only(corpus):
    first = prepare(config(corpus)).tokenizer.fingerprint
    held_out = next(
        path for path in sorted(Path(corpus, "text").iterdir()) if place_of(path.read_text(encoding="utf-8")) < 0.2
    )
    held_out.write_text(
        next(text for number in range(99) if place_of(text := f"entirely other text {number} " * 99) < 0.2)
    )
    assert prepare(config(corpus)).tokenizer.fingerprint == first


def test_bpe_learns_from_a_share_of_every_unit_of_a_large_corpus(corpus, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hybridlm.data.preparing.corpus_tokenizer.train_bpe", lambda texts, *_: seen.extend(texts) or byte_tokenizer()
    )
    lines = [json.dumps({"text": f"{number:06d} " + "x" * 993}) + "\n" for number in range(4000)]
    (corpus / "text/big.jsonl").write_text("".join(lines))
    prepare(
        config(corpus, path=f"{corpus}/text/*.jsonl", shard_mb=1, tokenizer=TokenizerConfig(vocab_size=300, train_mb=1))
    )
    numbers = [int(text[:6]) for text in seen]
    assert 1_000_000 <= sum(map(len, seen)) <= 1_005_000
    assert [
        len([number for number in numbers if quarter <= number * 4 // 4000 < quarter + 1]) for quarter in range(4)
    ] == pytest.approx([250] * 4, abs=30)


def test_the_second_time_nothing_is_built(corpus, monkeypatch):
    lines = []
    first = prepare(config(corpus), lines.append)
    assert any("prepared in" in line for line in lines)
    assert any("bits per byte" in line for line in lines)
    monkeypatch.setattr("hybridlm.data.preparing.prepare.build", lambda *_: pytest.fail("built twice"))
    monkeypatch.setattr("hybridlm.data.files.bins._sha256_of", lambda path: pytest.fail("hashes were looked at again"))
    lines.clear()
    second = prepare(config(corpus), lines.append)
    assert second.parts[0].folder == first.parts[0].folder
    assert tokens_of(second.parts[0].train) == tokens_of(first.parts[0].train)
    assert "already prepared" in lines[-1]


def test_a_small_corpus_says_how_many_ids_it_gave(corpus):
    lines = []
    size = prepare(config(corpus, tokenizer=TokenizerConfig(vocab_size=9000)), lines.append).tokenizer.vocab_size
    assert any(f"with {size} ids instead of the requested 9000" in line for line in lines)


def folder_of(settings: DataConfig) -> Path:
    return prepare(settings).parts[0].folder


def test_everything_that_matters_names_another_folder_and_nothing_else_does(corpus):
    base = folder_of(config(corpus))
    assert folder_of(config(corpus, seq_len=17, global_batch=3, prepare_workers=2, on_bad="fail")) == base
    byte_folder = folder_of(config(corpus, tokenizer=BYTES))
    assert folder_of(config(corpus, tokenizer=TokenizerConfig(kind="bytes", vocab_size=300))) == byte_folder
    others = [byte_folder, folder_of(config(corpus, val_fraction=0.4)), folder_of(config(corpus, dedup=True))]
    others.append(folder_of(config(corpus, shard_mb=1)))
    others.append(folder_of(config(corpus, tokenizer=TokenizerConfig(vocab_size=290))))
    others.append(folder_of(config(corpus, tokenizer=TokenizerConfig(kind="bytes", special_tokens=("<|x|>",)))))
    (corpus / "text/00.txt").write_text("changed")
    others.append(folder_of(config(corpus)))
    (corpus / "text/00.txt").rename(corpus / "text/renamed.txt")
    others.append(folder_of(config(corpus)))
    assert len({base, *others}) == 9


def write_lines(folder: Path, count: int, size: int = 1000) -> None:
    """``count`` documents of ``size`` characters, every hundredth line bad, in one file beside the texts."""
    good = (json.dumps({"text": f"{number} " + chr(97 + number % 26) * size}) + "\n" for number in range(count))
    (folder / "text/many.jsonl").write_text(
        "".join(line if number % 100 else "{cut off\n" for number, line in enumerate(good))
    )


def lines_config(folder: Path, **changes) -> DataConfig:
    return config(folder, **{"path": f"{folder}/text/*.jsonl", "tokenizer": BYTES, "shard_mb": 1, **changes})


CHILD = (
    "import os, sys\n"
    "from hybridlm.config.data import DataConfig\n"
    "from hybridlm.data.preparing import build, prepare, tokenise\n"
    "number, place = 0, sys.argv[2]\n"
    "replace = tokenise.replace_text\n"
    "def counted(path, text):\n"
    "    global number\n"
    "    number += 1\n"
    "    if number == int(place): os._exit(9)\n"
    "    replace(path, text)\n"
    "tokenise.replace_text = build.replace_text = counted\n"
    "prepare.prepare(DataConfig.model_validate_json(sys.argv[1]))\n"
)


@pytest.mark.parametrize("dedup", [False, True])
def test_killed_anywhere_it_goes_on_to_the_same_files(corpus, dedup, tmp_path):
    """By os._exit, as by kill -9: no handler and no cleanup runs. Before a unit's report, and before the manifest."""
    write_lines(corpus, 4500)
    whole = files_of(folder_of(lines_config(corpus, dedup=dedup, out=f"{tmp_path}/whole")))
    settings = lines_config(corpus, dedup=dedup)
    for place in (2, 3, 2):  # of what is left then
        done = subprocess.run([sys.executable, "-c", CHILD, settings.model_dump_json(), str(place)], check=False)
        assert done.returncode == 9
        (leftover,) = folders(corpus / "out")
        assert leftover.startswith(".files-")
    lines = []
    prepared = prepare(settings, lines.append)
    assert any("4 of 5 pieces are already tokenised" in line for line in lines)
    assert folders(corpus / "out") == [prepared.parts[0].folder.name]
    assert files_of(prepared.parts[0].folder) == whole


def test_several_processes_make_the_same_files(corpus, monkeypatch, tmp_path):
    write_lines(corpus, 4500)
    alone = files_of(folder_of(lines_config(corpus, out=f"{tmp_path}/alone", dedup=True, prepare_workers=1)))
    monkeypatch.setattr(pool, "_FEW_BYTES", 0)
    assert files_of(folder_of(lines_config(corpus, dedup=True, prepare_workers=2))) == alone
    assert len([name for name in alone if name.endswith(".bin")]) > 4


def test_shards_are_one_stream(corpus):
    write_lines(corpus, 3000)
    one, many = prepare(lines_config(corpus, shard_mb=64)), prepare(lines_config(corpus))
    assert len(one.parts[0].train.stream.pieces) == 1
    assert len(many.parts[0].train.stream.pieces) > 2
    for side in ("train", "val"):
        first, second = (getattr(prepared.parts[0], side) for prepared in (one, many))
        assert tokens_of(first) == tokens_of(second)
        assert (first.documents, first.text_bytes, first.gzip_bytes) == (
            second.documents,
            second.text_bytes,
            second.gzip_bytes,
        )


def test_a_file_that_can_only_be_read_whole_still_gives_bounded_shards(corpus):
    write_lines(corpus, 4500)
    path = corpus / "text/many.jsonl"
    with gzip.open(corpus / "text/many.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    path.unlink()
    part = prepare(lines_config(corpus, path=f"{corpus}/text/*.gz")).parts[0]
    assert [piece.count > 1_900_000 for piece in part.train.stream.pieces] == [True, False]
    assert max(piece.count for piece in part.train.stream.pieces) < 2_010_000


def test_what_is_bad_is_counted_by_kind_every_time_and_refused_on_request(corpus):
    write_lines(corpus, 300)
    (corpus / "text/more.jsonl").write_text('{"text": null}\n{"body": "b"}\n[1]\n')
    lines = []
    prepare(lines_config(corpus), lines.append)
    summary = "files: 6 of 303 documents left out: 3 x not JSON (first many.jsonl:1, "
    assert any(
        line.startswith(summary) and "1 x no field 'text' (first more.jsonl:2, it has body)" in line for line in lines
    )
    lines.clear()
    prepare(lines_config(corpus), lines.append)
    assert any(line.startswith(summary) for line in lines)
    for out in ("out", "fresh"):  # prepared before, and not
        with pytest.raises(UserError, match=r"data\.on_bad=fail: many\.jsonl:1: not JSON \(.*\)") as caught:
            prepare(lines_config(corpus, on_bad="fail", out=f"{corpus}/{out}"))
        assert len(str(caught.value).splitlines()) == 1
    assert folders(corpus / "fresh") == []


def test_nothing_but_bad_documents_is_refused(corpus):
    (corpus / "text/many.jsonl").write_text("[]\n" * 9)
    with pytest.raises(
        UserError, match=r"none of its 9 document\(s\) can be used; the first: many\.jsonl:1: not a JSON object"
    ):
        prepare(lines_config(corpus))
    assert folders(corpus / "out") == []


def kept_texts(prepared: Prepared) -> tuple[list[str], list[str]]:
    (part,) = prepared.parts
    return texts_of(prepared, part.train), texts_of(prepared, part.val)


def test_of_few_documents_the_nearest_goes_to_the_side_that_would_be_empty(corpus):
    for path in sorted((corpus / "text").iterdir())[3:]:
        path.unlink()
    texts = sorted((path.read_text(encoding="utf-8") for path in (corpus / "text").iterdir()), key=place_of)
    for fraction, held_out in ((place_of(texts[0]) / 2, texts[:1]), ((1 + place_of(texts[2])) / 2, texts[:2])):
        lines = []
        train, val = kept_texts(prepare(config(corpus, val_fraction=fraction), lines.append))
        assert sorted(val, key=place_of) == held_out
        assert sorted([*train, *val], key=place_of) == texts
        assert any(f"data.val_fraction={fraction} alone" in line for line in lines)


def test_equal_texts_are_on_one_side_whatever_file_holds_them(corpus):
    for number in range(30):
        text = f"text {number % 10}"
        (corpus / f"text/again{number}.txt").write_text(text)
        (corpus / f"text/lines{number}.jsonl").write_text(json.dumps({"text": text}))
    train, val = kept_texts(prepare(config(corpus, path=[f"{corpus}/text/again*", f"{corpus}/text/lines*"])))
    assert len(train) + len(val) == 60
    assert not set(train) & set(val)


@pytest.mark.parametrize("name", ["input.txt", "input.jsonl"])
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_lone_text_gives_its_end(tmp_path, name, kind):
    text = "".join(f"Line {number}: some words, again the same words\n" for number in range(400))
    (tmp_path / name).write_text(text if name.endswith("txt") else json.dumps({"text": text}))
    lines = []
    tokenizer = TokenizerConfig(kind=kind, vocab_size=300)
    prepared = prepare(config(tmp_path, path=f"{tmp_path}/{name}", val_fraction=0.1, tokenizer=tokenizer), lines.append)
    (train,), (val,) = kept_texts(prepared)
    assert train + val == text
    assert train.endswith("\n")
    assert 0.09 < len(val) / len(text) < 0.12
    whole = prepared.tokenizer.encode(text)
    assert [
        token
        for token in tokens_of(prepared.parts[0].train) + tokens_of(prepared.parts[0].val)
        if token != prepared.tokenizer.eos_id
    ] == whole
    assert any("the last 0.1 of it held out" in line for line in lines)


def test_a_lone_text_of_many_pieces_gives_its_end(tmp_path, monkeypatch):
    from hybridlm.data.reading import documents

    monkeypatch.setattr(documents, "LONGEST", 1000)
    text = "".join(f"line {number}\n" for number in range(2000))
    (tmp_path / "input.txt").write_text(text)
    train, val = kept_texts(prepare(config(tmp_path, path=f"{tmp_path}/input.txt", val_fraction=0.25, tokenizer=BYTES)))
    assert "".join(train + val) == text
    assert abs(len("".join(val)) / len(text) - 0.25) < 0.001


def test_a_lone_text_without_line_ends_is_cut_at_a_blank_or_anywhere(tmp_path):
    for text, end in (("some words " * 500, " "), ("x" * 500, "x"), ("ab", "b")):
        (tmp_path / "input.txt").write_text(text)
        (train,), (val,) = kept_texts(prepare(config(tmp_path, path=f"{tmp_path}/input.txt", tokenizer=BYTES)))
        assert train + val == text
        assert val[0] == end


def test_named_texts_are_validated_on_and_not_trained_on(corpus):
    lines = []
    settings = config(corpus, val_path=f"{corpus}/text/0*.txt", val_fraction=0.0)
    train, val = kept_texts(prepare(settings, lines.append))
    texts = [path.read_text(encoding="utf-8") for path in sorted((corpus / "text").iterdir())]
    assert (val, train) == (texts[:10], texts[10:])
    assert any("left out: 10 files of data.val_path" in line for line in lines)
    (corpus / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (texts[3], "new")))
    train, val = kept_texts(prepare(config(corpus, val_path=f"{corpus}/val.jsonl", dedup=True)))
    assert val == [texts[3], "new"]
    assert sorted(train) == sorted([*texts[:3], *texts[4:]])
    (corpus / "bad.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="nothing to validate on"):
        prepare(config(corpus, val_path=f"{corpus}/bad.jsonl"))


def test_all_of_a_text_is_read_where_nothing_is_to_be_held_out(corpus):
    prepared = prepare(config(corpus), whole=True)
    train, val = kept_texts(prepared)
    assert train == val == expected_text(corpus, val=False, below=0)
    assert prepared.parts[0].folder != prepare(config(corpus)).parts[0].folder


def test_one_conversation_is_not_cut(corpus):
    settings = chat_config(corpus)
    (corpus / "text/chat.jsonl").write_text(json.dumps(CHAT[0]))
    with pytest.raises(UserError, match=r"single conversation.*data\.val_path"):
        prepare(settings)
    assert not (corpus / "out").exists()


def test_equal_texts_are_left_out_on_request(corpus):
    records = [json.dumps({"text": f"text {number % 7}"}) + "\n" for number in range(50)]
    (corpus / "text/a.jsonl").write_text("".join(records))
    (corpus / "text/b.jsonl").write_text("".join(records) + json.dumps({"text": "only here"}))
    lines = []
    prepared = prepare(lines_config(corpus, dedup=True, val_fraction=0.4), lines.append)
    (part,) = prepared.parts
    texts = texts_of(prepared, part.train) + texts_of(prepared, part.val)
    assert sorted(texts) == sorted([f"text {number}" for number in range(7)] + ["only here"])
    assert any("93 duplicate documents left out" in line for line in lines)
    assert not list(part.folder.glob("unit-*"))


CHAT = [
    {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}é"}]}
    for i in range(60)
]
SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def chat_config(folder: Path, **changes) -> DataConfig:
    (folder / "text/chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CHAT), encoding="utf-8")
    values = {"format": "chat", "tokenizer": TokenizerConfig(vocab_size=300, special_tokens=SPECIALS), **changes}
    return config(folder, path=f"{folder}/text/*.jsonl", **values)


def test_conversations_come_with_what_is_learned_and_the_template(corpus):
    prepared = prepare(chat_config(corpus))
    (part,) = prepared.parts
    assert part.train.stream.masked
    said = ""
    for split in (part.train, part.val):
        ids, learned = (read(0, len(split.stream)) for read in (split.stream.read, split.stream.read_learned))
        text = prepared.tokenizer.decode(ids[learned].tolist())
        assert split.text_bytes == len(text.encode())
        said += text
    assert sorted(said) == sorted("".join(f"say {i}é" for i in range(60)))
    assert part.val.gzip_bytes is None
    assert "<|assistant|>" in (part.folder / "chat_template.jinja").read_text()


def test_conversations_need_the_tokens_of_a_template(corpus):
    with pytest.raises(UserError, match=r"data\.tokenizer\.special_tokens"):
        prepare(chat_config(corpus, tokenizer=BYTES))
    with pytest.raises(UserError, match=r"00\.txt holds no records; data\.format=chat reads"):
        prepare(chat_config(corpus).model_copy(update={"path": f"{corpus}/text/*"}))


def test_a_mixture_has_one_tokenizer_and_a_folder_for_each_part(corpus):
    write_lines(corpus, 300)
    parts = {
        "texts": PartConfig(source="files", path=f"{corpus}/text/*.txt"),
        "lines": PartConfig(source="files", path=f"{corpus}/text/*.jsonl", weight=3.0),
    }
    settings = DataConfig(source="mixture", parts=parts, out=f"{corpus}/out", tokenizer=BPE, val_fraction=0.2)
    lines = []
    prepared = prepare(settings, lines.append)
    assert [(part.name, part.weight) for part in prepared.parts] == [("texts", 1.0), ("lines", 3.0)]
    assert texts_of(prepared, prepared.parts[0].train) == expected_text(corpus, val=False)
    assert any(line.startswith("lines: 3 of 300 documents left out") for line in lines)
    heavier = settings.model_copy(
        update={"parts": {**parts, "texts": parts["texts"].model_copy(update={"weight": 2.0})}, "tokenizer": BYTES}
    )
    lighter = settings.model_copy(update={"tokenizer": BYTES})
    assert [part.folder for part in prepare(heavier).parts] == [part.folder for part in prepare(lighter).parts]


def test_two_at_once_both_get_the_data(corpus, monkeypatch):
    building = threading.Event()
    make = build._build

    def slowly(*arguments):
        building.set()
        time.sleep(0.5)
        make(*arguments)

    monkeypatch.setattr(build, "_build", slowly)
    results, lines = [], []
    first = threading.Thread(target=lambda: results.append(prepare(config(corpus))))
    first.start()
    assert building.wait(30)
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built twice"))
    results.append(prepare(config(corpus), lines.append))
    first.join()
    assert any("waiting for another process" in line for line in lines)
    assert tokens_of(results[0].parts[0].train) == tokens_of(results[1].parts[0].train)
    assert folders(corpus / "out") == [results[0].parts[0].folder.name]


def test_damage_in_the_cache_is_named(corpus):
    folder = folder_of(config(corpus))
    path = folder / "train-000000-00.bin"
    data = path.read_bytes()
    for damaged, message in ((data[:-1], "truncated"), (bytes([data[0] ^ 1]) + data[1:], "SHA-256")):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"train-000000-00\.bin .*{message}.*; delete its folder and prepare again$"
        ):
            prepare(config(corpus))
    path.write_bytes(data)
    prepare(config(corpus))
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for length in range(0, len(content) - 1, 97):
        manifest.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"manifest\.json is damaged; delete its folder"):
            prepare(config(corpus))
    manifest.write_bytes(content)
    other = folder_of(config(corpus, tokenizer=BYTES))
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="not made by its own tokenizer"):
        prepare(config(corpus))


def test_a_place_that_cannot_be_written_is_named(corpus):
    (corpus / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*data\.out"):
        prepare(config(corpus, out=f"{corpus}/file"))


def test_where_prepared_data_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDLM_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert data_folder(DataConfig(out=str(tmp_path / "c"))) == tmp_path / "c"
    assert data_folder(DataConfig()) == tmp_path / "a" / "data"
    monkeypatch.delenv("HYBRIDLM_CACHE")
    assert data_folder(DataConfig()) == tmp_path / "b" / "hybridlm" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert data_folder(DataConfig()) == tmp_path / ".cache" / "hybridlm" / "data"


def test_what_a_bpe_learns_from_is_bounded_where_words_do_not_repeat(tmp_path, monkeypatch):
    """Text without blanks is taken evenly from all of the corpus, as much of it as memory bears."""
    monkeypatch.setattr(cuts, "MOST_RARE", 30_000)
    rng = np.random.default_rng(0)
    for number in range(4):
        letters = rng.integers(0x4E00 + 500 * number, 0x4E00 + 500 * (number + 1), 40_000)
        (tmp_path / f"{number}.txt").write_text("".join(map(chr, letters)), encoding="utf-8")
    taken = list[str]()
    train = corpus_tokenizer.train_bpe
    monkeypatch.setattr(
        corpus_tokenizer, "train_bpe", lambda texts, *rest: train((taken.append(text) or text for text in texts), *rest)
    )
    lines = list[str]()
    prepare(config(tmp_path, path=f"{tmp_path}/*.txt", tokenizer=BPE, prepare_workers=1), lines.append)
    characters = sum(map(len, taken))
    assert 5_000 < characters <= 10_100
    assert max(map(len, taken)) < characters / 2, "some of every file that is trained on"
    assert any("of the text (words that rarely repeat" in line for line in lines)
    parts = list(cuts.to_learn("字" * 1000 + " and words"))
    assert "".join(parts) == "字" * 1000 + " and words"
    assert max(map(len, parts)) == 64


@pytest.mark.parametrize("sign", ["=", " ", "\n", "_-", "😀", "!\u0301"])
def test_a_bpe_learns_from_runs_of_one_sign_in_bounded_pieces(sign):
    """The library takes the square of a piece's length: a run of 200,000 signs took it 40 s."""
    text = f"before {sign * 3000} after"
    parts = list(cuts.to_learn(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 1024 + len("before ")
    assert list(cuts.to_learn(f"a {sign * 500} b")) == [f"a {sign * 500} b"]
