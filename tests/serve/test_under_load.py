"""A server in a process of its own under load, hostile requests and signals."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

httpx = pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("fastapi", reason="needs the extra `serve`")

from small_server import Process, wait_until, write_run  # noqa: E402

pytestmark = pytest.mark.slow
SECONDS, CLIENTS = 60, 50
GONE = 0.1  # the share of requests whose client leaves in the middle
FUZZED = 2000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "talker")


def request(rng: random.Random) -> dict:
    messages = [{"role": "user", "content": rng.choice(["hello", "count", "a" * 100, "what is " + str(rng.random())])}]
    if rng.random() < 0.5:
        messages.insert(0, {"role": "system", "content": "you are brief " * 8})
    options = rng.choice([{}, {"top_p": 0.9}, {"temperature": 0}, {"top_k": 10}, {"frequency_penalty": 0.5}])
    return {"messages": messages, "seed": rng.randrange(100), "max_tokens": rng.randint(1, 60), **options}


async def streamed(client, body: dict, leaves: int | None = None) -> str | None:
    """The text; None: the client left after so many events."""
    text, events = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            events += 1
            if leaves is not None and events > leaves:
                return None
            if line.startswith("data: {"):
                piece = json.loads(line.removeprefix("data: "))
                assert "error" not in piece, piece
                text += piece["choices"][0]["delta"].get("content", "")
        assert line == "data: [DONE]" or not line
    return text


def test_fifty_clients(run):
    """Each answer is the one that a lone client gets, also where others leave; memory does not grow without bounds."""
    answers: dict[str, str] = {}
    sizes: list[int] = []

    async def client(number: int, server: Process, end: float) -> int:
        rng, count = random.Random(number), 0
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as mine:
            while time.monotonic() < end:
                body = request(rng)
                text = await streamed(mine, body, rng.randint(1, 30) if rng.random() < GONE else None)
                count += 1
                if text is not None:
                    assert answers.setdefault(json.dumps(body), text) == text
                if number == 0:
                    sizes.append(server.resident())
        return count

    async def crowd(server: Process) -> int:
        end = time.monotonic() + SECONDS
        return sum(await asyncio.gather(*(client(number, server, end) for number in range(CLIENTS))))

    async def alone(server: Process) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as mine:
            for body in random.Random(0).sample(sorted(answers), min(100, len(answers))):
                assert await streamed(mine, json.loads(body)) == answers[body]

    with Process(run, "--prefix-mb", "32") as server:
        count = asyncio.run(crowd(server))
        metrics = httpx.get(f"{server.url}/metrics").text
        server.terminate()
        assert server.process.wait(30) == 0
        assert server.process.stderr.read() == ""
    with Process(run, "--prefix-mb", "0") as server:
        asyncio.run(alone(server))
    assert count > 4 * CLIENTS
    assert 'status="500"' not in metrics
    half = sizes[len(sizes) // 2]
    assert sizes[-1] < half + (32 << 20)


def mutated(rng: random.Random, key: str) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of a request in which about everything may be wrong."""
    body: object = rng.choice([request(rng), {"prompt": "x", "max_tokens": 3}, {"prompt": [1, 2], "max_tokens": 3}])
    odd = [None, True, -1, 0, 1e308, 2**70, "", "x" * 3000, "\ud800", "\0", [], {}, [[]], [None], {"a": {"b": []}}, 0.5]
    odd += [{"role": "user"}, ["x"] * 50, [{"role": "user", "content": [{"type": "text", "text": "y"}]}], "1", [1e9]]
    names = [*body, "n", "stop", "stream", "stream_options", "logit_bias", "logprobs", "top_logprobs", "temperature"]
    names += ["top_p", "min_p", "tools", "response_format", "max_tokens", "model", "echo", "\u202e", "__proto__"]
    for _ in range(rng.randint(0, 3)):
        body[rng.choice(names)] = rng.choice(odd)
    data = json.dumps(body).encode()
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        place = rng.randrange(len(data))
        data = data[:place] + rng.randbytes(rng.randint(0, 3)) + data[place + rng.randint(0, 3) :]
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    match rng.randrange(12):
        case 0:
            headers["content-type"] = rng.choice(["text/plain", "", "multipart/form-data; boundary=x", "a/b/c;;="])
        case 1:
            headers["authorization"] = rng.choice(["Bearer", "Bearer wrong", "Basic eA==", "\x01", key, ""])
        case 2:
            headers[rng.choice(["x-" + "a" * 50, "cookie", "range", "origin", "if-match", "te"])] = "z" * rng.randint(
                0, 900
            )
        case 3:
            headers["content-encoding"] = rng.choice(["gzip", "identity", "x"])
    method = rng.choice(["POST"] * 12 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
    path = rng.choice(
        ["/v1/chat/completions", "/v1/completions"] * 5 + ["/v1/models/\u00e9%00", "/v1//x", "/metrics", "//"]
    )
    return method, path, headers, data


def test_hostile_requests(run, tmp_path):
    """4xx or an answer, never 5xx, never a hang; without a right key nothing."""
    (tmp_path / "keys").write_text("secret\n")
    rng, statuses = random.Random(1), {}
    with Process(run, "--api-keys", str(tmp_path / "keys")) as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for _ in range(FUZZED):
                method, path, headers, data = mutated(rng, "secret")
                response = client.request(method, path, headers=headers, content=data)
                assert response.status_code < 500, (method, path, headers, data, response.text)
                if headers["authorization"] != "Bearer secret" and path.startswith("/v1/"):
                    assert response.status_code == 401, (path, headers)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            right = client.post("/v1/completions", headers={"authorization": "Bearer secret"}, json={"prompt": "x"})
            assert right.status_code == 200
        server.terminate()
        assert server.process.wait(30) == 0
        said = server.process.stderr.read()
        assert "Traceback" not in said
        assert "secret" not in said
    assert statuses[200] > FUZZED // 40
    assert statuses[400] > FUZZED // 4


def test_a_large_prompt_is_refused_in_constant_memory(run):
    with Process(run) as server:
        host, _, port = server.url.removeprefix("http://").partition(":")
        sizes = []
        for _ in range(16):
            assert httpx.post(f"{server.url}/v1/completions", content=b"x" * (10 << 20)).status_code == 413
            with socket.create_connection((host, int(port))) as sock:
                sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
                try:
                    for _ in range(160):
                        sock.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                except OSError:
                    pass  # it has been refused
            sizes.append(server.resident())
        # 320 MB were sent; what a refused request leaves is a few objects until they are collected.
        assert max(sizes) < sizes[0] + (24 << 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_open_answers_are_finished(run, number):
    body = {"prompt": "x", "max_tokens": 400, "logit_bias": {"256": -100}, "stream": True}
    with Process(run) as server:
        texts: list[list[str]] = []
        begun = threading.Barrier(6)

        def ask() -> None:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                mine = [next(lines)]
                begun.wait(30)
                mine += lines
            texts.append([line for line in mine if line])

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        begun.wait(30)
        server.process.send_signal(number)
        wait_until(lambda: httpx.get(f"{server.url}/v1/models").status_code == 503)
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        for thread in threads:
            thread.join(60)
        assert server.process.wait(30) == 0
    assert len(texts) == 5
    for lines in texts:
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in lines[-2]


def test_a_second_interrupt_ends_at_once(run):
    body = {"prompt": "x", "max_tokens": 4000, "logit_bias": {"256": -100}, "stream": True}
    with (
        Process(run, "--context", "100000") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        server.process.wait(20)


def test_mistakes_of_the_command(run, tmp_path):
    def said(*options: str) -> str:
        command = [sys.executable, "-m", "hybridlm", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        return line

    assert "no" in said(str(tmp_path / "nothing"))
    assert "--api-keys" in said(str(run), "--api-keys", str(tmp_path / "nothing"))
    (tmp_path / "empty").write_text("\n")
    assert "no key" in said(str(run), "--api-keys", str(tmp_path / "empty"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in said(str(run), "--port", str(taken.getsockname()[1]))
