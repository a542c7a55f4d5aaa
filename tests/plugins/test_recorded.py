"""Recordings: one plain run, one recording, replays; and plain runs with the reason where a function cannot be recorded."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")

from optkit_plugins.kernels.decode.recorded import Recorded, without_recording  # noqa: E402


class Graphs:
    """Stands for CUDA graphs: what is called while one is recorded runs at each replay instead."""

    def __init__(self, monkeypatch, problem: Exception | None = None):
        self.problem, self.recording, self.done = problem, None, []
        graphs = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[str] = []

            def replay(self) -> None:
                graphs.done += [f"replay {call}" for call in self.calls]

        @contextmanager
        def record(graph, pool=None):
            graphs.recording = graph
            try:
                yield
            finally:
                graphs.recording = None

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)

    def work(self) -> None:
        if self.recording is None:
            self.done.append("plain")
            return
        if self.problem:
            raise self.problem
        self.recording.calls.append("work")


def test_every_call_does_the_work_once(monkeypatch):
    graphs = Graphs(monkeypatch)
    recorded = Recorded(graphs.work, pool=None)
    for _ in range(4):
        recorded()
    assert graphs.done == ["plain", "replay work", "replay work", "replay work"]
    assert recorded.problem == ""


def test_what_waits_for_the_device_runs_plainly_and_says_why(monkeypatch):
    graphs = Graphs(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nmore"))
    recorded = Recorded(graphs.work, pool=None)
    for _ in range(3):
        recorded()
    assert graphs.done == ["plain", "plain", "plain"]
    assert recorded.problem == "operation not permitted when stream is capturing"


def test_missing_memory_is_not_taken_for_a_function_that_cannot_be_recorded(monkeypatch):
    graphs = Graphs(monkeypatch, torch.OutOfMemoryError("no memory"))
    recorded = Recorded(graphs.work, pool=None)
    recorded()
    with pytest.raises(torch.OutOfMemoryError):
        recorded()


def test_arguments_without_their_recording():
    rest = {"backend": "inductor", "fullgraph": True}
    plain = {**rest, "options": {"triton.cudagraphs": False}}
    assert without_recording({**rest, "mode": "reduce-overhead"}) == (plain, True)
    assert without_recording({**rest, "options": {"triton.cudagraphs": True}}) == (plain, True)
    tuned, records = without_recording({**rest, "mode": "max-autotune"})
    assert records
    assert tuned["options"]["max_autotune"]
    assert not tuned["options"]["triton.cudagraphs"]
    for untouched in ({**rest, "mode": None}, {**rest, "mode": "max-autotune-no-cudagraphs"}, {"backend": "cudagraphs"}):
        assert without_recording(untouched) == (untouched, False)
