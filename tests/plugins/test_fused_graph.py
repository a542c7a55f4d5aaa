"""A decode step with norms, gates, residuals and cache writes fused: what is found in each architecture, and that the values stay right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.plugins.tiny import KINDS, plain_greedy, tiny_model

torch = pytest.importorskip("torch")

from optkit_plugins.kernels.attention import interface as attending  # noqa: E402
from optkit_plugins.kernels.decode.loop import Sampler, Slot, highest_of_parts  # noqa: E402
from optkit_plugins.kernels.fused import matvec as multiplying  # noqa: E402
from optkit_plugins.kernels.fused.graph import StepPass, with_products  # noqa: E402
from optkit_plugins.kernels.fused.product import CALLS, plain_fused  # noqa: E402
from optkit_plugins.kernels.fused.projections import fuse_projections  # noqa: E402

# torch's own compiler still imports modules that use it
pytestmark = pytest.mark.filterwarnings("ignore:.*torch\\.jit\\.:DeprecationWarning")

#: What a model of two layers holds that the pass knows, in 16 bits.
WHOLE = {"products": 9, "norms": 5, "gates": 2, "residuals": 4, "attentions": 2}
FOUND = {
    "llama": WHOLE,
    "qwen2": WHOLE,
    "qwen3": WHOLE,
    "mistral": WHOLE,
    "gemma2": {"products": 9, "attentions": 2},  # norms with an offset, norms behind products, and gelu
    "gpt_neox": {"products": 9, "residuals": 2, "attentions": 2},
    "opt": {"products": 9, "residuals": 4, "attentions": 2},
    "gpt2": {"products": 1, "attentions": 2},  # Conv1D: weights lie the other way round
}
PROMPT = [5, 6, 7, 9, 11]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pass as on a GPU, with the ops' plain versions."""
    monkeypatch.setattr(attending, "runs_on", lambda device: True)
    monkeypatch.setattr(multiplying, "FEWEST_BYTES", 1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def without_codegen(passes: StepPass, graphs: list[Any] | None = None) -> Callable[..., Any]:
    """Inductor's own way to a graph, passes included, but the graph itself is run: a tenth of the time."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.virtualized import V

    def inner(graph: Any, inputs: Any, **rest: Any) -> Any:
        with V.set_fake_mode(torch._dynamo.utils.detect_fake_mode(inputs)), config.patch(post_grad_custom_pre_pass=passes):
            post_grad_passes(graph, True)
        if graphs is not None:
            graphs.append(graph.graph)
        return graph

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)


class Logits:
    """A step over a slot of one row whose logits are kept."""

    def __init__(self, model: Any, *, forced: bool = True):
        self.slot = Slot(model, 1, 64, Sampler(), [], spans=True)
        self.forced, append = forced, self.slot._append
        self.kept = torch.zeros(1, 128, dtype=model.dtype)
        torch._dynamo.mark_static_address(self.kept)
        self.slot._append = lambda logits: (self.kept.copy_(logits), append(logits))  # type: ignore[assignment, func-returns-value]
        ids = torch.tensor([PROMPT])
        self.slot.put(ids, torch.ones_like(ids), exact=False)
        self.slot.read(1, len(PROMPT), ragged=False)

    def run(self, step: Callable[[], Any], steps: int) -> Any:
        """(steps, vocabulary) in float64, of the same tokens whatever the model says."""
        rows = []
        for _ in range(steps):
            if self.forced:
                self.slot.texts[0, len(PROMPT) :] = torch.arange(20, 20 + 64 - len(PROMPT))
            step()
            rows.append(self.kept.double().clone())
        return torch.cat(rows)


def logits(kind: str, dtype: Any, backend: Any = None, layers: int = 2, **how: Any) -> Any:
    model = tiny_model(kind, num_hidden_layers=layers)[0].to(dtype)
    if backend is not None:
        fuse_projections(model)
    attention = attending.EngineAttention(model)
    with torch.inference_mode(), attention.use("decode"):
        step = Logits(model)
        run = step.slot.step if backend is None else torch.compile(step.slot.step, fullgraph=True, dynamic=False, backend=backend, **how)
        return step.run(run, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_are_as_near_to_float64_as_the_plain_model(kind: str) -> None:
    passes = StepPass()
    CALLS.clear()
    ours = logits(kind, torch.bfloat16, without_codegen(passes))
    assert +passes.found == FOUND[kind]
    assert {name: CALLS[name] // 4 for name in ("products", "norms", "gates", "residuals")} == {
        name: FOUND[kind].get(name, 0) for name in ("products", "norms", "gates", "residuals")
    }
    reference = logits(kind, torch.float64)
    error, plain = ((one - reference).norm() for one in (ours, logits(kind, torch.bfloat16)))
    assert error < 1.3 * plain, (float(error), float(plain))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_tokens_in_float32_are_those_of_the_plain_loop(kind: str) -> None:
    plain, model = tiny_model(kind)[0], tiny_model(kind)[0]
    fuse_projections(model)
    attention, passes = attending.EngineAttention(model), StepPass()
    with torch.inference_mode(), attention.use("decode"):
        step = Logits(model, forced=False)
        step.run(torch.compile(step.slot.step, fullgraph=True, dynamic=False, backend=without_codegen(passes)), 9)
    assert +passes.found == {"attentions": 2}, "products of 32 bits stay with the library"
    assert [step.slot.texts[0, 5:15].tolist()] == plain_greedy(plain, [PROMPT], 10)


def test_the_cache_is_written_in_place_and_nothing_else_of_it_is_left() -> None:
    graphs: list[Any] = []
    logits("llama", torch.bfloat16, without_codegen(StepPass(), graphs))
    (graph,) = graphs
    aten, ours = torch.ops.aten, torch.ops.optkit.decode_step_attention.default
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    caches = [node.args[place] for node in nodes if node.target is ours for place in (5, 6)]
    assert len(caches) == 4 and all(cache.op == "placeholder" and len(cache.users) == 1 for cache in caches)
    left = {node.target for node in nodes}
    assert not left & {aten.rsqrt.default, aten.neg.default, aten.mm.default}


def test_what_others_use_is_not_swallowed() -> None:
    from optkit_plugins.kernels.fused.matvec import matvec

    torch.manual_seed(0)
    weight, norm = (torch.randn(32, 64) / 8).bfloat16(), torch.rand(64).bfloat16()

    def layer(x: Any) -> Any:
        wide = x.float()
        normal = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        gate, up = matvec(normal, weight, None).chunk(2, -1)
        acted = torch.nn.functional.silu(gate) * up
        return acted + normal[:, :16], acted.sum(), gate.sum()

    passes, x = StepPass(), torch.randn(1, 64).bfloat16()
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=without_codegen(passes))
        torch.testing.assert_close(compiled(x), layer(x), rtol=0.05, atol=0.05)
    assert +passes.found == {"norms": 1}, "gate and up are seen by the caller, and so is what they make"


def test_a_registered_product_is_fused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from optkit_plugins.kernels.fused import product as fused_product
    from optkit_plugins.kernels.fused.matvec import matvec

    one = torch.ops.optkit.matvec.default
    monkeypatch.setitem(fused_product.FUSED, one, fused_product.Fused(torch.ops.optkit.fused_matvec.default, lambda node: False))
    weight, x, y = torch.randn(32, 64).bfloat16(), torch.randn(1, 64).bfloat16(), torch.randn(1, 32).bfloat16()
    passes = StepPass()
    with torch.inference_mode():
        torch.compile(lambda x, y: matvec(x, weight, None) + y, backend=without_codegen(passes))(x, y)
        assert not passes.found["residuals"], "the op does not take it"
        monkeypatch.undo()
        torch.compiler.reset()
        torch.compile(lambda x, y: matvec(x, weight, None) + y, backend=without_codegen(passes))(x, y)
        assert passes.found["residuals"] == 1


def test_the_plain_version_is_the_models_own_modules() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    config = tiny_model("llama")[0].config
    norm, mlp = LlamaRMSNorm(64, eps=0.1).double(), LlamaMLP(config).double()
    torch.nn.init.normal_(norm.weight)
    joined, x = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), torch.randn(1, 64).double()
    acted = plain_fused(lambda x: x @ joined.T, x, norm.weight, 0.1, None, True)
    out = plain_fused(lambda x: x @ mlp.down_proj.weight.T, acted, residual=x)
    torch.testing.assert_close(out, x + mlp(norm(x)), rtol=1e-5, atol=1e-6)  # the norm itself computes in float32


@pytest.mark.parametrize("vocabulary", [7, 512, 1000, 4096])
def test_the_highest_is_found_in_two_stages(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    for _ in range(20):
        scores = torch.randint(0, 40, (3, vocabulary), generator=generator).float()  # many are equal: the first one counts
        scores[1, : vocabulary // 2] = float("-inf")
        assert torch.equal(highest_of_parts(scores), scores.argmax(-1))


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_the_compiler_takes_the_fused_step() -> None:
    arguments = with_products({"backend": "inductor", "mode": None}, "fused")
    ours = logits("llama", torch.bfloat16, layers=1, **arguments)
    torch.testing.assert_close(ours, logits("llama", torch.float64, layers=1), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("options", "kind"), [({}, "StepPass"), ({"products": "matvec"}, "MatvecPass"), ({"mode": "max-autotune"}, "")])
def test_a_gpus_engine_compiles_its_steps_with_the_pass(make_trial: Any, options: dict[str, Any], kind: str) -> None:
    from dataclasses import replace

    from optkit_plugins import compile as compiling

    trial = replace(make_trial("compile", compiling.CompileOptions(**options), {"generate.cache": "static"}), device="cuda")
    engine: Any = compiling.build_engine(model=tiny_model("llama")[0], trial=trial)
    passes = engine.step_arguments.get("options", {}).get("post_grad_custom_pre_pass")
    assert (type(passes).__name__ if passes else "") == kind
