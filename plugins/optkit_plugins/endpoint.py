"""endpoint: a running server of the OpenAI protocol, measured beside the others.

Idea: vLLM, llama.cpp, Ollama, SGLang and ``transformers serve`` all answer ``/v1/completions``; measured with the same prompts, from the
same client, against the same baseline, their speed and texts can be compared. Price: the time of HTTP and of both tokenizations is part
of the figure, memory and perplexity are not to be had, and what the server really runs is its own business. Do not use it to judge a
kernel: use an engine in this process for that. Protocol: https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field

from optkit import Claims, Engine, Options, Technique, TrialContext, UnavailableError, hookimpl

EXAMPLE = "--set endpoint.url=http://127.0.0.1:8000"
#: The model is the server's: nothing that changes a local one would have an effect.
LOCAL_CHANGES = frozenset(
    {
        "weights-quantized", "weights-opaque", "weights-changed", "weights-elsewhere", "architecture-changed", "adapter",
        "python-in-forward",
    }
)  # fmt: skip


class EndpointOptions(Options):
    url: str | None = Field(None, description="address of the server, with or without /v1; required")
    model: str | None = Field(None, description="name of the model there; default the first that /v1/models lists")
    api: Literal["completions", "chat"] = Field("completions", description="completions sends the prompt as it is, chat as a message")
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the key")
    concurrency: int = Field(8, ge=1, le=1024, description="requests at a time; at most the samples of a batch (batch.size)")
    timeout_seconds: float = Field(120.0, gt=0, description="seconds that one answer may take")
    stream: bool = Field(True, description="read answers as a stream, which gives the time to the first token")
    token_ids: bool = Field(False, description="send and ask for token ids instead of text (vLLM does); it must have the same tokenizer")


technique = Technique(
    name="endpoint",
    stage="engine",
    summary="measures an OpenAI-compatible server beside the others; HTTP is part of its time, and it gives no perplexity",
    roles=frozenset({"load", "engine"}),
    honours=frozenset({"generate.max_new_tokens"}),
    adds=frozenset({"outside-torch"}),
    refuses=LOCAL_CHANGES,
    tasks=frozenset({"generate"}),
    options=EndpointOptions,
    paper="https://platform.openai.com/docs/api-reference/completions",
    tested_on=("cpu",),
)


@hookimpl
def configure(options: EndpointOptions) -> Claims:
    if options.url is None:
        return Claims(problem=f"it needs the address of a server: {EXAMPLE}")
    from optkit_plugins._openai import check_url, is_loopback

    problem = check_url(options.url)
    if problem is None and options.api_key_env and not os.environ.get(options.api_key_env):
        problem = f"the environment variable {options.api_key_env} (option api_key_env) is not set"
    if problem is None and options.token_ids and options.api == "chat":
        problem = "token_ids works with api=completions only: a chat template needs text"
    notes = [f"prompts are sent to {options.url}"]
    if options.api_key_env and options.url.startswith("http://") and not is_loopback(options.url):
        notes.append("the key travels unencrypted (http)")
    return Claims(problem=problem, notes=tuple(notes))


@hookimpl
def load_model() -> None:
    """No local model: the server has it."""
    return None


@hookimpl
def build_engine(trial: TrialContext) -> Engine:
    from optkit.engine import end_of_text
    from optkit_plugins._openai_engine import OpenAIEngine

    options: Any = trial.options
    key = os.environ.get(options.api_key_env) if options.api_key_env else None
    if options.api_key_env and not key:
        raise UnavailableError(f"endpoint: the environment variable {options.api_key_env} (option api_key_env) is not set")
    from optkit_plugins._openai import Client

    client = Client(options.url, api_key=key, timeout=options.timeout_seconds)
    try:
        model = options.model or client.first_model()
    except BaseException:
        client.close()
        raise
    engine = OpenAIEngine(
        client,
        model,
        trial.tokenizer,
        chat=options.api == "chat",
        stream=options.stream,
        token_ids=options.token_ids,
        concurrency=options.concurrency,
        eos=end_of_text(None, trial.tokenizer),  # type: ignore[arg-type]
    )
    trial.notes["engine"] = engine
    return engine


@hookimpl
def prove_effect(trial: TrialContext) -> dict[str, Any]:
    engine = trial.notes.get("engine")
    if engine is None or not engine.requests:
        return {"summary": "no server was asked", "answered": False}
    trial.notes["time_to_first_token_seconds"] = engine.median_first_token_seconds()
    return engine.facts()
