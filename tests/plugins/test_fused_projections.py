"""Joined projections: the same tokens and weights, one product a group, and nothing left over."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.tiny import plain_greedy, ragged_prompts, tiny_model

torch = pytest.importorskip("torch")

from optkit_plugins.kernels.fused.projections import Joined, fuse_projections, joined_layers, split_projections  # noqa: E402
from optkit_plugins.kernels.packed.linear import WeightOnlyLinear  # noqa: E402

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "opt")
IDS = torch.arange(3, 20)[None]


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def empty(model: Any) -> bool:
    return all(joined.input is None and not any(part is not None for part in joined.waiting) for joined in joined_layers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_model(kind: str) -> None:
    plain, model = tiny_model(kind)[0], tiny_model(kind)[0]
    facts = fuse_projections(model)
    groups, layers = (2, 6) if kind == "opt" else (4, 10)
    assert facts == {"groups_fused": groups, "layers_fused": layers, "left": {}}
    assert plain_greedy(model, ragged_prompts(), 10) == plain_greedy(plain, ragged_prompts(), 10)
    assert empty(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_a_compiled_graph_multiplies_once_a_group_and_has_one_output(kind: str) -> None:
    plain, model = tiny_model(kind)[0], tiny_model(kind)[0]
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def products(of: Any) -> int:
        return sum(node.target is torch.nn.functional.linear for node in of.graph.nodes)

    torch._dynamo.reset()
    fuse_projections(model)
    compiled, before = torch.compile(model, backend=backend, fullgraph=True), torch.compile(plain, backend=backend, fullgraph=True)
    with torch.inference_mode():
        expected = before(IDS, use_cache=False).logits
        for _ in range(3):
            torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
    assert len(graphs) == 2, "one each: no recompile"
    assert products(graphs[0]) - products(graphs[1]) == 2 * 3, "two products less an attention, one less an MLP"
    assert [len(graph.graph.output_node().args[0]) for graph in graphs] == [1, 1]
    weights = [node for node in graphs[1].graph.nodes if node.op == "placeholder" and node.meta["example_value"].dim() == 2]
    static = [node for node in weights if node.meta["tensor_dict"].get("_dynamo_static_input_type")]
    assert len(weights) - len(static) == 1, "weights have fixed addresses, so that a CUDA graph does not copy them; the ids have not"
    assert empty(model)
    torch._dynamo.reset()


def test_weights_keep_names_places_and_are_stored_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from optkit.modules import linears, stored_bytes

    plain, model = tiny_model("qwen2")[0], tiny_model("qwen2")[0]
    fuse_projections(model)
    before, after = plain.state_dict(), model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert stored_bytes(model) == stored_bytes(plain)
    assert [name for name, _ in linears(model)] == [name for name, _ in linears(plain)]
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(plain))
    torch.testing.assert_close(logits(copy.deepcopy(model)), logits(plain))


def test_it_can_be_taken_back_and_done_again() -> None:
    plain, model = tiny_model("llama")[0], tiny_model("llama")[0]
    fuse_projections(model)
    assert fuse_projections(model)["groups_fused"] == 0, "joined layers are left alone"
    split_projections(model)
    assert not list(joined_layers(model)) and torch.equal(logits(model), logits(plain))
    assert fuse_projections(model)["groups_fused"] == 4


@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_packed_layers_share_a_product_too(format: str) -> None:
    from optkit.modules import linears, replace, stored_bytes
    from optkit_plugins._packed import packed_facts

    models = [tiny_model("qwen2", seed=3)[0] for _ in range(2)]
    for model in models:
        for name, linear in linears(model):
            replace(model, name, WeightOnlyLinear.from_linear(linear, format))
    plain, model = models
    facts = fuse_projections(model)
    assert facts["groups_fused"] == 4
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    words = model.model.layers[0].mlp.up_proj.words
    assert words.untyped_storage().data_ptr() == model.model.layers[0].mlp.gate_proj.words.untyped_storage().data_ptr()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert empty(model)
    original = stored_bytes(tiny_model("qwen2", seed=3)[0])
    for either in models:  # the proof's bytes: a weight that two layers share is counted once
        packed = {name: (layer, 4 * (layer.in_features * layer.out_features + (layer.bias is not None) * layer.out_features)) for name, layer in
                  either.named_modules() if isinstance(layer, WeightOnlyLinear)}  # fmt: skip
        told = packed_facts(either, packed, {})
        assert (told["bytes_full_precision"], told["bytes_stored"]) == (original, stored_bytes(either))


def group(module: Any) -> Any:
    parent = torch.nn.Module()
    for name, child in zip(("gate_proj", "up_proj"), module, strict=True):
        setattr(parent, name, child)
    return parent


def linear(rows: int = 32, columns: int = 64, **options: Any) -> Any:
    return torch.nn.Linear(columns, rows, **options)


def hooked() -> Any:
    module = linear()
    module.register_forward_hook(lambda *_: None)
    return module


def tied(parent: Any) -> Any:
    parent.other = torch.nn.Linear(64, 32)
    parent.other.weight = parent.up_proj.weight
    return parent


@pytest.mark.parametrize(
    ("parent", "reason"),
    [
        (group([linear(), hooked()]), "hooks"),
        (group([linear(), linear(columns=32)]), "inputs of several widths"),
        (group([linear(), linear(bias=False)]), "only some with a bias"),
        (group([linear(), linear(dtype=torch.bfloat16)]), "several dtypes"),
        (group([linear(device="meta"), linear(device="meta")]), "without data"),
        (group([linear(), torch.nn.Identity()]), "layers of Identity, Linear"),
        (group([WeightOnlyLinear.from_linear(linear(rows)) for rows in (32, 40)]), "no multiple of 16"),
        (group([WeightOnlyLinear.from_linear(linear(), format) for format in ("nf4", "int8")]), "formats"),
        (tied(group([linear(), linear()])), "tied weights"),
    ],
)
def test_what_cannot_share_is_left_with_the_reason(parent: Any, reason: str) -> None:
    facts = fuse_projections(parent)
    assert facts["groups_fused"] == 0 and reason in facts["left"][".gate_proj+up_proj"]
    assert not list(joined_layers(parent))


def test_other_orders_inputs_and_gradients_are_right_too() -> None:
    torch.manual_seed(0)
    parent, plain = group([linear(), linear(16)]), group([linear(), linear(16)])
    plain.load_state_dict(parent.state_dict())
    fuse_projections(parent)
    (joined,) = (module for module in parent.modules() if isinstance(module, Joined))
    x, y = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    with torch.inference_mode():
        for name, given in (("up_proj", x), ("gate_proj", x), ("gate_proj", x), ("gate_proj", y), ("up_proj", x), ("up_proj", y)):
            torch.testing.assert_close(getattr(parent, name)(given), getattr(plain, name)(given), msg=f"{name} of another input")
        parent.gate_proj(x), parent.up_proj(x)
    assert joined.input is None
    parent.up_proj(x).sum().backward()
    plain.up_proj(x).sum().backward()
    torch.testing.assert_close(parent.up_proj.weight.grad, plain.up_proj.weight.grad)
