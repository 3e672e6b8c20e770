"""The server as clients see it: OpenAI's own client, and plain HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

httpx = pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from small_server import loaded, serving, wait_until, write_run  # noqa: E402

from hybridlm.data.chat import template_of  # noqa: E402
from hybridlm.data.reading.documents import Turn  # noqa: E402
from hybridlm.errors import UserError  # noqa: E402
from hybridlm.generate.engine import Engine  # noqa: E402
from hybridlm.generate.sampling import Sampling  # noqa: E402
from hybridlm.serve.command import is_loopback, read_keys, served  # noqa: E402
from hybridlm.serve.limits import Limits  # noqa: E402


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "talker")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "writer", chat=False)


@pytest.fixture(scope="module")
def url(chat_run):
    with serving(chat_run) as address:
        yield address


@pytest.fixture
def post(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client.post


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")))


def events(response) -> list:
    lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
TURNS = [Turn("system", "be brief"), Turn("user", "hello")]


def test_the_answer_is_that_of_generate(chat_run, post):
    run = loaded(chat_run)
    template = template_of(run.tokenizer)
    ids = template.encode_prompt(TURNS, run.tokenizer)
    stops = (template.end_id, run.tokenizer.eos_id)
    for seed in range(3):
        sampling = Sampling(temperature=0.9, top_p=0.8, seed=seed, stop_ids=stops, max_new_tokens=30)
        (want,) = Engine(run.model, run.tokenizer).generate([ids], [sampling])
        body = {"messages": MESSAGES, "temperature": 0.9, "top_p": 0.8, "seed": seed, "max_completion_tokens": 30}
        got = post("/v1/chat/completions", json=body).json()
        (choice,) = got["choices"]
        assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
        assert choice["finish_reason"] == want.finish
        assert got["usage"]["prompt_tokens"] == len(ids)
        assert got["usage"]["completion_tokens"] == len(want.ids)


def test_a_stream_is_the_answer_in_pieces(url, post):
    body = {"messages": MESSAGES, "seed": 5, "max_tokens": 40, "n": 2}
    whole = post("/v1/chat/completions", json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | options) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = events(response)
    assert [piece["choices"][0]["delta"] for piece in pieces[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index, choice in enumerate(whole["choices"]):
        mine = [each for piece in pieces for each in piece["choices"] if each["index"] == index]
        assert "".join(each["delta"].get("content", "") for each in mine) == choice["message"]["content"]
        assert [each["finish_reason"] for each in mine][-1] == choice["finish_reason"]


def test_the_choices_have_seeds_of_their_own(post):
    body = {"prompt": "ab", "seed": 5, "max_tokens": 20}
    three = post("/v1/completions", json=body | {"n": 3}).json()
    assert len({choice["text"] for choice in three["choices"]}) == 3
    third = post("/v1/completions", json=body | {"seed": 7}).json()
    assert three["choices"][2]["text"] == third["choices"][0]["text"]
    assert three["usage"]["completion_tokens"] == 60
    for prompt in (["ab", "cd"], [[97, 98], [99, 100]]):
        two = post("/v1/completions", json=body | {"prompt": prompt}).json()
        assert two["choices"][0]["text"] == three["choices"][0]["text"]
        assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert post("/v1/completions", json=body | {"prompt": [97, 98]}).json()["choices"] == three["choices"][:1]


def test_logprobs(chat_run, post):
    body = {"seed": 1, "max_tokens": 4}
    chat = post("/v1/chat/completions", json=body | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3}).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(content) == chat["usage"]["completion_tokens"]
    for token in content:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] <= token["top_logprobs"][0]["logprob"] <= 0
    text = post("/v1/completions", json=body | {"prompt": "x", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert len(text["tokens"]) == len(text["token_logprobs"]) == len(text["top_logprobs"])


def test_stop_and_bias(post):
    bias = {str(i): -100 for i in range(261) if chr(i) not in "ab"}
    body = {"prompt": "x", "seed": 2, "max_tokens": 60, "logit_bias": bias}
    (free,) = post("/v1/completions", json=body).json()["choices"]
    assert set(free["text"]) == {"a", "b"}
    stop = free["text"][10:14]
    (stopped,) = post("/v1/completions", json=body | {"stop": [stop, "never"]}).json()["choices"]
    assert stopped["text"] == free["text"].partition(stop)[0]
    assert stopped["finish_reason"] == "stop"


def test_a_conversation_is_not_read_again(post):
    body = {"messages": [{"role": "user", "content": "a" * 200}], "temperature": 0, "max_tokens": 8}
    first = post("/v1/chat/completions", json=body).json()
    said = first["choices"][0]["message"]["content"]
    body["messages"] += [{"role": "assistant", "content": said}, {"role": "user", "content": "go on"}]
    second = post("/v1/chat/completions", json=body).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 200


def test_models(url, chat_run):
    (card,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert (card["id"], card["object"], card["context"], card["chat"]) == ("talker", "model", 512, True)
    assert httpx.get(f"{url}/v1/models/talker").json() == card
    assert httpx.get(f"{url}/v1/models/other").status_code == 404
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_openais_client(url):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["talker"]
        named = {"model": "talker", "seed": 3, "max_tokens": 12}
        chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=1, **named)
        assert chat.choices[0].logprobs.content[0].top_logprobs
        stream = client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **named
        )
        pieces = list(stream)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == chat.choices[0].message.content
        assert pieces[-1].usage.completion_tokens == chat.usage.completion_tokens
        assert client.completions.create(prompt="x", **named).choices[0].finish_reason in ("stop", "length")
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert refused.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="talker", messages=MESSAGES, response_format={"type": "json_object"})
        assert refused.value.param == "response_format"


WRONG = {
    "no JSON": b"{",
    "not an object": b"[1]",
    "nothing": b"",
    "deep": b"[" * 100_000,
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "no prompt": b"{}",
    "empty prompt": b'{"prompt": ""}',
    "no prompts": b'{"prompt": []}',
    "ids and text": b'{"prompt": ["x", 1]}',
    "an id too large": b'{"prompt": [999]}',
    "negative": b'{"prompt": [-1]}',
    "hot": b'{"prompt": "x", "temperature": -1}',
    "text for a number": b'{"prompt": "x", "temperature": "1"}',
    "a huge number": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "an unknown field": b'{"prompt": "x", "\\ud800": 1}',
    "many choices": b'{"prompt": "x", "n": 10000}',
    "empty stop": b'{"prompt": "x", "stop": ""}',
    "an unknown id": b'{"prompt": "x", "logit_bias": {"5000": 1}}',
    "too long": json.dumps({"prompt": "x" * 600}).encode(),
    "much too long": json.dumps({"prompt": "x" * 600_000}).encode(),
    "another model": b'{"prompt": "x", "model": "gpt-4"}',
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_in_openais_form(post, body):
    response = post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]


def test_other_refusals(url, text_run):
    assert httpx.post(f"{url}/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 400
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    assert httpx.get(f"{url}/nothing").json()["error"]["type"] == "not_found_error"
    with serving(text_run) as other:
        refused = httpx.post(f"{other}/v1/chat/completions", json={"messages": MESSAGES})
        assert refused.json()["error"]["code"] == "not_a_chat_model"
        assert httpx.post(f"{other}/v1/completions", json={"prompt": "x", "seed": 1}).status_code == 200


def test_a_large_body_is_refused_before_it_is_read(url):
    declared = httpx.post(f"{url}/v1/completions", content=b"x" * (2 << 20))
    assert declared.status_code == 413
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as sock:  # in chunks, without saying how many
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 20 << 20:
                sock.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
            answer = sock.recv(100)
        except OSError:
            answer = b""
        assert sent < 20 << 20 or answer.startswith(b"HTTP/1.1 413")


def test_keys(chat_run):
    with serving(chat_run, keys=["first", "second"]) as url:
        for key, status in ((None, 401), ("wrong", 401), ("firs", 401), ("first", 200), ("second", 200)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
            assert httpx.get(f"{url}/metrics", headers=headers).status_code == status
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Basic first"}).status_code == 401
        assert [httpx.get(f"{url}{path}").status_code for path in ("/", "/health")] == [200, 200]


def test_other_sites(chat_run):
    """A page of another site gets nothing, unless it was asked for; nor does one that has its name point here."""
    with serving(chat_run, hosts=["127.0.0.1"], origins=["https://ours.example"]) as url:
        for origin, allowed in (("https://ours.example", True), ("https://theirs.example", False)):
            answer = httpx.get(f"{url}/v1/models", headers={"origin": origin})
            assert ("access-control-allow-origin" in answer.headers) == allowed
        assert httpx.get(f"{url}/health", headers={"host": "theirs.example"}).status_code == 403
    with serving(chat_run) as url:
        answer = httpx.get(f"{url}/v1/models", headers={"origin": "https://theirs.example"})
        assert "access-control-allow-origin" not in answer.headers


LONG = {"prompt": "x", "seed": 1, "max_tokens": 500, "logit_bias": {"256": -100}}


def test_a_body_without_a_content_type_is_refused(url):
    """A page of another site may send one without asking."""
    answer = httpx.post(f"{url}/v1/completions", content=b'{"prompt": "a"}')
    assert answer.status_code == 400


def test_a_dead_engine_is_not_healthy(chat_run):
    async def health() -> int:
        app, _ = served(loaded(chat_run), Limits(context=64))  # its engine was never started
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return (await client.get("/health")).status_code

    assert asyncio.run(health()) == 503


@pytest.mark.parametrize(
    ("host", "near"), [("localhost", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False)]
)
def test_loopback(host, near):
    assert is_loopback(host) == near


def test_keys_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HYBRIDLM_API_KEYS", raising=False)
    assert read_keys(None) == []
    monkeypatch.setenv("HYBRIDLM_API_KEYS", "one, two")
    assert read_keys(None) == ["one", "two"]
    monkeypatch.setenv("HYBRIDLM_API_KEYS", " ,")
    (tmp_path / "keys").write_text("\n")
    for path in (None, tmp_path / "keys", tmp_path / "none"):
        with pytest.raises(UserError):
            read_keys(path)


def test_a_client_that_leaves_ends_its_answer(chat_run):
    with serving(chat_run, context=100_000, answer=90_000) as url:
        body = LONG | {"max_tokens": 90_000}
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as response:
            lines = response.iter_lines()  # httpx closes the stream with it
            next(lines)
            assert metric(url, "hybridlm_writing") == 1
        wait_until(lambda: metric(url, "hybridlm_writing") == 0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.5)
        wait_until(lambda: metric(url, "hybridlm_writing") == 0)


def test_time_and_queue_are_limited(chat_run):
    with serving(chat_run, context=100_000, answer=90_000, batch=1, queue=1, seconds=1.5) as url:
        body = LONG | {"max_tokens": 90_000}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=30), range(4)))
        codes = [answer.json()["error"]["code"] for answer in answers]
        assert set(codes) == {"timeout", "queue_full"}
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 200
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as response:
            last = [line for line in response.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_many_at_once_get_the_answers_of_one(url):
    def ask(seed: int) -> str:
        body = {"messages": MESSAGES, "seed": seed % 5, "max_tokens": 30}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"][
            "content"
        ]

    alone = [ask(seed) for seed in range(5)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == alone * 4


def test_a_slow_body_is_given_up(chat_run):
    with serving(chat_run, slow=0.3) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            assert sock.recv(100).startswith(b"HTTP/1.1 408")


def test_the_page_runs_nothing_but_its_own_script(url):
    answer = httpx.get(url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_no_thread_is_left(chat_run):
    before = threading.active_count()
    with serving(chat_run) as url:
        httpx.get(f"{url}/health")
    wait_until(
        lambda: "engine" not in {thread.name for thread in threading.enumerate()} or threading.active_count() <= before
    )
