"""What clients send, in the form of OpenAI's interface. What would change the answer and is not known here is refused;
what is only for OpenAI's own books is ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hybridlm.generate.sampling import Sampling

_IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
# Harmless with these values, and unknown with any other.
_OFF: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_MOST_STOPS, _LONGEST_STOP, _MOST_TOP = 16, 1000, 20

_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_Id], Field(fail_fast=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = False  # this server adds none


class TextPart(_Part):
    type: Literal["text"]
    text: str


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None  # of a participant; no template has a place for it
    refusal: None = None  # as OpenAI's client sends an answer back

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Body(_Part):
    """What both endpoints take. Fields that are null count as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = ""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] = []
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if value is not None and name not in _IGNORED and value not in _OFF.get(name, ())
        }

    @model_validator(mode="after")
    def _stops(self) -> Body:
        stops = self.stops
        if len(stops) > _MOST_STOPS or not all(0 < len(text) <= _LONGEST_STOP for text in stops):
            raise ValueError(f"stop: at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def most(self) -> int | None:
        """The most tokens of an answer; None: as many as fit."""
        raise NotImplementedError

    @property
    def top(self) -> int | None:
        """How many likely tokens to report for each; None: no log-probabilities."""
        raise NotImplementedError

    def sampling(self, seed: int, stop_ids: tuple[int, ...], room: int) -> Sampling:
        """Of the first answer. room: tokens that there is place for. UserError: values that do not go together."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=seed,
            stop=self.stops,
            stop_ids=stop_ids,
            max_new_tokens=min(room, self.most or room),
            logprobs=self.top,
        )


class CompletionBody(Body):
    """prompt: one or several, as text or as ids."""

    prompt: str | Annotated[list[str], Field(fail_fast=True)] | _Ids | Annotated[list[_Ids], Field(fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None

    @property
    def most(self) -> int:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class ChatBody(Body):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] = 0

    @model_validator(mode="after")
    def _together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: requires logprobs")
        if any(message.role in ("system", "developer") for message in self.messages[1:]):
            raise ValueError("messages: only the first message can be a system message")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
