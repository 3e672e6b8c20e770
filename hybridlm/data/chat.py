"""Conversations as tokens: the special tokens around each message, and which tokens are learned.

What an assistant has to write is learned: the content of its messages and the token that ends each. Everything else is
context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from hybridlm.data.reading.conversations import ROLES
from hybridlm.data.reading.documents import Document, Turn
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError


@dataclass(frozen=True)
class _Style:
    """How a message is written: prefix (with {role}), content, end, tail. end is a special token, which the assistant
    learns to write."""

    name: str
    tokens: tuple[str, ...]  # the special ones in it
    prefix: str
    end: str
    tail: str = ""


_STYLES = (
    _Style("hybridlm's", (*(f"<|{role}|>" for role in ROLES), "<|end|>"), "<|{role}|>", "<|end|>"),
    _Style("ChatML's", ("<|im_start|>", "<|im_end|>"), "<|im_start|>{role}\n", "<|im_end|>", "\n"),
    _Style(
        "Llama 3's",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
)


@dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer's conversations are written; ``template_of`` makes it.

    prefixes: the ids before a content, by role. end_id: the special token right after every content, where generation
    stops. tail: the ids after that one.
    """

    style: _Style
    prefixes: Mapping[str, tuple[int, ...]]
    end_id: int
    tail: tuple[int, ...]

    def encode(
        self, roles: Sequence[str], contents: Sequence[np.ndarray], context: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation, given the role and the content ids of each message: its ids, uint32 (n,), and which are
        learned, bool (n,): none of the first ``context`` messages."""
        pieces: list[Sequence[int] | np.ndarray] = []
        learned: list[bool] = []
        for place, (role, content) in enumerate(zip(roles, contents, strict=True)):
            answer = role == "assistant" and place >= context
            pieces += [self.prefixes[role], content, (self.end_id,), self.tail]
            learned += [False, answer, answer, False]
        ids = np.concatenate([np.asarray(piece, dtype=np.uint32) for piece in pieces])
        return ids, np.repeat(learned, [len(piece) for piece in pieces])

    def encode_prompt(self, turns: Iterable[Turn], tokenizer: Tokenizer) -> list[int]:
        """The ids of a conversation so far, and of what precedes the assistant's next content."""
        ids: list[int] = []
        for role, content in turns:
            ids += [*self.prefixes[role], *tokenizer.encode(content), self.end_id, *self.tail]
        return [*ids, *self.prefixes["assistant"]]

    def jinja(self) -> str:
        """The template in Jinja, as ``apply_chat_template`` of Hugging Face takes it, ``add_generation_prompt``
        included.

        What it renders has the ids of ``encode``, unless a content spells a special token or, where the template has
        text next to a content (ChatML, Llama 3), begins with what the tokenizer merges with a line end.
        """
        before, after = (_quoted(part) for part in self.style.prefix.split("{role}"))
        lines = [
            "{%- for message in messages -%}",
            f"{{%- if message['role'] not in {list(ROLES)} or (message['role'] == 'system' and not loop.first) -%}}",
            f"{{{{- raise_exception('roles are {', '.join(ROLES)}, and system is the first only') -}}}}",
            "{%- endif -%}",
            (
                f"{{{{- {before} + message['role'] + {after} + message['content'] +"
                f" {_quoted(self.style.end + self.style.tail)} -}}}}"
            ),
            "{%- endfor -%}",
            (
                f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(self.style.prefix.format(role='assistant'))}"
                " -}}{%- endif -%}"
            ),
        ]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write ``chat_template.jinja``, which Hugging Face's programs look for next to ``tokenizer.json``."""
        (Path(folder) / "chat_template.jinja").write_text(self.jinja(), encoding="utf-8", newline="\n")


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The template for which ``tokenizer`` has the special tokens: ours, else ChatML's, else Llama 3's.

    ConfigError: it has none of the three sets, or documents end with the token that ends a message.
    """
    template, problem = _fitting(tokenizer)
    if template is None:
        raise ConfigError(f"data.format: {problem}")
    return template


def missing_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens that ``tokenizer`` needs for conversations: none if it has a template, else those of ours."""
    return () if _fitting(tokenizer)[0] is not None else _STYLES[0].tokens


def _fitting(tokenizer: Tokenizer) -> tuple[ChatTemplate | None, str]:
    """The template, or why there is none."""
    for style in _STYLES:
        known = {name: token for name in style.tokens if (token := tokenizer.special_id(name)) is not None}
        if len(known) < len(style.tokens):
            continue
        if shared := [name for name, token in known.items() if token == tokenizer.eos_id]:
            return None, (
                f"{shared[0]} of {style.name} template also ends this tokenizer's documents, so each message would be a"
                f" document; use another template, such as data.tokenizer.special_tokens={list(_STYLES[0].tokens)}"
            )
        template = ChatTemplate(
            style,
            {role: tuple(_ids(style.prefix.format(role=role), known, tokenizer)) for role in ROLES},
            known[style.end],
            tuple(_ids(style.tail, known, tokenizer)),
        )
        return template, ""
    sets = "; or ".join(f"{style.name} {' '.join(style.tokens)}" for style in _STYLES)
    return None, (f"the tokenizer lacks the special tokens of a template; set data.tokenizer.special_tokens to {sets}")


def encode_conversations(
    conversations: Iterable[Document], tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids (uint32) of each conversation in turn, of a pair of preferences both, and which of them are learned
    (bool), without end-of-document tokens.

    Every content is encoded separately, so that it has the same ids anywhere and gives no special token. Memory is
    bounded as in ``Tokenizer.encode_documents``. ValueError: a document that is not a conversation.
    """
    ahead: deque[tuple[tuple[str, ...], int]] = deque()  # roles and context of what was read and not yet yielded

    def contents() -> Iterator[str]:
        for conversation in conversations:
            if not conversation.turns:
                raise ValueError(f"{conversation.name} is not a conversation")
            for turns in conversation.conversations:
                ahead.append((tuple(turn.role for turn in turns), conversation.context))
                for turn in turns:
                    yield turn.content

    encoded = tokenizer.encode_documents(contents())
    for first in encoded:
        roles, context = ahead.popleft()
        yield template.encode(roles, [first, *islice(encoded, len(roles) - 1)], context)


def _ids(text: str, specials: Mapping[str, int], tokenizer: Tokenizer) -> list[int]:
    """The ids of a piece of the template: its special tokens, and the text between them encoded separately."""
    for name, token in specials.items():
        before, found, behind = text.partition(name)
        if found:
            return [*_ids(before, specials, tokenizer), token, *_ids(behind, specials, tokenizer)]
    return tokenizer.encode(text) if text else []


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\n", "\\n") + "'"
