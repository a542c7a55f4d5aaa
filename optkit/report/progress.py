"""Progress on stderr: a live line where it is a terminal, a line a step where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from optkit.report.terminal import console
from optkit.report.text import markup_safe


class Watch(Protocol):
    def progress(self, done: int, total: int, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Quiet:
    """Warnings only."""

    def progress(self, done: int, total: int, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        console(stderr=True).print(f"warning: {markup_safe(text)}", style="yellow")


class Lines(Quiet):
    """One line a step, where stderr is a file or a pipe."""

    last = ""

    def progress(self, done: int, total: int, text: str) -> None:
        if text != self.last and not text.startswith(("turn", "generated")):
            console(stderr=True).print(f"{done:3d}/{total} {markup_safe(text)}")
        self.last = text


class Live(Quiet):
    """A bar with the time that is left. It appears with the first step, so that an answer from the memo shows none."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None

    def progress(self, done: int, total: int, text: str) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self.bar is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=total)
        self.bar.update(self.task, completed=done, total=total, description=markup_safe(text, 60))

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def shown(*, quiet: bool) -> Iterator[Watch]:
    if quiet:
        yield Quiet()
    elif not console(stderr=True).is_terminal:
        yield Lines()
    else:
        live = Live()
        try:
            yield live
        finally:
            live.stop()
