"""A client of the OpenAI protocol, over the standard library alone."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optkit import OptkitError, UnavailableError, UsageError

#: Longest line of a stream and longest plain answer, in bytes: a server must not fill the client's memory.
LONGEST = 16 * 2**20
#: The server closed a kept-alive connection between two requests: nothing of the new request was answered.
STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


@dataclass(frozen=True)
class Answer:
    """One completion.

    :ivar token_ids: the new tokens, from servers that tell them. :ivar completion_tokens: how many tokens the server says it generated.
    :ivar first_token_seconds: from sending the request to the first piece of text; ``None`` without a stream.
    """

    text: str
    token_ids: list[int] | None = None
    completion_tokens: int | None = None
    first_token_seconds: float | None = None


class StatusError(OptkitError):
    """The server answered with an HTTP error."""

    def __init__(self, status: int, message: str):
        self.status = status
        super().__init__(message)


def check_url(url: str) -> str | None:
    """What is wrong with a server's address, or ``None``."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return f"'{url}' is no address: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"'{url}' is no address of a server; write it like http://127.0.0.1:8000"
    if parts.username or parts.password:
        return "the address holds a user name or password, which records would keep; name an environment variable in api_key_env"
    return None


def is_loopback(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


class Client:
    """Requests to one server, one kept-alive connection a thread. Proxies of the environment and redirects are not followed.

    :param url: with or without the trailing ``/v1``. :param timeout: seconds for a whole answer.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 120.0):
        self.url = url.rstrip("/")
        parts = urllib.parse.urlsplit(self.url)
        self.host, self.port, self.secure = str(parts.hostname), parts.port, parts.scheme == "https"
        self.root = parts.path.removesuffix("/v1")
        self.timeout = timeout
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []

    def get(self, path: str) -> Any:
        """The JSON answer to a GET, such as ``/v1/models``."""
        response, _ = self._send("GET", path, None)
        return self._json(response, path)

    def status(self, path: str) -> int:
        """The status of a GET whose answer is of no interest, such as ``/health``."""
        try:
            response, _ = self._send("GET", path, None)
        except StatusError as error:
            return error.status
        self._drop(response)
        return response.status

    def first_model(self) -> str:
        """The name of the first model that the server lists.

        :raises OptkitError: where it lists none, or cannot list them.
        """
        try:
            listed = self.get("/v1/models")
        except StatusError as error:
            raise StatusError(error.status, f"{error}; a server that lists no models needs their name in the option model") from None
        rows = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(rows, list) or any(not isinstance(row, dict) or not isinstance(row.get("id"), str) for row in rows):
            raise malformed(f"{self.url}/v1/models", json.dumps(listed)[:200])
        if not rows:
            raise UsageError(f"{self.url} lists no model; name the one that it serves in the option model")
        return str(rows[0]["id"])

    def complete(self, path: str, body: dict[str, Any]) -> Answer:
        """The answer of ``/v1/completions`` or ``/v1/chat/completions``, streamed or whole."""
        response, started = self._send("POST", path, body)
        if "text/event-stream" in (response.getheader("Content-Type") or ""):
            return self._streamed(response, path, started)
        return whole_answer(self._json(response, path), self.url + path)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
            connection = self._local.connection = kind(self.host, self.port, timeout=self.timeout)
            self._connections.append(connection)
        return connection

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[http.client.HTTPResponse, float]:
        connection = self._connect()
        reused = connection.sock is not None
        data = None if body is None else json.dumps(body).encode()
        started = time.perf_counter()
        try:
            try:
                connection.request(method, self.root + path, data, self.headers)
                response = connection.getresponse()
            except STALE:
                if not reused:
                    raise
                connection.close()
                connection.request(method, self.root + path, data, self.headers)
                response = connection.getresponse()
            if response.status != 200:
                raise self._status_error(response, path)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._failure(error) from error
        return response, started

    def _drop(self, response: http.client.HTTPResponse) -> None:
        """Close both: with ``Connection: close`` the socket belongs to the response."""
        response.close()
        self._connect().close()

    def _status_error(self, response: http.client.HTTPResponse, path: str) -> StatusError:
        said = one_line(response.read(4096).decode("utf-8", "replace"))
        self._drop(response)  # what is left of a long answer must not be taken for the next one
        hints = {
            401: "; set api_key_env to the name of the variable that holds the key",
            404: "; check the address and the model's name",
            503: "; it may still be loading",
        }
        return StatusError(response.status, f"{self.url}{path} answered {response.status} ({said}){hints.get(response.status, '')}")

    def _failure(self, error: Exception) -> OptkitError:
        if isinstance(error, TimeoutError):
            return OptkitError(f"{self.url} did not answer within {self.timeout:g} s; raise timeout_seconds, or lower concurrency")
        if isinstance(error, ConnectionRefusedError):
            return UnavailableError(f"no server listens at {self.url} (connection refused); start it, or correct the address")
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            return UnavailableError(f"{self.url} cannot be reached ({one_line(str(error))}); correct the address")
        return OptkitError(f"{self.url} broke off its answer ({type(error).__name__}: {one_line(str(error))}); its own log says why")

    def _json(self, response: http.client.HTTPResponse, path: str) -> Any:
        try:
            data = response.read(LONGEST + 1)
        except (OSError, http.client.HTTPException) as error:
            self._drop(response)
            raise self._failure(error) from error
        if len(data) > LONGEST:
            self._drop(response)
            raise OptkitError(f"{self.url}{path} answered with more than {LONGEST} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise malformed(self.url + path, data[:200].decode("utf-8", "replace")) from error

    def _streamed(self, response: http.client.HTTPResponse, path: str, started: float) -> Answer:
        try:
            return self._collect(response, self.url + path, started)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from error
        finally:
            if not response.isclosed():
                self._drop(response)

    def _collect(self, response: http.client.HTTPResponse, where: str, started: float) -> Answer:
        texts: list[str] = []
        ids: list[int] = []
        first = usage = None
        finished = with_ids = False
        for event in events(response, where, started + self.timeout):
            if event is None:
                finished = True
                break
            choice, text = piece(event, where)
            if text and first is None:
                first = time.perf_counter() - started
            texts.append(text)
            with_ids = with_ids or isinstance(choice.get("token_ids"), list)
            ids += choice.get("token_ids") or []
            finished = finished or bool(choice.get("finish_reason"))
            usage = completion_tokens(event) or usage
        if not finished:
            raise OptkitError(f"{where} ended its stream without a last message; its own log says why")
        response.read()  # the rest of a kept-alive answer
        return Answer("".join(texts), ids if with_ids else None, usage, first)


def events(response: http.client.HTTPResponse, where: str, deadline: float) -> Iterator[dict[str, Any] | None]:
    """The JSON messages of a server-sent stream; ``None`` for its end mark."""
    while line := response.readline(LONGEST):
        if time.perf_counter() > deadline:
            raise TimeoutError
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            yield None
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise malformed(where, data[:200].decode("utf-8", "replace")) from error
        if not isinstance(event, dict):
            raise malformed(where, data[:200].decode("utf-8", "replace"))
        if event.get("error"):
            raise OptkitError(f"{where} failed in the middle of its answer ({one_line(str(event['error']))})")
        yield event


def piece(event: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The choice of one message of a stream (empty in the one that holds only the usage), and its text."""
    choices = event.get("choices")
    if choices == [] or (choices is None and "usage" in event):
        return {}, ""
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise malformed(where, str(event))
    delta = choices[0].get("delta") or {}
    text = choices[0].get("text") or (delta.get("content") if isinstance(delta, dict) else None) or ""
    if not isinstance(text, str):
        raise malformed(where, str(event))
    return choices[0], text


def whole_answer(answer: Any, where: str) -> Answer:
    """The completion in an answer that came in one piece."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice: Any = choices[0] if isinstance(choices, list) and choices else None
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str):
        raise malformed(where, json.dumps(answer)[:200])
    ids = choice.get("token_ids")
    return Answer(text, ids if isinstance(ids, list) else None, completion_tokens(answer))


def completion_tokens(answer: dict[str, Any]) -> int | None:
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else None


def malformed(where: str, data: str) -> OptkitError:
    return OptkitError(f"{where} does not speak the OpenAI protocol: it answered '{one_line(data)}'; check the address and the option api")


def one_line(text: str, limit: int = 200) -> str:
    """Printable text of one line: what a server says goes to a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:limit]).strip()
