"""What torch.compile did: graphs, breaks, and the recompiles that should not have been."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch._dynamo.utils import counters


@dataclass
class Tally:
    """What was compiled. A recompile is a graph that an already warm call needed again."""

    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0
    buckets: list[str] = field(default_factory=list)

    def count(self, call: Callable[[], Any], name: str, *, first: bool) -> Any:
        """Run ``call`` and note the graphs that it compiled. ``first``: they are expected, under ``name``."""
        if first:
            self.buckets.append(name)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        try:
            with warnings.catch_warnings():
                # torch's own compiler imports modules that still use torch.jit; nothing that a user could change
                warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
                return call()
        finally:
            new = counters["stats"]["unique_graphs"] - graphs
            self.graphs += new
            self.graph_breaks += sum(counters["graph_break"].values()) - breaks
            self.recompiles += 0 if first else new
