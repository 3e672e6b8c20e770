"""A conversation with a model: its messages, the model's cache of them, and what happens when the context is full.

Each turn prefills the new tokens only. With a template (a run trained on conversations) the tokens are those of its
messages. Without one (a base model) the conversation is a single text, and each of the user's messages is a new line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from hybridlm.config.section import Section
from hybridlm.data.chat import ChatTemplate
from hybridlm.data.reading.documents import Turn, encodable
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError, printable
from hybridlm.generate.engine import Engine, State
from hybridlm.generate.row import Finish
from hybridlm.generate.sampling import Sampling
from hybridlm.generate.state_file import load_state, save_state


class Saved(Section):
    """What is saved of a conversation besides its state, as JSON. open: ids that close the last answer."""

    template: bool = False
    turns: tuple[tuple[str, str], ...] = ()
    open: tuple[Annotated[int, Field(ge=0)], ...] = ()


class Conversation:
    """engine: one with a context, which limits the conversation. tell: receives notes, for example about messages that
    no longer fit."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        sampling: Sampling,
        tell: Callable[[str], None],
    ) -> None:
        assert engine.context is not None
        self.engine, self.tokenizer, self.template, self.tell = engine, tokenizer, template, tell
        ends = (tokenizer.eos_id,) if template is None else (template.end_id, tokenizer.eos_id)
        self.sampling = replace(sampling, stop_ids=ends)
        self.context = engine.context
        self.turns: list[Turn] = []
        self._state: State | None = None
        self._open: tuple[int, ...] = ()  # ids that close the last answer, not yet prefilled

    @property
    def tokens(self) -> int:
        """Tokens of the conversation in the context."""
        return 0 if self._state is None else len(self._state.ids[0]) + len(self._open)

    def reset(self, system: str | None = None) -> None:
        """Starts over, with a new system message or the present one. UserError: there is no template for one."""
        if system is not None and self.template is None:
            raise UserError("/system: this model was not trained on conversations, so it takes no system message")
        kept = self.turns[:1] if self.turns and self.turns[0].role == "system" else []
        self.turns = kept if system is None else [Turn("system", system)] if system else []
        self._state, self._open = None, ()

    def say(self, text: str) -> Iterator[str]:
        """The answer as it is generated, one piece per token, empty while a character is incomplete. The caller may
        stop at any piece, which keeps the answer so far. With a base model an empty text continues the answer.

        UserError: the text does not fit in the context, or there is nothing to continue.
        """
        state = self._read(text)
        answer, finish = "", None
        try:
            for step in self.engine.run(state, [self.sampling]):
                answer, finish = answer + step.text, step.finish
                yield step.text
        finally:
            self._close(answer, finish)
        if finish == "length":
            hint = "; an empty line continues" if self.template is None else ""
            self.tell(f"stopped after {self.sampling.max_new_tokens:,} tokens{hint}")
        elif finish == "context":
            self.tell(f"stopped: the context of {self.context:,} tokens is full")

    def _close(self, answer: str, finish: Finish | None) -> None:
        if self.template is None:
            self._open = (self.tokenizer.eos_id,) if finish == "stop" else ()
        else:
            self._open = (self.template.end_id, *self.template.tail)
            self.turns.append(Turn("assistant", answer))

    @property
    def _room(self) -> int:
        """The most tokens before an answer, which gets at least a quarter of the context if it may be that long."""
        return self.context - min(self.sampling.max_new_tokens, self.context // 4)

    def _read(self, text: str) -> State:
        """Prefills what is new or, if that does not fit, what is left after dropping the oldest messages."""
        if self.template is None:
            state = self._read_text(text)
        else:
            state, self.turns = self._read_message(self.template, [*self.turns, Turn("user", text)])
        self._state, self._open = state, ()
        return state

    def _extended(self, new: list[int]) -> State | None:
        """The state with these tokens after it; None: they do not fit, or there is none yet."""
        if self._state is None or len(self._state.ids[0]) + len(new) > self._room:
            return None
        if new:
            self.engine.extend(self._state, [new])
        return self._state

    def _read_message(self, template: ChatTemplate, turns: list[Turn]) -> tuple[State, list[Turn]]:
        """The state after the last of ``turns``, and the turns that were kept."""
        if state := self._extended([*self._open, *template.encode_prompt(turns[-1:], self.tokenizer)]):
            return state, turns
        first = 1 if turns[0].role == "system" else 0
        kept = turns
        while len(ids := template.encode_prompt(kept, self.tokenizer)) > self._room:
            if len(kept) == first + 1:
                raise self._too_long(len(ids))
            kept = [*kept[:first], *kept[first + 2 :]]  # without the oldest question and its answer
        state = self.engine.prefill([ids])
        if dropped := len(turns) - len(kept):
            self.tell(f"the context of {self.context:,} tokens is full: dropped the {dropped} oldest messages")
        return state, kept

    def _read_text(self, text: str) -> State:
        begun = self.tokens > 0 and not self._open
        new = [*self._open, *self.tokenizer.encode(("\n" if begun and text else "") + text)]
        if self._state is None and not new:
            raise UserError("nothing to continue yet; write something")
        if len(new) > self._room:
            raise self._too_long(len(new))
        if state := self._extended(new):
            return state
        if self._state is None:
            return self.engine.prefill([new])
        ids = [*self._state.ids[0], *new]
        kept = ids[-max(len(new), self._room // 2) :]
        state, dropped = self.engine.prefill([kept]), len(ids) - len(kept)
        self.tell(f"the context of {self.context:,} tokens is full: dropped the {dropped:,} oldest tokens")
        return state

    def _too_long(self, tokens: int) -> UserError:
        return UserError(
            f"{tokens:,} tokens leave no room for an answer in a context of {self.context:,}; shorten the text, or"
            " start with a larger --context"
        )

    def save(self, path: Path) -> None:
        """UserError: there is nothing to save, or the file cannot be written."""
        if self._state is None:
            raise UserError("/save: the conversation is empty")
        turns = tuple((turn.role, turn.content) for turn in self.turns)
        saved = Saved(template=self.template is not None, turns=turns, open=self._open)
        save_state(path, self._state, self.engine.model, saved.model_dump_json())

    def load(self, path: Path) -> None:
        """Replaces this conversation by a saved one. UserError: not a conversation with this model."""
        state, note = load_state(path, self.engine.model)
        try:
            saved = Saved.model_validate_json(note or "{}")  # empty: a state of `hybridlm generate`
        except ValidationError as error:
            where = printable(".".join(map(str, error.errors()[0]["loc"])))
            raise UserError(f"{path}: a saved state, but not a valid conversation ({where or 'not JSON'})") from None
        if len(state.ids) != 1 or saved.template != (self.template is not None):
            raise UserError(f"{path}: a saved state, but not of a conversation")
        roles = [role for role, _ in saved.turns]
        in_turn = ["user", "assistant"] * (len(roles) // 2)
        if (
            roles not in (in_turn, ["system", *in_turn])
            or not all(encodable(content) for _, content in saved.turns)
            or not all(token < self.engine.model.vocab_size for token in saved.open)
        ):
            raise UserError(f"{path}: a saved state, but its messages do not form a conversation")
        self.turns = [Turn(*turn) for turn in saved.turns]
        self._state, self._open = state, saved.open
