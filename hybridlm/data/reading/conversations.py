"""Conversation records, in the formats in common use, as turns of system, user and assistant. Each record is recognised
by its own fields, so one file may mix them.

Tool calls become text of the assistant, which is learned, and tool results text of the user, which is context; both are
written as the Hermes and Qwen templates write them. A record that cannot be expressed as such turns is left out as a
whole, with the reason.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybridlm.data.reading.documents import (
    LONGEST,
    TOO_LONG,
    Bad,
    Document,
    Turn,
    encodable,
    not_text,
    type_name,
)

ROLES = ("system", "user", "assistant")
_TOOL, _CALL, _CALLED = "tool", "call", "tool_call"
# Role names of OpenAI's format, ShareGPT's and other programs'.
_NAMES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), _TOOL),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}
_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"))
_WELL_KNOWN = {("instruction", "output"): "Alpaca", ("instruction", "response"): "Dolly"}
_INPUTS = ("input", "context")  # what an instruction is about: Alpaca's, Dolly's
_OPTIONAL = ("system", *_INPUTS)
_TOOLS = "with tool calls or results, which become text"
_SHOWN_CHARS = 40  # of an unknown role, which may be a whole text


class Unfit(Exception):
    """Why a record is not a conversation, or not a pair of them: the kind of problem, and optionally a detail."""


@dataclass(frozen=True)
class ChatRecords:
    """Records with a list of messages (``messages``, ``conversations``), or with a question and its answer in two
    fields."""

    columns = (*((name,) for name in _LISTS), *_PAIRS)
    optional = _OPTIONAL
    texts = tuple(sorted({name for pair in _PAIRS for name in pair} | {*_OPTIONAL}))

    def document(self, where: str, record: Mapping[str, Any]) -> Document | Bad:
        """The conversation of a record: at least one assistant message, and a system message only at the beginning."""
        try:
            written = tuple(_messages(record))
            turns = joined(written)
            if not any(turn.role == "assistant" for turn in turns):
                raise Unfit("no assistant message", f"{len(turns)} of other roles")
            if (size := sum(len(turn.content) for turn in turns)) > LONGEST:
                raise Unfit(TOO_LONG, f"{size:,} characters")
        except Unfit as unfit:
            return Bad(where, *unfit.args)
        tools = any(turn.role in (_TOOL, _CALL) or turn.content.endswith(f"</{_CALLED}>") for turn in written)
        return Document(where, "", turns=turns, forms=(_form(record), *([_TOOLS] if tools else [])))


def _messages(record: Mapping[str, Any]) -> Iterator[Turn]:
    system = record.get("system")
    if isinstance(system, str) and system:
        yield Turn("system", text_of(record, "system"))
    if (field := next((name for name in _LISTS if record.get(name) is not None), None)) is not None:
        yield from turns_of(field, record[field], begun=bool(system))
        return
    asked, answered = next((pair for pair in _PAIRS if all(name in record for name in pair)), ("", ""))
    if not asked:
        raise Unfit(
            "no messages, conversations, prompt with response, or instruction with output", f"it has {_names(record)}"
        )
    prompt, answer = record[asked], record[answered]
    if isinstance(prompt, list | tuple) and isinstance(answer, list | tuple):
        yield from turns_of(asked, [*prompt, *answer], begun=bool(system))
        return
    inputs = [name for name in _INPUTS if asked == "instruction" and record.get(name)]
    fields = [asked, *inputs[:1]]
    yield Turn("user", "\n\n".join(text_of(record, field) for field in fields))
    yield Turn("assistant", text_of(record, answered))


def _form(record: Mapping[str, Any]) -> str:
    """What a record with a conversation is called."""
    if (field := next((name for name in _LISTS if record.get(name) is not None), None)) is not None:
        return "ShareGPT" if record[field][0].get("role") is None else "messages"
    asked, answered = next(pair for pair in _PAIRS if all(name in record for name in pair))
    return _WELL_KNOWN.get((asked, answered), f"{asked} and {answered}")


def text_of(record: Mapping[str, Any], field: str) -> str:
    """Raises Unfit."""
    value = record[field]
    if reason := not_text(value):
        raise Unfit(f"{field!r} is not text", reason)
    if not value:
        raise Unfit(f"{field!r} is empty")
    return str(value)


def turns_of(field: str, messages: object, *, begun: bool) -> Iterator[Turn]:
    """The messages in ``field``. begun: there was a system message already. Raises Unfit."""
    if not isinstance(messages, list | tuple):
        raise Unfit(f"{field!r} is not a list", type_name(messages))
    if not messages:
        raise Unfit(f"{field!r} is empty")
    for number, message in enumerate(messages, 1):
        place = f"message {number}"
        if not isinstance(message, Mapping):
            raise Unfit("a message is not an object", f"{place}: {type_name(message)}")
        role = _role(place, message)
        if role == "system" and (begun or number > 1):
            raise Unfit("role 'system' after the first message", place)
        content = _content(place, role, message)
        if content:
            yield Turn(role, content)
        elif role != "system":  # an empty system message is dropped
            raise Unfit("the content of a message is empty", place)


def _role(place: str, message: Mapping[str, Any]) -> str:
    if "role" not in message and "from" not in message:
        raise Unfit("a message has no 'role'", f"{place}: it has {_names(message)}")
    name = message["role"] if message.get("role") is not None else message.get("from")  # a table has all columns
    if not isinstance(name, str) or name.lower() not in _NAMES:
        raise Unfit(f"unknown role {str(name)[:_SHOWN_CHARS]!r}", f"{place}; docs/data.md lists the known roles")
    return _NAMES[name.lower()]


def _content(place: str, role: str, message: Mapping[str, Any]) -> str:
    """The text of a message, with its tool calls written out."""
    calls = list(message.get("tool_calls") or []) if isinstance(message.get("tool_calls"), list | tuple) else []
    calls += [message["function_call"]] if message.get("function_call") else []
    value = message["content"] if message.get("content") is not None else message.get("value")
    if "content" not in message and "value" not in message and not calls:
        raise Unfit("a message has no 'content'", f"{place}: it has {_names(message)}")
    parts = value if isinstance(value, list | tuple) else [] if value is None and calls else [value]
    text = "".join(_part(place, part) for part in parts)
    written = [_tagged(_CALLED, text) if role == _CALL else text] if text else []
    written += [_tagged(_CALLED, _call(place, call)) for call in calls]
    if role == _TOOL:
        return _tagged("tool_response", "\n".join(written))
    return "\n".join(written)


def _part(place: str, part: object) -> str:
    """The text of one part of a content; a part that is not text (an image, audio) is refused."""
    fields = part if isinstance(part, Mapping) else {"text": part}
    text = fields.get("text")
    if reason := not_text(text):
        reason = f"a part of type {fields['type']}" if isinstance(fields.get("type"), str) else reason
        raise Unfit("the content of a message is not text", f"{place}: {reason}")
    return str(text)


def _call(place: str, call: object) -> str:
    """A tool call as one line of JSON: its name and its arguments, parsed if they are JSON in a string."""
    facts = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(facts, Mapping) or not isinstance(facts.get("name"), str):
        raise Unfit("a tool call has no name", place)
    arguments = facts.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    line = json.dumps(
        {"name": facts["name"], "arguments": {} if arguments is None else arguments}, ensure_ascii=False, default=str
    )
    if not encodable(line):
        raise Unfit("the content of a message is not text", f"{place}: half a surrogate pair")
    return line


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>"


def joined(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """The turns with the roles that templates know. Consecutive tool results are one turn, and so are an answer and
    the call that follows it."""
    found, was = list[Turn](), ""
    for role, content in turns:
        known = {_TOOL: "user", _CALL: "assistant"}.get(role, role)
        if role == was == _TOOL or (role == _CALL and found and known == found[-1].role):
            content = f"{found.pop().content}\n{content}"
        found.append(Turn(known, content))
        was = role
    return tuple(found)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "none"
