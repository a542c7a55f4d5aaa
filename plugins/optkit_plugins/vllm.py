"""vllm: the model served by vLLM in a process and an environment of its own, measured beside the others.

Idea: paged keys and values, continuous batching and hand-written kernels (PagedAttention, Kwon et al. 2023, https://arxiv.org/abs/2309.06180).
vLLM's pins fit no other environment, so ``vllm serve`` of its own environment is started on a free port of the loopback, asked through
the OpenAI protocol with token ids, and ended with the trial. Price: minutes of starting, most of the GPU's memory unless told
otherwise, HTTP in every figure, and no perplexity. Do not use it for a model that other techniques changed: vLLM loads its own.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from optkit import Claims, Engine, ModelSource, Options, Technique, TrialContext, UnavailableError, UsageError, hookimpl

HINT = (
    "give it an environment of its own: python -m venv vllm-env && vllm-env/bin/pip install vllm, "
    "then --set vllm.executable=vllm-env/bin/vllm"
)
#: The model is vLLM's: nothing that changes a local one would have an effect.
LOCAL_CHANGES = frozenset(
    {
        "weights-quantized", "weights-opaque", "weights-changed", "weights-elsewhere", "architecture-changed", "adapter",
        "python-in-forward",
    }
)  # fmt: skip


class VllmOptions(Options):
    executable: str = Field("vllm", description="path or name of the vllm program")
    arguments: str = Field("", description="further arguments of `vllm serve`, as in a shell")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="share of the GPU's memory that vLLM takes; its default of about 0.9 leaves no room for a baseline"
    )
    concurrency: int = Field(64, ge=1, le=1024, description="requests at a time; at most the samples of a batch (batch.size)")
    start_seconds: float = Field(900.0, gt=0, description="seconds that loading and compiling may take")
    timeout_seconds: float = Field(300.0, gt=0, description="seconds that one answer may take")

    @field_validator("arguments")
    @classmethod
    def _as_in_a_shell(cls, arguments: str) -> str:
        shlex.split(arguments)  # a quote that is not closed is told at once
        return arguments


technique = Technique(
    name="vllm",
    stage="engine",
    summary="starts a vLLM server in its own environment and measures it; minutes of starting, HTTP in its time, no perplexity",
    roles=frozenset({"load", "engine"}),
    honours=frozenset({"load.dtype", "load.trust_remote_code", "generate.max_new_tokens"}),
    adds=frozenset({"outside-torch"}),
    refuses=LOCAL_CHANGES,
    tasks=frozenset({"generate"}),
    options=VllmOptions,
    paper="https://arxiv.org/abs/2309.06180",
    tested_on=(),
)


@hookimpl
def configure(options: VllmOptions) -> Claims:
    found = shutil.which(options.executable)
    problem = None if found else f"no program '{options.executable}' was found; vLLM's pins fit no other environment, so {HINT}"
    return Claims(problem=problem, notes=("nobody has run it with vLLM yet: it follows the documented interface of `vllm serve`",))


@hookimpl
def load_model() -> None:
    """No local model: the server loads it."""
    return None


def command(source: ModelSource, trial: TrialContext, port: int) -> list[str]:
    """``vllm serve`` for this model. Random weights of a config are vLLM's own (``--load-format dummy``).

    :raises UnavailableError: without the program. :raises UsageError: for a model that vLLM cannot be given.
    """
    options: Any = trial.options
    executable = shutil.which(options.executable)
    if executable is None:
        raise UnavailableError(f"vllm: no program '{options.executable}' was found; {HINT}")
    if source.shrink:
        raise UsageError("vllm loads the whole model and cannot shrink it; leave out --shrink, or vllm")
    location = source.location
    arguments = ["--dtype", trial.settings["load.dtype"] or "auto", "--seed", str(trial.seed)]
    if source.kind == "random":
        location = str(_config_folder(Path(source.location), trial))
        arguments += ["--load-format", "dummy"]
    elif source.kind == "folder":
        location = str(Path(source.location).resolve())
    if trial.settings["load.trust_remote_code"]:
        arguments.append("--trust-remote-code")
    if options.gpu_memory_utilization is not None:
        arguments += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    own = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", source.name]
    return [executable, "serve", location, *own, *arguments, *shlex.split(options.arguments)]


def _config_folder(config: Path, trial: TrialContext) -> Path:
    """A folder with the config and the tokenizer, as vLLM wants it."""
    folder = trial.folder / "model"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(config, folder / "config.json")
    trial.tokenizer.save_pretrained(folder)
    return folder


@hookimpl
def build_engine(trial: TrialContext) -> Engine:
    from optkit.engine import end_of_text
    from optkit_plugins._openai import Client
    from optkit_plugins._openai_engine import OpenAIEngine
    from optkit_plugins._server import Server, free_port

    options: Any = trial.options
    port = free_port()
    trial.report("starting vLLM")
    server = Server(command(trial.source, trial, port), f"http://127.0.0.1:{port}", trial.folder / "vllm.log")
    try:
        server.wait(options.start_seconds)
    except BaseException:
        server.end()
        raise
    engine = OpenAIEngine(
        Client(server.url, timeout=options.timeout_seconds),
        trial.source.name,
        trial.tokenizer,
        token_ids=True,
        concurrency=options.concurrency,
        eos=end_of_text(None, trial.tokenizer),  # type: ignore[arg-type]
        on_close=server.end,
    )
    trial.notes["engine"] = engine
    return engine


@hookimpl
def prove_effect(trial: TrialContext) -> dict[str, Any]:
    engine = trial.notes.get("engine")
    if engine is None or not engine.requests:
        return {"summary": "no vLLM server was asked", "answered": False}
    trial.notes["time_to_first_token_seconds"] = engine.median_first_token_seconds()
    version = str(engine.client.get("/version").get("version"))
    facts = engine.facts()
    del facts["url"]  # another port in each trial
    return facts | {"summary": f"vLLM {version}, lengths {facts['lengths']}", "vllm": version}
