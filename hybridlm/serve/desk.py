"""Between the engine's thread and the event loop: requests go in as jobs, and their steps come out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from hybridlm.generate.row import Step
from hybridlm.generate.sampling import Sampling
from hybridlm.runs.checkpoint import LoadedRun
from hybridlm.serve.batch import Job
from hybridlm.serve.engine import ServeEngine
from hybridlm.serve.limits import Limits
from hybridlm.serve.metrics import Metrics
from hybridlm.serve.refusal import Refusal


class Order:
    """The jobs of one request. written: tokens of all answers so far."""

    def __init__(self, jobs: Sequence[Job], metrics: Metrics, seconds: float) -> None:
        self.jobs, self.written = jobs, 0
        self._metrics, self._began, self._seconds = metrics, time.perf_counter(), seconds
        self.inbox: asyncio.Queue[tuple[Job, Step | Exception]] = asyncio.Queue()

    async def steps(self) -> AsyncIterator[Step]:
        """Every step as it comes. Refusal: the engine failed, or took too long."""
        begun, writing = set[Job](), len(self.jobs)
        while writing:
            job, step = await self._next()
            if not begun:
                self._metrics.first_token.observe(time.perf_counter() - self._began)
            if job not in begun:
                begun.add(job)
                self._metrics.read(job)
            self.written += step.id is not None
            self._metrics.written.inc(step.id is not None)
            writing -= step.finish is not None
            yield step

    async def _next(self) -> tuple[Job, Step]:
        try:
            async with asyncio.timeout(self._seconds - (time.perf_counter() - self._began)):
                job, step = await self.inbox.get()
        except TimeoutError:
            raise Refusal(504, f"the answer took longer than {self._seconds:g} seconds", "timeout") from None
        if isinstance(step, Exception):
            raise Refusal(500, "the model could not answer; the server's log says why", "engine_failed")
        return job, step


class Desk:
    """Takes requests for one engine. ``open`` is to be called in the event loop that it serves."""

    def __init__(self, run: LoadedRun, limits: Limits) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.engine = ServeEngine(run.model, run.tokenizer, limits, self._deliver)
        self.metrics.watch(self.engine)
        self._orders: dict[Job, Order] = {}

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def close(self) -> None:
        self.engine.stop()

    def order(self, prompts: Sequence[tuple[Sequence[int], Sampling, Sequence[int]]]) -> Order:
        """prompts: the ids, options and marks of each answer. Refusal: the queue is full; UserError: an impossible
        option."""
        jobs = [self.engine.job(ids, sampling, number, marks) for number, (ids, sampling, marks) in enumerate(prompts)]
        order = Order(jobs, self.metrics, self.limits.seconds)
        self._orders |= dict.fromkeys(jobs, order)
        if not self.engine.submit(jobs):
            self.finished(order)
            raise Refusal(429, "too many requests are waiting; try again later", "queue_full")
        return order

    def finished(self, order: Order) -> None:
        """Cancels whatever is still being generated for it."""
        for job in order.jobs:
            job.cancelled = True
            self._orders.pop(job, None)

    def _deliver(self, steps: Sequence[tuple[Job, Step | Exception]]) -> None:
        if steps and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._sort, steps)

    def _sort(self, steps: Sequence[tuple[Job, Step | Exception]]) -> None:
        for job, step in steps:
            order = self._orders.get(job)
            if order is not None:
                order.inbox.put_nowait((job, step))
