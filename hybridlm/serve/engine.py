"""Answers for many clients at once: prompts are read in pieces between two tokens of the answers being written.

An answer depends on its prompt, options and seed only. The logits depend on more: in another batch, or after a kept
prefix, sums are rounded differently. So a choice that rounding could have decided is not made from them: the text is
read again, alone and in pieces that depend on its request only, which always gives the same logits, and these decide.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.generate.row import Choice, Row, Step, choose, refuse_impossible
from hybridlm.generate.sampling import Sampling
from hybridlm.model.cache import ModelCache
from hybridlm.model.decoder import Decoder
from hybridlm.model.lm import HybridLM
from hybridlm.serve.batch import Batch, Job
from hybridlm.serve.limits import Limits
from hybridlm.serve.prefixes import Prefixes, restore

# How much rounding may change a logit, relative to the largest. In float32 at most 2e-6 was measured for the layers
# here, and 4e-7 for most. A draw depends on many logits, whose errors partly cancel: this allowance was at least three
# times the shift measured. In lower precision most choices would be within rounding, so they are not rechecked.
NOISE = 2.0**-20
_EXACT = (torch.float32, torch.float64)
_FIRST_ROOM = 256  # tokens
_PIECES = 4  # full pieces of prompts read in a turn; shorter ones count for less
_TOGETHER = 32  # rows decoded in a turn: more take no less time each, and a new prompt would wait longer
_LEAST = 4  # a piece, however short, counts as at least 1/_LEAST of a full one

Deliver = Callable[[Sequence[tuple[Job, Step | Exception]]], None]


class ServeEngine:
    """deliver: receives the steps of each turn and, of a job that failed, the error; called in the engine's thread."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, limits: Limits, deliver: Deliver) -> None:
        self.model, self.tokenizer, self.limits, self.deliver = model.eval(), tokenizer, limits, deliver
        self.prefixes = Prefixes(limits.prefixes)
        self.waiting: deque[Job] = deque()
        self.reading: list[Job] = []
        self._taken_on: set[Job] = set()  # what this turn works on
        self._decoded = 0  # one past the last row decoded in the previous turn
        self.rechecks = 0  # choices that were made after reading alone
        self._noise = NOISE if model.embedding.weight.dtype in _EXACT else 0.0
        self._decoder = Decoder(model)
        # From the start as many as any window in reach: a layer's memory then never changes from columns to a window's.
        specs = [block.mixer.spec for block in model.blocks]  # type: ignore[union-attr]
        windows = [window for spec in specs if (window := getattr(spec, "window", None)) and window <= limits.context]
        self._first_room = min(max(_FIRST_ROOM, *windows, 0), limits.context)
        self.batch = self._new_batch()
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def job(self, ids: Sequence[int], sampling: Sampling, number: int = 0, marks: Sequence[int] = ()) -> Job:
        """A job for ``submit``. UserError: an impossible logit_bias."""
        refuse_impossible([sampling], self.model.vocab_size)
        return Job(list(ids), Row(number, sampling, self.tokenizer), self.prefixes.root, tuple(marks))

    def _new_batch(self) -> Batch:
        return Batch(self.model, self._decoder, self._first_room, self.limits.context)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the turn that it is in."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Puts jobs in the queue, unless they do not fit in it. Callable from any thread; a job is taken out again by
        ``cancelled``."""
        with self._wake:
            if len(self.waiting) + len(jobs) > self.limits.queue:
                return False
            self.waiting.extend(jobs)
            self._wake.notify()
        return True

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.batch.jobs)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or self.busy)
                if self._stopped:
                    return
            self.turn()

    @torch.inference_mode()
    def turn(self) -> None:
        """Reads pieces of prompts, then decodes a token of each of the next answers being written."""
        steps: list[tuple[Job, Step | Exception]] = []
        try:
            self._admit()
            self._read_some()
            self._decode(steps)
        except Exception as error:  # whatever it is, the next requests may be answered
            traceback.print_exc()
            steps += [(job, error) for job in self._taken_on]
            self.reading, self.batch = [], self._new_batch()
        self.deliver(steps)

    def _admit(self) -> None:
        self._taken_on = {*self.reading, *self.batch.jobs}
        self.reading = [job for job in self.reading if not job.cancelled]
        for place in reversed(range(len(self.batch.jobs))):
            if self.batch.jobs[place].cancelled:
                self.batch.leave(place)
        with self._wake:  # clients that gave up free their places in the queue
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            while self.waiting and len(self.reading) + len(self.batch.jobs) < self.limits.batch:
                job = self.waiting.popleft()
                self.reading.append(job)
                self._taken_on.add(job)

    def _read_some(self) -> None:
        """In turn of the oldest job, so that none waits for ever, and of the one with least to read, so that few
        wait."""
        budget, oldest = _PIECES * self.limits.chunk, True
        while budget > 0 and self.reading:
            job = self.reading[0] if oldest else min(self.reading, key=lambda job: len(job.ids) - job.read)
            before, logits = job.read, self._read(job)
            budget, oldest = budget - max(job.read - before, self.limits.chunk // _LEAST), not oldest
            if logits is not None:
                self.reading.remove(job)
                (choice,) = choose(logits, [job.row], [job.ids], 0.0 if job.exact else self._noise)
                steps: list[tuple[Job, Step | Exception]] = []
                self._take(job, choice, steps)
                self.deliver(steps)  # a first token does not wait for other prompts

    def _read(self, job: Job) -> Tensor | None:
        """Reads the next piece, or takes over what was read before; the logits (1, V) after the last one."""
        cuts = job.cuts(self.limits.chunk)
        found = self.prefixes.exact(job.ids, cuts) if job.alone else self.prefixes.longest(job.ids)
        if found.tokens > job.read:
            restore(found, self._open(job))
            job.reused += 0 if job.alone else found.tokens - job.read
            job.node, job.read = found, found.tokens
            job.exact = found.exact and [node.tokens for node in found.path()] == [n for n in cuts if n <= found.tokens]
            if job.read == len(job.ids):
                return found.logits
        cache = job.cache or self._open(job)
        end = next(cut for cut in cuts if cut > job.read)
        piece = torch.tensor([job.ids[job.read : end]], device=self.model.embedding.weight.device)
        logits: Tensor = self.model(piece, cache, keep="last").logits[:, -1]
        whole, one_piece = end == len(job.ids), job.node.tokens == job.read
        job.read = end
        if not job.alone or end % self.limits.chunk == 0:  # elsewhere no other text is read from there
            kept = logits if whole else None
            job.node = self.prefixes.add(job.node, job.ids[:end], cache, kept, job.exact and one_piece)
        return logits if whole else None

    def _open(self, job: Job) -> ModelCache:
        """A new cache for ``job``."""
        job.cache = self.model.new_cache(1, max(self.batch.room, len(job.ids) + 1))
        return job.cache

    def _decode(self, steps: list[tuple[Job, Step | Exception]]) -> None:
        if not self.batch.jobs:
            return
        count = len(self.batch.jobs)
        rows = math.ceil(count / math.ceil(count / _TOGETHER))
        first = self._decoded if rows < count and self._decoded < count else 0
        jobs = self.batch.jobs[first : first + rows]
        logits = self.batch.logits(first, len(jobs))
        choices = choose(logits, [job.row for job in jobs], [job.ids for job in jobs], self._noise)
        for place in reversed(range(len(jobs))):  # the last row moves to where one has left
            self._take(jobs[place], choices[place], steps, first + place)
        self._decoded = first + rows

    def _take(
        self, job: Job, choice: Choice, steps: list[tuple[Job, Step | Exception]], place: int | None = None
    ) -> None:
        """Gives ``job`` its next token, or has it read again. place: its row in the batch, None: it is in none."""
        if not choice.settled:
            self.rechecks += 1
            job.alone, job.exact, job.cache, job.read, job.node = True, True, None, 0, self.prefixes.root
            self.reading.insert(0, job)
            if place is not None:
                self.batch.leave(place)
            return
        job.alone = False
        if place is not None:
            job.exact = False
        step = job.row.step(choice.id, choice.logprob, len(job.ids) + 1 == self.limits.context)
        steps.append((job, step))
        if step.finish is None:
            job.ids.append(choice.id)
            if place is None:
                self.batch.join(job)
            return
        cache = job.cache if place is None else self.batch.row(place)
        assert cache is not None
        self.prefixes.add(job.node, job.ids[: job.read], cache, None, exact=False)
        if place is not None:
            self.batch.leave(place)
