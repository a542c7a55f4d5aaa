"""Attention that turns query and key and writes the cache: the kernel under Triton's interpreter and the plain version against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from optkit_plugins.kernels.attention.decode_step import decode_step_attention, turned  # noqa: E402

INTERPRETED = """
import json, torch
from triton.runtime import interpreter
from optkit_plugins.kernels.attention.decode import Fresh, launch
from optkit_plugins.kernels.attention.decode_step import plain_step_attention

plain_patch = interpreter._patch_lang_tensor
def patch(tensor, scope):  # the interpreter of Triton 3.6 does not loop to a run-time bound under numpy 2.4
    plain_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patch

CASES = [
    # size, key heads, heads of a group, dtype, programs that share a row, turned, column, window, angles by row
    (64, 2, 2, "float32", 4, True, 70, 0, True),
    (80, 1, 3, "float32", 3, True, 109, 0, False),
    (128, 2, 4, "bfloat16", 4, True, 0, 0, True),
    (16, 2, 1, "float16", 1, False, 20, 0, False),
    (96, 1, 2, "float32", 4, True, 109, 33, False),
]
results = []
generator = torch.Generator().manual_seed(0)
for size, kv_heads, groups, name, splits, turns, column, window, by_row in CASES:
    dtype, rows, wide = getattr(torch, name), 2, lambda tensor: None if tensor is None else tensor.double()
    sizes = [kv_heads * groups * size, kv_heads * size, kv_heads * size]
    joined = torch.randn(rows, sum(sizes), generator=generator).to(dtype)  # as a joined projection leaves them
    query, key, value = (part.view(rows, 1, -1, size).transpose(1, 2) for part in joined.split(sizes, -1))
    keys, values = (torch.randn(rows, kv_heads, 110, size, generator=generator).to(dtype) for _ in range(2))
    angle = torch.randn(rows if by_row else 1, size // 2, generator=generator).repeat(1, 2)
    cos, sin = (angle.cos().to(dtype), angle.sin().to(dtype)) if turns else (None, None)
    at, first, last = torch.tensor([column]), torch.tensor([0, min(7, column)]), torch.tensor([column, column])
    right_keys, right_values = keys.double(), values.double()
    fresh = Fresh(wide(key), wide(value), at, wide(cos), wide(sin))
    expected = plain_step_attention(
        wide(query), right_keys, right_values, first, last, fresh, scale=0.3, window=window or None, dtype=torch.float64
    )
    keys[:, :, column] = values[:, :, column] = float("nan")
    counters = torch.zeros(8, dtype=torch.int32)
    fresh = Fresh(key, value, at, cos, sin)
    out = launch(query, keys, values, first, last, counters, 0.3, window, fresh=fresh, splits=splits)
    pairs = ((out, expected), (keys, right_keys), (values, right_values))
    results.append([name, bool(counters.any()), *(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)])
print(json.dumps(results))
"""


def test_the_kernel_equals_float64() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    bounds = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
    assert len(results) == 5
    for dtype, counting, *errors in results:
        assert not counting and max(errors) < bounds[dtype], results


def case(rows: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    query, key, value = draw(rows, 4, 1, 16), draw(rows, 2, 1, 16), draw(rows, 2, 1, 16)
    angle = draw(1, 1, 1, 8).repeat(1, 1, 1, 2)
    keys, values = draw(rows, 2, 40, 16), draw(rows, 2, 40, 16)
    return query, key, value, angle.cos(), angle.sin(), keys, values, torch.tensor([20]), torch.tensor([0, 3]), torch.tensor([20, 20])


def test_it_is_what_transformers_and_sdpa_do_apart() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key, value, cos, sin, keys, values, column, first, last = case()
    right_query, right_key = apply_rotary_pos_emb(query, key, cos[:, 0], sin[:, 0])
    torch.testing.assert_close(turned(key, cos, sin), right_key)
    right_keys, right_values = keys.index_copy(2, column, right_key), values.index_copy(2, column, value)
    at = torch.arange(40)
    mask = ((at >= first[:, None]) & (at <= last[:, None]))[:, None, None]
    twice = right_keys.repeat_interleave(2, 1), right_values.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(right_query, *twice, attn_mask=mask, scale=0.2)[:, :, 0]
    out = decode_step_attention(query, key, value, cos, sin, keys, values, column, first, last, None, 0.2, 0, 0.0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(keys, right_keys)
    torch.testing.assert_close(values, right_values)


@pytest.mark.parametrize("turns", [True, False])
def test_the_op_is_declared_as_it_is(turns: bool) -> None:
    query, key, value, cos, sin, *rest = case()
    angles = (cos, sin) if turns else (None, None)
    torch.library.opcheck(torch.ops.optkit.decode_step_attention.default, (query, key, value, *angles, *rest, None, 0.2, 0, 0.0))
