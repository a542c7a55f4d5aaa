"""Every pair of techniques: what the plan allows runs, keeps its bounds and is proven; what it refuses says why and what to do.

One tiny model in this process; compile with ``aot_eager``, since only composition is tested here.
"""

import itertools
import re
import warnings

import pytest
import torch

from optkit.errors import PlanConflict
from optkit.loading import byte_tokenizer
from optkit.machine import detect
from optkit.plan import Choice, make_plan
from optkit.proof import ACTIVE, NO_EFFECT
from optkit.registry import discover
from optkit.session import Session
from optkit.settings import KNOWN
from optkit.snapshot import checksum
from optkit.sources import ModelSource
from optkit.technique import PROPERTIES

#: Options with which a technique does something on a tiny model on the CPU.
OPTIONS = {
    "compile": {"backend": "aot_eager"},
    "gqa": {"ratio": 2},
    "batching": {"kind": "length"},
    "kv-cache": {"kind": "static"},
    "precision": {"dtype": "bfloat16"},
    "sampling": {"repetition_penalty": 1.3},
    "prune": {"method": "magnitude", "share": 0.1},
    "gptq": {"bits": 8, "group_size": 32},
    "offload": {"layers": 1},
}
#: Techniques that compute in another process: planned here, run in their own tests.
ELSEWHERE = {"endpoint": {"url": "http://127.0.0.1:9/v1"}, "vllm": {}, "parallel": {"devices": "cpu,cpu"}}
#: What an untouched run on the CPU has already: an honest "no effect".
ALREADY_THERE = {"flash", "batching", "cache"}
#: What these prompts and random weights may not give it: a text that repeats itself.
ALREADY_THERE |= {"speculate"}
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 8], [90, 91]]
NEW_TOKENS = 6

REGISTRY = discover()
READY = [row.name for row in REGISTRY if row.status == "ready" and "generate" in row.technique.tasks]
NAMES = [name for name in READY if name not in ELSEWHERE]


def build_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)  # transformers' small start makes every distribution flat, and a wrong mask goes unnoticed
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter whose second matrix is not zero."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    model = peft.get_peft_model(build_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(adapter):
    return OPTIONS | ELSEWHERE | {"merge-lora": {"adapter": str(adapter)}}


def planned(names, options):
    return make_plan(REGISTRY, detect(), "generate", [Choice(name, options.get(name, {})) for name in names])


def carry_out(plan, folder, watch=()):
    """The plan on a fresh model: its session, greedy tokens, scores and facts."""
    session = Session(REGISTRY, plan, ModelSource("tiny", "folder", str(folder)), detect(), folder, watch=watch)
    model = build_model()
    if plan.settings["load.dtype"]:
        model = model.to(getattr(torch, plan.settings["load.dtype"]))
    calibration = [[(7 * i + 3 * j) % 250 for j in range(32)] for i in range(8)]
    session.load(model, byte_tokenizer())
    session.transform(calibration)
    session.build()
    rows = session.engine.generate(PROMPTS, new_tokens=NEW_TOKENS, exact=True)
    scores = session.engine.score([prompt + [20, 21, 22] for prompt in PROMPTS], [len(prompt) for prompt in PROMPTS])
    with torch.profiler.profile() as seen:
        session.engine.generate(PROMPTS[:1], new_tokens=2, exact=True)
    session.share(kernels={event.key: event.count for event in seen.key_averages()})
    return session, rows, scores


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, options):
    everything = [step for name in NAMES for step in planned([name], options).steps]
    session, rows, scores = carry_out(planned([], options), tmp_path_factory.mktemp("baseline"), watch=everything)
    return rows, scores, session.facts()


def explains(conflict):
    """A refusal names a role, a setting or a property (or the technique's own problem), and a way out."""
    subject = re.search(r"role '\w+'|setting '[\w.]+'|property '[\w-]+'|adds '[\w-]+'|^[\w-]+: ", conflict)
    known = [name for name in (*KNOWN, *PROPERTIES) if f"'{name}'" in conflict]
    way_out = re.search(r"keep one|leave out|leave it out|add one|drop one|--set|pip install|give |choose|use ", conflict)
    return subject and (known or "role '" in conflict or re.match(r"^[\w-]+: ", conflict)) and way_out


@pytest.mark.parametrize("pair", list(itertools.combinations(READY, 2)), ids="+".join)
def test_pair(pair, options, baseline, tmp_path):
    try:
        plan = planned(pair, options)
    except PlanConflict as refused:
        assert all(explains(conflict) for conflict in refused.conflicts), refused.conflicts
        return
    if set(pair) & ELSEWHERE.keys():
        return  # planned and allowed; it runs against a server in the technique's own tests
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        session, rows, scores = carry_out(plan, tmp_path)
    reference, reference_scores, facts = baseline
    assert [len(row) for row in rows] == [NEW_TOKENS] * len(PROMPTS)
    assert all(torch.isfinite(score).all() for score in scores)
    lossless = not plan.lossy and "merge-lora" not in pair and "sampling" not in pair
    if lossless:
        assert rows == reference
    worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(scores, reference_scores, strict=True))
    assert worst < (1e-4 if lossless else bound(pair)), worst
    for name, proof in session.proof(facts).items():
        assert proof["verdict"] == ACTIVE or (name in ALREADY_THERE and proof["verdict"] == NO_EFFECT), (name, proof)
    session.close()


def bound(pair):
    """Largest difference of a log probability in nats on this model with random weights: how far each lossy technique may move it."""
    return sum({"gqa": 8.0, "nf4": 2.0, "fp4": 3.0, "prune": 1.5, "merge-lora": 2.0}.get(name, 0.7) for name in pair)


def test_every_ready_technique_is_in_a_pair_that_runs(options):
    alone = {name: [] for name in NAMES}
    for pair in itertools.combinations(NAMES, 2):
        try:
            planned(pair, options)
        except PlanConflict:
            continue
        for name in pair:
            alone[name].append(pair)
    assert all(alone.values()), alone


def test_the_model_is_the_same_each_time():
    assert checksum(build_model()) == checksum(build_model())
