"""Models and samples that users name, and what wrong ones get: one line, never a traceback."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.errors import UsageError
from optkit.samples import Sample, gather, sample_from, sample_set
from optkit.sources import bundled_folder, folder_digest, model_source


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_sources_by_kind(model_folder, monkeypatch):
    assert model_source(None).location == str(bundled_folder())
    assert model_source(str(model_folder)).kind == "folder"
    assert model_source(f"random:{model_folder / 'config.json'}").name == "random:model"
    monkeypatch.chdir(model_folder)
    assert model_source("random:config.json").name == "random:model"
    assert model_source("some/model").kind == "hub"
    assert model_source(str(model_folder), shrink=True).shrink


@pytest.mark.parametrize("text", ["./nowhere", "/nowhere/at/all", "random:nowhere.json", "a b c", "x/y/z"])
def test_a_source_that_is_not_there_is_one_line(text):
    with pytest.raises(UsageError) as caught:
        model_source(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": 3}', "[" * 100_000])
def test_a_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError):
        model_source(str(tmp_path))


def test_the_fingerprint_follows_contents_not_names_of_folders(model_folder, tmp_path):
    before = folder_digest(model_folder)
    assert folder_digest(model_folder) == before
    (model_folder / "model.safetensors").write_bytes(b"weightz")
    assert folder_digest(model_folder) != before
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert folder_digest(copy) == folder_digest(model_folder)


def test_jsonl_samples_of_every_kind(tmp_path):
    path = tmp_path / "s.jsonl"
    rows = [
        {"id": "a", "prompt": "p", "answer": "x"},
        {"prompt": "q", "answer": {"k": [1, "é"]}},
        {"text": "t"},
        {"messages": [{"role": "user", "content": "hi"}], "answer": "yes"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    samples = sample_set(str(path), model_source(None)).samples
    assert [sample.answer for sample in samples] == ["x", '{"k":[1,"é"]}', None, "yes"]
    assert samples[1].id == "s.jsonl:2"
    assert len({sample.digest for sample in samples}) == 4


@pytest.mark.parametrize(
    "line", ["{", "3", "null", '{"prompt": 3}', '{"prompt": "a", "text": "b"}', '{"messages": []}', '{"messages": [3]}', "[" * 50_000, "{}"]
)
def test_a_wrong_line_names_file_and_number(tmp_path, line):
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(UsageError, match="s.jsonl:2"):
        sample_set(str(path), model_source(None))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_line_is_anything_but_a_sample_or_one_line_of_error(text):
    try:
        assert isinstance(sample_from(text, "x:1"), Sample)
    except UsageError as error:
        assert "\n" not in str(error)


def test_plain_text_is_cut_at_paragraphs(tmp_path):
    path = tmp_path / "t.txt"
    paragraphs = [f"paragraph {number} " + "word " * 100 for number in range(20)]
    path.write_text("\n\n".join(paragraphs))
    samples = sample_set(str(path), model_source(None)).samples
    assert "\n\n".join(sample.text for sample in samples) == "\n\n".join(part.strip() for part in paragraphs)
    assert all(len(sample.text) <= 2000 for sample in samples)


def test_one_long_paragraph_stays_whole():
    assert gather(["x" * 5000]) == ["x" * 5000]


def test_random_samples_and_wrong_shapes():
    samples = sample_set("random:3x7", model_source(None)).samples
    assert [sample.extra for sample in samples] == [{"random_tokens": 7}] * 3
    assert len({sample.digest for sample in samples}) == 3
    for shape in ("random:", "random:0x4", "random:4", "random:axb"):
        with pytest.raises(UsageError, match="COUNTxTOKENS"):
            sample_set(shape, model_source(None))


def test_binary_and_missing_files(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    for text in (tmp_path / "b.txt", tmp_path / "none.jsonl"):
        with pytest.raises(UsageError):
            sample_set(str(text), model_source(None))
