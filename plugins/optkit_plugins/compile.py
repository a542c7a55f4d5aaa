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

from optkit import Claims, Machine, Options, Setting, Technique, TrialContext, UsageError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import Engine
    from optkit.technique import Task

Backend = Literal["inductor", "aot_eager", "cudagraphs", "eager"]
Mode = Literal["auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

Products = Literal["auto", "library", "matvec", "fused", "inductor"]


class CompileOptions(Options):
    backend: Backend = Field("inductor", description="compiler backend of torch.compile; aot_eager compiles nothing and is for tests")
    mode: Mode = Field("auto", description="inductor's mode; auto is reduce-overhead (CUDA graphs) on a GPU and default on a CPU")
    fullgraph: bool = Field(True, description="an error instead of a graph break")
    fuse: bool = Field(True, description="on a GPU, one product for layers that read the same input: query, key, value; gate and up")
    products: Products = Field(
        "auto", description="on a GPU, what multiplies a single row: cuBLAS, a kernel of ours, that with norms and more, or inductor's"
    )
    score: bool | None = Field(None, description="compile the scoring pass too; by default in the task 'score' only")
    steps: Literal["auto", "whole", "layers"] = Field(
        "auto", description="a step as one graph a shape (whole), or a layer at a time for all shapes (layers: several rows on a GPU)"
    )
    prompts: bool | None = Field(None, description="read prompts with compiled layers too; by default on a GPU")


#: What the proof takes over from the engine.
ENGINE_FACTS = ("attention", "fused", "replay", "recorded_steps", "recorded_prompts", "not_recorded", "not_compiled")


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
            "generate.slots",
            "generate.prompt_lookup_tokens",
            "generate.prompt_lookup_ngram",
        }
    ),
    refuses=frozenset({"python-in-forward", "outside-torch", "many-paths", "positions-restart"}),
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


def products(options: CompileOptions, device: str) -> str:
    """What multiplies single rows: on a GPU our kernels, unless inductor is to tune everything itself."""
    if device != "cuda":
        return "library"
    return options.products if options.products != "auto" else "library" if options.mode.startswith("max-autotune") else "fused"


@hookimpl
def build_engine(model: PreTrainedModel, trial: TrialContext) -> Engine:
    from optkit_plugins.kernels.decode.engine import CompiledEngine
    from optkit_plugins.kernels.fused.graph import with_products
    from optkit_plugins.kernels.ragged.engine import RaggedEngine
    from optkit_plugins.kernels.speculative.compiled_engine import DraftingEngine

    options = trial.options
    assert isinstance(options, CompileOptions)
    score = trial.task == "score" if options.score is None else options.score
    trial.notes["fused"] = fuse(model) if options.fuse and trial.device == "cuda" else {"groups_fused": 0}
    arguments, settings = with_products(compile_arguments(options, trial.device), products(options, trial.device)), trial.settings
    slots, drafts = settings["generate.slots"], settings["generate.prompt_lookup_tokens"]
    if slots and drafts:
        raise UsageError("generate.slots and generate.prompt_lookup_tokens are not read together; leave one of them out")
    engine: CompiledEngine
    if slots:
        engine = RaggedEngine(model, trial, arguments, score=score, slots=slots)
    elif drafts:
        engine = DraftingEngine(model, trial, arguments, score=score, drafts=drafts, ngram=settings["generate.prompt_lookup_ngram"])
    else:
        engine = CompiledEngine(model, trial, arguments, score=score)
    engine.steps = options.steps
    if options.prompts is not None:
        engine.compile_prompts = options.prompts
    trial.notes["engine"] = engine
    return engine


def fuse(model: PreTrainedModel) -> dict[str, Any]:
    from optkit_plugins.kernels.fused.projections import fuse_projections

    return fuse_projections(model)


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    engine = trial.notes.get("engine")
    if engine is None:
        return {"graphs": 0, "graph_breaks": 0, "recompiles": 0, "buckets": [], "summary": "not compiled"}
    tally, facts = engine.tally, engine.facts()
    fused = trial.notes["fused"]["groups_fused"]
    used = [", ".join(tally.buckets) or "unused", f"attention: {facts['attention']}"]
    used += [f"{counted(fused, 'group')} of projections joined"] if fused else []
    used += [f"fused in a step: {', '.join(f'{number} {what}' for what, number in facts['fused'].items())}"] if facts["fused"] else []
    used += [facts["replay"], *facts["not_compiled"]] + [f"not recorded: {problem}" for problem in facts["not_recorded"]]
    return {
        "graphs": tally.graphs,
        "graph_breaks": tally.graph_breaks,
        "recompiles": tally.recompiles,
        "buckets": list(tally.buckets),
        "cuda_graphs": facts["cuda_graphs"],
        "fused_groups": fused,
        **{name: facts[name] for name in ENGINE_FACTS},
        "summary": f"{counted(tally.graphs, 'graph')}, {counted(tally.graph_breaks, 'break')}, {counted(tally.recompiles, 'recompile')}: "
        + "; ".join(used),
    }


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
