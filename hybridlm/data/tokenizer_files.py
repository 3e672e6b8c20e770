"""Tokenizers made elsewhere: their files, read in the form that keeps every text.

Whatever a file asks for that is not the text (a blank before it, special tokens around it, padding, cutting, random
merges) is turned off.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.tokenizer_bytes import byte_letters, check_largest, parts
from hybridlm.data.tokenizer_library import LEGAL, MAX_BYTES, library_of, read_facts
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Unreadable, read_text

EOS = "<|endoftext|>"
_EOS_NAMES = (EOS, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")

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
_CL100K_SPECIALS = {
    EOS: 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# A .tiktoken file holds ranks only; how text is split and which ids are special goes by the encoding's name.
ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), (GPT2, {EOS: 50256})),
    "cl100k_base": (CL100K, _CL100K_SPECIALS),
    "o200k_base": (O200K, {EOS: 199999, "<|endofprompt|>": 200018}),
}
# vocab.json and merges.txt do not say how text is split; these classes of transformers split as GPT-2 does.
_GPT2_CLASSES = {
    "GPT2Tokenizer",
    "RobertaTokenizer",
    "BartTokenizer",
    "CodeGenTokenizer",
    "LEDTokenizer",
    "LongformerTokenizer",
}
_MARK = "end of document"  # in the list of a template
_BESIDE_OURS = (
    "config.yaml",
    "manifest.json",
)  # a run's and prepared data's: there even a tokenizer.json without the mark is ours
_SPECIAL = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}  # of an added token


def saved_eos(facts: Mapping[str, Any], *, ours: bool = True) -> str | None:
    """The end-of-document token that a file of ours names, None: ``EOS``. The format lacks a field; a template that
    adds none lists it.

    ours: no other program made the file. One that may have is believed by our mark alone: others list tokens for no
    purpose."""
    processor = facts.get("post_processor") or {}
    if processor.get("type") != "TemplateProcessing" or len(processor["special_tokens"]) != 1:
        return None
    ((name, listed),) = processor["special_tokens"].items()
    believed = ours or listed["tokens"] == [_MARK]
    return name if believed and all("Sequence" in piece for piece in processor["single"]) else None


def unmarked(facts: dict[str, Any]) -> dict[str, Any]:
    """``facts``, which this changes, as a file of ours said them before there was a mark: the fingerprints of old runs
    stay."""
    for name, listed in ((facts["post_processor"] or {}).get("special_tokens") or {}).items():
        if listed["tokens"] == [_MARK]:
            listed["tokens"] = [name]
    return facts


def read(path: Path, special_tokens: Sequence[str] = ()) -> LibraryTokenizer:
    """The tokenizer of a tokenizer.json, a folder or a .tiktoken file, with its end of document named. Any Exception:
    it cannot be used.

    special_tokens: those that it has under no name are added behind its ids.
    """
    if path.is_dir():
        facts, eos = _read_folder(path)
    elif path.suffix == ".tiktoken":
        facts, eos = _read_tiktoken(path), EOS
    elif path.suffix == ".model":
        raise UserError(_conversion(path.parent, "SentencePiece's own format is not read"))
    else:
        facts = read_facts(path)
        eos = saved_eos(facts) if any(path.with_name(name).is_file() for name in _BESIDE_OURS) else None
    return _build(facts, eos, special_tokens, path)


def _optional(path: Path) -> dict[str, Any]:
    return read_facts(path) if path.is_file() else {}


def _conversion(folder: Path, reason: str) -> str:
    call = f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(FOLDER)"
    return f"tokenizer {folder}: {reason}; legal is a folder with a tokenizer.json, which {call} writes"


def _read_folder(folder: Path) -> tuple[dict[str, Any], str | None]:
    """What a tokenizer.json of it says or would say, and its end-of-document token where something names it."""
    config = _optional(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        facts = read_facts(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
        if kind not in _GPT2_CLASSES:
            raise UserError(_conversion(folder, f"vocab.json and merges.txt do not say how {kind} splits text"))
        vocab, merges = read_facts(folder / "vocab.json"), _merges(folder / "merges.txt")
        specials = _optional(folder / "added_tokens.json")
        specials |= {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
        facts = _byte_level(vocab, merges, specials, None)
    elif any(folder.glob("*.model")):
        raise UserError(_conversion(folder, "it holds SentencePiece's own format only"))
    else:
        raise UserError(
            f"tokenizer {folder}: a folder without a tokenizer.json (or vocab.json and merges.txt); legal is {LEGAL}"
        )
    return facts, _folder_eos(folder, _names(facts))


def _merges(path: Path) -> list[list[str]]:
    """The pairs of a merges.txt."""
    try:
        lines = read_text(path, MAX_BYTES).split("\n")
    except Unreadable as error:
        raise UserError(f"tokenizer {path}: {error}; legal is {LEGAL}") from None
    return [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]


def _folder_eos(folder: Path, names: Mapping[str, int]) -> str | None:
    """The end-of-document token that the configuration files of a Hugging Face folder name, None if none does."""
    by_id = {token: name for name, token in names.items()}
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        config = _optional(folder / file)
        eos, number = config.get("eos_token"), config.get("eos_token_id")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        number = number[0] if isinstance(number, list) and number else number
        eos = by_id.get(number, f"id {number}") if eos is None and number is not None else eos
        if eos in names:
            return eos
        if eos is not None:
            raise UserError(
                f"{folder / file}: its end-of-document token {eos!r} is not in the vocabulary; legal is a token of it"
            )
    return None


def _names(facts: Mapping[str, Any]) -> dict[str, int]:
    """Token to id of a tokenizer.json as it stands."""
    vocab = facts["model"]["vocab"]
    names = dict(vocab) if isinstance(vocab, dict) else {entry[0]: token for token, entry in enumerate(vocab)}
    return names | {token["content"]: token["id"] for token in facts.get("added_tokens") or []}


def _build(facts: dict[str, Any], eos: str | None, special_tokens: Sequence[str], path: Path) -> LibraryTokenizer:
    """The library's tokenizer of ``facts``, which this changes. ``eos``: its end-of-document token where something
    names it."""
    names = _names(facts)
    eos = (
        saved_eos(facts, ours=False)
        or eos
        or next((name for name in _EOS_NAMES if name in names or name in special_tokens), None)
    )
    added = facts["added_tokens"] = facts.get("added_tokens") or []
    if eos is None:
        own = ", ".join([token["content"] for token in added if token["special"]][:20]) or "none"
        raise UserError(
            f"tokenizer {path}: no end-of-document token; legal is one of {', '.join(_EOS_NAMES)}; its special ones:"
            f" {printable(own)[:500]}"
        )
    _keep_text_only(facts)
    largest = max(names.values(), default=-1)
    check_largest(largest)
    missing = [name for name in special_tokens if name not in names]
    added += [{"id": token, "content": name, **_SPECIAL} for token, name in enumerate(missing, largest + 1)]
    for token in added:
        token.update({"lstrip": False, "rstrip": False})  # they would swallow blanks of the text
        if token["content"] == eos:
            token.update({"special": True, "normalized": False})
    library = library_of(facts, path)
    moved = {token["content"]: token["id"] for token in added if library.token_to_id(token["content"]) != token["id"]}
    if moved and isinstance(facts["model"]["vocab"], dict):
        # The library numbers added tokens one after the other, but for those that its model knows.
        facts["model"]["vocab"] |= moved
        library = library_of(facts, path)
    if wrong := [content for content, token in moved.items() if library.token_to_id(content) != token]:
        raise ValueError(f"the library gives its token {wrong[0]!r} another id than {moved[wrong[0]]}")
    if eos not in {token["content"] for token in added}:
        library.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    if eos != EOS:
        listed = [{"id": eos, "ids": [library.token_to_id(eos)], "tokens": [_MARK]}]  # see saved_eos
        library.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=listed)
    return library


def _keep_text_only(facts: dict[str, Any]) -> None:
    """Turn off, in place, what adds to a text: the blank before it above all, so that the first word is encoded as it
    stands."""
    facts |= {"post_processor": None, "padding": None, "truncation": None}
    facts["model"].pop("dropout", None)
    for field, children, unwanted in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        kept = [step for step in parts(facts.get(field)) if step["type"] != unwanted]
        if len(kept) < len(parts(facts.get(field))):
            facts[field] = {"type": "Sequence", children: kept} if kept else None
    for step in parts(facts.get("pre_tokenizer")):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for step in [*parts(facts.get("pre_tokenizer")), *parts(facts.get("decoder"))]:
        if step["type"] == "Metaspace":
            step.pop("add_prefix_space", None)
            step["prepend_scheme"] = "never"


def _byte_level(
    vocab: dict[str, int], merges: Iterable[tuple[str, str]], specials: dict[str, int], pattern: str | None
) -> dict[str, Any]:
    """The JSON of a byte-level BPE; ``pattern`` None: GPT-2's, which the library has built in."""
    split = (
        []
        if pattern is None
        else [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
    )
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    return {
        "added_tokens": [
            {"id": token, "content": name, **_SPECIAL}
            for name, token in sorted(specials.items(), key=lambda item: item[1])
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, letters]},
        "decoder": dict(letters),
        # tiktoken looks a whole piece up before it merges.
        "model": {
            "type": "BPE",
            "ignore_merges": pattern is not None,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def _read_tiktoken(path: Path) -> dict[str, Any]:
    """What a tokenizer.json of the same tokens would say."""
    if path.stem not in ENCODINGS:
        legal = ", ".join(f"{name}.tiktoken" for name in ENCODINGS)
        raise UserError(
            f"tokenizer {path}: how text is split goes by the file's name, and {path.stem!r} is unknown; legal is"
            f" {legal}"
        )
    pattern, specials = ENCODINGS[path.stem]
    ranks: dict[bytes, int] = {}
    try:
        lines = read_text(path, MAX_BYTES).splitlines()
        for line in lines:
            content, rank = line.split()
            ranks[base64.b64decode(content, validate=True)] = int(rank)
    except Unreadable as error:
        raise UserError(f"tokenizer {path}: {error}; legal is {LEGAL}") from None
    except ValueError:
        raise UserError(
            f"tokenizer {path}: {line[:40]!r} is no line of it; legal is a token in base64, a blank and its rank"
        ) from None
    if len(lines) != len(set(ranks.values()) - set(specials.values())) or min(ranks.values(), default=-1) < 0:
        raise UserError(
            f"tokenizer {path}: a rank or a token stands twice or is a special id; legal is one line for every token"
        )
    letter = {value: key for key, value in byte_letters().items()}
    written = {token: "".join(letter[value] for value in token) for token in ranks}
    ordered = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [(written[halves[0]], written[halves[1]]) for token in ordered if (halves := _halves(token, ranks))]
    return _byte_level({written[token]: rank for token, rank in ranks.items()}, merges, specials, pattern)


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens whose merge gives ``token``: BPE of its bytes with the lower ranks only. Empty if those do not
    lead to two."""
    pieces = [token[place : place + 1] for place in range(len(token))]
    while len(pieces) > 2:
        near = [ranks.get(left + right, ranks[token]) for left, right in pairwise(pieces)]
        at = near.index(min(near))
        if near[at] >= ranks[token]:
            return []
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces if all(piece in ranks for piece in pieces) else []
