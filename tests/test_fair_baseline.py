"""The baseline in a trial does what plain transformers does in a user's script: nothing watches it, and Python works no more for a token.

On a GPU ``generate`` waits for Python, so anything that is left on the model, or in the process, would make every speed-up too large.
"""

from __future__ import annotations

import cProfile
import gc
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from optkit.experiment import Experiment, preloaded  # noqa: E402
from optkit.loading import byte_tokenizer  # noqa: E402
from optkit.request import Request, prepare  # noqa: E402
from optkit.runner import Runner  # noqa: E402
from optkit.trial import TrialServer  # noqa: E402
from tests.plugins.tiny import tiny_model  # noqa: E402

TOKENS = 16


def python_calls(work: Callable[[], Any]) -> int:
    """Function calls of one run, Python's and C's, once warm."""
    work()
    profile = cProfile.Profile()
    profile.runcall(work)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def what_watches(model: Any) -> dict[str, Any]:
    """All that could slow a forward pass down, or see it."""
    from torch.nn.modules import module

    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "hooks": sum(len(getattr(part, kind)) for part in model.modules() for kind in kinds),
        "replaced": sum("forward" in vars(part) for part in model.modules()),
        "global hooks": sum(len(value) for name, value in vars(module).items() if name.startswith("_global_") and isinstance(value, dict)),
        "modes": torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack(),
        "traced": bool(sys.getprofile() or sys.gettrace()),
        "garbage": (gc.isenabled(), gc.get_threshold()),
    }


class Watched(Runner):
    """The runner, and what is seen in its process."""

    calls = (*Runner.calls, "facts")  # type: ignore[assignment]

    def facts(self) -> dict[str, Any]:
        threads = {"python": threading.active_count(), "torch": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}
        return {"watching": what_watches(self.session.model), "calls": python_calls(lambda: self.once(1)), "threads": threads}


def main(spec: dict[str, Any]) -> Watched:
    return Watched(spec)


@pytest.mark.skipif(sys.platform != "linux", reason="trials are forked there")
def test_a_trial_adds_nothing_to_what_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OPTKIT_RECORDS_DIR", str(tmp_path / "records"))
    model, _ = tiny_model("llama", vocab_size=256)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"generate.max_new_tokens": TOKENS, "batch.size": 8}
    plans = [["compile"], ["int8"]]  # what other plans need is imported, and watched, in the baseline too
    request = Request(
        model=str(tmp_path / "model"), samples="random:8x32", plans=plans, profile="cpu", repeats=1, task="generate", set=settings
    )  # fmt: skip
    experiment = Experiment(prepare(request))
    experiment.folder = Path(tempfile.mkdtemp(dir=tmp_path))
    spec = experiment.trial_spec(experiment.setup.baseline) | {"threads": 1}
    with TrialServer(preloaded(experiment.setup), {"OMP_NUM_THREADS": "1"}, log_folder=tmp_path / "logs") as server:
        trial = server.spawn("tests.test_fair_baseline:main", spec, name="baseline")
        trial.call("load", timeout=60.0)
        facts = trial.call("facts", timeout=60.0)
        assert "fresh Python" not in trial.log_tail()

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa").eval()
    ids = torch.randint(5, 250, (8, 32), generator=torch.Generator().manual_seed(0))

    config = transformers.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=100_000)

    def plain() -> Any:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    assert plain().shape == (8, 32 + TOKENS)
    nothing = {"hooks": 0, "replaced": 0, "global hooks": 0, "modes": 0, "traced": False}
    fresh = "import gc, json; print(json.dumps([gc.isenabled(), list(gc.get_threshold())]))"  # another test may have changed ours
    garbage = json.loads(subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, check=True).stdout)
    assert facts["watching"] == nothing | {"garbage": garbage}
    assert facts["threads"] == {"python": 1, "torch": 1, "cores": len(os.sched_getaffinity(0))}
    assert facts["calls"] <= 1.02 * python_calls(plain)
