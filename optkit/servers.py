"""Which server forks a round's processes: one whose threads spin while they wait for each other, or one whose threads sleep.

Spinning is what a user gets, and for small work on a quiet machine it is twice as fast; where other processes want the cores it is ten
times slower, and its timings say nothing. libgomp decides when it is loaded, so it takes two servers. All processes of a round come from
one of them: ratios are always taken between equals.
"""

from __future__ import annotations

from pathlib import Path

from optkit.machine import QUIET_CORES, busy_cores
from optkit.trial import TrialServer


class Servers:
    """At most two servers, each started when a round first needs it. A context manager."""

    def __init__(self, imports: list[str], env: dict[str, str], log_folder: Path, *, cpu: bool):
        self._imports, self._env, self._log_folder, self._cpu = imports, env, log_folder, cpu
        self._started: dict[bool, TrialServer] = {}
        #: cores that others kept busy before each round
        self.busy: list[float] = []

    def pick(self) -> TrialServer:
        """The server for the round that begins now, by what others do with the cores at this moment."""
        crowded = False
        if self._cpu:
            self.busy.append(busy_cores())
            crowded = self.busy[-1] > QUIET_CORES
        if crowded not in self._started:
            env = self._env | ({"OMP_WAIT_POLICY": "passive"} if crowded else {})
            self._started[crowded] = TrialServer(self._imports, env, log_folder=self._log_folder)
        return self._started[crowded]

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._started.values():
            server.close()
