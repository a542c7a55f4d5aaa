"""Decode attention over each row's own columns: the plain version against float64, the kernel against it under Triton's interpreter, and
the op inside a compiled graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from optkit_plugins.kernels.attention import decode as decoding  # noqa: E402
from optkit_plugins.kernels.attention.decode import decode_attention, spans_mask  # noqa: E402

INTERPRETED = """
import json, torch
from triton.runtime import interpreter
from optkit_plugins.kernels.attention.decode import launch, plain_decode_attention

plain_patch = interpreter._patch_lang_tensor
def patch(tensor, scope):  # the interpreter of Triton 3.6 does not loop to a run-time bound under numpy 2.4
    plain_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patch

CASES = [
    # size, key heads, heads of a group, dtype, programs that share a row, window, softcap, one launch
    (64, 2, 1, "float32", 4, 0, 0.0, True),
    (80, 1, 3, "float32", 3, 0, 0.0, False),
    (96, 1, 8, "float16", 2, 33, 0.0, True),
    (128, 2, 4, "bfloat16", 4, 0, 0.0, True),
    (128, 1, 5, "bfloat16", 1, 0, 0.0, False),
    (256, 1, 2, "float32", 4, 0, 5.0, True),
    (16, 2, 2, "float32", None, 7, 0.5, False),
]
errors = []
generator = torch.Generator().manual_seed(0)
for size, kv_heads, groups, dtype, splits, window, softcap, one_launch in CASES:
    dtype = getattr(torch, dtype)
    query = torch.randn(4, 1, kv_heads * groups, size, generator=generator).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(4, kv_heads, 110, size, generator=generator).to(dtype) for _ in range(2))
    first, last = torch.tensor([0, 7, 60, 5]), torch.tensor([109, 40, 60, 4])  # all, some, one and no column
    expected = plain_decode_attention(
        query.double(), keys.double(), values.double(), first, last,
        scale=0.3, window=window or None, softcap=softcap or None, dtype=torch.float64,
    )
    keys[1, :, 41:] = values[1, :, 41:] = float("nan")  # a column that is not the row's may hold anything
    counters = torch.zeros(8, dtype=torch.int32) if one_launch else None
    for _ in range(2):  # counters are ready for the next launch
        out = launch(query, keys, values, first, last, counters, 0.3, window, softcap, splits=splits)
        assert counters is None or not counters.any()
        assert not out[3].any()
        errors.append((str(dtype), ((out.double() - expected).norm() / expected.norm()).item()))
query = torch.randn(6, 4, 1, 64, generator=generator)
keys, values = (torch.randn(2, 2, 50, 64, generator=generator) for _ in range(2))  # three rows of queries share one of keys
first, last = torch.tensor([3, 3, 3, 9, 9, 9]), torch.tensor([40, 41, 42, 20, 21, 22])
expected = plain_decode_attention(query.double(), keys.double(), values.double(), first, last, scale=0.3, dtype=torch.float64)
alone = [plain_decode_attention(query[row : row + 1].double(), keys[row // 3 : row // 3 + 1].double(), values[row // 3 : row // 3 + 1].double(),
                                first[row : row + 1], last[row : row + 1], scale=0.3, dtype=torch.float64) for row in range(6)]
assert torch.allclose(torch.cat(alone), expected, atol=1e-12)
for splits in (1, 4):
    out = launch(query, keys, values, first, last, torch.zeros(16, dtype=torch.int32), 0.3, splits=splits)
    errors.append((str(out.dtype), ((out.double() - expected).norm() / expected.norm()).item()))
print(json.dumps(errors))
"""


def test_the_kernel_equals_float64():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bounds = {"torch.float32": 1e-6, "torch.float16": 1e-3, "torch.bfloat16": 1e-2}
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 16
    assert all(error < bounds[dtype] for dtype, error in errors), errors


@pytest.mark.parametrize("capability", [75, 90, 120])
def test_the_kernels_compile_for_each_generation_of_gpu(capability):
    """Without the GPU: the interpreter takes what the compiler refuses."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from optkit_plugins.kernels.attention import decode_triton as kernel

    element = "*fp16" if capability == 75 else "*bf16"
    types = dict.fromkeys(("query", "keys", "values", "out", "new_keys", "new_values", "cos", "sin"), element)
    types |= dict.fromkeys(("first", "last", "column_at"), "*i64")
    types |= {"sums": "*fp32", "stats": "*fp32", "counters": "*i32", "scale": "fp32"}
    constants = decoding.constants(groups=4, size=96, block=32, splits=16, window=0)
    more = {"TILE": 16, "SOFTCAP": 0.0, "FUSED": True, "UPCAST": False, "SHARE": 1, "FRESH": True, "ROTARY": True}
    for function, values in ((kernel.split, constants | more), (kernel.combine, constants)):
        signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in function.arg_names}
        places = {(function.arg_names.index(name),): value for name, value in values.items()}
        compiled = triton.compile(
            ASTSource(function, signature, places), target=GPUTarget("cuda", capability, 32), options={"num_warps": 2}
        )
        assert compiled.asm["cubin"]


def random_case(rows=3, heads=4, kv_heads=2, size=16, columns=40):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(rows, heads, 1, size, generator=generator)
    keys, values = (torch.randn(rows, kv_heads, columns, size, generator=generator) for _ in range(2))
    return query, keys, values, torch.tensor([0, 3, 20]), torch.tensor([39, 17, 20])


@pytest.mark.parametrize("window", [None, 5])
def test_the_plain_version_is_sdpa_over_the_rows_own_columns(window):
    query, keys, values, first, last = random_case()
    mask = spans_mask(first, last, 40, window)[:, None, None]
    twice = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *twice, attn_mask=mask, scale=0.2)[:, :, 0]
    out = decode_attention(query, keys, values, first, last, scale=0.2, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_softcap_bends_the_scores():
    query, keys, values, first, last = random_case(kv_heads=4)
    scores = (query * keys).sum(-1) * 0.9
    seen = spans_mask(first, last, 40)[:, None]
    weights = (2.0 * (scores / 2.0).tanh()).masked_fill(~seen, float("-inf")).softmax(-1)
    expected = (weights[..., None] * values).sum(2)
    out = decode_attention(query, keys, values, first, last, scale=0.9, softcap=2.0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_the_op_stays_whole_in_a_graph():
    query, keys, values, first, last = random_case()

    def step(last):
        return decode_attention(query, keys, values, first, last + 0, scale=0.2) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(last), step(last))
    torch.testing.assert_close(compiled(last - 1), step(last - 1))
    torch.compiler.reset()
    torch.library.opcheck(torch.ops.optkit.decode_attention.default, (query, keys, values, first, last, None, 0.2, 0, 0.0))


def test_splits_fill_the_device_and_no_more(monkeypatch):
    class H200:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    device = torch.device("cuda")
    assert [decoding.default_splits(pairs, 1024, device) for pairs in (8, 64, 512)] == [16, 4, 1]
    assert decoding.default_splits(8, 8192, device) == 32
