"""ONNX: the model as one graph of standard operators, run by ONNX Runtime instead of torch.

Idea: the whole forward pass, with keys and values as inputs and outputs, is traced once (``torch.onnx.export``) and handed to a
runtime that fuses operators and has no Python between them. Price: the export takes seconds to minutes, the weights lie in memory
twice while the torch model lives, and prefill computes the logits of every position. Do not use it where more than greedy text is
wanted (other settings of generation are refused), with bfloat16, or for a model whose forward pass branches on its data.
Documentation: https://onnxruntime.ai and https://onnx.ai.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Engine, Limit, Machine, Options, OptkitError, Setting, Technique, TrialContext, UnavailableError, hookimpl
from optkit.engine import end_of_text, pad_left, pad_right, pad_token, trim

if TYPE_CHECKING:
    import torch

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
GPU_HINT = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu>=1.24'"
#: Random tokens that check an export, and how far their scores may differ, in nats: rounding only.
CHECKED_TOKENS = 24
LIMIT_NATS = {"torch.float32": 1e-2, "torch.float16": 0.25}
NO_BFLOAT16 = "ONNX Runtime implements few operators in bfloat16"


class OnnxOptions(Options):
    provider: Literal["auto", "cpu", "cuda"] = Field("auto", description="where ONNX Runtime computes; auto is the trial's device")
    dtype: Literal["float32", "float16"] = Field("float32", description="dtype of weights and keys; float16 on cuda only")
    opset: int = Field(23, ge=18, le=23, description="version of ONNX's operators; from 23 on attention is one operator")


technique = Technique(
    name="onnx",
    stage="engine",
    summary="exports the model to ONNX and runs it with ONNX Runtime; greedy text only, and an export of seconds to minutes",
    roles=frozenset({"engine"}),
    honours=frozenset({"generate.max_new_tokens"}),
    adds=frozenset({"outside-torch"}),
    refuses=frozenset({"weights-opaque", "python-in-forward", "weights-elsewhere"}),
    tasks=frozenset({"score", "generate"}),
    # the runtime itself comes in two distributions (onnxruntime, onnxruntime-gpu): configure looks for either
    requires=("onnx>=1.20", "onnxscript>=0.6"),
    extra="onnx",
    options=OnnxOptions,
    paper="https://onnx.ai",
    tested_on=("cpu",),
)


@hookimpl
def configure(options: OnnxOptions, task: str, machine: Machine) -> Claims:
    because = f"{NO_BFLOAT16}, so the graph is exported in {options.dtype}"
    return Claims(
        settings=(Setting(name="load.dtype", value=options.dtype, because=because, strength="must"),),
        limits=(
            Limit(name="load.dtype", allowed=(options.dtype,), because=f"{because} (option dtype)"),
            Limit(name="load.attention", allowed=("sdpa", "eager"), because="the graph holds ONNX's own attention operators"),
        ),
        problem=_problem(options, machine),
    )


def _problem(options: OnnxOptions, machine: Machine) -> str | None:
    provider = machine.device if options.provider == "auto" else options.provider
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; " + (GPU_HINT if provider == "cuda" else "pip install 'onnxruntime>=1.24'")
    if provider == "cuda" and machine.device != "cuda":
        return "provider=cuda needs a GPU and this machine has none; use --set onnx.provider=cpu"
    if provider == "cuda" and not _installed("onnxruntime-gpu"):
        return f"the installed onnxruntime computes on the CPU only; {GPU_HINT}, or say --set onnx.provider=cpu"
    if options.dtype == "float16" and provider == "cpu":
        return "dtype=float16 has no kernels in ONNX Runtime's CPU provider; use --set onnx.dtype=float32"
    return None


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@hookimpl
def build_engine(model: Any, trial: TrialContext) -> Engine:
    path, nodes = _exported(model, trial)
    eos = end_of_text(model, trial.tokenizer)
    engine = OnnxEngine(path, provider=_provider(trial), eos=eos, pad=pad_token(trial.tokenizer, eos))
    trial.notes |= {"engine": engine, "nodes": nodes}
    return engine


def _provider(trial: TrialContext) -> str:
    chosen = trial.options.provider  # type: ignore[attr-defined]
    return trial.device if chosen == "auto" else chosen


def _exported(model: Any, trial: TrialContext) -> tuple[Path, int]:
    from optkit_plugins._onnx_export import export

    path = trial.folder / "model.onnx"
    trial.report("exporting to ONNX")
    return path, export(model, path, opset=trial.options.opset)  # type: ignore[attr-defined]


class OnnxEngine(Engine):
    """Greedy decoding and scoring with a graph that ``_onnx_export.export`` wrote.

    Inputs and outputs are torch tensors whose memory is bound to the session, so nothing is copied between the two libraries.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, *, provider: str, eos: frozenset[int], pad: int):
        import numpy
        import torch

        self.session: Any = open_session(path, provider)
        self.device, self.eos, self.pad = provider, eos, pad
        self.runs = 0
        self.inputs, self.outputs = self.session.get_inputs(), self.session.get_outputs()
        self.providers = self.session.get_providers()
        half = self.outputs[0].type == "tensor(float16)"
        self.dtype = torch.float16 if half else torch.float32
        self.element = {torch.int64: numpy.int64, torch.float32: numpy.float32, torch.float16: numpy.float16}

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        import torch

        ids, mask = pad_left(prompts, self.pad, self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ends = torch.tensor(sorted(self.eos), device=self.device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        past, produced = self.empty_past(len(prompts)), []
        for _ in range(new_tokens):
            logits, past = self.forward(ids, mask, positions, past)
            ids = logits[:, -1].argmax(-1, keepdim=True)
            produced.append(ids)
            ended |= torch.isin(ids[:, 0], ends)
            if not exact and bool(ended.all()):
                break
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
        rows = torch.cat(produced, 1).tolist() if produced else [[] for _ in prompts]
        return [trim(row, self.eos, exact) for row in rows]

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        ids, mask = pad_right(sequences, self.pad, self.device)
        logits, _ = self.forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), self.empty_past(len(sequences)))
        for row, sequence, start in zip(logits, sequences, starts, strict=True):
            yield row[start - 1 : len(sequence) - 1].float().log_softmax(-1)

    def empty_past(self, batch: int) -> list[torch.Tensor]:
        import torch

        return [torch.empty(batch, cache.shape[1], 0, cache.shape[3], dtype=self.dtype, device=self.device) for cache in self.inputs[3:]]

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (batch, sequence, vocabulary) and the keys and values of past and new tokens, each (batch, heads, total, width)."""
        import torch

        batch, total = mask.shape
        shapes: list[tuple[int, ...]] = [(batch, ids.shape[1], self.outputs[0].shape[2])]
        shapes += [(batch, output.shape[1], total, output.shape[3]) for output in self.outputs[1:]]
        results = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        held = [tensor.contiguous() for tensor in (ids, mask, positions, *past)]  # alive until the session has run
        binding = self.session.io_binding()
        for node, tensor in zip(self.inputs, held, strict=True):
            binding.bind_input(node.name, self.device, 0, self.element[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for node, tensor in zip(self.outputs, results, strict=True):
            binding.bind_output(node.name, self.device, 0, self.element[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()  # the session computes on a stream of its own
        self.session.run_with_iobinding(binding)
        self.runs += 1
        return results[0], results[1:]

    def close(self) -> None:
        self.session = None


def open_session(path: Path, provider: str) -> Any:
    """A session on ``provider`` with as many threads as torch uses.

    :raises UnavailableError: where ONNX Runtime lacks the provider: it would compute on the CPU without a word.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of every node that stays on the CPU by design (shapes)
    session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[provider]])
    if PROVIDERS[provider] not in session.get_providers():
        raise UnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its {PROVIDERS[provider]} "
            f"(it offers {', '.join(session.get_providers())}); {GPU_HINT} for the driver's CUDA version, "
            "or say --set onnx.provider=cpu"
        )
    return session


@hookimpl
def prove_effect(model: Any, trial: TrialContext) -> dict[str, Any]:
    engine = trial.notes.get("engine")
    if engine is None or not engine.runs:
        return {"summary": "not run by ONNX Runtime", "session_ran": False}
    import onnxruntime

    return {
        "summary": f"{trial.notes['nodes']} nodes on {engine.providers[0]}, ONNX Runtime {onnxruntime.__version__}",
        "session_ran": True,
        "nodes": trial.notes["nodes"],
        "opset": trial.options.opset,  # type: ignore[attr-defined]
        "providers": engine.providers,
        "onnxruntime": onnxruntime.__version__,
        "file_bytes": sum(file.stat().st_size for file in trial.folder.glob("model.onnx*")),
    }


@hookimpl
def save_model(model: Any, folder: Path, trial: TrialContext) -> bool:
    """``model.onnx`` (and its weights' file), the config and the tokenizer, as other tools expect them.

    :raises OptkitError: when the written graph, opened again, does not score like the model.
    """
    from optkit_plugins._onnx_export import copy_export

    source = trial.folder / "model.onnx"
    if not source.exists():
        source, _ = _exported(model, trial)
    folder.mkdir(parents=True, exist_ok=True)
    copy_export(source, folder)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if trial.tokenizer is not None:
        trial.tokenizer.save_pretrained(folder)
    check_export(model, folder / "model.onnx", trial)
    return True


def check_export(model: Any, path: Path, trial: TrialContext) -> None:
    """Open the graph in a session of its own and compare its scores of random tokens with the model's."""
    import torch

    engine = OnnxEngine(path, provider=_provider(trial), eos=frozenset(), pad=0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (CHECKED_TOKENS,), generator=torch.Generator().manual_seed(trial.seed))
    with torch.no_grad():
        rows = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, :-1].float().log_softmax(-1).cpu()
    expected = rows.gather(1, ids[1:, None])[:, 0]
    difference = float((engine.score([ids.tolist()], [1])[0].cpu() - expected).abs().max())
    engine.close()
    limit = LIMIT_NATS[str(engine.dtype)]
    if not difference <= limit:
        raise OptkitError(
            f"the exported graph scores up to {difference:.3g} nats a token differently from the model, {limit:g} are allowed; "
            f"{path.parent} is left for inspection"
        )
