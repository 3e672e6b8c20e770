"""A trained model behind the interface of lm-evaluation-harness (EleutherAI): log-likelihoods of continuations and of
whole texts, and generation.

As in training, every text begins with the end-of-document token, which takes the place of other models' BOS token. The
border between context and continuation is the harness's own: the two are encoded together and cut where the context
alone would end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hybridlm.errors import UserError
from hybridlm.eval.losses import Continuation, loglikelihoods
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM

_MAX_NEW = 256  # tokens where a task sets no limit, as in the harness
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
Pair = tuple[Any, list[int], list[int]]  # (the texts, ids of the context, ids of the continuation)


class HarnessLM(TemplateLM):
    """max_length: the most tokens the model reads; a longer context is cut on the left, as the harness does. batch:
    rows at a time."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, *, max_length: int, batch: int) -> None:
        super().__init__()
        self.tok, self.max_length, self.batch = tokenizer, max_length, batch
        self.engine = Engine(model, tokenizer, max_batch=batch)

    @property
    def eot_token_id(self) -> int:
        return self.tok.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text, after the end-of-document token unless ``add_special_tokens`` is False."""
        ids = self.tok.encode(string)
        return ids if add_special_tokens is False else [self.tok.eos_id, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request the log-likelihood (nats) of its continuation, and whether greedy decoding produces it.
        UserError: an empty continuation, which would count as certain."""
        rows = []
        for _, context, continuation in requests:
            if not continuation:
                raise UserError("--tasks: an answer choice is empty and cannot be scored; fix the task's data")
            kept = max(self.max_length, len(continuation)) + 1
            rows.append(Continuation(tuple((context + continuation)[-kept:]), len(continuation)))
        return loglikelihoods(self.engine.model, rows, self.batch)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in adjacent windows of ``max_length`` tokens, each token once."""
        rolled = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for windows in rolled for window in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in rolled]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first stop text. UserError: an unsupported setting."""
        prompts, samplings = [], []
        for number, request in enumerate(requests):
            context, settings = request.args
            samplings.append(self._sampling(settings, number))
            # The harness requires a window longer than the text to generate, which a small model may not have.
            room = max(self.max_length - samplings[-1].max_new_tokens, self.max_length // 2, 1)
            prompts.append(self.tok_encode(context)[-room:])
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))  # a batch has similar lengths
        done = self.engine.generate([prompts[i] for i in order], [samplings[i] for i in order])
        texts = dict(zip(order, (completion.text for completion in done), strict=True))
        return [texts[number] for number in range(len(requests))]

    def _sampling(self, settings: dict[str, Any], seed: int) -> Sampling:
        wanted = normalize_gen_kwargs(settings, _MAX_NEW)
        if unknown := sorted(wanted.keys() - _GENERATION):
            raise UserError(
                f"--tasks: generation_kwargs of a task: {unknown[0]} is not supported; supported are"
                f" {', '.join(sorted(_GENERATION))}"
            )
        return Sampling(
            temperature=wanted["temperature"] if wanted["do_sample"] else 0.0,
            top_k=wanted.get("top_k") or None,
            top_p=wanted.get("top_p", 1.0),
            min_p=wanted.get("min_p", 0.0),
            repetition_penalty=wanted.get("repetition_penalty", 1.0),
            seed=seed,
            stop=tuple(text for text in wanted["until"] if text),
            stop_ids=(self.eot_token_id,),
            max_new_tokens=wanted["max_gen_toks"],
        )
