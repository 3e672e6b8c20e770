"""What clients get, in the form of OpenAI's interface: whole answers and the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.generate.distribution import TokenLogprob
from hybridlm.generate.row import Finish, Step

_FINISH: dict[Finish, str] = {"stop": "stop", "length": "length", "context": "length"}


@dataclass
class Usage:
    prompt: int = 0
    reused: int = 0  # of the prompt's
    new: int = 0

    def content(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


@dataclass
class Answers:
    """The answers to one request, in the form of the endpoint. chat: that of conversations, else that of texts."""

    model: str
    tokenizer: Tokenizer
    chat: bool
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, answers: Sequence[Sequence[Step]], usage: Usage, logprobs: bool) -> dict[str, Any]:
        """All steps of every answer."""
        choices = []
        for index, steps in enumerate(answers):
            text = "".join(step.text for step in steps)
            content: dict[str, Any] = {"text": text}
            if self.chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, content, steps, logprobs))
        return {**self._head(False), "choices": choices, "usage": usage.content()}

    def first(self, count: int) -> list[bytes]:
        """The events before the text of ``count`` answers."""
        if not self.chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._event([self._choice(index, delta, (), False)]) for index in range(count)]

    def piece(self, step: Step, logprobs: bool) -> bytes | None:
        """The event of one step; None: it adds nothing yet."""
        if not step.text and step.finish is None and not logprobs:
            return None
        content: dict[str, Any] = {"text": step.text}
        if self.chat:
            content = {"delta": {"content": step.text} if step.text or step.finish is None else {}}
        return self._event([self._choice(step.row, content, (step,), logprobs)])

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        content = {**self._head(True), "choices": choices}
        return event(content if usage is None else {**content, "usage": usage.content()})

    def _choice(self, index: int, content: dict[str, Any], steps: Sequence[Step], logprobs: bool) -> dict[str, Any]:
        finish = steps[-1].finish if steps else None
        given = [step.logprob for step in steps if step.logprob is not None]
        report = (self._chat_logprobs if self.chat else self._text_logprobs)(given) if logprobs else None
        ended = None if finish is None else _FINISH[finish]
        return {"index": index, **content, "logprobs": report, "finish_reason": ended}

    def _named(self, token: int) -> str:
        return self.tokenizer.special_name(token) or self.tokenizer.decode([token])

    def _chat_logprobs(self, given: Sequence[TokenLogprob]) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._named(token),
                "logprob": logprob,
                "bytes": list(self.tokenizer.bytes_of(token)),
            }

        content = [{**one(each.id, each.logprob), "top_logprobs": [one(*top) for top in each.top]} for each in given]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, given: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [self._named(each.id) for each in given],
            "token_logprobs": [each.logprob for each in given],
            "top_logprobs": [{self._named(token): logprob for token, logprob in each.top} for each in given],
            "text_offset": None,
        }


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


END = b"data: [DONE]\n\n"
