"""What /metrics reports, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hybridlm.serve.batch import Job
from hybridlm.serve.engine import ServeEngine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("hybridlm_requests", "answered requests", ["path", "status"], registry=registry)
        self.prompt = Counter("hybridlm_prompt_tokens", "tokens of prompts", registry=registry)
        self.reused = Counter("hybridlm_prompt_tokens_reused", "those of them not read again", registry=registry)
        self.written = Counter("hybridlm_generated_tokens", "tokens of answers", registry=registry)
        self.first_token = Histogram(
            "hybridlm_first_token_seconds", "from request to first token", buckets=_SECONDS, registry=registry
        )

    def read(self, job: Job) -> None:
        self.prompt.inc(job.prompt)
        self.reused.inc(job.reused)

    def watch(self, engine: ServeEngine) -> None:
        """Adds what is read off the engine whenever someone asks."""
        gauges = {
            "hybridlm_waiting": ("answers that wait", lambda: len(engine.waiting)),
            "hybridlm_reading": ("answers whose prompt is being read", lambda: len(engine.reading)),
            "hybridlm_writing": ("answers being written", lambda: len(engine.batch.jobs)),
            "hybridlm_prefix_bytes": ("states kept of prompts", lambda: engine.prefixes.bytes),
            "hybridlm_rechecks": ("tokens chosen after reading the text again alone", lambda: engine.rechecks),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
