"""From what a client sends to the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridlm.data.chat import ChatTemplate
from hybridlm.data.reading.documents import Turn
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.serve.refusal import Refusal
from hybridlm.serve.requests import Body, ChatBody, CompletionBody

Prompt = tuple[list[int], Sequence[int]]  # ids, and marks: lengths of what other prompts may begin with


class Prompts:
    """name: by which clients call the model. template: None: the run was not trained on conversations. context: tokens
    of a prompt and its answer."""

    def __init__(
        self, name: str, created: int, tokenizer: Tokenizer, template: ChatTemplate | None, vocab: int, context: int
    ) -> None:
        self.name, self.tokenizer, self.template = name, tokenizer, template
        self._created, self._vocab, self._context = created, vocab, context
        # A text with more bytes than this has too many tokens, however it is cut.
        self._most_bytes = int(tokenizer.token_bytes().max()) * context

    def card(self) -> dict[str, Any]:
        """What /v1/models says; the last two fields are ours."""
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "hybridlm",
            "context": self._context,
            "chat": self.template is not None,
        }

    def refuse_other(self, name: str) -> None:
        """Refusal: ``name`` is another model's. Without one any is meant."""
        if name not in ("", self.name):
            raise Refusal(404, f"no such model; this server serves {self.name}", "model_not_found", "model")

    def ends(self, body: Body) -> tuple[int, ...]:
        """The ids that end an answer."""
        eos = self.tokenizer.eos_id
        return (self.template.end_id, eos) if self.template is not None and isinstance(body, ChatBody) else (eos,)

    def read(self, body: Body) -> list[Prompt]:
        """The prompts, each of which leaves room for an answer. Refusal: one is empty, too long, or not of this
        model; UserError: a text that the tokenizer cannot encode."""
        self.refuse_other(body.model)
        if isinstance(body, ChatBody):
            return [self._conversation(body)]
        assert isinstance(body, CompletionBody)
        prompts = [self._text(prompt) if isinstance(prompt, str) else self._ids(prompt) for prompt in body.prompts]
        if not prompts:
            raise Refusal(400, "prompt: none given", param="prompt")
        for ids in prompts:
            self._refuse_misfit(ids, "prompt")
        return [(ids, ()) for ids in prompts]

    def _text(self, text: str) -> list[int]:
        self._refuse_long(len(text), "prompt")
        return self.tokenizer.encode(text) if text else []

    def _ids(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self._vocab:
            raise Refusal(400, f"prompt: ids are 0 to {self._vocab - 1}", param="prompt")
        return ids

    def _conversation(self, body: ChatBody) -> Prompt:
        if self.template is None:
            raise Refusal(
                400, "this model was not trained on conversations; use /v1/completions", "not_a_chat_model", "messages"
            )
        turns = [
            Turn("system" if message.role == "developer" else message.role, message.text) for message in body.messages
        ]
        self._refuse_long(sum(len(turn.content) for turn in turns), "messages")
        # Others may have the same system message, and the next turn has all of these messages.
        opening = len(self.template.prefixes["assistant"])
        ids = self.template.encode_prompt(turns, self.tokenizer)
        marks = {len(ids) - opening}
        if turns[0].role == "system":
            marks.add(len(self.template.encode_prompt(turns[:1], self.tokenizer)) - opening)
        self._refuse_misfit(ids, "messages")
        return ids, sorted(marks)

    def _refuse_long(self, characters: int, param: str) -> None:
        """Before a text is encoded that cannot fit."""
        if self._most_bytes and characters > self._most_bytes:
            raise self._too_long(f"more than {self._context:,}", param)

    def _refuse_misfit(self, ids: Sequence[int], param: str) -> None:
        if not ids:
            raise Refusal(400, f"{param}: empty; a prompt needs at least one token", param=param)
        if len(ids) >= self._context:
            raise self._too_long(f"{len(ids):,}", param)

    def _too_long(self, tokens: str, param: str) -> Refusal:
        return Refusal(
            400,
            f"{param}: {tokens} tokens leave no room for an answer in a context of {self._context:,}",
            "context_length_exceeded",
            param,
        )
