"""``hybridlm push``: what export wrote, and nothing else, to a repository of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path
from textwrap import shorten

from hybridlm.errors import RunFailed, UserError, printable
from hybridlm.runs.run_folder import RunFolder

# What export writes or a user puts beside it; everything else is refused, whatever it holds.
_CONFIGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "config.yaml")
_OTHERS = ("special_tokens_map.json", "model.safetensors.index.json", "chat_template.jinja", "modeling_hybridlm.py")
_FILES = (*_CONFIGS, *_OTHERS, "*.safetensors", "*.gguf", "README.md", "LICENSE*", ".gitattributes")
_WHOLE = (  # for other programs, for hybridlm
    {"config.json", "tokenizer.json", "model.safetensors"},
    {"config.yaml", "tokenizer.json", "weights.safetensors"},
)
_WEIGHTS = ("*.safetensors", "*.gguf")  # no text
_SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,})\b")
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")


def exported_files(place: Path) -> list[Path]:
    """The files of an exported folder, by name; of a .gguf file, itself. UserError, a line each: it is no export, or
    holds something that export does not write."""
    if place.is_file() and place.suffix == ".gguf" and not place.is_symlink():
        return [place]
    if not place.is_dir():
        raise UserError(f"{place}: neither an exported folder nor a .gguf file")
    if RunFolder(place).checkpoints.is_dir():
        raise UserError(f"{place}: a run folder; export it first: hybridlm export {place} DIR")
    names = sorted(path.name for path in place.iterdir())
    if not any(files <= set(names) for files in _WHOLE) and not any(fnmatch(name, "*.gguf") for name in names):
        raise UserError(f"{place}: not a folder that `hybridlm export` wrote")
    problems = [f"{place / name}: {problem}" for name in names if (problem := _problem(place / name))]
    if problems:
        raise UserError(problems)
    return [place / name for name in names]


def _problem(path: Path) -> str | None:
    """Why a file is not pushed, or None."""
    if path.is_symlink() or not path.is_file():
        return "not a regular file; only the files of an export are pushed"
    if not any(fnmatch(path.name, pattern) for pattern in _FILES):
        return "not a file that export writes; move it out of the folder"
    if not any(fnmatch(path.name, pattern) for pattern in _WEIGHTS):
        text = path.read_bytes()
        if _SECRET.search(text) or _PRIVATE_KEY.search(text):
            return "holds what looks like an access token or a private key"
    return None


def listing(files: list[Path], repo: str, *, private: bool) -> list[str]:
    """What a push would do, a line each."""
    sizes = [path.stat().st_size for path in files]
    lines = [f"{size:>15,}  {path.name}" for path, size in zip(files, sizes, strict=True)]
    kind = "a private repository" if private else "a public repository"
    head = f"https://huggingface.co/{repo}: made as {kind} unless it exists; {sum(sizes):,} bytes in all"
    return [head, *lines]


def refuse_name(repo: str) -> None:
    """UserError: no repository can have this name, or the package is missing."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("push needs the package huggingface_hub: pip install 'hybridlm[export]'")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not in its __all__

    try:
        validate_repo_id(repo)
        owned = repo.count("/") == 1
    except HFValidationError:
        owned = False
    if not owned:
        raise UserError(f"{printable(repo[:100])}: not the name of a repository; expected OWNER/NAME")


def push(files: list[Path], repo: str, *, private: bool) -> str:
    """Uploads ``files`` in one commit, into a repository that is made where there is none; returns its address. The
    token is that of HF_TOKEN or of `hf auth login`. UserError: the hub refuses. RunFailed: it cannot be reached."""
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        added = [CommitOperationAdd(path.name, path) for path in files]
        api.create_commit(repo, added, commit_message="Upload of a model exported by hybridlm")
    except Exception as error:  # which library speaks HTTP has changed and will change
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = printable(shorten(" ".join(str(error).split()) or type(error).__name__, 200))
        if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            raise UserError(
                f"{repo}: the hub refuses ({status or 'no token'}); set HF_TOKEN to a token with write access to it, or"
                " run `hf auth login`"
            ) from None
        if status is not None and 400 <= status < 500:
            raise UserError(f"{repo}: the hub refuses ({status}: {reason})") from None
        raise RunFailed(f"{repo}: the hub cannot be reached, or failed ({reason}); run the command again") from None
    return address
