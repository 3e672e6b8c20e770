"""``hybridlm push``: a dry run unless told otherwise, and only what export writes leaves the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hybridlm.cli.verbs import run_app

errors = pytest.importorskip("huggingface_hub.errors", reason="huggingface_hub is not installed")
huggingface_hub = pytest.importorskip("huggingface_hub")
TOKEN = "hf_" + "a1" * 17


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "exported"
    place.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_hybridlm.py"):
        (place / name).write_text("{}")
    return place


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: what it was asked, and an error that it raises where one is set."""
    asked = SimpleNamespace(calls=[], error=None)

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            if asked.error is not None:
                raise asked.error
            asked.calls.append(("create", repo, private, exist_ok))
            return f"https://huggingface.co/{repo}"

        def create_commit(self, repo, operations, *, commit_message):
            asked.calls.append(("commit", repo, sorted(one.path_in_repo for one in operations), commit_message))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return asked


def push(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        run_app(["push", *map(str, arguments)])
    assert (end.value.code or 0) == code


def test_nothing_is_sent_without_yes(folder, hub, capsys):
    push(folder, "me/model", "--private")
    said = capsys.readouterr().out
    assert hub.calls == []
    assert all(part in said for part in ("me/model", "private", "model.safetensors", "--yes", " 10 bytes"))


def test_what_was_listed_is_sent(folder, hub, capsys, tmp_path):
    push(folder, "me/model", "--yes")
    assert hub.calls[0] == ("create", "me/model", False, True)
    assert hub.calls[1][2] == sorted(path.name for path in folder.iterdir())
    said = capsys.readouterr()
    assert said.out.endswith("https://huggingface.co/me/model\n")
    assert TOKEN not in said.out + said.err
    (tmp_path / "model.gguf").write_text("GGUF")
    push(tmp_path / "model.gguf", "me/model", "--yes", "--private")
    assert hub.calls[2:] == [
        ("create", "me/model", True, True),
        ("commit", "me/model", ["model.gguf"], hub.calls[1][3]),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pytorch_model.bin", ""),
        ("step-00000010.ckpt", ""),
        (".env", ""),
        ("id_rsa", ""),
        ("notes.txt", ""),
        ("train.py", ""),
        ("more/step.ckpt", ""),
        ("README.md", f"my token is {TOKEN}."),
        ("config.yaml", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)
def test_what_export_does_not_write_stays(folder, hub, capsys, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    push(folder, "me/model", "--yes", code=2)
    said = capsys.readouterr().err
    assert name.split("/")[0] in said
    assert TOKEN not in said
    assert hub.calls == []


def test_a_link_stays(folder, hub, tmp_path, capsys):
    (tmp_path / "secret.json").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "secret.json")
    push(folder, "me/model", "--yes", code=2)
    assert "generation_config.json" in capsys.readouterr().err
    assert hub.calls == []


@pytest.mark.parametrize("repo", ["model", "me/a/b", "me/mo del", "../me/model", "me/model.git", "", "me/--x"])
def test_a_name_that_is_none_is_refused(folder, hub, repo, capsys):
    push(folder, repo, "--yes", code=2)
    assert capsys.readouterr().err.count("\n") == 1
    assert hub.calls == []


def test_a_folder_that_is_no_export_is_refused(folder, hub, tmp_path, capsys):
    (folder / "config.json").unlink()
    push(folder, "me/model", "--yes", code=2)
    push(tmp_path / "nowhere", "me/model", code=2)
    capsys.readouterr()
    (folder / "checkpoints").mkdir()
    push(folder, "me/model", "--yes", code=2)
    said = capsys.readouterr().err
    assert (said.count("\n"), "hybridlm export" in said) == (1, True)
    assert hub.calls == []


def refusal(status):
    error = RuntimeError("as the hub says\nin two lines")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (refusal(401), 2, "HF_TOKEN"),
        (refusal(403), 2, "HF_TOKEN"),
        (errors.LocalTokenNotFoundError("no token"), 2, "HF_TOKEN"),
        (refusal(409), 2, "409"),
        (refusal(503), 1, "cannot be reached"),
        (ConnectionError("no route to host"), 1, "no route to host"),
    ],
)
def test_errors_of_the_hub_are_a_line(folder, hub, capsys, error, code, part):
    hub.error = error
    push(folder, "me/model", "--yes", code=code)
    said = capsys.readouterr().err
    assert (said.count("\n"), part in said) == (1, True)
    assert TOKEN not in said
