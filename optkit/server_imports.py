"""What the trial server imports, without starting CUDA, which does not survive a fork.

Some libraries ask which GPU there is when they are imported (a 4-bit one, and one that transformers imports with its models), and torch
starts CUDA to answer. A trial that is forked after that has to become a fresh Python and import everything itself, more than 10 s for
each on a GPU machine. So the driver's library answers, as far as it knows.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from optkit.machine import Machine, detect


def import_all(imports: Sequence[str]) -> dict[str, str]:
    """Import modules. One that fails is told to the parent; the trial that needs it meets the same error itself.

    :return: what failed, and why.
    """
    failed = _import_each(module for module in imports if module == "torch")
    rest = [module for module in imports if module != "torch"]
    if "torch" not in sys.modules or (machine := detect()).device != "cuda":
        return failed | _import_each(rest)
    with answered(machine):
        return failed | _import_each(rest)


def _import_each(imports: Iterable[str]) -> dict[str, str]:
    failed = {}
    for module in imports:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            failed[module] = f"{type(error).__name__}: {error}"
    return failed


class KnownProperties:
    """A device's properties as far as the driver's library knows them; what else is asked for, torch answers, by starting CUDA."""

    def __init__(self, ask: Any, index: int, machine: Machine):
        assert machine.compute_capability is not None
        self.name = machine.name
        self.major, self.minor = machine.compute_capability
        self._ask, self._index = ask, index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for their hooks before the object has its own attributes
            raise AttributeError(name)
        return getattr(self._ask(self._index), name)


@contextmanager
def answered(machine: Machine) -> Iterator[None]:
    """While modules are imported, ``torch.cuda.get_device_properties`` and all that asks it do not start CUDA.

    Answers and functions that an import keeps for later stay right: outside, the functions are torch's again. Nothing is answered where
    GPUs of several models are there, since the driver's library numbers them in another order than CUDA.
    """
    import torch

    if machine.compute_capability is None or torch.cuda.device_count() != machine.count:
        yield
        return
    from torch.cuda._utils import _get_device_index

    current, properties, importing = torch.cuda.current_device, torch.cuda.get_device_properties, True

    def current_device() -> int:
        return 0 if importing else current()

    def get_device_properties(device: Any = None) -> Any:
        if not importing:
            return properties(device)
        index = 0 if device is None else _get_device_index(device, optional=True)
        return KnownProperties(properties, index, machine) if 0 <= index < machine.count else properties(device)

    torch.cuda.current_device, torch.cuda.get_device_properties = current_device, get_device_properties
    try:
        yield
    finally:
        importing = False
        torch.cuda.current_device, torch.cuda.get_device_properties = current, properties
