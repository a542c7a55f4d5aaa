"""The limits, against figures known from the architecture and worked out by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from optkit.measure import Peaks, Work, generate_limit_seconds, limit_over_devices, model_work, score_limit_seconds  # noqa: E402
from optkit.technique import Devices  # noqa: E402


def llama_8b(tied: bool = False):
    """Llama-3.1-8B's published shape, without memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_work_of_llama_8b():
    work = model_work(llama_8b())
    assert work.parameters == 8_030_261_248 - 128256 * 4096  # as published, without the embedding table
    assert work.weight_bytes - 2 * work.parameters in range(1024)  # the rotary frequencies are read too
    assert work.weight_bytes == pytest.approx(15.01e9, rel=1e-3)
    assert work.kv_bytes == 131_072


def test_a_table_that_is_the_head_too_is_read():
    assert model_work(llama_8b(tied=True)).parameters == model_work(llama_8b()).parameters


def test_packed_weights_count_as_the_weights_that_they_stand_for():
    from transformers import AutoModelForCausalLM, LlamaConfig

    from optkit_plugins.kernels.packed.linear import WeightOnlyLinear

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config)
    plain = model_work(model)
    linear = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = WeightOnlyLinear.from_linear(linear, "nf4", 64)
    packed = model_work(model)
    assert packed.parameters == plain.parameters
    assert packed.weight_bytes < plain.weight_bytes - 3 * linear.weight.numel()


def test_generation_is_held_to_reading_and_to_arithmetic():
    work = Work(weight_bytes=1000, parameters=500, kv_bytes=2, layers=1, hidden=10)
    peaks = Peaks(read_bandwidth=100.0, flops=1e6, dtype="float32")
    # 4 prompt tokens: 2·500·4 + 2·1·10·16 = 4,320 FLOPs take 0.00432 s, reading 10 s; a step reads 10 s and 2 bytes a cached token
    step = 10 + (4 + 1 * 2 / 2) * 2 / 100
    assert generate_limit_seconds(work, peaks, [[4]], 3) == pytest.approx(10 + 2 * step)
    slow = Peaks(read_bandwidth=1e12, flops=1.0, dtype="float32")
    assert generate_limit_seconds(work, slow, [[4]], 3) == pytest.approx(4320 + 2 * 1000, rel=1e-6)
    assert score_limit_seconds(work, slow, [[4], [2]]) == pytest.approx(4320 + 2 * 500 * 2 + 2 * 10 * 4)


def test_devices_that_share_rows_take_as_long_as_the_one_with_the_most_and_slices_are_read_at_once():
    work = Work(weight_bytes=1000, parameters=500, kv_bytes=0, layers=1, hidden=10)
    reading = Peaks(read_bandwidth=100.0, flops=1e12, dtype="float32")  # 10 s a reading of the weights, whatever the rows
    counting = Peaks(read_bandwidth=1e12, flops=1.0, dtype="float32")  # 1,000 s a token

    def least(peaks):
        return lambda lengths: generate_limit_seconds(work, peaks, lengths, 2)

    batches = [[1, 1, 1, 1, 1], [1]]  # prefill and one step of each
    rows, layers, slices = (Devices(count=2, share=share) for share in ("rows", "layers", "slices"))
    assert limit_over_devices(least(reading), batches, None) == pytest.approx(4 * 10, rel=1e-6)
    assert limit_over_devices(least(reading), batches, rows) == pytest.approx(4 * 10, rel=1e-6)  # each reads all of its weights
    assert limit_over_devices(least(reading), batches, layers) == pytest.approx(4 * 10, rel=1e-6)
    assert limit_over_devices(least(reading), batches, slices) == pytest.approx(4 * 10 / 2, rel=1e-6)
    one = limit_over_devices(least(counting), batches, None)
    assert one == pytest.approx((5 + 1) * 2 * 1000 + (5 + 1) * 20)  # 20 FLOPs a prompt token are those of attention
    assert limit_over_devices(least(counting), batches, rows) == pytest.approx((3 + 1) * 2 * 1000 + (3 + 1) * 20)  # three rows, then one
    assert limit_over_devices(least(counting), batches, layers) == one
    assert limit_over_devices(least(counting), batches, slices) == one / 2
