"""What a server takes on, by default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """context: tokens of a prompt and its answer. answer: tokens of an answer. batch: answers written at a time; queue:
    answers that wait for it, beyond which requests are refused. choices: answers of one request. body: bytes of a
    request. seconds: for a request, from its last byte to the end of its answer. slow: seconds for its body to arrive.
    prefixes: bytes of states kept of prompts. chunk: tokens of a prompt that are read at a time, between two tokens of
    the answers being written."""

    context: int
    answer: int = 4096
    batch: int = 64
    queue: int = 256
    choices: int = 16
    body: int = 1 << 20
    seconds: float = 600.0
    slow: float = 30.0
    prefixes: int = 512 << 20
    chunk: int = 128
