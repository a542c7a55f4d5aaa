"""Whole experiments with real processes on a tiny model: results against transformers' own, memo, records, and failing techniques."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optkit.errors import OptkitError, UnavailableError, UsageError
from optkit.experiment import execute
from optkit.loading import byte_tokenizer
from optkit.request import Request, prepare
from tests.fakes import install, plugin
from tests.plugins.tiny import tiny_model

SHARED = Path(os.environ.get("OPTKIT_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", str(tmp_path / "records"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model, _ = tiny_model("llama", vocab_size=256)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(json.dumps({"id": str(n), "prompt": f"count {n}", "answer": f"{n}{n}"}) for n in range(12)))
    return path


def request(model_folder, samples, plugins=(), **more):
    settings = {"generate.max_new_tokens": 8, "batch.size": 4}
    return Request(model=str(model_folder), samples=str(samples), plugins=list(plugins), profile="cpu", repeats=1, set=settings, **more)


def arm(record, name):
    return next(row for row in record["arms"] if row["name"] == name)


LOUDER = "@hookimpl\ndef transform_model(model, trial): model.lm_head.weight.data.mul_(1.5)"


def test_a_run_measures_compares_proves_and_is_remembered(model_folder, samples, monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", {"louder": plugin("louder", LOUDER, stage="'quantize'", lossy="True")})
    record = execute(request(model_folder, samples, ["louder"]))
    assert [row["state"] for row in record["arms"]] == ["ok", "ok"]
    louder = arm(record, "louder")
    assert louder["proof"]["louder"]["verdict"] == "active"
    assert louder["speed_up"]["n"] == 1 and not louder["speed_up"]["differs"]
    assert louder["quality"]["perplexity"]["difference"] != 0 and louder["quality"]["kl"]["value"] > 1e-3
    assert louder["tokens"] == 8 * 8  # 8 timed samples of 8 new tokens
    assert record["baseline_again"]["n"] == 1
    again = execute(request(model_folder, samples, ["louder"]))
    assert "measured_now" not in again or again["id"] == record["id"]
    assert {row["predictions_from"] for row in again["arms"]} == {"memo"}
    assert again["arms"][1]["quality"] == louder["quality"]


def test_perplexity_is_that_of_transformers(model_folder, samples):
    from transformers import AutoModelForCausalLM

    record = execute(request(model_folder, samples))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = byte_tokenizer()
    total, count = 0.0, 0
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        prompt, answer = tokenizer(row["prompt"]).input_ids, [*tokenizer(row["answer"]).input_ids, 1]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += float(model(torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
        count += len(answer)
    assert arm(record, "baseline")["quality"]["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_failing_techniques_are_states_with_reasons_and_lose_nothing_else(model_folder, samples, monkeypatch, tmp_path):
    install(
        monkeypatch, tmp_path / "site",
        {
            "raiser": plugin("raiser", "@hookimpl\ndef transform_model(model): raise ValueError('no room at 7')", stage="'quantize'"),
            "crasher": plugin("crasher", "@hookimpl\ndef transform_model(model):\n    import ctypes\n    ctypes.string_at(0)", stage="'quantize'"),
            "glutton": plugin("glutton", "@hookimpl\ndef transform_model(model): raise MemoryError('all of it')", stage="'quantize'"),
            "louder": plugin("louder", LOUDER, stage="'engine'"),
        },
    )  # fmt: skip
    record = execute(request(model_folder, samples, ["raiser", "crasher", "glutton", "louder"], each=True))
    states = {row["name"]: (row["state"], row["reason"]) for row in record["arms"]}
    assert states["raiser"] == ("failed", "ValueError: no room at 7")
    assert states["crasher"][0] == "crashed" and "SIGSEGV" in states["crasher"][1]
    assert states["glutton"][0] == "oom"
    assert states["louder"][0] == "ok" and states["baseline"][0] == "ok"
    assert len(states) == 6  # and all together, which fails as its first member does


def test_ten_new_samples_compute_ten(model_folder, samples, monkeypatch, tmp_path):
    first = execute(request(model_folder, samples, limit=6))
    assert arm(first, "baseline")["quality"]["perplexity"]["n"] == 6
    from optkit import predictions_memo

    asked = []
    original = predictions_memo.remember_predictions

    def spy(memo, spec, rows, compute, **more):
        return original(memo, spec, rows, lambda missing: asked.append(len(missing)) or compute(missing), **more)

    monkeypatch.setattr("optkit.experiment.remember_predictions", spy)
    second = execute(request(model_folder, samples, limit=12))
    assert asked == [6]
    assert arm(second, "baseline")["quality"]["perplexity"]["n"] == 12


def test_changed_code_of_a_plugin_is_another_identity(model_folder, samples, monkeypatch, tmp_path):
    from optkit.experiment import Experiment

    install(monkeypatch, tmp_path / "site", {"louder": plugin("louder", LOUDER, stage="'quantize'")})
    before = Experiment(prepare(request(model_folder, samples, ["louder"])))
    module = next((tmp_path / "site").glob("fake_louder*.py"))
    module.write_text(module.read_text() + "\n# another version\n")
    after = Experiment(prepare(request(model_folder, samples, ["louder"])))
    assert before.specs["louder"] != after.specs["louder"] and before.specs["baseline"] == after.specs["baseline"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"set": {"generate.max_new_tokens": 9}}, {"set": {"load.dtype": "bfloat16"}}, {"task": "score"}, {"shrink": True}],
)
def test_every_part_of_a_request_is_in_the_identity(model_folder, samples, change):
    from optkit.experiment import Experiment

    plain = Experiment(prepare(request(model_folder, samples)))
    given = request(model_folder, samples)
    for name, value in change.items():
        setattr(given, name, value)
    assert Experiment(prepare(given)).specs["baseline"] != plain.specs["baseline"]


def test_a_remembered_run_imports_nothing_heavy(model_folder, samples):
    execute(request(model_folder, samples))
    code = (
        "import sys\nfrom optkit.experiment import execute\nfrom optkit.request import Request\n"
        f"record = execute(Request(model={str(model_folder)!r}, samples={str(samples)!r}, plugins=[], profile='cpu', repeats=1,"
        " set={'generate.max_new_tokens': 8, 'batch.size': 4}))\n"
        "from optkit.report.terminal import console, record_view\nconsole().print(record_view(record, 2))\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'joblib') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert "from the record of" in done.stdout and "from the memo" in done.stdout


def test_texts_are_not_kept_when_that_is_asked(model_folder, samples, tmp_path):
    execute(request(model_folder, samples, store_text=False))
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*.json"))
    assert b'"text"' not in kept


def test_prompts_without_answers_get_agreement_and_divergence(model_folder, tmp_path):
    record = execute(
        Request(model=str(model_folder), samples="random:6x5", plugins=["precision"], profile="cpu", repeats=1,
                set={"precision.dtype": "bfloat16", "generate.max_new_tokens": 6})
    )  # fmt: skip
    quality = arm(record, "precision")["quality"]
    assert quality["agreement"]["n"] == 6 and 1e-6 < quality["kl"]["value"] < 0.1
    assert "exact_match" not in quality and arm(record, "precision")["loaded"]["dtype"] == "bfloat16"


def test_the_untouched_model_does_not_diverge_from_itself(model_folder, monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", {"idle": plugin("idle")})
    record = execute(
        Request(
            model=str(model_folder), samples="random:6x5", plugins=["idle"], profile="cpu", repeats=1, set={"generate.max_new_tokens": 6}
        )
    )
    quality = arm(record, "idle")["quality"]
    assert quality["kl"]["value"] < 1e-6 and quality["agreement"]["value"] == 1
    assert arm(record, "idle")["proof"]["idle"]["verdict"] == "no effect"


def test_a_plugins_own_metric_is_shown_and_a_name_given_twice_is_refused(model_folder, samples, monkeypatch, tmp_path):
    body = LOUDER + "\n@hookimpl\ndef evaluate(outputs, samples): return {'%s': float(len(outputs))}"
    install(
        monkeypatch, tmp_path / "site",
        {"counter": plugin("counter", body % "counted", stage="'quantize'"), "clash": plugin("clash", body % "perplexity", stage="'quantize'")},
    )  # fmt: skip
    record = execute(request(model_folder, samples, ["counter"]))
    assert arm(record, "counter")["quality"]["counted"]["value"] == 12
    with pytest.raises(OptkitError, match="'perplexity' is given twice, the second time by clash"):
        execute(request(model_folder, samples, ["clash"]))


def test_a_hub_model_that_cannot_be_fetched_is_one_line_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UnavailableError, match="cannot fetch 'nobody/nothing' from the hub") as caught:
        execute(Request(model="nobody/nothing", profile="cpu", plugins=[]))
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE"):
        execute(Request(model="nobody/nothing", profile="cpu", plugins=[]))


def test_texts_cannot_be_continued(model_folder, tmp_path):
    (tmp_path / "t.txt").write_text("some text")
    with pytest.raises(UsageError, match="--task score"):
        prepare(Request(model=str(model_folder), samples=str(tmp_path / "t.txt"), task="generate", profile="cpu"))


@pytest.mark.skipif(not (SHARED / "models/stories260k").is_dir(), reason="the shared models are not here")
def test_the_known_perplexity_of_a_published_model():
    record = execute(
        Request(model=str(SHARED / "models/stories260k"), samples=str(SHARED / "data/tinystories/embed_eval.jsonl"), plugins=[],
                profile="cpu", repeats=1)
    )  # fmt: skip
    assert arm(record, "baseline")["quality"]["perplexity"]["value"] == pytest.approx(4.69, abs=0.02)
