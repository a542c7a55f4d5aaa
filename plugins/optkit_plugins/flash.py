"""flash: fused attention, with the kernel chosen by measurement on the model's own heads.

Fused kernels never write the matrix of attention scores to memory. transformers' default (SDPA) already uses one, so the gain is what a
*better* kernel brings on this device: candidates are timed for a moment on the model's head count, head size and dtype, and the fastest
is used. Where the default wins, nothing is changed and the verdict is "no effect". Not for models that soft-cap attention scores, which
SDPA leaves out, and flash-attn 2 needs compute capability 8.0 (a T4 has 7.5) and half precision.

FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning (Dao 2023).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit import Claims, Machine, Options, Technique, TrialContext, UnavailableError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit.technique import Task

#: option -> name of the backend in ``torch.nn.attention.SDPBackend``
SDPA_BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
#: part of an operator's name, as a profiler shows it -> what ran
KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_attention_math": "math",
    "_scaled_dot_product_fused_attention_overrideable": "fused",
    "flash_attn": "flash_attention_2",
    "FlashAttnFunc": "flash_attention_2",
}
#: transformers takes every name with "flash" in it for the flash-attn library.
NAMES = {"flash": "fused"}
#: A candidate must beat the default by this part: less is noise.
MARGIN = 0.1


class FlashOptions(Options):
    backend: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "flash_attention_2"] = Field(
        "auto", description="attention kernel; auto measures those that this device has, sdpa is torch's own choice"
    )


technique = Technique(
    name="flash",
    stage="attention",
    summary="the fastest fused attention kernel for the model's heads, chosen by measurement; costs nothing",
    tasks=frozenset({"score", "generate", "train"}),
    options=FlashOptions,
    paper="https://arxiv.org/abs/2307.08691",
    tested_on=("cpu", "NVIDIA H200"),
    exceptions={"effect": "where torch's own choice is the fastest kernel, as it mostly is on a CPU, auto changes nothing"},
)


@hookimpl
def configure(options: FlashOptions, task: Task, machine: Machine) -> Claims:
    return Claims(problem=what_is_missing(options.backend, machine))


def what_is_missing(backend: str, machine: Machine) -> str | None:
    """Why a backend cannot run on this machine, with the way out."""
    if machine.device == "cpu" and backend in ("cudnn", "efficient", "flash_attention_2"):
        return f"backend '{backend}' needs an NVIDIA GPU; set flash.backend=auto"
    if backend != "flash_attention_2":
        return None
    if (machine.compute_capability or (0, 0)) < (8, 0):
        return f"flash-attn 2 needs compute capability 8.0 and {machine.name} is older; set flash.backend=auto"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install 'optkit[flash]', or set flash.backend=auto"
    return None


@hookimpl
def transform_model(model: PreTrainedModel, trial: TrialContext) -> None:
    options = trial.options
    assert isinstance(options, FlashOptions)
    own = str(model.config._attn_implementation)
    backend: str = options.backend
    if backend == "auto":
        candidates = ["sdpa", *(name for name in (*SDPA_BACKENDS, "flash_attention_2") if what_is_missing(name, trial.machine) is None)]
        milliseconds = measure(model, candidates, generate=trial.task == "generate")
        backend = fastest(milliseconds)
        trial.notes["milliseconds"] = milliseconds
    if backend != "flash_attention_2" and getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        raise UnavailableError(
            f"{type(model).__name__} soft-caps its attention scores, which SDPA leaves out; leave out flash (or set "
            "flash.backend=flash_attention_2 where flash-attn is installed)"
        )
    name = backend if backend in ("sdpa", "flash_attention_2") else register(backend)
    if name != own:
        model.set_attn_implementation(name)
    trial.notes["backend"], trial.notes["changed"] = backend, name != own


def fastest(milliseconds: dict[str, float]) -> str:
    """The quickest backend, but torch's own choice unless another beats it by ``MARGIN``."""
    best = min(milliseconds, key=lambda name: milliseconds[name])
    if "sdpa" in milliseconds and milliseconds[best] > (1 - MARGIN) * milliseconds["sdpa"]:
        return "sdpa"
    return best


def register(backend: str) -> str:
    """Give transformers an attention that prefers ``backend`` and takes the next best where it cannot run (such as under a mask).

    :return: the name to set on a model.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    # math runs everything, and a CPU takes a fused kernel before it whatever the order is
    others = [] if backend == "math" else [other for other in SDPA_BACKENDS if other != backend]
    order = [getattr(SDPBackend, SDPA_BACKENDS[name]) for name in (backend, *others)]

    def attention(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(order, set_priority=True):
            return sdpa_attention_forward(*args, **kwargs)

    name = f"optkit_sdpa_{NAMES.get(backend, backend)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


# ---------------------------------------------------------------- measuring


def measure(model: PreTrainedModel, candidates: list[str], *, generate: bool, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of attention alone by backend, the best of ``repeats``; those that refuse these heads are left out.

    :param generate: a prompt and 64 decode steps; else one causal pass. On the heads, head size and dtype of ``model``.
    """
    import torch

    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    length = min(getattr(config, "max_position_embeddings", None) or 1024, 1024 if model.device.type == "cuda" else 256)
    with torch.inference_mode():
        query = torch.randn(1, heads, length, size, device=model.device, dtype=model.dtype)
        key, value = (torch.randn(1, kv_heads, length, size, device=model.device, dtype=model.dtype) for _ in range(2))
        found: dict[str, float] = {}
        for name in candidates:
            attend = attention_of(name)
            try:
                prompt = best_of(partial(attend, query, key, value, True), model.device.type, repeats)
                step = best_of(partial(attend, query[:, :, -1:], key, value, False), model.device.type, repeats)
            except (RuntimeError, ImportError):  # this kernel takes no such heads or dtype
                continue
            found[name] = prompt + 64 * step if generate else prompt
    return found


def attention_of(backend: str) -> Callable[..., Any]:
    """Attention alone: a function of query (1, heads, length, size), key, value, causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if backend == "flash_attention_2":
        from flash_attn import flash_attn_func

        return lambda query, key, value, causal: flash_attn_func(*(part.transpose(1, 2) for part in (query, key, value)), causal=causal)
    if backend == "sdpa":
        return lambda query, key, value, causal: scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    def attend(query: Any, key: Any, value: Any, causal: bool) -> Any:
        with sdpa_kernel([getattr(SDPBackend, SDPA_BACKENDS[backend])]):
            return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    return attend


def best_of(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Milliseconds of the quickest of ``repeats`` calls, synchronized, after a warm-up."""
    import warnings

    import torch

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns why a backend refuses; the refusal itself is an error that is handled
        work()
        for _ in range(repeats):
            synchronize()
            started = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - started)
    return 1000 * min(times)


# ---------------------------------------------------------------- proof


@hookimpl
def prove_effect(model: PreTrainedModel, trial: TrialContext) -> dict[str, Any]:
    ran = sorted({what for kernel in trial.kernels for part, what in KERNELS.items() if part in kernel})
    seen = f"kernel seen: {', '.join(ran)}" if ran else "no attention kernel profiled"
    if trial.notes.get("changed") is False:
        measured = trial.notes.get("milliseconds", {})
        why = f"fastest of {', '.join(measured)}" if measured else "asked for"
        return {"summary": f"torch's own SDPA kept ({why}); {seen}"}
    facts: dict[str, Any] = {"kernels": ran} if ran else {"implementation": str(model.config._attn_implementation)}
    return facts | {"summary": f"{trial.notes.get('backend', model.config._attn_implementation)}; {seen}"}
