"""Reading GPTQ and AWQ checkpoints: the formats, as plain functions, and a model in full precision from a folder of them.

Both store a linear layer ``y = x @ W`` with W of shape (in × out) as integers in int32 words, one scale and one zero point a group of
inputs and output: ``W[i, o] = scales[group(i), o] * (integer[i, o] - zero[group(i), o])``. They differ in how the words are filled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit import UnavailableError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from optkit import ModelSource, TrialContext

#: Nibble i of a word of AutoAWQ's GEMM layout holds this column of the eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Tensors of a quantized layer; its bias is an ordinary tensor.
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Format:
    """How a checkpoint says that it was written.

    :ivar method: ``gptq`` or ``awq``. :ivar group_size: inputs a group, -1 for all of them.
    :ivar zero_offset: added to the stored zero points: GPTQ's first format stores them less one.
    """

    method: str
    bits: int
    group_size: int
    zero_offset: int


# ---------------------------------------------------------------- formats


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unsigned integers from int32 words along the first dimension.

    Value i lies in the bits [i·bits, (i+1)·bits) of the words strung together, lowest bit first. So 3-bit values cross words: 32 of them
    fill three.

    :param words: (words, n), int32. :param count: values to read. :return: (count, n), int32.
    """
    import torch

    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    start = torch.arange(count, device=words.device) * bits
    word, offset = start // 32, start % 32
    following = unsigned[(word + 1).clamp(max=len(unsigned) - 1)]
    both = unsigned[word] | following << 32
    return (both >> offset[:, None] & (1 << bits) - 1).to(torch.int32)


def gptq_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int, zero_offset: int
) -> torch.Tensor:  # fmt: skip
    """The weight (out × in, float32) of a layer in AutoGPTQ's layout.

    :param qweight: (in·bits/32, out), packed along the inputs.
    :param qzeros: (groups, out·bits/32), packed along the outputs.
    :param scales: (groups, out). :param g_idx: (in,), the group of each input; with ``desc_act`` in any order.
    :param zero_offset: 1 for the first format ("gptq"), which stores the zero point less one; 0 for "gptq_v2".
    """
    integers = unpack(qweight, bits, g_idx.numel())
    zeros = unpack(qzeros.t(), bits, scales.shape[1]).t() + zero_offset
    groups = g_idx.long()
    return ((integers - zeros[groups]).float() * scales.float()[groups]).t().contiguous()


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """4-bit integers of AutoAWQ's GEMM layout: (n, words) int32 -> (n, 8·words), columns in order.

    Nibble i of a word holds column ``AWQ_ORDER[i]`` of its eight.
    """
    import torch

    shifts = torch.arange(8, device=words.device, dtype=torch.int32) * 4
    nibbles = words[:, :, None] >> shifts & 15
    columns = torch.empty_like(nibbles)
    columns[:, :, list(AWQ_ORDER)] = nibbles
    return columns.reshape(len(words), -1)


def awq_weight(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight (out × in, float32) of a layer in AutoAWQ's GEMM layout.

    :param qweight: (in, out/8), packed along the outputs. :param qzeros: (groups, out/8), packed alike, stored as they are.
    :param scales: (groups, out); the groups are consecutive inputs.
    """
    integers, zeros = unpack_awq(qweight), unpack_awq(qzeros)
    size = len(integers) // len(scales)
    steps = (integers - zeros.repeat_interleave(size, 0)).float()
    return (steps * scales.float().repeat_interleave(size, 0)).t().contiguous()


def read_format(folder: Path) -> Format:
    """What ``config.json`` (``quantization_config``) or AutoGPTQ's ``quantize_config.json`` say.

    :raises UsageError: for a checkpoint that is not GPTQ or AWQ, or in a layout that is not read here.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
    found = config.get("quantization_config")
    if found is None and (folder / "quantize_config.json").is_file():
        found = {"quant_method": "gptq"} | json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
    if found is None or found.get("quant_method") not in ("gptq", "awq"):
        method = f"its weights are quantized with '{found.get('quant_method')}'" if found else "its configuration names no quantization"
        raise UsageError(f"gptq: '{folder}' holds no GPTQ or AWQ checkpoint: {method}; leave out gptq.mode=read")
    return _gptq_format(found) if found["quant_method"] == "gptq" else _awq_format(found)


def _gptq_format(found: dict[str, Any]) -> Format:
    bits = int(found["bits"])
    layout = found.get("checkpoint_format") or "gptq"
    if bits not in (2, 3, 4, 8) or layout not in ("gptq", "gptq_v2") or found.get("pack_dtype", "int32") != "int32":
        raise UsageError(
            f"gptq: {bits} bits in the layout '{layout}' (words of {found.get('pack_dtype', 'int32')}) are not read here; "
            "the layouts 'gptq' and 'gptq_v2' with 2, 3, 4 or 8 bits in int32 words are"
        )
    return Format("gptq", bits, int(found.get("group_size", -1)), 1 if layout == "gptq" else 0)


def _awq_format(found: dict[str, Any]) -> Format:
    bits = int(found.get("bits", found.get("w_bit", 4)))
    version = str(found.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not found.get("zero_point", True):
        raise UsageError(f"gptq: AWQ with {bits} bits in the layout '{version}' is not read here; 4 bits with zero points in 'gemm' are")
    return Format("awq", 4, int(found.get("group_size", found.get("q_group_size", 128))), 0)


# ---------------------------------------------------------------- loading


def load(source: ModelSource, trial: TrialContext) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any]]:
    """The model in full precision, the facts of what was read, and by layer the grid on which it lies (``grid_of``).

    :raises UsageError: for a folder that holds something else, or tensors that do not fit the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = _folder(source)
    form = read_format(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = trial.dtype or config.dtype or torch.float16
    attention = trial.settings["load.attention"]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=False)
    tensors, facts, grids = expand(_tensors(folder), skeleton, form, dtype)
    model = type(skeleton).from_pretrained(
        None,  # type: ignore[arg-type]  # no folder: everything comes from the tensors given
        config=config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation=attention,
        device_map=trial.device,
    )
    return model.eval(), facts, grids


def _folder(source: ModelSource) -> Path:
    if source.shrink or source.kind == "random":
        raise UsageError("gptq: gptq.mode=read reads a whole checkpoint; give its folder or hub id, without --shrink")
    if source.kind == "folder":
        return Path(source.location)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.location, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise UnavailableError(
            f"gptq: '{source.location}' cannot be fetched ({' '.join(str(error).split())[:200]}); "
            "download it where there is a network and give its folder"
        ) from error


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files: those of the index, or every file (AutoGPTQ names its file after the bits)."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() else []
    files = [folder / name for name in names] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"gptq: '{folder}' holds no *.safetensors; convert the checkpoint to safetensors first")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def expand(
    tensors: dict[str, torch.Tensor], skeleton: PreTrainedModel, form: Format, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Full-precision tensors by name in place of the quantized ones, facts, and the layers' grids. ``tensors`` is emptied on the way.

    :param skeleton: the model on the meta device: it says how wide each layer is, and which way round.
    """
    layers = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    if not layers:
        raise UsageError("gptq: the files hold no quantized layer (no tensor is named *.qweight)")
    result: dict[str, torch.Tensor] = {}
    packed_bytes, grids = 0, {}
    for name in layers:
        parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        packed_bytes += sum(part.numel() * part.element_size() for part in parts.values())
        result[f"{name}.weight"] = _expand_layer(name, parts, skeleton, form).to(dtype)
        grids[name] = grid_of(parts, form)
    result |= tensors
    label = "AWQ" if form.method == "awq" else "GPTQ"
    facts = {"linears_read": len(layers), "format": label, "bits": form.bits, "group_size": form.group_size, "bytes_packed": packed_bytes}
    return result, facts, grids


def grid_of(parts: dict[str, torch.Tensor], form: Format) -> tuple[int, torch.Tensor, torch.Tensor] | str:
    """Bits, scale and zero point (out × groups) of a layer whose groups are consecutive inputs, or why it has none."""
    import torch

    scales = parts["scales"]
    if "g_idx" in parts:
        order = parts["g_idx"].long()
        if not torch.equal(order, torch.arange(len(order)) // (len(order) // len(scales))):
            return "the groups of its inputs are in no order (desc_act)"
    zeros = unpack_awq(parts["qzeros"]) if form.method == "awq" else unpack(parts["qzeros"].t(), form.bits, scales.shape[1]).t()
    return form.bits, scales.t().contiguous(), (zeros + form.zero_offset).t().contiguous()


def _expand_layer(name: str, parts: dict[str, torch.Tensor], skeleton: PreTrainedModel, form: Format) -> torch.Tensor:
    import torch
    from transformers.pytorch_utils import Conv1D

    try:
        layer = skeleton.get_submodule(name)
    except AttributeError:
        raise UsageError(f"gptq: the files hold a layer '{name}' that {type(skeleton).__name__} does not have") from None
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    width, height = shape if isinstance(layer, Conv1D) else shape[::-1]  # inputs, outputs
    words = (width, height * form.bits // 32) if form.method == "awq" else (width * form.bits // 32, height)
    if tuple(parts["qweight"].shape) != words or parts["scales"].shape[1] != height:
        raise UsageError(
            f"gptq: '{name}' has words of shape {tuple(parts['qweight'].shape)}; {width} inputs and {height} outputs at {form.bits} bits "
            f"take {words}. The configuration's bits are not this layer's"
        )
    if form.method == "awq":
        weight = awq_weight(parts["qweight"], parts["qzeros"], parts["scales"])
    else:
        size = form.group_size if form.group_size > 0 else width
        groups = parts.get("g_idx", torch.arange(width) // size)
        weight = gptq_weight(parts["qweight"], parts["qzeros"], parts["scales"], groups, form.bits, form.zero_offset)
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight
