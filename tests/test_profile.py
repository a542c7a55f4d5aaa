"""Profiles: facts against data sheets, which one a machine is, and files that are wrong in every way."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit.errors import UsageError
from optkit.machine import Machine
from optkit.profile import Profile, auto_profile, fits, list_profiles, load_profile, missing_for
from optkit.profile_files import built_in_folder

NAMES = ["a100", "colab-t4", "cpu", "h100", "h200", "rtx4090", "rtx5090", "t4", "t4x2"]

#: Written down apart from the profiles, from NVIDIA's data sheets and white papers: GB; bus width in bits x Gbit/s a pin; compute
#: capability; multiprocessors x FLOPs a clock x boost GHz for float32 and for dense 16-bit matrices with FP32 accumulate.
SHEETS = {
    "t4": (16, 256 * 10.0, (7, 5), 40 * 128 * 1.59, 40 * 1024 * 1.59),
    "rtx4090": (24, 384 * 21.0, (8, 9), 128 * 256 * 2.52, 128 * 512 * 2.52),
    "rtx5090": (32, 512 * 28.0, (12, 0), 170 * 256 * 2.407, 170 * 512 * 2.407),
    "a100": (80, 5120 * 3.186, (8, 0), 108 * 128 * 1.41, 108 * 2048 * 1.41),
    "h100": (80, 5120 * 5.234, (9, 0), 132 * 256 * 1.98, 132 * 4096 * 1.83),
    "h200": (141, 6144 * 6.25, (9, 0), 132 * 256 * 1.98, 132 * 4096 * 1.83),
}
#: Rates of the other dtypes as multiples of the 16-bit one: which there are, and what an architecture does a clock.
RATIOS = {
    "t4": {"int8": 2, "int4": 4},
    "rtx4090": {"bf16": 1, "tf32": 0.5, "fp8": 2, "int8": 4, "int4": 8},
    "rtx5090": {"bf16": 1, "tf32": 0.5, "fp8": 2, "int8": 4, "fp4": 8},
    "a100": {"bf16": 1, "tf32": 0.5, "int8": 2, "int4": 4},
    "h100": {"bf16": 1, "tf32": 0.5, "fp8": 2, "int8": 2},
    "h200": {"bf16": 1, "tf32": 0.5, "fp8": 2, "int8": 2},
}

CPU = Machine("cpu", "EPYC", 1, None, 2**34, 2**34, "EPYC", 2)
H200 = Machine("cuda", "NVIDIA H200", 1, (9, 0), 143_771 * 2**20, 2**40, "Xeon", 16, driver="580.65.06", cuda_driver_version="13.0")
T4 = replace(H200, name="Tesla T4", compute_capability=(7, 5), memory_bytes=15_360 * 2**20)


@pytest.fixture(autouse=True)
def no_folders_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("OPTKIT_PROFILES_DIR", raising=False)


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path) -> str:
    with pytest.raises(UsageError) as raised:
        load_profile(str(path))
    return str(raised.value)


# --- the built-in profiles


def test_every_built_in_profile_is_listed_and_loads() -> None:
    rows = list_profiles(machine=CPU)
    assert [row.name for row in rows] == NAMES
    assert [row.problem for row in rows] == [None] * len(NAMES)
    assert all(row.source == "built-in" and row.summary for row in rows)


@pytest.mark.parametrize("name", SHEETS)
def test_facts_agree_with_the_data_sheets(name: str) -> None:
    memory_gb, gigabits, capability, single, half = SHEETS[name]
    profile = load_profile(name)
    assert profile.memory_gb == memory_gb
    assert profile.compute_capability == capability
    assert profile.bandwidth_gb_s == pytest.approx(gigabits / 8, rel=0.01)
    expected = {"fp32": single, "fp16": half, **{dtype: ratio * half for dtype, ratio in RATIOS[name].items()}}
    rates = {dtype: rate * 1000 for dtype, rate in profile.peak_tflops.items() if dtype != "fp64"}
    assert rates == pytest.approx(expected, rel=0.01)


def test_the_two_profiles_of_hosted_notebooks_are_t4s() -> None:
    t4 = load_profile("t4")
    for name, count in (("t4x2", 2), ("colab-t4", 1)):
        profile = load_profile(name)
        assert (profile.count, profile.peak_tflops, profile.memory_gb) == (count, t4.peak_tflops, t4.memory_gb)


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_default_and_size_has_its_source_or_reason(name: str) -> None:
    profile = load_profile(name)
    assert [fact.name for fact in profile.facts() if not fact.source] == []
    assert [technique for technique, default in profile.defaults.items() if not default.because] == []
    assert {"max_memory_fraction", "cleanup_every"} <= set(profile.reasons)
    assert set(profile.tasks) == {"generate", "score", "train"}
    assert all(task.because for task in profile.tasks.values())
    assert profile.max_memory_fraction == 0.85


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cpu"])
def test_measured_rates_and_expected_speeds_stay_under_the_limits(name: str) -> None:
    profile = load_profile(name)
    assert (profile.measured_bandwidth_gb_s or 0) < (profile.bandwidth_gb_s or 0)
    assert all(rate < profile.peak_tflops[dtype] for dtype, rate in profile.measured_tflops.items())
    weights_gb = {"Llama-2-7B": 13.2, "Llama-3.1-8B": 15.0, "Llama-2-7B-chat": 13.2}
    bits = {"bf16": 16, "float16": 16, "int8 weights": 8}
    for row in profile.expected:
        if row.task == "generate":  # a step reads all weights once
            step_gb = weights_gb[row.model] * bits.get(row.dtype, 4) / 16
            assert row.tokens_per_second / row.batch_size < (profile.bandwidth_gb_s or 0) / step_gb


def test_a_t4_has_float16_and_neither_bf16_nor_fp8() -> None:
    profile = load_profile("t4")
    assert profile.defaults["precision"].options == {"dtype": "float16"}
    assert not {"bf16", "fp8", "tf32"} & set(profile.peak_tflops)


def test_defaults_keep_the_file_s_order() -> None:
    assert list(load_profile("cpu").defaults) == ["flash", "int8"]
    assert all(default.options == {} for default in load_profile("cpu").defaults.values())


@pytest.mark.parametrize("name", ["t4", "rtx4090", "rtx5090", "a100", "h100", "h200"])
def test_batch_sizes_fit_the_memory_that_may_be_planned_with(name: str) -> None:
    """Llama-3.1-8B: 15.01 GB in bf16, 4.98 GB in NF4, 131,072 bytes of KV a token, 128,256 words in 16-bit and float32 logits."""
    profile = load_profile(name)
    budget = profile.max_memory_fraction * (profile.memory_bytes or 0)
    weights = 4.98e9 if "nf4" in profile.defaults else 15.01e9
    generate, score = profile.tasks["generate"], profile.tasks["score"]
    assert weights + generate.batch_size * generate.sequence_length * 131_072 < budget
    assert weights + score.batch_size * score.sequence_length * 128_256 * 6 < budget


def test_loading_imports_neither_torch_nor_transformers_nor_numpy() -> None:
    code = (
        "import sys; from optkit.profile import list_profiles, load_profile; list_profiles(); load_profile('auto');"
        "print([name for name in ('torch', 'numpy', 'transformers', 'joblib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- which profile is this machine


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (CPU, "cpu"),
        (H200, "h200"),
        (replace(H200, count=8), "h200"),
        (replace(H200, name="NVIDIA H200 NVL"), "auto-nvidia-h200-nvl"),
        (replace(H200, name="NVIDIA GH200 144G HBM3e"), "auto-nvidia-gh200-144g-hbm3e"),
        (replace(H200, name="NVIDIA H200 MIG 1g.18gb", memory_bytes=16 * 2**30), "auto-nvidia-h200-mig-1g-18gb"),
        (replace(H200, name="NVIDIA H100 80GB HBM3", memory_bytes=81_559 * 2**20), "h100"),
        (replace(H200, name="NVIDIA H100 PCIe", memory_bytes=81_559 * 2**20), "auto-nvidia-h100-pcie"),
        (replace(H200, name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), memory_bytes=81_920 * 2**20), "a100"),
        (replace(H200, name="NVIDIA A100-SXM4-40GB", compute_capability=(8, 0), memory_bytes=40_960 * 2**20), "auto-nvidia-a100-sxm4-40gb"),
        (replace(H200, name="NVIDIA GeForce RTX 4090", compute_capability=(8, 9), memory_bytes=24_564 * 2**20), "rtx4090"),
        (replace(H200, name="NVIDIA GeForce RTX 5090", compute_capability=(12, 0), memory_bytes=32_607 * 2**20), "rtx5090"),
        (
            replace(H200, name="NVIDIA GeForce RTX 5090 Laptop GPU", compute_capability=(12, 0), memory_bytes=24_463 * 2**20),
            "auto-nvidia-geforce-rtx-5090-laptop-gpu",
        ),
        (T4, "t4"),
        (replace(T4, count=2), "t4x2"),
        (replace(T4, environment="colab"), "colab-t4"),
        (replace(T4, count=2, environment="kaggle"), "t4x2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_is_what_the_machine_is(machine: Machine, name: str) -> None:
    profile = load_profile("auto", machine=machine)
    assert profile.name == name
    assert fits(profile, machine)
    assert missing_for(profile, machine) is None
    assert load_profile(name, machine=machine) == profile


def test_a_made_profile_holds_what_the_driver_says_and_no_more() -> None:
    machine = replace(H200, name="NVIDIA L4", compute_capability=(8, 9), memory_bytes=23_034 * 2**20, count=4)
    profile = load_profile("auto", machine=machine)
    assert (profile.count, profile.memory_gb, profile.compute_capability) == (4, 22.5, (8, 9))
    assert profile.bandwidth_gb_s is None and profile.peak_tflops == {}
    assert profile.defaults["precision"].options == {"dtype": "bfloat16"}
    assert all(fact.source for fact in profile.facts())


def test_a_made_profile_asks_old_gpus_for_nothing_that_they_lack() -> None:
    pascal = replace(H200, name="Tesla P100-PCIE-16GB", compute_capability=(6, 0), memory_bytes=2**34)
    defaults = load_profile("auto", machine=pascal).defaults
    assert "compile" not in defaults  # Triton begins with Volta
    assert defaults["precision"].options == {"dtype": "float16"}
    unknown = load_profile("auto", machine=replace(pascal, compute_capability=None))
    assert list(unknown.defaults) == ["flash"]


def test_a_machine_that_a_profile_is_not_is_told_in_one_line() -> None:
    told = missing_for(load_profile("h200"), CPU) or ""
    assert "\n" not in told
    for part in ("'h200'", "H200 (sm_90, 141 GB)", "EPYC", "'cpu' fits", "optkit plan --profile h200"):
        assert part in told
    assert "2 GPUs, 1 can be seen" in (missing_for(load_profile("t4x2"), T4) or "")
    assert "Profile 't4' fits" in (missing_for(load_profile("t4x2"), T4) or "")


def test_an_unusable_gpu_is_the_reason_that_is_told() -> None:
    broken = replace(CPU, gpus_seen=1, gpu_problem="NVIDIA H200 is there and cannot be used")
    assert "cannot be used" in (missing_for(load_profile("h200"), broken) or "")


def test_every_machine_can_run_on_its_cpu() -> None:
    assert missing_for(load_profile("cpu"), H200) is None
    assert load_profile("cpu").as_machine(H200).device == "cpu"


def test_a_profile_describes_the_machine_that_one_does_not_have() -> None:
    machine = load_profile("t4x2").as_machine(CPU)
    assert (machine.device, machine.count, machine.compute_capability) == ("cuda", 2, (7, 5))
    assert machine.memory_bytes == 16 * 2**30 and machine.host_memory_bytes == 29 * 2**30
    assert fits(load_profile("t4x2"), machine)


# --- a user's own


def test_a_profile_extends_another(tmp_path: Path) -> None:
    write(
        tmp_path,
        "mine",
        """
        extends = "h200"
        summary = "ours"
        without = ["precision"]
        bandwidth_gb_s = 4500
        peak_tflops = { bf16 = 700 }
        [defaults.compile]
        options = { mode = "max-autotune" }
        [tasks.generate]
        batch_size = 128
        sequence_length = 4096
        """,
    )
    mine, base = load_profile("mine", [tmp_path]), load_profile("h200")
    assert (mine.name, mine.summary, mine.memory_gb) == ("mine", "ours", 141)
    assert list(mine.defaults) == ["flash", "compile"]
    assert mine.defaults["compile"].options == {"mode": "max-autotune"}
    assert mine.defaults["flash"] == base.defaults["flash"]
    assert mine.tasks["generate"].batch_size == 128 and mine.tasks["score"] == base.tasks["score"]
    assert mine.peak_tflops == {**base.peak_tflops, "bf16": 700}
    # A changed fact is not given the source of the old one.
    assert mine.source_of("bandwidth_gb_s") == mine.source_of("peak_tflops.bf16") == "stated in mine.toml"
    assert mine.source_of("peak_tflops.fp32") == base.source_of("peak_tflops")
    assert mine.source_of("memory_gb") == base.source_of("memory_gb")


def test_what_was_taken_out_stays_out_further_on(tmp_path: Path) -> None:
    write(tmp_path, "one", 'extends = "cpu"\nwithout = ["int8"]\n')
    write(tmp_path, "two", 'extends = "one"\n')
    assert list(load_profile("two", [tmp_path]).defaults) == ["flash"]
    write(tmp_path, "three", 'extends = "two"\nwithout = ["flash"]\n')
    assert list(load_profile("three", [tmp_path]).defaults) == []
    write(tmp_path, "four", 'extends = "two"\n[defaults.int8]\n')
    assert list(load_profile("four", [tmp_path]).defaults) == ["flash", "int8"]


def test_a_user_s_h200_may_extend_ours_and_comes_before_it(tmp_path: Path) -> None:
    write(tmp_path, "h200", 'extends = "h200"\nsummary = "ours"\n')
    assert load_profile("h200", [tmp_path]).summary == "ours"
    assert [row.name for row in list_profiles([tmp_path], CPU)].count("h200") == 1


def test_profiles_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "one", 'extends = "two"\n')
    two = write(tmp_path, "two", 'extends = "one"\n')
    with pytest.raises(UsageError, match="leads back to itself"):
        load_profile("one", [tmp_path])
    assert "does not exist" in message(write(tmp_path, "three", 'extends = "h20"\n'))
    assert "did you mean 'h200'" in message(tmp_path / "three.toml")
    assert "which does not exist" in message(two)  # `one` is only known where its folder is


@pytest.mark.parametrize("way", ["argument", "variable", "config", "path"])
def test_a_user_s_folder_is_found(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "config" / "optkit" / "profiles" if way == "config" else tmp_path / "mine"
    path = write(folder, "box", 'extends = "cpu"\nsummary = "my box"\n')
    if way == "variable":
        monkeypatch.setenv("OPTKIT_PROFILES_DIR", str(folder))
    profile = load_profile(str(path) if way == "path" else "box", [folder] if way == "argument" else [])
    assert (profile.summary, profile.origin) == ("my box", str(path))


def test_auto_takes_a_user_s_profile_only_where_it_states_matches(tmp_path: Path) -> None:
    write(tmp_path, "quiet", 'extends = "h200"\n')
    assert auto_profile(H200, [tmp_path]).name == "h200"
    write(tmp_path, "ours", 'extends = "h200"\n[matches]\nnames = ["H200"]\n')
    assert auto_profile(H200, [tmp_path]).name == "ours"
    assert auto_profile(CPU, [tmp_path]).name == "cpu"
    write(tmp_path, "one-t4", 'extends = "t4"\n[matches]\nnames = ["T4"]\n')
    assert auto_profile(replace(T4, count=2), [tmp_path]).name == "one-t4"  # the user's own goes before ours for two


def test_a_broken_file_never_breaks_the_listing(tmp_path: Path) -> None:
    write(tmp_path, "broken", "this is [ no toml")
    write(tmp_path, "wrong", 'extends = "cpu"\ncount = "two"\n[matches]\n')
    write(tmp_path, "fine", 'extends = "cpu"\n')
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    rows = {row.name: row for row in list_profiles([tmp_path], CPU)}
    assert set(NAMES) <= set(rows)
    assert {name for name, row in rows.items() if row.problem} == {"broken", "wrong", "folder", "binary"}
    assert rows["fine"].fits and not rows["wrong"].fits


def test_auto_does_not_pass_over_a_broken_file_that_might_be_the_one(tmp_path: Path) -> None:
    write(tmp_path, "other", "this is [ no toml")
    assert auto_profile(CPU, [tmp_path]).name == "cpu"
    write(tmp_path, "ours", 'extends = "h200"\ncount = "two"\n[matches]\nnames = ["H200"]\n')
    with pytest.raises(UsageError, match="count: must be a valid integer, not 'two'"):
        auto_profile(H200, [tmp_path])


# --- wrong files


def test_all_mistakes_are_told_at_once_with_their_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "wrong",
        """
        summary = "x"
        device = "gpu"
        memry_gb = 32
        count = true
        bandwidth_gb_s = "fast"
        max_memory_fraction = 1.5
        compute_capability = [9]
        without = ["flsh"]
        [matches]
        name = ["H200"]
        [peak_tflops]
        bf61 = 1
        fp16 = -3
        [sources]
        bandwith_gb_s = "a sheet"
        [tasks.generat]
        batch_size = 1
        sequence_length = 1
        [tasks.score]
        batch_size = 0
        [defaults.flash]
        becuase = "x"
        [defaults."Not A Name"]
        [[expected]]
        task = "generate"
        """,
    )
    told = message(path)
    assert str(path) in told
    for line in (
        "device: must be 'cuda' or 'cpu', not 'gpu'",
        "memry_gb: unknown key; did you mean 'memory_gb'?",
        "count: must be a valid integer, not true",
        "bandwidth_gb_s: must be a valid number, not 'fast'",
        "max_memory_fraction: must be less than or equal to 0.98, not 1.5",
        "compute_capability.1: is missing",
        "without: 'flsh' is not among the defaults; did you mean 'flash'?",
        "matches.name: unknown key; did you mean 'names'?",
        "peak_tflops.bf61: unknown key; did you mean 'bf16'?",
        "peak_tflops.fp16: must be greater than 0, not -3",
        "sources.bandwith_gb_s: there is no such fact; did you mean 'bandwidth_gb_s'?",
        "tasks.generat: unknown key; did you mean 'generate'?",
        "tasks.score.batch_size: must be greater than or equal to 1, not 0",
        "tasks.score.sequence_length: is missing",
        "defaults.flash.becuase: unknown key; did you mean 'because'?",
        "defaults.'Not A Name': is no technique's name",
        "expected.0.model: is missing",
    ):
        assert line in told, told


def test_a_gpu_profile_needs_what_decides_whether_it_fits(tmp_path: Path) -> None:
    told = message(write(tmp_path, "bare", 'summary = "x"\ndevice = "cuda"\n'))
    assert "memory_gb: is missing" in told and "compute_capability: is missing" in told


CPU_PROFILE = 'summary = "x"\ndevice = "cpu"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPU_PROFILE + "memory_gb = nan\n", "memory_gb: must be a finite number"),
        (CPU_PROFILE + "memory_gb = inf\n", "memory_gb: must be"),
        (CPU_PROFILE + "[defaults.a.options]\nx = nan\n", "defaults.a.options: holds nan, which is no finite number"),
        (CPU_PROFILE + "[defaults.a.options]\nx = [[-inf]]\n", "no finite number"),
        (CPU_PROFILE + "[defaults.a.options]\nx = 1979-05-27\n", "holds a date"),
        (CPU_PROFILE + f"[defaults.a.options]\nx = {'9' * 4000}\n", "beyond 64 bits"),
        (CPU_PROFILE + f"count = {'9' * 5000}\n", "is no valid TOML: Exceeds the limit"),
        (CPU_PROFILE + f"count = 0x{'f' * 9000}\n", "count: must be"),
        (CPU_PROFILE + f"memory_gb = {'9' * 4000}\n", "memory_gb: must be"),
        (CPU_PROFILE + f"x = {'[' * 5000}{']' * 5000}\n", "is nested too deeply"),
        (CPU_PROFILE + "defaults.a.options" + ".a" * 3000 + " = 1\n", "is nested deeper than 8 levels"),
        (CPU_PROFILE + "a" + ".a" * 3000 + " = 1\n", "a: unknown key"),
        (CPU_PROFILE + 'device = "cpu"\n', "is no valid TOML: Cannot overwrite a value"),
        ('summary = "\\u202Eevil"\ndevice = "cpu"\n', "summary: holds control or invisible characters"),
        ('summary = "\\u001b[31mred"\ndevice = "cpu"\n', "summary: holds control or invisible characters"),
        (CPU_PROFILE + '"\\u202Ekey" = 1\n', "'\\u202ekey': unknown key"),
        (CPU_PROFILE + 'name = "other"\n', "name: is 'other', but the file is odd.toml"),
        (CPU_PROFILE + 'origin = "built-in"\n', "origin: unknown key"),
        (CPU_PROFILE + "extends = 3\n", "extends: must be a valid string, not 3"),
        (CPU_PROFILE + "sources = 3\n", "sources: must be"),
        (CPU_PROFILE + "defaults = []\nwithout = 3\n", "without: must be a list"),
    ],
    ids=range(21),
)
def test_what_toml_allows_and_a_profile_does_not(tmp_path: Path, text: str, expected: str) -> None:
    told = message(write(tmp_path, "odd", text))
    assert expected in told
    assert len(told) < 1200
    assert all(line.isprintable() for line in told.split("\n"))


def test_many_mistakes_are_cut_short(tmp_path: Path) -> None:
    told = message(write(tmp_path, "odd", CPU_PROFILE + "".join(f"x{index} = 1\n" for index in range(3000))))
    assert "has 3000 mistakes" in told and "and 2975 more" in told and len(told.splitlines()) == 27


@pytest.mark.parametrize(
    "name",
    ["h20", "../h200", "../../etc/passwd", "a\0b", "a\0.toml", "x" * 300, "x" * 300 + ".toml", "\u202eh200", "", ".", "H200", "/dev/zero"],
)
def test_names_that_are_no_profile_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_profile(name)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 900


def test_a_mistyped_name_is_guessed() -> None:
    with pytest.raises(UsageError, match="unknown profile 'rtx509'; did you mean 'rtx5090'"):
        load_profile("rtx509")


def test_another_machine_s_made_profile_is_refused() -> None:
    with pytest.raises(UsageError, match="made from another machine; this one is 'cpu'"):
        load_profile("auto-nvidia-l4", machine=CPU)


def test_a_folder_that_is_not_there_is_told_by_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--profiles-dir: .* is not a folder"):
        load_profile("cpu", [tmp_path / "none"])
    monkeypatch.setenv("OPTKIT_PROFILES_DIR", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="OPTKIT_PROFILES_DIR: .* is not a folder"):
        load_profile("cpu")


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    with path.open("wb") as file:
        file.truncate(2**31)
    assert "more than the 1048576" in message(path)


# --- anything at all

_KEYS = st.sampled_from([*Profile.model_fields, "without", "flash", "options", "because", "bf16", "batch_size", "names", "'ü'", "x"])
_SCALARS = st.one_of(
    st.integers().map(str),
    st.floats().map(lambda number: repr(number)),
    st.text(max_size=8).map(lambda text: '"' + text.replace("\\", "").replace('"', "") + '"'),
    st.sampled_from(["true", '"cpu"', '"cuda"', '"h200"', '"odd"', "[9, 0]", "{}", "[{}]", "1979-05-27", "0xfff", '"auto"']),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
        st.lists(st.tuples(_KEYS, inner), max_size=3).map(lambda items: "{" + ", ".join(f"{key} = {value}" for key, value in items) + "}"),
    ),
    max_leaves=6,
)
_LINES = st.one_of(
    st.tuples(st.lists(_KEYS, min_size=1, max_size=3), _VALUES).map(lambda pair: ".".join(pair[0]) + " = " + pair[1]),
    st.lists(_KEYS, min_size=1, max_size=3).map(lambda keys: "[" + ".".join(keys) + "]"),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.lists(_LINES, max_size=8).map("\n".join), st.text(max_size=200)))
def test_no_file_gives_anything_but_a_profile_or_a_usage_error(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "odd", "")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        profile = load_profile(str(path))
    except UsageError as error:
        assert str(error)
    else:
        assert Profile(**profile.model_dump()) == profile
        tomllib.loads(text)


def test_the_built_in_folder_holds_the_profiles_and_no_more() -> None:
    assert sorted(path.stem for path in built_in_folder().glob("*.toml")) == NAMES
