"""The tokenizer in a GGUF file, and how far llama.cpp's ids of a text are ours.

llama.cpp knows the ways in which a byte-level BPE cuts text before merging as a list of names (``pre``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.tokenizer.byte_strings import is_byte_level, parts
from hybridlm.data.tokenizer.cuts import SPLITS
from hybridlm.errors import UserError

_NEAREST = "llama-bpe"
_QWEN2 = SPLITS["llama3"].replace(r"\p{N}{1,3}", r"\p{N}")
_PRE = {SPLITS["llama3"]: _NEAREST, _QWEN2: "qwen2"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
# Merges must not be empty; this one is of two letters that stand for no byte, so that no text has them.
_NO_MERGE = "\u2603 \u2603"


@dataclass(frozen=True)
class Vocabulary:
    """The keys of a tokenizer, ``tokenizer.ggml.*`` and the template. exact: llama.cpp gives every text our ids."""

    keys: dict[str, Any]
    exact: bool


def vocabulary(tokenizer: Tokenizer, ids: int, *, chat: bool) -> Vocabulary:
    """ids: how many the model has; chat: with the template of conversations. UserError: it is no byte-level BPE."""
    facts = tokenizer.facts()
    if not is_byte_level(facts):
        raise UserError("the run's tokenizer is no byte-level BPE, and others are not written to GGUF files")
    model, merges = facts["model"], facts["model"]["merges"]
    tokens = [f"<unused {token}>" for token in range(ids)]
    types = [_UNUSED] * ids
    for content, token in model["vocab"].items():
        tokens[token], types[token] = content, _NORMAL
    for added in facts["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    pre = _pre(facts)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or _NEAREST,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges] or [_NO_MERGE],
        "tokenizer.ggml.bos_token_id": tokenizer.eos_id,  # documents begin with it in training
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    if chat:
        template = template_of(tokenizer)
        keys |= {"tokenizer.chat_template": template.jinja(), "tokenizer.ggml.eot_token_id": template.end_id}
    # Without merges every byte is a token, however the text is cut.
    return Vocabulary(keys, (pre is not None or not merges) and tokenizer.lossless)


def _pre(facts: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how this tokenizer.json cuts text, if it has one."""
    *before, last = parts(facts["pre_tokenizer"])
    whole = bool(facts["model"].get("ignore_merges"))  # a piece that is a token is not merged
    if last["type"] != "ByteLevel" or len(before) > 1:
        return None
    if not before:
        return "gpt-2" if last.get("use_regex", True) and not whole else None
    step = before[0]
    plain = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    name = _PRE.get(step["pattern"].get("Regex", "")) if plain and not last.get("use_regex", True) else None
    return name if name == _NEAREST or not whole else None  # llama.cpp merges no whole piece with llama-bpe


def as_in_llama_cpp(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens and merges, with text cut as llama.cpp does for one that it has no name for."""
    facts = tokenizer.facts()
    llama3 = {"type": "Split", "pattern": {"Regex": SPLITS["llama3"]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [llama3, level]}
    facts["normalizer"], facts["model"]["ignore_merges"] = None, True
    return Tokenizer(LibraryTokenizer.from_str(json.dumps(facts)))


def differing(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """How many tokens of ``texts`` are none in llama.cpp, and how many there are."""
    theirs, sizes = as_in_llama_cpp(tokenizer), tokenizer.token_bytes()
    different = total = 0
    for text in texts:
        ends = [_ends(one.encode(text), sizes) for one in (tokenizer, theirs)]
        different += len(ends[0] - ends[1])
        total += len(ends[0])
    return different, total


def _ends(ids: list[int], sizes: np.ndarray) -> set[tuple[int, int]]:
    """Each token with the byte that it ends at."""
    return set(zip(ids, np.cumsum(sizes[ids]).tolist(), strict=True))
