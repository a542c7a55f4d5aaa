"""Clocks, memory, energy, and the hardware's limit, in the process that does the work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from optkit.technique import Devices


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class Clock:
    """``with Clock(device) as clock: …`` then ``clock.seconds``: synchronized wall-clock time."""

    def __init__(self, device: str):
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Clock:
        synchronize(self.device)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._started


def host_seconds() -> float:
    """What this processor takes just now for a fixed piece of Python, the best of three (a few milliseconds each).

    ``generate`` on a GPU waits for Python most of the time, and on a shared host the same Python can take twice as long a minute later.
    """

    def once() -> float:
        started, total = time.perf_counter(), 0
        for number in range(50_000):
            total += number & 7
        return time.perf_counter() - started

    return min(once() for _ in range(3))


def reset_peak_memory(device: str) -> int:
    """Start counting the peak anew; gives the bytes in use now (resident set on the CPU, allocated on CUDA)."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")
    except OSError:
        pass
    return _status_bytes("VmRSS")


def peak_memory(device: str) -> int:
    """Peak bytes since ``reset_peak_memory``."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    try:
        with open("/proc/self/status") as handle:
            for line in handle:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def energy_joules(device: str) -> float | None:
    """The GPU's energy counter in joules, where NVML has one; differences of it are energy used."""
    if device != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        import torch

        handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-" + str(torch.cuda.get_device_properties(0).uuid))
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except Exception:  # no NVML, no counter, a virtual GPU: energy is then not shown
        return None


@dataclass(frozen=True)
class Peaks:
    """What this device reached just now. ``read_bandwidth`` in bytes/s (read only), ``flops`` in FLOP/s of a matrix product."""

    read_bandwidth: float
    flops: float
    dtype: str


def measure_peaks(device: str, dtype: torch.dtype, working_set: int) -> Peaks:
    """Read-only bandwidth from a matrix-vector product, and a square matrix product's FLOP/s.

    :param working_set: bytes to read a pass: the model's own size (up to 1 GB), so that a model that fits a cache is held to the cache.
    """
    import torch

    itemsize = torch.tensor([], dtype=dtype).element_size()
    columns = 4096 if working_set > 1 << 26 else 1024
    rows = max(16, min(working_set, 1 << 30) // (columns * itemsize))
    with torch.inference_mode():
        matrix = torch.randn(rows, columns, device=device, dtype=torch.float32).to(dtype)
        vector = torch.randn(columns, device=device, dtype=torch.float32).to(dtype)
        seconds = _best_seconds(lambda: torch.mv(matrix, vector), device)
        bandwidth = rows * columns * itemsize / seconds
        size = 8192 if device == "cuda" else 1024
        left = torch.randn(size, size, device=device).to(dtype)
        flops = 2 * size**3 / _best_seconds(lambda: left @ left, device)
    return Peaks(bandwidth, flops, str(dtype).removeprefix("torch."))


def _best_seconds(work: Any, device: str, *, budget: float = 0.3) -> float:
    """The quickest of as many rounds as fit the budget, each of several calls: a limit is the best that was seen."""
    work()
    best, spent = float("inf"), 0.0
    while spent < budget:
        with Clock(device) as clock:
            for _ in range(4):
                work()
        best, spent = min(best, clock.seconds / 4), spent + clock.seconds
    return best


@dataclass(frozen=True)
class Work:
    """One model's cost, for its limit.

    :ivar weight_bytes: bytes read by a decode step (embedding table left out, unless it is the head too).
    :ivar parameters: N of the formula, without the embedding table. :ivar kv_bytes: of one token in the KV cache.
    :ivar layers: decoder layers. :ivar hidden: width.
    """

    weight_bytes: int
    parameters: int
    kv_bytes: int
    layers: int
    hidden: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def model_work(model: Any) -> Work:
    """Bytes and arithmetic of one forward pass. A module that keeps weights in buffers says how many in ``packed_weights``."""
    from optkit.modules import stored_bytes

    config = model.config.get_text_config(decoder=True)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    table = model.get_input_embeddings()
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is table.weight
    unread = 0 if tied else table.weight.numel()
    dtype_bytes = model.dtype.itemsize if model.dtype.is_floating_point else 2
    packed = sum(getattr(module, "packed_weights", 0) for module in model.modules())
    logical = sum(_logical_numel(parameter) for parameter in model.parameters()) + packed - unread
    return Work(
        weight_bytes=stored_bytes(model) - unread * table.weight.element_size(),
        parameters=logical,
        kv_bytes=2 * layers * heads * width * dtype_bytes,
        layers=layers,
        hidden=hidden,
    )


def _logical_numel(parameter: Any) -> int:
    """Weights that a parameter stands for: a 4-bit one packs two a byte and says so in its ``quant_state``."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None and hasattr(state, "shape") else parameter.numel()


def generate_limit_seconds(work: Work, peaks: Peaks, prompts: list[list[int]], new_tokens: int) -> float:
    """The least time that the hardware allows for the prompts' batches.

    A decode step takes max(weight bytes / bandwidth, 2·N·B / peak) + B·context·KV bytes / bandwidth; the prefill 2·N + 2·L·hidden·seq
    FLOPs a token, or one reading of the weights.

    :param prompts: prompt lengths of each batch.
    """
    total = 0.0
    for lengths in prompts:
        batch, context = len(lengths), sum(lengths)
        prefill = sum(2 * work.parameters * n + 2 * work.layers * work.hidden * n * n for n in lengths) / peaks.flops
        total += max(prefill, work.weight_bytes / peaks.read_bandwidth)
        step = max(work.weight_bytes / peaks.read_bandwidth, 2 * work.parameters * batch / peaks.flops)
        steps = new_tokens - 1
        cached = context + batch * steps / 2
        total += steps * (step + cached * work.kv_bytes / peaks.read_bandwidth)
    return total


def limit_over_devices(least: Callable[[list[list[int]]], float], batches: list[list[int]], devices: Devices | None) -> float:
    """The least time for the batches where several devices compute together.

    With rows shared out, a batch takes as long as the device with the most work of it; slices of every layer are read and computed all at
    once; layers one after another take what they take on one device.

    :param least: the least seconds that one device takes for batches. :param batches: lengths of each batch.
    """
    if devices is not None and devices.share == "rows":
        parts = ([batch[first :: devices.count] for first in range(min(devices.count, len(batch)))] for batch in batches)
        return sum(max(least([rows]) for rows in shared) for shared in parts)
    return least(batches) / (devices.count if devices is not None and devices.share == "slices" else 1)


def score_limit_seconds(work: Work, peaks: Peaks, lengths: list[list[int]]) -> float:
    """The least time for one forward pass over each batch of sequences, from FLOPs or one reading of the weights a batch."""
    total = 0.0
    for batch in lengths:
        flops = sum(2 * work.parameters * n + 2 * work.layers * work.hidden * n * n for n in batch)
        total += max(flops / peaks.flops, work.weight_bytes / peaks.read_bandwidth)
    return total
