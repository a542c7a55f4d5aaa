"""compile: the decode step as one compiled graph over a static KV cache, in a loop of our own.

``generate`` starts hundreds of kernels a token from Python, grows its cache and asks the device after every token whether it is done.
Here one graph a token (recorded as a CUDA graph on a GPU) reads and writes buffers that never move: cache, tokens, positions, sampling
and end-of-text included. The first batch of a new shape compiles for seconds to a minute; the KV cache is allocated for the whole
bucket (rows and columns rounded up to powers of two). Not worth it for a handful of prompts, nor where every batch has another shape.

PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation (Ansel et al. 2024).
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Machine, Options, Setting, Technique, TrialContext, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import Engine
    from optkit.technique import Task

Backend = Literal["inductor", "aot_eager", "cudagraphs", "eager"]
Mode = Literal["auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class CompileOptions(Options):
    backend: Backend = Field("inductor", description="compiler backend of torch.compile; aot_eager compiles nothing and is for tests")
    mode: Mode = Field("auto", description="inductor's mode; auto is reduce-overhead (CUDA graphs) on a GPU and default on a CPU")
    fullgraph: bool = Field(True, description="an error instead of a graph break")
    score: bool | None = Field(None, description="compile the scoring pass too; by default in the task 'score' only")


technique = Technique(
    preload=("torch._inductor.compile_fx",),
    name="compile",
    stage="engine",
    summary="one compiled graph a token over a static KV cache; costs compile time and a cache of full length",
    roles=frozenset({"engine"}),
    honours=frozenset(
        {
            "generate.cache",
            "generate.max_new_tokens",
            "generate.do_sample",
            "generate.temperature",
            "generate.top_k",
            "generate.top_p",
            "generate.repetition_penalty",
        }
    ),
    refuses=frozenset({"python-in-forward", "outside-torch", "many-paths", "draft-tokens", "positions-restart"}),
    tasks=frozenset({"score", "generate"}),
    options=CompileOptions,
    paper="https://doi.org/10.1145/3620665.3640366",
    tested_on=("cpu", "NVIDIA H200"),
)


@hookimpl
def configure(options: CompileOptions, task: Task, machine: Machine) -> Claims:
    because = "the compiled step writes a cache of fixed shape and address"
    return Claims(
        settings=(Setting(name="generate.cache", value="static", because=because, strength="must"),),
        problem=what_is_missing(options, machine),
        notes=(f"torch.compile {compile_arguments(options, machine.device)}",),
    )


def what_is_missing(options: CompileOptions, machine: Machine) -> str | None:
    """Why the backend cannot run here, with the way out."""
    if options.backend == "cudagraphs" and machine.device != "cuda":
        return "backend 'cudagraphs' needs an NVIDIA GPU; set compile.backend=inductor"
    if options.backend != "inductor":
        return None
    compilers = ("CXX", ("g++", "clang++", "c++")) if machine.device == "cpu" else ("CC", ("gcc", "clang", "cc"))
    candidates = (os.environ[compilers[0]],) if os.environ.get(compilers[0]) else compilers[1]
    if any(shutil.which(candidate) for candidate in candidates):
        return None
    return f"inductor needs a C++ compiler and none of {', '.join(candidates)} is on the PATH: install one (such as the package g++)"


def compile_arguments(options: CompileOptions, device: str) -> dict[str, Any]:
    """Arguments of ``torch.compile``."""
    arguments: dict[str, Any] = {"backend": options.backend, "fullgraph": options.fullgraph}
    if options.backend == "inductor":
        mode = options.mode if options.mode != "auto" else "reduce-overhead" if device == "cuda" else "default"
        arguments["mode"] = None if mode == "default" else mode
    return arguments


@hookimpl
def build_engine(model: PreTrainedModel, trial: TrialContext) -> Engine:
    from optkit_plugins.kernels.compiled_engine import CompiledEngine

    options = trial.options
    assert isinstance(options, CompileOptions)
    score = trial.task == "score" if options.score is None else options.score
    engine = CompiledEngine(model, trial, compile_arguments(options, trial.device), score=score)
    trial.notes["engine"] = engine
    return engine


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    engine = trial.notes.get("engine")
    if engine is None:
        return {"graphs": 0, "graph_breaks": 0, "recompiles": 0, "buckets": [], "summary": "not compiled"}
    tally, arguments = engine.tally, engine.arguments
    used = ", ".join(tally.buckets) or "unused"
    return {
        "graphs": tally.graphs,
        "graph_breaks": tally.graph_breaks,
        "recompiles": tally.recompiles,
        "buckets": list(tally.buckets),
        "cuda_graphs": trial.device == "cuda" and (arguments["backend"] == "cudagraphs" or arguments.get("mode") in CUDA_GRAPH_MODES),
        "summary": f"{tally.graphs} graphs, {tally.graph_breaks} breaks, {tally.recompiles} recompiles: {used}",
    }
