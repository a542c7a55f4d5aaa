"""GPTQ: 2, 3, 4 or 8-bit linear weights, rounded a column at a time while the columns left make up for the error (Frantar et al. 2023).

With a few hundred calibration samples it keeps more quality than rounding to nearest at the same bits; below 4 bits the difference is
large. It needs minutes on a GPU for a model of a few billion parameters. The exported folder holds packed weights that vLLM runs fast.
Here, layers of 4 bits in groups of 64 or 128 and of 8 bits a row go to a fused kernel when a CUDA GPU generates; everywhere else weights
keep their full size and speed, and only their values are those of few bits.

``mode=read`` loads existing GPTQ and AWQ checkpoints (AutoGPTQ's, GPTQModel's and AutoAWQ's files) instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from optkit import Claims, Options, Technique, UsageError, hookimpl
from optkit_plugins import _fused_kernels, _packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import Machine, ModelSource, TrialContext
    from optkit.technique import Role


class GptqOptions(Options):
    mode: Literal["quantize", "read"] = Field("quantize", description="quantize a model, or read a checkpoint of GPTQ or AWQ files")
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits a weight")
    group_size: int = Field(
        128, description="weights that share a scale, -1 for a row; where it does not divide a width, a half or quarter of it, or a row"
    )
    symmetric: bool = Field(True, description="no zero points: what most kernels read; off is more exact at 2 and 3 bits")
    damp: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal that is added to it before it is inverted")
    act_order: bool = Field(True, description="round the columns with the largest activations first; the stored format is the same")
    samples: int = Field(256, ge=1, description="calibration samples at most")
    min_parameters: int = Field(1000, ge=0, description="leave smaller layers alone")
    head: bool = Field(False, description="quantize the output head as well; a head tied to the embedding never is")
    kernel: _fused_kernels.Kernel = Field(
        "auto", description="who multiplies: torch, with expanded weights (library), or optkit's fused kernel on CUDA from sm_80 (triton); "
        "auto is the fused kernel where it generates"
    )  # fmt: skip
    skip: tuple[str, ...] = Field((), description="name patterns of layers to leave alone, such as *.layers.0.*")

    @field_validator("group_size")
    @classmethod
    def _positive_or_row(cls, size: int) -> int:
        if size != -1 and size < 8:
            raise ValueError(f"group_size is {size}; give -1 for one scale a row, or at least 8")
        return size


technique = Technique(
    name="gptq",
    stage="quantize",
    summary="calibrated 2, 3, 4 or 8-bit weights: quality, export, and speed on a GPU at 4 bits; or reads GPTQ and AWQ checkpoints",
    honours=frozenset({"load.dtype", "load.attention"}),
    calibrates=True,
    lossy=True,
    tasks=frozenset({"score", "generate"}),
    requires=("llmcompressor>=0.14,<0.15", "compressed-tensors>=0.18"),
    extra="gptq",
    options=GptqOptions,
    paper="https://arxiv.org/abs/2210.17323",
    tested_on=("cpu",),
    exceptions={"saves[gpt2]": "transformers loads packed weights into linear layers alone, and GPT-2 has Conv1D; export refuses"},
)


@hookimpl
def configure(options: GptqOptions, task: str, machine: Machine) -> Claims:
    problem = _fused_kernels.problem(options.kernel, task, machine)
    if problem:
        return Claims(problem=problem)
    roles: frozenset[Role] = frozenset({"load" if options.mode == "read" else "weights"})
    if options.bits in (4, 8) and _fused_kernels.wanted(options.kernel, task, machine):
        notes = ("layers that the fused kernel takes are multiplied packed; set gptq.kernel=library for engines that read weights",)
        return Claims(roles=roles, adds=frozenset({"weights-quantized", "weights-opaque"}), notes=notes)
    if options.mode == "read":
        return Claims(roles=roles, notes=("weights of the checkpoint are expanded to full precision",))
    note = "weights keep their full size in memory: this shows the quality of an export, not its speed"
    return Claims(roles=roles, adds=frozenset({"weights-changed"}), notes=(note,))


@hookimpl
def load_model(source: ModelSource, trial: TrialContext) -> PreTrainedModel:
    from optkit_plugins import _gptq_files

    model, trial.notes["read"], trial.notes["stored"] = _gptq_files.load(source, trial)
    return model


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    from optkit_plugins import _gptq_quantize

    options = trial.options
    assert isinstance(options, GptqOptions)
    if options.mode == "read":
        _fused_kernels.take_over(model, trial, options.kernel, lambda model: pack_layers(model, trial.notes.pop("stored", {})))
        return
    _packed.refuse_quantized(model, "gptq")
    refuse_experts(model)
    samples = [ids for ids in trial.calibration if len(ids) > 1][: options.samples]
    if not samples:
        raise UsageError(
            "gptq: there are no calibration samples; give texts that are not evaluated (optkit.optimize(…, calibration=[[ids], …]), or a "
            "sample file with more rows than --limit)"
        )
    names = _packed.chosen(model, min_parameters=options.min_parameters, head=options.head, skip=options.skip)
    _packed.convert(model, names, _packed.linear)
    folder = trial.folder / "config"
    folder.mkdir(parents=True, exist_ok=True)
    trial.notes["grids"], trial.notes["rounded"] = _gptq_quantize.quantize(
        model, names, samples, trial.tokenizer, folder,
        bits=options.bits, group_size=options.group_size, symmetric=options.symmetric, damp=options.damp, act_order=options.act_order,
    )  # fmt: skip
    trial.notes["samples"], trial.notes["tokens"] = len(samples), sum(map(len, samples))
    grids = {name: grid.stored for name, grid in trial.notes["grids"].items()}
    _fused_kernels.take_over(model, trial, options.kernel, lambda model: pack_layers(model, grids))


def pack_layers(model: PreTrainedModel, stored: dict[str, Any]) -> dict[str, str]:
    """Move layers to the fused kernel, one at a time.

    :param stored: name -> (bits, scale, zero) of the layer's grid, or why there is none. :return: name -> why a layer stays as it is.
    """
    from torch import nn

    from optkit_plugins.kernels.packed.convert import exchange, from_grid

    left: dict[str, str] = {}
    made: nn.Module | str
    for name, grid in stored.items():
        module = model.get_submodule(name)
        plain = type(module) is nn.Linear
        made = (
            grid if isinstance(grid, str) else from_grid(module, *grid) if plain else f"the fused kernel takes no {type(module).__name__}"
        )
        if isinstance(made, str):
            left[name] = made
        else:
            exchange(model, name, module, made)
    return left


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    if trial.options.mode == "read":  # type: ignore[attr-defined]
        read = trial.notes.get("read", {"linears_read": 0})
        facts = {**read, "summary": f"{read['linears_read']} linears read" + (f" from {read['format']} files" if "format" in read else "")}
    else:
        facts = quantized_facts(model, trial)
    if facts.get("linears_read") or facts.get("linears_quantized"):
        _fused_kernels.add_facts(facts, model, trial, "torch, with expanded weights")
    return facts


def quantized_facts(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    """Counts of layers that lie on their grid *now*, and the bytes that an export takes."""
    grids = trial.notes.get("grids", {})
    found = dict(model.named_modules())
    fused = _fused_kernels.layers(model)
    on_grid = {name: grid for name, grid in grids.items() if name in fused or (name in found and grid.holds(found[name].weight))}
    shapes = {name: (found[name].out_features, found[name].in_features) for name in on_grid}
    facts = _packed.packed_facts(model, {name: (layer, _fused_kernels.full_bytes(layer, model)) for name, layer in fused.items()}, {})
    full = facts["bytes_full_precision"]
    saved = sum(rows * columns * model.dtype.itemsize for rows, columns in shapes.values())
    exported = full - saved + sum(grid.packed_bytes(shapes[name]) for name, grid in on_grid.items())
    sizes = [str(grid.group or "row") for grid in on_grid.values()]
    facts |= {
        "linears_quantized": len(on_grid),
        "bytes_exported": exported,
        "quantized_share_of_parameter_bytes": round(saved / full, 4) if full else 0.0,
        "summary": f"0 of {facts['linears']} linears",
    }
    if on_grid:
        bits = next(iter(on_grid.values())).bits
        facts |= {
            "bits": bits,
            "group_sizes": {size: sizes.count(size) for size in sorted(set(sizes))},
            "calibration_samples": trial.notes["samples"],
            "calibration_tokens": trial.notes["tokens"],
            "summary": f"{len(on_grid)} of {facts['linears']} linears on a grid of {bits} bits; an export takes "
            f"{_packed.megabytes(exported)} instead of {_packed.megabytes(full)}, in memory they "
            + (f"take {_packed.megabytes(facts['bytes_stored'])}" if fused else "stay"),
        }
    if trial.notes.get("rounded"):
        facts["rounded_to_nearest"] = trial.notes["rounded"]
        facts["summary"] += f"; {len(trial.notes['rounded'])} rounded to nearest (too little calibration, or raise damp)"
    return facts


@hookimpl
def save_model(model: PreTrainedModel, folder: Path, trial: TrialContext) -> bool | None:
    """A compressed-tensors folder with packed weights."""
    from optkit_plugins import _gptq_quantize

    grids = trial.notes.get("grids")
    _fused_kernels.give_back(model)
    if not grids:
        return None
    if _packed.was_conv1d(model.get_submodule(name) for name in grids):
        raise UsageError(
            f"gptq: {type(model).__name__} is built of Conv1D layers, into which transformers cannot load packed weights; "
            "export it without gptq"
        )
    _gptq_quantize.write_folder(model, grids, folder)
    return True


def refuse_experts(model: PreTrainedModel) -> None:
    """:raises UsageError: for a mixture whose experts are 3-D parameters: GPTQ would leave most of the model as it is."""
    experts = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 3)
    share = experts / max(1, sum(parameter.numel() for parameter in model.parameters()))
    if share > _packed.EXPERTS_WORTH_A_WORD:
        raise UsageError(
            f"gptq: {share:.0%} of the parameters are experts of a mixture, stored as 3-D parameters that GPTQ does not reach; "
            "leave gptq out for this model"
        )
