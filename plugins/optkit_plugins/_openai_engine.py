"""The engine that generates with a server of the OpenAI protocol."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from optkit import Engine
from optkit.engine import trim
from optkit_plugins._openai import Answer, Client, StatusError

#: Statuses with which strict servers refuse a field that they do not know.
UNKNOWN_FIELD = (400, 422)


class OpenAIEngine(Engine):
    """Greedy texts of a server, ``concurrency`` requests at a time.

    Prompts travel as text without the beginning-of-text token, which servers add themselves, and texts come back as token ids of the
    local tokenizer; with ``token_ids`` both travel as ids (vLLM's extension). With ``exact`` the server is asked to ignore its
    end-of-text token; where it cannot, each row is as long as the server says that it generated.
    """

    cannot_score = "the OpenAI protocol gives no distributions over the prompt's tokens"

    def __init__(
        self, client: Client, model: str, tokenizer: Any, *, chat: bool = False, stream: bool = True, token_ids: bool = False,
        concurrency: int = 8, eos: frozenset[int] = frozenset(), on_close: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.name = f"{model} at {client.url}"
        self.client, self.model, self.tokenizer = client, model, tokenizer
        self.chat, self.stream, self.token_ids, self.eos, self.on_close = chat, stream, token_ids, eos, on_close
        self.pool = ThreadPoolExecutor(concurrency, thread_name_prefix="optkit-openai")
        self.requests = 0
        #: whether the server took the fields that fix a text's length; ``None`` before the first try
        self.extensions: bool | None = None
        self.exact_lengths: bool | None = None
        self.first_token_seconds: list[float] = []

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        if new_tokens < 1:
            return [[] for _ in prompts]
        futures = [self.pool.submit(self.ask, prompt, new_tokens, exact) for prompt in prompts]
        try:
            answers = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        self.requests += len(answers)
        self.first_token_seconds += [answer.first_token_seconds for answer in answers if answer.first_token_seconds is not None]
        rows = [self.row(answer, new_tokens, exact) for answer in answers]
        if exact:
            self.exact_lengths = self.exact_lengths is not False and all(len(row) == new_tokens for row in rows)
        return rows

    def ask(self, prompt: Sequence[int], new_tokens: int, exact: bool) -> Answer:
        """One request. A server that refuses the fields beyond the protocol is asked again without them."""
        body = self.body(prompt, new_tokens)
        if exact and self.extensions is not False:
            try:
                answer = self.complete(body | {"ignore_eos": True, "min_tokens": new_tokens})
                self.extensions = True
                return answer
            except StatusError as error:
                if error.status not in UNKNOWN_FIELD or self.extensions:
                    raise
            answer = self.complete(body)
            self.extensions = False
            return answer
        return self.complete(body)

    def complete(self, body: dict[str, Any]) -> Answer:
        return self.client.complete("/v1/chat/completions" if self.chat else "/v1/completions", body)

    def body(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": new_tokens, "temperature": 0}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            text = self.tokenizer.decode(list(prompt), skip_special_tokens=True)
            return body | {"messages": [{"role": "user", "content": text}]}
        if self.token_ids:
            return body | {"prompt": list(prompt), "return_token_ids": True}
        begins = bool(prompt) and prompt[0] == getattr(self.tokenizer, "bos_token_id", None)
        return body | {"prompt": self.tokenizer.decode(list(prompt[1:] if begins else prompt), skip_special_tokens=False)}

    def row(self, answer: Answer, new_tokens: int, exact: bool) -> list[int]:
        """The answer as token ids. With ``exact`` (timing) only the count matters: the server's, not that of the text encoded anew."""
        ids = answer.token_ids
        if ids is None:
            ids = list(self.tokenizer(answer.text, add_special_tokens=False).input_ids)
            if exact and answer.completion_tokens is not None:
                filler = self.tokenizer.eos_token_id or 0
                ids = (ids + [filler] * answer.completion_tokens)[: answer.completion_tokens]
        return trim(ids[:new_tokens], self.eos, exact)

    def facts(self) -> dict[str, Any]:
        """What ``prove_effect`` shows."""
        lengths = {None: "not timed", True: "exact", False: "as the server ends its texts"}[self.exact_lengths]
        return {
            "summary": f"{self.name}, lengths {lengths}",
            "answered": True,
            "model": self.model,
            "url": self.client.url,
            "lengths": lengths,
        }

    def median_first_token_seconds(self) -> float | None:
        return statistics.median(self.first_token_seconds) if self.first_token_seconds else None

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.client.close()
        self.on_close()
