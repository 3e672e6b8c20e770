"""Records of preferences: a conversation with a better end and a worse one, in the formats in common use.

Messages are those of ``conversations``. The two begin alike; what follows, from the first answer that differs, is
learned. A record that cannot be expressed so is left out as a whole, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybridlm.data.reading.conversations import Unfit, joined, text_of, turns_of
from hybridlm.data.reading.documents import LONGEST, TOO_LONG, Bad, Document, Turn

_PROMPTS = ("prompt", "question", "instruction")  # TRL's, Orca's, Argilla's
_ENDS = ("chosen", "rejected")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # Anthropic's, whose conversations are single texts
_SPOKEN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class PreferenceRecords:
    """Records with ``chosen`` and ``rejected``: answers to a ``prompt``, or whole conversations."""

    columns = (*((prompt, *_ENDS) for prompt in _PROMPTS), _ENDS)
    optional = ("system",)
    texts = (*_PROMPTS, *_ENDS, "system")

    def document(self, where: str, record: Mapping[str, Any]) -> Document | Bad:
        """The pair of a record: two conversations that differ from an answer on, and end with one."""
        try:
            if missing := [name for name in _ENDS if record.get(name) is None]:
                raise Unfit(f"no {missing[0]!r}", f"it has {', '.join(map(str, record)) or 'none'}")
            asked = next((name for name in _PROMPTS if record.get(name) is not None), None)
            (chosen, form), (rejected, _) = (_conversation(record, asked, name) for name in _ENDS)
            context = _context(chosen, rejected)
            if (size := sum(len(turn.content) for turn in (*chosen, *rejected))) > LONGEST:
                raise Unfit(TOO_LONG, f"{size:,} characters")
        except Unfit as unfit:
            return Bad(where, *unfit.args)
        # All pairs with one prompt are on one side: of training, or of validation.
        prompt = json.dumps(chosen[:context])
        return Document(where, "", turns=chosen, context=context, rejected=rejected, key=prompt, forms=(form,))


def _context(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> int:
    """How many messages both begin with."""
    if chosen == rejected:
        raise Unfit("chosen and rejected are the same")
    pairs = zip(chosen, rejected, strict=False)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    for turns in (chosen, rejected):
        if len(turns) == same or turns[same].role != "assistant":
            raise Unfit("chosen and rejected differ in more than answers", f"at message {same + 1}")
    return same


def _conversation(record: Mapping[str, Any], prompt: str | None, end: str) -> tuple[tuple[Turn, ...], str]:
    """The messages of one of the two, and the name of their form."""
    given, system = record[end], record.get("system")
    first = [Turn("system", text_of(record, "system"))] if isinstance(system, str) and system else []
    if isinstance(given, str):
        if prompt is None:
            return (*first, *_spoken(end, given)), "chosen and rejected, transcripts"
        answer = [Turn("assistant", text_of(record, end))]
    else:
        answer = list(turns_of(end, given, begun=bool(first)))
        if not answer or answer[0].role != "assistant" or prompt is None:
            return joined([*first, *answer]), "chosen and rejected, whole conversations"
    asked = record[prompt]
    if isinstance(asked, str):
        asking = [Turn("user", text_of(record, prompt))]
    else:
        asking = list(turns_of(prompt, asked, begun=bool(first)))
    return joined([*first, *asking, *answer]), f"{prompt}, chosen and rejected"


def _spoken(field: str, text: str) -> Iterator[Turn]:
    """The messages of a transcript, ``\\n\\nHuman: ...\\n\\nAssistant: ...``."""
    before, *parts = _SPOKEN.split(text)
    if before.strip() or not parts:
        raise Unfit(f"no prompt, and {field!r} is no transcript of Human and Assistant")
    for place, (speaker, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        if not content:
            raise Unfit("the content of a message is empty", f"message {place}")
        yield Turn(_SPEAKERS[speaker], text_of({field: content}, field))
