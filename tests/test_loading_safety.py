"""Hostile model folders: nothing in them is run, imported or fetched, and one line says what was refused.

All are loaded in one child with an audit hook, which sees what Python itself sees: imports, sockets, programs. The trap that each of
them sets writes a file when it is sprung.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optkit import foreign_code
from optkit.errors import UsageError
from optkit.loading import byte_tokenizer
from optkit.sources import model_source
from tests.plugins.tiny import tiny_model

REMOTE = "org/repo--evil.Evil"


class Trap:
    """Touches ``path`` when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class Folder:
    """A good model's folder, to be spoiled."""

    def __init__(self, path: Path, trap: Path):
        self.path, self.trap = path, trap
        self.code = f"import os\nos.mkdir({str(trap)!r})\nclass Evil: pass\n"

    def edit(self, name: str, **keys: Any) -> None:
        path = self.path / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | keys))

    def module(self, name: str = "evil.py") -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_text(self.code)

    def pickled(self, name: str, *, plain: bool = False) -> None:
        (self.path / "model.safetensors").unlink(missing_ok=True)
        if plain:
            (self.path / name).write_bytes(pickle.dumps(Trap(self.trap), 2))
        else:
            torch.save({"model.norm.weight": Trap(self.trap)}, self.path / name)


def known_architecture(folder: Folder) -> None:
    folder.module()
    folder.edit("config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})


def unknown_architecture(folder: Folder) -> None:
    known_architecture(folder)
    folder.edit("config.json", model_type="evil")


def tokenizer(folder: Folder) -> None:
    folder.module()
    folder.edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")


def custom_generate(folder: Folder) -> None:
    folder.module("custom_generate/generate.py")
    (folder.path / "custom_generate" / "requirements.txt").write_text("evil")
    folder.edit("generation_config.json", custom_generate="org/repo")


def attention(folder: Folder) -> None:
    kernel = "org/kernel"
    folder.edit("config.json", _attn_implementation=kernel, attn_implementation=kernel, _attn_implementation_internal=kernel)


def kernels(folder: Folder) -> None:
    folder.edit("config.json", use_kernels=True, kernel_config={"kernel_mapping": {"RMSNorm": "org/kernel:RMSNorm"}})


def pickled_index(folder: Folder) -> None:
    folder.pickled("part.bin")
    folder.edit("pytorch_model.bin.index.json", metadata={}, weight_map={"model.norm.weight": "part.bin"})


def adapter(folder: Folder) -> None:
    facts = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "org/another"}
    folder.edit("adapter_config.json", **facts, auto_mapping={"base_model_class": "X", "parent_library": "evil"}, megatron_core="evil")
    torch.save({"x": Trap(folder.trap)}, folder.path / "adapter_model.bin")


def outside(folder: Folder) -> None:
    folder.edit("model.safetensors.index.json", metadata={}, weight_map={"model.norm.weight": "../../elsewhere.safetensors"})


#: name -> how the folder is spoiled, how loading ends ("loaded" or the error's type), and words of the one line that says so.
CASES: dict[str, tuple[Callable[[Folder], Any], str, str]] = {
    "code of a known architecture": (known_architecture, "loaded", "config.json: auto_map"),
    "code of an unknown architecture": (unknown_architecture, "UsageError", "contains custom code"),
    "code in another repository": (
        lambda folder: folder.edit("config.json", auto_map={"AutoModelForCausalLM": REMOTE}), "loaded", "config.json: auto_map",
    ),
    "code of a tokenizer": (tokenizer, "UsageError", "contains custom code"),
    "code that generates": (custom_generate, "loaded", "custom_generate/generate.py"),
    "a kernel as attention": (attention, "loaded", "config.json: attn_implementation"),
    "kernels for layers": (kernels, "loaded", "config.json: use_kernels, config.json: kernel_config"),
    "a kernel for experts": (
        lambda folder: folder.edit("config.json", experts_implementation="org/kernel"), "UsageError", 'experts_implementation="org/kernel"'
    ),
    "an unknown quantization": (
        lambda folder: folder.edit("config.json", quantization_config={"quant_method": "evil", "loader": "evil.load"}),
        "UsageError", "quantized by 'evil', which transformers does not know",
    ),
    "a quantization without a method": (lambda folder: folder.edit("config.json", quantization_config={"x": 1}), "UsageError", "quant_method"),
    "a quantization of a foreign class": (
        lambda folder: folder.edit(
            "config.json", quantization_config={"quant_method": "torchao", "quant_type": {"default": {"_type": "evil.Config", "_data": {}}}}
        ),
        "UsageError", "evil.Config",
    ),
    "pickled weights": (lambda folder: folder.pickled("pytorch_model.bin"), "UsageError", "a pickle that would run code"),
    "a plain pickle as weights": (lambda folder: folder.pickled("pytorch_model.bin", plain=True), "UsageError", "a pickle that would run code"),
    "pickled parts of weights": (pickled_index, "UsageError", "a pickle that would run code"),
    "an adapter beside the model": (adapter, "UsageError", "holds an adapter beside the model"),
    "weights outside of the folder": (outside, "UsageError", "'../../elsewhere.safetensors', which is no file of the folder itself"),
    "other weights by name": (
        lambda folder: folder.edit("config.json", transformers_weights="../other.safetensors"), "UsageError", "no file of the folder itself"
    ),
}  # fmt: skip

CHILD = """
import json, sys
from pathlib import Path
seen = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system") or (event == "import" and "evil" in str(arguments[0])):
        seen.append([event, str(arguments[:2])])
import torch
import transformers.models.llama.modeling_llama  # libraries may look round while they are imported: only what follows is watched
from optkit.context import TrialContext
from optkit.engine import TransformersEngine
from optkit.errors import OptkitError
from optkit.loading import load_model, load_tokenizer
from optkit.settings import Settings
from optkit.sources import model_source
sys.addaudithook(hook)
found = {}
for name, folder in json.load(sys.stdin).items():
    seen.clear()
    try:
        source = model_source(folder)
        trial = TrialContext("", None, Settings({}), "generate", "cpu", 0, None, source, Path("unused"))
        model = load_model(source, trial)
        trial.tokenizer = load_tokenizer(source)
        tokens = TransformersEngine(model, trial).generate([[1, 2, 3]], new_tokens=4)
        facts = [type(model).__module__, model.config._attn_implementation, tokens]
        found[name] = ["loaded", facts, list(seen)]
    except OptkitError as error:
        found[name] = [type(error).__name__, str(error), list(seen)]
    except BaseException as error:
        found[name] = ["!" + type(error).__name__, str(error), list(seen)]
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    root = tmp_path_factory.mktemp("hostile")
    model, _ = tiny_model("llama", vocab_size=256)
    made = {}
    for number, name in enumerate(["nothing", *CASES]):
        folder = made[name] = Folder(root / f"model-{number}", root / f"sprung-{number}")
        model.save_pretrained(folder.path)
        byte_tokenizer().save_pretrained(folder.path)
        if name in CASES:
            CASES[name][0](folder)
    return made


def outcomes(folders: dict[str, Folder], names: list[str], **environment: str) -> dict[str, Any]:
    """What came of loading each, with what Python saw meanwhile."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        input=json.dumps({name: str(folders[name].path) for name in names}),
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Folder]) -> dict[str, Any]:
    return outcomes(folders, list(folders))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_run_imported_or_fetched_and_one_line_says_so(name, folders, loaded):
    outcome, text, seen = loaded[name]
    _, expected, words = CASES[name]
    assert (outcome, seen) == (expected, [])
    assert not folders[name].trap.exists()
    if outcome == "loaded":
        module, implementation, tokens = text
        assert (module, implementation) == ("transformers.models.llama.modeling_llama", "sdpa")
        assert tokens == loaded["nothing"][1][2]
        text = foreign_code.refused(folders[name].path)
    assert words in text
    assert "\n" not in text and len(text) < 700


def test_the_environment_does_not_make_torch_unpickle(folders):
    """With this variable torch unpickles wherever nobody says otherwise."""
    names = [name for name in CASES if "pickle" in name]
    assert len(names) == 3
    for name, (outcome, text, seen) in outcomes(folders, names, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1").items():
        assert (outcome, seen) == ("UsageError", []) and "a pickle that would run code" in text
        assert not folders[name].trap.exists()


def test_a_good_folder_names_nothing(folders):
    assert foreign_code.refused(folders["nothing"].path) == ""


@pytest.mark.parametrize("plain", [True, False])
def test_the_traps_work(folders, plain, tmp_path):
    """Read without care, each pickle springs its trap: what is tested above could fail."""
    folder = Folder(tmp_path, tmp_path / "sprung")
    folder.pickled("x.bin", plain=plain)
    if plain:
        pickle.loads((tmp_path / "x.bin").read_bytes())
    else:
        torch.load(tmp_path / "x.bin", weights_only=False)
    assert folder.trap.exists()
    folder.trap.rmdir()
    exec(folder.code)
    assert folder.trap.exists()


@pytest.mark.parametrize(
    "name",
    ["../nowhere", "../../etc/passwd", "a\0b", "\u202emodel", "x" * 300, "org/" + "x" * 300, "org/..", "../..", "a/b/c", "~nobody-has-this-name/x",
     "-model", "model ", "\x1b[31mred", "org\\model", "/dev/null", "random:a\0b", "random:" + "x" * 5000, "random:~nobody-has-this-name"],
)  # fmt: skip
def test_names_that_are_no_model_are_refused_in_one_line(name):
    with pytest.raises(UsageError) as refused:
        model_source(name)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


def test_only_explicit_words_read_pickles_or_foreign_code():
    """``weights_only`` and ``trust_remote_code`` are said wherever a library could reach a pickle or a file of Python."""
    said = {"torch.load(": "weights_only=True", "from_pretrained(": "trust_remote_code=", "from_config(": "trust_remote_code="}
    for path in sorted((Path(__file__).parents[1] / "optkit").rglob("*.py")):
        if path.parent.name == "testing":
            continue  # makes its models from configurations of its own
        text = path.read_text()
        for call, words in said.items():
            for piece in text.split(call)[1:]:
                arguments = piece[: _closing(piece)]
                assert words in arguments or ("**arguments" in arguments and words.rstrip("=") in text), f"{path.name}: {call}{arguments})"


def _closing(text: str) -> int:
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    return len(text)
