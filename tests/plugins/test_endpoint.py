"""endpoint: a small server with known answers, a server that misbehaves in every way, and ``transformers serve`` on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from optkit import OptkitError, UnavailableError
from optkit_plugins import endpoint as plugin
from optkit_plugins._openai import Client, check_url
from optkit_plugins._openai_engine import OpenAIEngine
from tests.plugins.tiny import tiny_model

Reply = Callable[["FakeServer", BaseHTTPRequestHandler, dict[str, Any]], None]


class FakeServer:
    """A server on a free port of the loopback. ``reply`` answers each request; ``seen`` holds (path, headers, body)."""

    def __init__(self, reply: Reply):
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.stopping = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                fake.seen.append((self.path, dict(self.headers), body))
                reply(fake, self, body)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], FakeServer]]:
    servers: list[FakeServer] = []

    def start(reply: Reply) -> FakeServer:
        servers.append(FakeServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def send(handler: BaseHTTPRequestHandler, data: Any, status: int = 200, kind: str = "application/json") -> None:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)


def stream(handler: BaseHTTPRequestHandler, *events: Any, end: bytes = b"data: [DONE]\n\n") -> None:
    raw = b"".join(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n" for event in events) + end
    send(handler, raw, kind="text/event-stream; charset=utf-8")


def echo(fake: FakeServer, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Answers with the last word of the prompt, ``max_tokens`` times; as a stream where that is asked for."""
    words = [" " + body["prompt"].split()[-1]] * body["max_tokens"]
    usage = {"completion_tokens": len(words)}
    if not body.get("stream"):
        send(handler, {"choices": [{"text": "".join(words), "finish_reason": "length"}], "usage": usage})
        return
    chunks = [{"choices": [{"text": word, "index": 0}]} for word in words]
    stream(handler, *chunks, {"choices": [{"text": "", "finish_reason": "length"}]}, {"choices": [], "usage": usage})


def word_tokenizer(size: int = 128) -> Any:
    """One word a token, so that text and ids say the same: ``<s> </s> <pad> w3 w4 …``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", *(f"w{index}" for index in range(3, size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def engine_on(make_trial: Any) -> Iterator[Callable[..., OpenAIEngine]]:
    engines: list[Any] = []

    def build(url: str, **options: Any) -> Any:
        trial = make_trial("endpoint", plugin.EndpointOptions(url=url, **({"model": "tiny"} | options)), tokenizer=word_tokenizer())
        engines.append(plugin.build_engine(trial))
        engines[-1].trial = trial
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_answers_come_in_the_order_of_the_prompts_as_token_ids(serve: Any, engine_on: Any, streamed: bool) -> None:
    server = serve(echo)
    engine = engine_on(server.url, stream=streamed, concurrency=3)
    prompts = [[0, 5, 6], [7], [8, 9], [0, 10], [11, 12, 13]]
    assert engine.generate(prompts, new_tokens=2) == [[6, 6], [7, 7], [9, 9], [10, 10], [13, 13]]
    assert engine.generate(prompts, new_tokens=0) == [[]] * 5
    bodies = [body for _, _, body in server.seen]
    assert {body["prompt"] for body in bodies} == {"w5 w6", "w7", "w8 w9", "w10", "w11 w12 w13"}, "the server adds its own <s>"
    assert all(body["temperature"] == 0 and body["max_tokens"] == 2 and body["model"] == "tiny" for body in bodies)
    facts = plugin.prove_effect(engine.trial)
    assert facts["answered"] is True and facts["url"] == server.url
    assert (engine.trial.notes["time_to_first_token_seconds"] is not None) == streamed


def test_the_address_may_end_in_v1_and_the_key_comes_from_the_environment(serve: Any, engine_on: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MY_KEY", "secret-1")
    server = serve(echo)
    engine = engine_on(server.url + "/v1/", api_key_env="MY_KEY")
    engine.generate([[5]], new_tokens=1)
    path, headers, _ = server.seen[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret-1"
    assert "secret-1" not in json.dumps(engine.facts())


def test_chat_sends_one_message_and_reads_its_content(serve: Any, engine_on: Any) -> None:
    def reply(fake: FakeServer, handler: Any, body: dict[str, Any]) -> None:
        if body.get("stream"):
            deltas = [{"delta": {"role": "assistant"}}, {"delta": {"content": "w4"}, "finish_reason": "stop"}]
            stream(handler, *({"choices": [delta]} for delta in deltas))
        else:
            send(handler, {"choices": [{"message": {"content": "w4"}}]})

    server = serve(reply)
    for streamed in (True, False):
        assert engine_on(server.url, api="chat", stream=streamed).generate([[0, 5, 6]], new_tokens=4) == [[4]]
    path, _, body = server.seen[0]
    assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "w5 w6"}]


def test_exact_lengths_are_asked_for_and_those_of_a_strict_server_are_its_own(serve: Any, engine_on: Any) -> None:
    def strict(fake: FakeServer, handler: Any, body: dict[str, Any]) -> None:
        if "ignore_eos" in body:
            send(handler, {"detail": "Unexpected fields"}, 422)
        else:  # five tokens by its own count, one of them no text
            send(handler, {"choices": [{"text": "w4 w5 w6 w7"}], "usage": {"completion_tokens": 5}})

    lenient, strict_server = serve(echo), serve(strict)
    engine = engine_on(lenient.url)
    assert engine.generate([[5]], new_tokens=3, exact=True) == [[5, 5, 5]]
    assert lenient.seen[0][2]["ignore_eos"] is True and lenient.seen[0][2]["min_tokens"] == 3
    assert engine.facts()["lengths"] == "exact"

    engine = engine_on(strict_server.url)
    for _ in range(2):
        rows = engine.generate([[5]], new_tokens=8, exact=True)
        assert rows[0][:4] == [4, 5, 6, 7] and len(rows[0]) == 5
    assert ["ignore_eos" in body for _, _, body in strict_server.seen] == [True, False, False], "refused once, never asked again"
    assert engine.facts()["lengths"] == "as the server ends its texts"
    assert engine.generate([[5]], new_tokens=8) == [[4, 5, 6, 7]], "outside timing only the text counts"


def test_token_ids_travel_both_ways_where_the_server_knows_them(serve: Any, engine_on: Any) -> None:
    def reply(fake: FakeServer, handler: Any, body: dict[str, Any]) -> None:
        ids = [body["prompt"][-1]] * body["max_tokens"]
        pieces = [{"text": "?", "token_ids": [token]} for token in ids]
        stream(handler, *({"choices": [piece]} for piece in [*pieces, {"text": "", "finish_reason": "stop"}]))

    server = serve(reply)
    assert engine_on(server.url, token_ids=True).generate([[0, 5], [9]], new_tokens=2) == [[5, 5], [9, 9]]
    assert sorted(body["prompt"] for _, _, body in server.seen) == [[0, 5], [9]] and server.seen[0][2]["return_token_ids"] is True


def test_the_first_listed_model_is_taken(serve: Any, engine_on: Any) -> None:
    def reply(models: Any, status: int = 200) -> Reply:
        return lambda fake, handler, body: send(handler, models, status)

    assert engine_on(serve(reply({"data": [{"id": "one"}, {"id": "two"}]})).url, model=None).model == "one"
    for answer, status in (({"data": []}, 200), ({"error": "no cache"}, 500)):
        with pytest.raises(OptkitError, match="option model"):
            engine_on(serve(reply(answer, status)).url, model=None)
    with pytest.raises(OptkitError, match="does not speak the OpenAI protocol"):
        engine_on(serve(reply(["one"])).url, model=None)


def test_a_connection_that_the_server_closed_is_opened_again(serve: Any, engine_on: Any) -> None:
    def closing(fake: FakeServer, handler: Any, body: dict[str, Any]) -> None:
        echo(fake, handler, body)
        handler.close_connection = True  # without telling

    engine = engine_on(serve(closing).url, concurrency=1)
    assert [engine.generate([[token]], new_tokens=1) for token in (5, 6, 7)] == [[[5]], [[6]], [[7]]]


MALFORMED: dict[str, Callable[[Any], None]] = {
    "no JSON": lambda handler: send(handler, b"<html>\x1b[31mhello\x07</html>"),
    "no object": lambda handler: send(handler, [1]),
    "no choice": lambda handler: send(handler, {"choices": []}),
    "no text": lambda handler: send(handler, {"choices": [{"text": None}]}),
    "number as text": lambda handler: send(handler, {"choices": [{"text": 5}]}),
    "deep nesting": lambda handler: send(handler, b"[" * 100_000),
    "no JSON in the stream": lambda handler: stream(handler, b"{oops"),
    "no object in the stream": lambda handler: stream(handler, [1]),
    "no choices in the stream": lambda handler: stream(handler, {"text": "w4"}),
    "text of the stream is no text": lambda handler: stream(handler, {"choices": [{"text": ["w4"]}]}),
    "stream without an end": lambda handler: stream(handler, {"choices": [{"text": "w4"}]}, end=b""),
    "error in the stream": lambda handler: stream(handler, {"error": "out of memory"}),
    "broken off": lambda handler: (
        handler.send_response(200),
        handler.send_header("Content-Length", "100"),
        handler.end_headers(),
        handler.wfile.write(b"{"),
        setattr(handler, "close_connection", True),
    ),  # type: ignore[dict-item, return-value]
    "500": lambda handler: send(handler, {"error": "boom\nboom"}, 500),
    "redirect": lambda handler: send(handler, b"", 302),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_bad_answer_is_one_line_that_names_the_server(serve: Any, engine_on: Any, fault: str) -> None:
    server = serve(lambda fake, handler, body: MALFORMED[fault](handler))
    with pytest.raises(OptkitError) as raised:
        engine_on(server.url).generate([[5], [6]], new_tokens=1)
    message = str(raised.value)
    assert server.url in message and message.isprintable() and len(message) < 500


@pytest.mark.parametrize(("status", "hint"), [(401, "api_key_env"), (404, "the model's name"), (503, "loading")])
def test_a_status_says_the_way_out(serve: Any, engine_on: Any, status: int, hint: str) -> None:
    server = serve(lambda fake, handler, body: send(handler, {"detail": "no"}, status))
    with pytest.raises(OptkitError, match=rf"answered {status} .*{hint}"):
        engine_on(server.url).generate([[5]], new_tokens=1, exact=True)


@pytest.mark.parametrize("dripping", [False, True])
def test_a_slow_server_is_given_up_after_the_time_out(serve: Any, engine_on: Any, dripping: bool) -> None:
    """Also where it sends a little again and again: the limit holds for the whole answer."""

    def slow(fake: FakeServer, handler: Any, body: dict[str, Any]) -> None:
        if not dripping:
            fake.stopping.wait(10)
            handler.close_connection = True
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        try:
            while not fake.stopping.wait(0.02):
                handler.wfile.write(b'data: {"choices": [{"text": "w4"}]}\n\n')
        except OSError:
            pass

    engine = engine_on(serve(slow).url, timeout_seconds=0.3)
    with pytest.raises(OptkitError, match="did not answer within 0.3 s; raise timeout_seconds"):
        engine.generate([[5]], new_tokens=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_server_is_one_line_with_the_address(engine_on: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UnavailableError, match=f"no server listens at {url}"):
        engine_on(url).generate([[5]], new_tokens=1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "--set endpoint.url="),
        ({"url": "127.0.0.1:8000"}, "write it like http"),
        ({"url": "file:///etc/passwd"}, "write it like http"),
        ({"url": "http://host:99999"}, "no address"),
        ({"url": "http://me:secret@host"}, "api_key_env"),
        ({"url": "http://host", "api_key_env": "SURELY_NOT_SET_HERE"}, "SURELY_NOT_SET_HERE"),
        ({"url": "http://host", "api": "chat", "token_ids": True}, "api=completions"),
    ],
)
def test_what_cannot_work_is_said_in_the_plan(options: dict[str, Any], problem: str) -> None:
    assert problem in (plugin.configure(plugin.EndpointOptions(**options)).problem or "")
    assert "secret" not in (plugin.configure(plugin.EndpointOptions(**options)).problem or "")


def test_the_plan_says_where_prompts_go(monkeypatch: Any) -> None:
    monkeypatch.setenv("MY_KEY", "x")
    claims = plugin.configure(plugin.EndpointOptions(url="http://example.org", api_key_env="MY_KEY"))
    assert claims.problem is None and "http://example.org" in claims.notes[0] and "unencrypted" in claims.notes[1]
    assert check_url("https://example.org/openai/v1") is None


def test_scores_are_refused_with_the_reason_and_an_untouched_model_shows_no_server(serve: Any, engine_on: Any, make_trial: Any) -> None:
    engine = engine_on(serve(echo).url)
    assert engine.cannot_score and plugin.load_model() is None
    with pytest.raises(NotImplementedError, match="no distributions"):
        engine.log_probs([[5, 6]], [1])
    untouched = plugin.prove_effect(make_trial("endpoint", plugin.EndpointOptions()))
    assert untouched == plugin.prove_effect(engine.trial) == {"summary": "no server was asked", "answered": False}


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: Any) -> Iterator[tuple[str, str, Any]]:
    """``transformers serve`` on a tiny model: its address, the model's name there, and the model."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model, _ = tiny_model("llama")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    port = free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "serve.log", "wb") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, folder / "serve.log")
        yield url, str(folder), model
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(url: str, process: Any, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            threading.Event().wait(0.2)
    pytest.fail(f"transformers serve did not start: {log.read_text()[-2000:]}")


@pytest.mark.parametrize("streamed", [True, False])
def test_transformers_serve_gives_the_texts_of_the_same_model_here(transformers_serve: Any, engine_on: Any, streamed: bool) -> None:
    import torch

    url, name, model = transformers_serve
    engine = engine_on(url, model=name, stream=streamed, concurrency=2)
    prompts = [[7, 9, 30, 55, 4], [60, 61], [100, 3, 3, 8]]
    expected = []
    for prompt in prompts:
        text = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=1, pad_token_id=2)
        row = text[0, len(prompt) :].tolist()
        expected.append(row[: row.index(1)] if 1 in row else row)
    assert engine.generate(prompts, new_tokens=10) == expected
    assert len({token for row in expected for token in row}) > 4
    timed = engine.generate(prompts, new_tokens=10, exact=True)
    assert engine.extensions is False, "it refuses fields beyond the protocol"
    assert [len(row) for row in timed] == [min(len(row) + (len(row) < 10), 10) for row in expected], "its count includes the end of a text"


def test_transformers_serve_without_a_listed_model_says_which_option_helps(transformers_serve: Any, engine_on: Any) -> None:
    with pytest.raises(OptkitError, match="option model"):
        engine_on(transformers_serve[0], model=None)


def test_a_client_can_be_used_without_a_trial(serve: Any) -> None:
    client = Client(serve(echo).url, timeout=5)
    assert client.complete("/v1/completions", {"prompt": "a b", "max_tokens": 1}).text == " b"
    client.close()
