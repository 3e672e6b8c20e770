"""A conversation with a small random model, for tests."""

from __future__ import annotations

from small_models import small_config

from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.generate.conversation import Conversation
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.model.build import fresh_model

SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


class Talk:
    """A conversation with a model of noise, whose answers are letters and end by themselves now and then."""

    def __init__(self, chat: bool, context: int = 200, tokens: int = 20, pattern: str = "MTM", seed: int = 0) -> None:
        self.tokenizer = byte_tokenizer(SPECIALS if chat else ())
        self.model = fresh_model(small_config(pattern), self.tokenizer.vocab_size, seed=seed, device="cpu")
        self.template = template_of(self.tokenizer) if chat else None
        end = self.template.end_id if self.template else self.tokenizer.eos_id
        bias = {i: -1e9 for i in range(self.tokenizer.vocab_size) if chr(i) not in "abc" and i != end}
        sampling = Sampling(seed=1, max_new_tokens=tokens, logit_bias=bias)
        self.told: list[str] = []
        self.read: list[int] = []  # tokens that each forward was given
        engine = Engine(self.model, self.tokenizer, context=context)
        self.model.register_forward_pre_hook(lambda module, given: self.read.append(given[0].shape[1]))
        self.conversation = Conversation(engine, self.tokenizer, self.template, sampling, self.told.append)

    def say(self, text: str) -> str:
        return "".join(self.conversation.say(text))

    @property
    def ids(self) -> list[int]:
        """Every token that was read or is about to be."""
        return [*self.conversation._state.ids[0], *self.conversation._open]
