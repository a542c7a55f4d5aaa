"""Functions without inputs and outputs as CUDA graphs of our own: what the host does for one is a single launch.

``torch.compile`` records graphs too (mode ``reduce-overhead``), for functions of any kind: it checks guards, finds the recording and
copies inputs before each launch. A decode step has no inputs, so all of that can go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Recorded:
    """Runs ``function`` plainly the first time, records it the second time, and from then on replays the recording.

    The function reads and writes tensors that never move, returns nothing, and asks nothing of the device. Where it cannot be recorded
    it is run plainly, and :ivar problem: says why.

    :param pool: of ``torch.cuda.graph_pool_handle``; recordings that never run at the same time may share one.
    """

    def __init__(self, function: Callable[[], None], pool: Any):
        self.function, self.pool = function, pool
        self.called, self.problem = False, ""
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif not self.called or self.problem:
            self.function()
            self.called = True
        else:
            self._record()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.function()
        except RuntimeError as error:  # something in it waits for the device, say
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.problem = str(error).splitlines()[0]
            self.function()
            return
        self.graph = graph
        graph.replay()


def without_recording(arguments: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Arguments of ``torch.compile`` without its CUDA graphs, and whether they asked for them."""
    from torch._inductor import list_mode_options

    if arguments.get("backend") != "inductor":
        return arguments, False
    options = arguments["options"] if "options" in arguments else list_mode_options(arguments["mode"]) if arguments.get("mode") else {}
    if not options.get("triton.cudagraphs"):
        return arguments, False
    rest = {name: value for name, value in arguments.items() if name not in ("mode", "options")}
    return {**rest, "options": {**options, "triton.cudagraphs": False}}, True
