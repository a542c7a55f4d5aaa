"""TensorRT: decode steps as engines that NVIDIA's compiler built for this GPU, through Torch-TensorRT.

Idea: one decode step with keys and values of a fixed length is exported (``torch.export``) and compiled ahead of time
(``torch_tensorrt.dynamo.compile``): fixed shapes let TensorRT choose kernels by measuring them. Price: minutes of building for each
pair of batch size and length, keys and values are copied each step, and prefill stays in torch. Do not use it for ragged work with many
shapes, or where a compiled torch loop is quick enough. Documentation: https://docs.pytorch.org/TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit import Claims, Engine, Limit, Options, Technique, TrialContext, UnavailableError, hookimpl
from optkit.engine import end_of_text, pad_left, pad_token, trim

if TYPE_CHECKING:
    import torch

HINT = "pip install 'torch-tensorrt>=2.11' (of the same version as torch, on Linux with a CUDA driver), or leave tensorrt out"


class TensorRTOptions(Options):
    bucket: int = Field(256, ge=1, le=131072, description="keys and values have a multiple of this length; a larger one builds less often")
    min_block_size: int = Field(1, ge=1, description="fewest operators that become an engine; shorter runs of them stay in torch")
    optimization_level: int = Field(3, ge=0, le=5, description="how long TensorRT searches for kernels")


technique = Technique(
    name="tensorrt",
    stage="engine",
    summary="decode steps as TensorRT engines for this GPU; minutes of building for each batch size and length",
    roles=frozenset({"engine"}),
    honours=frozenset({"generate.max_new_tokens"}),
    adds=frozenset({"outside-torch"}),
    refuses=frozenset({"weights-opaque", "python-in-forward", "weights-elsewhere"}),
    tasks=frozenset({"generate", "score"}),
    devices=frozenset({"cuda"}),
    requires=("torch-tensorrt>=2.11",),
    extra="tensorrt",
    options=TensorRTOptions,
    paper="https://docs.pytorch.org/TensorRT",
    tested_on=(),
)


@hookimpl
def configure() -> Claims:
    because = "the exported step holds operators that TensorRT converts"
    return Claims(
        limits=(Limit(name="load.attention", allowed=("sdpa", "eager"), because=because),),
        notes=("nobody has run it on a GPU yet: it follows the documented interface of Torch-TensorRT 2.11",),
    )


def torch_tensorrt() -> Any:
    """The library. :raises UnavailableError: its import raises a bare ``Exception`` where TensorRT's own libraries are missing."""
    try:
        import torch_tensorrt as library
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnavailableError(f"Torch-TensorRT cannot be imported ({cause}); {HINT}") from error
    return library


@hookimpl
def build_engine(model: Any, trial: TrialContext) -> Engine:
    eos = end_of_text(model, trial.tokenizer)
    engine = TensorRTEngine(model, torch_tensorrt(), trial.options, eos=eos, pad=pad_token(trial.tokenizer, eos), report=trial.report)
    trial.notes["engine"] = engine
    return engine


class TensorRTEngine(Engine):
    """Greedy decoding and scoring with compiled steps. Prefill runs in torch; every later token comes from TensorRT."""

    name = "tensorrt"

    def __init__(self, model: Any, library: Any, options: Any, *, eos: frozenset[int], pad: int, report: Any = lambda text: None):
        self.model, self.library, self.options, self.eos, self.pad, self.report = model, library, options, eos, pad, report
        #: (batch, length of keys and values) -> the compiled step
        self.steps: dict[tuple[int, int], Any] = {}
        self.runs = 0

    def generate(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, exact: bool = False) -> list[list[int]]:
        import torch

        if new_tokens < 1:
            return [[] for _ in prompts]
        ends = torch.tensor(sorted(self.eos), device=self.model.device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.model.device)
        decode = self.decode(prompts, new_tokens)
        logits, produced = next(decode), []
        for step in range(new_tokens):
            produced.append(logits.argmax(-1))
            ended |= torch.isin(produced[-1], ends)
            if step + 1 == new_tokens or (not exact and bool(ended.all())):
                break
            logits = decode.send(produced[-1])
        return [trim(row, self.eos, exact) for row in torch.stack(produced, 1).tolist()]

    def log_probs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[torch.Tensor]:
        """Token after token through the same steps that generate, so that they are what is scored."""
        import torch

        rests = [list(sequence[start:]) for sequence, start in zip(sequences, starts, strict=True)]
        longest = max(map(len, rests))
        given = torch.tensor([rest + [self.pad] * (longest - len(rest)) for rest in rests], device=self.model.device)
        decode = self.decode([sequence[:start] for sequence, start in zip(sequences, starts, strict=True)], longest)
        rows = [next(decode)]
        rows += [decode.send(given[:, step]) for step in range(longest - 1)]
        stacked = torch.stack(rows, 1).float().log_softmax(-1)
        for row, rest in zip(stacked, rests, strict=True):
            yield row[: len(rest)]

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Any:
        """A generator of logits (batch, vocabulary): first those after the prompts, then those after each token (batch,) sent to it."""
        import torch

        ids, mask = pad_left(prompts, self.pad, self.model.device)
        batch, prompt = ids.shape
        length = -(-(prompt + tokens) // self.options.bucket) * self.options.bucket
        step = self.steps.get((batch, length)) or self.build(batch, length)
        with torch.inference_mode():
            logits, past, positions = self.prefill(ids, mask, length)
        mask = torch.nn.functional.pad(mask, (length - prompt, 1))
        mask[:, -1] = 1
        while True:
            token = yield logits
            positions = positions + 1
            with torch.inference_mode():
                logits, *past = step(token[:, None].contiguous(), mask, positions, *past)
            self.runs += 1
            logits = logits[:, -1]
            mask = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=1)

    def prefill(self, ids: Any, mask: Any, length: int) -> tuple[Any, list[Any], Any]:
        """Last logits, keys and values filled up on the left to ``length``, and the last positions (batch, 1)."""
        import torch
        from transformers import DynamicCache

        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1
        )
        fill = (0, 0, length - ids.shape[1], 0)
        layers = output.past_key_values.layers
        past = [torch.nn.functional.pad(tensor, fill) for layer in layers for tensor in (layer.keys, layer.values)]
        return output.logits[:, -1], past, positions[:, -1:]

    def build(self, batch: int, length: int) -> Any:
        """Export and compile one step for this batch size and this length of keys and values."""
        import torch

        from optkit_plugins._cache_inputs import cache_shapes, with_cache_inputs

        self.report(f"building TensorRT engines for a batch of {batch} and {length} tokens")
        device, dtype = self.model.device, self.model.dtype
        ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        mask = torch.ones(batch, length + 1, dtype=torch.long, device=device)
        positions = torch.full((batch, 1), length - 1, dtype=torch.long, device=device)
        past = [
            torch.zeros(batch, heads, length, width, dtype=dtype, device=device)
            for heads, *widths in cache_shapes(self.model)
            for width in widths
        ]
        inputs = (ids, mask, positions, *past)
        with torch.no_grad():
            program = torch.export.export(with_cache_inputs(self.model, same_length=True), inputs, strict=False)
            step = self.library.dynamo.compile(
                program,
                arg_inputs=inputs,
                device=device,
                use_explicit_typing=True,  # the model's own dtypes
                use_fp32_acc=dtype == torch.float16,
                truncate_double=True,
                min_block_size=self.options.min_block_size,
                optimization_level=self.options.optimization_level,
            )
        self.steps[batch, length] = step
        return step

    def close(self) -> None:
        self.steps.clear()


@hookimpl
def prove_effect(trial: TrialContext) -> dict[str, Any]:
    engine = trial.notes.get("engine")
    if engine is None or not engine.runs:
        return {"summary": "no step ran in TensorRT", "engines": 0}
    parts = [name for step in engine.steps.values() for name, _ in step.named_children()]
    engines = sum("_run_on_acc" in name for name in parts)  # Torch-TensorRT's names of converted and of left parts
    left = sum("_run_on_gpu" in name for name in parts)
    if not engines:
        return {"summary": "TensorRT converted nothing: every step ran in torch", "engines": 0}
    return {
        "summary": f"{engines} TensorRT engines for {len(engine.steps)} shapes, {left} parts left in torch",
        "engines": engines,
        "parts_in_torch": left,
        "shapes": sorted([list(shape) for shape in engine.steps]),
        "torch_tensorrt": engine.library.__version__,
    }
