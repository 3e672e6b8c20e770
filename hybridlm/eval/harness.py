"""A trained model as lm-evaluation-harness (EleutherAI) asks for one: log-likelihoods of continuations and texts, and
generation.

As in training, every text begins behind the end-of-document token, which takes the place that a begin token has in
other models. The border between context and continuation is the harness's own: the two are encoded together and cut
where the context alone would end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hybridlm.errors import UserError
from hybridlm.eval.scoring import Row, scored
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM

_MAX_NEW = 256  # tokens where a task does not say, as in the harness
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
Pair = tuple[Any, list[int], list[int]]  # (the texts, ids of the context, ids of the continuation)


class HarnessLM(TemplateLM):
    """max_length: tokens that the model reads at most; what is before them is left out, as the harness does. batch:
    rows at a time."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, *, max_length: int, batch: int) -> None:
        super().__init__()
        self.model, self.tok, self.max_length, self.batch = model.eval(), tokenizer, max_length, batch
        self.engine = Engine(model, tokenizer, max_batch=batch)

    @property
    def eot_token_id(self) -> int:
        return self.tok.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text, behind the end-of-document token unless ``add_special_tokens`` is False."""
        ids = self.tok.encode(string)
        return ids if add_special_tokens is False else [self.tok.eos_id, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each the log-likelihood (nats) of the continuation, and whether greedy decoding would write it."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        answers = scored(self.model, rows, self.batch)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """The last ``max_length`` inputs and the target behind them. UserError: there is nothing to score, which would
        count as certain."""
        if not continuation:
            raise UserError(
                "--tasks: a continuation (an answer to choose) is empty, which has no score; mend the task's data"
            )
        kept = max(self.max_length, len(continuation)) + 1
        return Row(tuple((context + continuation)[-kept:]), len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows of ``max_length`` side by side, each token once."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine: list[Pair] = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first stop text. ConfigError: a setting of the task that
        is not known."""
        prompts: list[list[int]] = []
        samplings: list[Sampling] = []
        for place, request in enumerate(requests):
            context, settings = request.args
            sampling = self._sampling(settings, place)
            # The harness asks for a window that is longer than what is to be written; a small model's may not be.
            room = max(self.max_length - sampling.max_new_tokens, self.max_length // 2, 1)
            prompts.append(self.tok_encode(context)[-room:])
            samplings.append(sampling)
        order = sorted(
            range(len(prompts)), key=lambda place: -len(prompts[place])
        )  # rows of a batch are of like length
        done = self.engine.generate([prompts[place] for place in order], [samplings[place] for place in order])
        texts = dict(zip(order, (completion.text for completion in done), strict=True))
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[place])
        return [texts[place] for place in range(len(requests))]

    def _sampling(self, settings: dict[str, Any], seed: int) -> Sampling:
        wanted = normalize_gen_kwargs(settings, _MAX_NEW)
        if unknown := sorted(wanted.keys() - _GENERATION):
            raise UserError(
                f"generation_kwargs of a task: {unknown[0]}: not known here; legal are {', '.join(sorted(_GENERATION))}"
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
