"""Data sets of the hub: small local folders, and a small hub on this machine that answers as the real one does."""

import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

from hybridlm.config.data import CorpusConfig, HfConfig
from hybridlm.data.reading import hub
from hybridlm.data.reading.documents import Bad, TextRecords
from hybridlm.data.reading.file_units import FilePart
from hybridlm.data.reading.hub import RemoteFile
from hybridlm.errors import UserError

COMMIT = "a" * 40
MB = 1_000_000


@pytest.fixture
def open_hub(tmp_path):
    def opened(config, unit_bytes=MB, text_field="text"):
        corpus = CorpusConfig(source="hf", hf=config, text_field=text_field)
        return hub.open_hub(corpus, unit_bytes, tmp_path / "data", lambda size: None)

    return opened


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The libraries' caches are below the test's folder; no test asks the real hub."""
    import datasets.config
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def write(folder, files):
    """files: name to texts, or to bytes."""
    folder.mkdir(exist_ok=True)
    for name, texts in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            texts if isinstance(texts, bytes) else "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        )
    return str(folder)


def long_texts(count, length=1000):
    return [f"{i:07d}" * (length // 7) for i in range(count)]


def read(corpus):
    return [document for unit in corpus.units for document in unit.documents()]


def read_unit(packed):
    return [(document.name, document.text) for document in pickle.loads(packed).documents()]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_is_a_document_in_order(tmp_path, open_hub, streaming):
    folder = write(tmp_path / "set", {"a.jsonl": ["one", "two"], "b.jsonl": ["three", "", None, "four"]})
    found = read(open_hub(HfConfig(id=folder, streaming=streaming)))
    names = ["a.jsonl:1", "a.jsonl:2", *(f"b.jsonl:{row}" for row in range(1, 5))]
    assert [getattr(one, "name", None) or one.where for one in found] == (
        names if streaming else [f"set-train.parquet:{row}" for row in range(1, 7)]
    )
    assert [one.what if isinstance(one, Bad) else one.text for one in found] == [
        "one",
        "two",
        "three",
        "empty",
        "'text' is not text",
        "four",
    ]


def test_parquet_csv_and_gzipped_lines_are_read(tmp_path, open_hub):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "p").mkdir()
    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["x", "y"]}), tmp_path / "p/train.parquet")
    lines = gzip.compress(b'{"body": "x"}\n{"body": "y"}\n', mtime=0)
    sets = [
        tmp_path / "p",
        write(tmp_path / "c", {"train.csv": b"id,body\n1,x\n2,y\n"}),
        write(tmp_path / "g", {"train.jsonl.gz": lines}),
    ]
    for folder in sets:
        for streaming in (False,) if folder == sets[1] else (False, True):
            corpus = open_hub(HfConfig(id=str(folder), streaming=streaming), text_field="body")
            assert [document.text for document in read(corpus)] == ["x", "y"]


def test_csv_cannot_be_streamed(tmp_path, open_hub):
    folder = write(tmp_path / "c", {"train.csv": b"id,text\n1,x\n2,y\n"})
    with pytest.raises(UserError, match=r"data\.hf\.streaming=false"):
        open_hub(HfConfig(id=folder, streaming=True))


def test_units_are_whole_row_groups_of_about_the_same_bytes(tmp_path, open_hub):
    texts = long_texts(10_000, 100) + long_texts(10_000, 1000)
    folder = write(tmp_path / "set", {"train.jsonl": texts})
    units = open_hub(HfConfig(id=folder), MB).units
    rows = [(part.begin, part.end) for unit in units for part in unit.units]
    assert [begin for begin, _ in rows] == [0, *(end for _, end in rows[:-1])]
    assert rows[-1][1] == len(texts)
    assert [document.text for unit in units for document in unit.documents()] == texts
    sizes = [sum(len(document.text) for document in unit.documents()) for unit in units]
    assert sum(units[i].size for i in range(len(units))) == pytest.approx(sum(sizes), rel=0.05)
    assert all(size < 2.1 * MB for size in sizes)


def test_a_limit_takes_evenly_spaced_stretches_and_always_the_same(tmp_path, open_hub):
    folder = write(tmp_path / "set", {"train.jsonl": long_texts(30_000, 200)})
    config = HfConfig(id=folder, limit_mb=1)
    corpus = open_hub(config)
    found = [document.name for document in read(corpus)]
    assert MB <= sum(len(document.text) for document in read(corpus)) <= MB + 16 * 200
    firsts = [int(next(iter(unit.documents())).name.rsplit(":", 1)[1]) for unit in corpus.units]
    assert firsts == pytest.approx([i * 30_000 / 16 for i in range(16)], abs=1001)
    assert [document.name for document in read(open_hub(config))] == found
    assert len(read(open_hub(HfConfig(id=folder, limit_mb=7)))) == 30_000


def test_a_limit_is_reached_where_row_groups_are_few(tmp_path, open_hub):
    folder = write(tmp_path / "set", {"train.jsonl": long_texts(3001)})
    size = sum(len(document.text) for document in read(open_hub(HfConfig(id=folder, limit_mb=1))))
    assert MB <= size <= MB + 4 * 1000


def test_a_limit_of_a_stream_takes_an_even_share_of_groups_of_files(tmp_path, open_hub, monkeypatch):
    monkeypatch.setattr(hub, "_FILE_MB", 1)
    folder = write(tmp_path / "set", {f"{i}.jsonl": long_texts(700) for i in range(6)})
    corpus = open_hub(HfConfig(id=folder, streaming=True, limit_mb=2))
    taken = [[document.name for document in unit.documents()] for unit in corpus.units]
    assert [len(names) for names in taken] == [1007, 1007]  # 994 bytes each, more than one file of a group
    assert taken[1][0] == "3.jsonl:1"
    assert [unit.size for unit in corpus.units] == [MB, MB]


def test_a_unit_is_small_and_is_read_in_a_spawned_process(tmp_path, open_hub):
    folder = write(tmp_path / "set", {"a.jsonl": long_texts(300), "b.jsonl": ["last"]})
    configs = [{}, {"streaming": True}, {"split": "train[:50%]+train[50%:]"}]
    units = [unit for config in configs for unit in open_hub(HfConfig(id=folder, **config), 100_000).units]
    packed = [pickle.dumps(unit) for unit in units]
    assert max(map(len, packed)) < 10_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(read_unit, packed)
    assert found == [[(one.name, one.text) for one in unit.documents()] for unit in units]
    assert sum(map(len, found)) == 3 * 301


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_follows_the_content_and_whatever_chooses_documents(tmp_path, open_hub, streaming):
    files = {"a.jsonl": ["one", "two"], "b.jsonl": ["three"]}
    folder = write(tmp_path / "set", files)

    def fingerprint(**options):
        return open_hub(HfConfig(id=folder, streaming=streaming, **options)).fingerprint

    first = fingerprint()
    write(tmp_path / "set", files)
    os.utime(tmp_path / "set/a.jsonl", (1, 1))
    assert fingerprint() == first
    assert len(first) == 64
    others = {first, fingerprint(limit_mb=1), fingerprint(split="all")}
    write(tmp_path / "set", {"a.jsonl": ["one", "owt"]})
    others.add(fingerprint())
    assert [document.text for document in read(open_hub(HfConfig(id=folder, streaming=streaming)))] == [
        "one",
        "owt",
        "three",
    ]
    write(tmp_path / "set", {"a.jsonl": ["one", "two"], "b.jsonl": ["three"], "README.md": b"---\nlicense: mit\n---\n"})
    others.add(fingerprint())
    assert len(others) == 5


def test_a_finer_cut_has_another_fingerprint(tmp_path, open_hub):
    folder = write(tmp_path / "set", {"a.jsonl": long_texts(100)})
    assert open_hub(HfConfig(id=folder), 50_000).fingerprint != open_hub(HfConfig(id=folder), 25_000).fingerprint


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "wikitext"}, "data.hf.id=wikitext is neither a folder .* nor owner/name"),
        ({"id": "gone/../x"}, "is neither a folder .* nor owner/name"),
        ({"id": "set/train.jsonl"}, "is a file; .*data.source=files with data.path=set/train.jsonl"),
        ({"revision": "v1"}, "data.hf.revision=v1: data.hf.id=set is a local folder"),
        ({"name": "de"}, "data.hf.name=de: data.hf.id=set has default$"),
        ({"split": "test"}, "data.hf.split=test: data.hf.id=set has no split 'test'; it has train, validation"),
        ({"split": "train+test"}, "has no split 'test'; it has train, validation"),
        ({"id": "nothing"}, "data.hf.id=nothing cannot be read: .*doesn't contain any data files"),
        ({"id": "code"}, "code .* never .*: data.hf.revision=refs/convert/parquet"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(
    tmp_path, open_hub, monkeypatch, capfd, caplog, streaming, options, message
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set", {"train.jsonl": ["one"], "validation.jsonl": ["two"]})
    write(tmp_path / "code", {"code.py": b"raise SystemExit('was run')"})
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        read(open_hub(HfConfig(**{"id": "set", "streaming": streaming, **options})))
    assert len(str(caught.value).splitlines()) == 1
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.jsonl": b'{"text": "x"}\n{cut'}, "data.hf.id=set cannot be read: JSON parse error"),
        (
            {"a.jsonl": ["x"], "b.jsonl": b'{"body": "x"}\n'},
            "data.hf.id=set cannot be read: .*column names don't match",
        ),
        ({"a.jsonl": b""}, "data.hf.id=set cannot be read: its files are empty"),
    ],
    ids=["cut", "two_schemas", "empty"],
)
def test_files_that_datasets_cannot_read_are_named_in_one_line(tmp_path, open_hub, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set", content)
    with pytest.raises(UserError, match=message) as caught:
        open_hub(HfConfig(id="set"))
    assert len(str(caught.value).splitlines()) == 1
    found = read(open_hub(HfConfig(id="set", streaming=True)))
    assert sum(isinstance(one, Bad) for one in found) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_do_not_fit_are_named(tmp_path, open_hub, streaming):
    folder = write(tmp_path / "set", {"a.jsonl": b'{"title": "x", "body": "y"}\n'})
    (bad,) = read(open_hub(HfConfig(id=folder, streaming=streaming)))
    assert ("title, body" in bad.detail, "'text'" in bad.what) == (True, True)


def test_a_part_of_a_split_is_read_from_disk_but_not_streamed(tmp_path, open_hub):
    folder = write(tmp_path / "set", {"train.jsonl": long_texts(10)})
    assert len(read(open_hub(HfConfig(id=folder, split="train[:50%]")))) == 5
    assert open_hub(HfConfig(id=folder, split="train[:0%]")).units == []
    with pytest.raises(UserError, match=r"data\.hf\.split=train\[:50%\]: .* cannot be streamed"):
        open_hub(HfConfig(id=folder, split="train[:50%]", streaming=True))


def test_the_libraries_are_left_as_they_were(tmp_path, open_hub):
    import datasets
    from huggingface_hub import constants

    def state():
        flags = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
        return datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled(), flags

    before = state()
    open_hub(HfConfig(id=write(tmp_path / "set", {"a.jsonl": ["x"]})))
    with pytest.raises(UserError, match="cannot reach the hub"):
        open_hub(HfConfig(id="nobody/nothing"))
    assert state() == before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("connection reset"),
            r"data.hf.id=me/set: the network failed \(connection reset\); run the same command again",
        ),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "data.hf.id=me/set cannot be read: .*invalid start byte",
        ),
    ],
)
def test_a_stream_that_fails_midway_says_to_run_again(monkeypatch, error, message):
    class Failing(io.RawIOBase):
        rest = b'{"text": "one"}\n{"text": "two"}\n'

        def readable(self):
            return True

        def readinto(self, buffer):
            if not self.rest:
                raise RuntimeError("reading failed") from error
            count, buffer[: len(self.rest)], self.rest = len(self.rest), self.rest, b""
            return count

    monkeypatch.setattr("fsspec.open", lambda url: contextlib.nullcontext(Failing()))
    remote = RemoteFile("a.jsonl", "hf://datasets/me/set/a.jsonl", HfConfig(id="me/set"))
    found = FilePart(remote, TextRecords("text"), "lines").documents()
    assert [next(found).text, next(found).text] == ["one", "two"]
    with pytest.raises(UserError, match=message) as caught:
        next(found)
    assert len(str(caught.value).splitlines()) == 1


FILES = {
    f"data/train-{i}.jsonl": "".join(json.dumps({"text": f"{i} {j}"}) + "\n" for j in range(3)).encode()
    for i in range(2)
}
CARD = (
    b"---\nconfigs:\n- config_name: en\n  data_files: data/*.jsonl\n- config_name: de\n  data_files:"
    b" data/train-0.jsonl\n---\n"
)
MANY = (
    "---\nconfigs:\n"
    + "".join(f"- config_name: dump-{i:03d}\n  data_files: data/*.jsonl\n" for i in range(100))
    + "---\n"
)
REPOSITORIES = {
    "me/set": FILES,
    "me/two": {**FILES, "README.md": CARD},
    "me/many": {**FILES, "README.md": MANY.encode()},
    "me/code": {"code.py": b"raise SystemExit('was run')"},
}
REFUSED = {
    "me/gone": (404, "RepoNotFound"),
    "me/gated": (403, "GatedRepo"),
    "me/down": (503, ""),
    "me/denied": (401, ""),
}


class SmallHub(BaseHTTPRequestHandler):
    """The part of the hub's interface that datasets uses, without the real one's redirects."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path).removeprefix("/api").removeprefix("/datasets/")
        name, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if name == "me/hangs":
            self.server.released.wait(30)
        elif name in REFUSED:
            self.answer(REFUSED[name][0], X_Error_Code=REFUSED[name][1], X_Error_Message="no")
        elif name not in REPOSITORIES:
            self.answer(404)
        elif rest[:1] == ["resolve"]:
            self.send_file(REPOSITORIES[name].get("/".join(rest[2:])))
        elif rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            paths = [file for file in REPOSITORIES[name] if file.startswith(below)]
            entries = [
                {"type": "file", "path": file, "size": len(REPOSITORIES[name][file]), "oid": COMMIT} for file in paths
            ]
            folders = [] if below else [{"type": "directory", "path": "data", "size": 0, "oid": COMMIT}]
            self.answer(200, json.dumps(entries + folders).encode(), Content_Type="application/json")
        elif rest[:1] == ["revision"] and rest[1] not in (COMMIT, "v1", "main"):
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            info = {"id": name, "sha": COMMIT, "gated": False, "private": False, "siblings": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_file(self, data):
        if data is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)


@pytest.fixture(scope="module")
def small_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    server.daemon_threads = True
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()
    server.server_close()


CHILD = """
import json, sys, time
import datasets, huggingface_hub
import pathlib
from hybridlm.config.data import CorpusConfig, HfConfig
from hybridlm.errors import UserError
from hybridlm.data.reading import hub_access
from hybridlm.data.reading.hub import open_hub
hub_access._PATIENCE = 2.0
for options in json.loads(sys.argv[1]):
    begin, answer = time.monotonic(), {}
    try:
        config = CorpusConfig(source="hf", hf=HfConfig(**options))
        corpus = open_hub(config, 1000000, pathlib.Path(sys.argv[2]), lambda size: None)
        answer["fingerprint"] = corpus.fingerprint
        answer["texts"] = [document.text for unit in corpus.units for document in unit.documents()]
    except UserError as error:
        answer["error"] = str(error)
    print(json.dumps({**answer, "seconds": time.monotonic() - begin}))
"""


def ask(home, endpoint, configs, **environment):
    """What a new process answers to each config; the libraries read their environment when they are imported."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(configs), str(home / "data")],
        env={
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in run.stdout.splitlines()], run.stderr


def test_a_data_set_of_the_hub_is_read_and_found_again_without_a_network(small_hub, tmp_path):
    closed = "http://127.0.0.1:9"
    texts = [f"{i} {j}" for i in range(2) for j in range(3)]
    kept, pinned, streamed = {"id": "me/set"}, {"id": "me/set", "revision": "v1"}, {"id": "me/set", "streaming": True}
    (on_disk, at_v1, stream, german), said = ask(
        tmp_path, small_hub, [kept, pinned, streamed, {"id": "me/two", "name": "de"}]
    )
    assert on_disk["texts"] == stream["texts"] == at_v1["texts"] == texts
    assert german["texts"] == texts[:3]
    assert at_v1["fingerprint"] == on_disk["fingerprint"]  # the same commit
    assert said == ""

    unread = {"id": "me/gone"}
    offline = [
        kept,
        pinned,
        {**kept, "revision": "v2"},
        streamed,
        {"id": "me/two", "name": "fr"},
        {"id": "me/two"},
        unread,
    ]
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        found, _ = ask(tmp_path, closed, offline, **environment)
        assert [answer.get("texts") for answer in found[:2]] == [texts, texts]
        assert {answer["fingerprint"] for answer in found[:2]} == {on_disk["fingerprint"]}
        assert "cannot reach the hub" in found[2]["error"]
        assert found[3]["fingerprint"] == stream["fingerprint"]  # so that what was prepared is found
        assert "data.hf.streaming=true keeps no copy of it" in found[3]["error"]
        for number in (4, 5, 6):
            assert "cannot reach the hub" in found[number]["error"]
            assert "go online for the first start" in found[number]["error"]
        assert all(len(answer.get("error", "x").splitlines()) == 1 for answer in found)
        assert max(answer["seconds"] for answer in found) < 15  # a bare load_dataset takes 25


def test_refusals_of_the_hub_are_reported_in_one_line(small_hub, tmp_path):
    cases = [
        (
            {"id": "me/gone"},
            "data.hf.id=me/gone: the hub has no such data set, or it is private and needs HF_TOKEN to be set",
        ),
        (
            {"id": "me/gated"},
            "data.hf.id=me/gated is gated: accept its terms on its page on the hub, then set HF_TOKEN",
        ),
        ({"id": "me/denied"}, "data.hf.id=me/denied"),
        (
            {"id": "me/set", "revision": "v9"},
            "data.hf.revision=v9: data.hf.id=me/set has no such branch, tag or commit",
        ),
        ({"id": "me/two"}, "data.hf.name=null: data.hf.id=me/two has en, de"),
        ({"id": "me/two", "name": "fr"}, "data.hf.name=fr: data.hf.id=me/two has en, de"),
        ({"id": "me/many"}, "data.hf.name=null: data.hf.id=me/many has dump-000, dump-001, "),
        (
            {"id": "me/set", "split": "test"},
            "data.hf.split=test: data.hf.id=me/set has no split 'test'; it has train",
        ),
        (
            {"id": "me/code"},
            "data.hf.id=me/code needs its own code to be run, which is never done",
        ),
        ({"id": "me/down"}, "data.hf.id=me/down: cannot reach the hub"),
        (
            {"id": "me/hangs"},
            "data.hf.id=me/hangs: cannot reach the hub (",
        ),
        ({"id": "a--b/c"}, "data.hf.id=a--b/c cannot be read: "),
    ]
    found, said = ask(tmp_path, small_hub, [config for config, _ in cases])
    for (_, message), answer in zip(cases, found, strict=True):
        assert answer["error"].startswith(message)
        assert len(answer["error"].splitlines()) == 1
        assert len(answer["error"]) < 400
        assert answer["seconds"] < 20
    assert (
        len(said.splitlines()) == 2
    )  # that the hub cannot be reached, as the copy in the cache would be used without a word else
