"""Processes that hold the same model on other devices and do the same work: one a device, each with an interpreter of its own.

Processes, because a decode step of a transformers model is bound by Python, and threads would share one interpreter's lock. They are
spawned (CUDA does not survive a fork), get the model as it is after every transformation (a GPU's memory is passed by handle and copied
from GPU to GPU), and build their engine as this process builds its own. They stay in this process's group, and end when it does.
"""

from __future__ import annotations

import dataclasses
import gc
import pickle
from collections.abc import Callable
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn

from optkit import Engine, OptkitError, TransformersEngine, UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit import TrialContext

#: Seconds that a worker has to end by itself.
PATIENCE = 10.0


class Worker:
    """One process on one device. Ask, do your own work, then fetch the answer."""

    def __init__(self, model: PreTrainedModel, device: str, *, seed: int, prepare: Callable[[Any], Any] | None = None):
        """:param prepare: called in the process with the model, before it is placed; importable by its name."""
        context = torch.multiprocessing.get_context("spawn")
        self.device, self.asked = device, False
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, model, device, seed, torch.get_num_threads(), prepare), name=f"optkit {device}", daemon=True
        )
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UnavailableError(
                f"the model cannot be sent to the process of {device} ({error}): a technique of this plan changed it in a way that has "
                "no pickled form; leave out that technique, or parallel"
            ) from error
        finally:
            theirs.close()

    def ask(self, call: str, *arguments: Any) -> None:
        """Start ``call``: ``build`` (trial), ``random`` (state), or a method of the engine with its arguments."""
        try:
            self.connection.send((call, arguments))
        except OSError as error:
            raise self.lost() from error
        self.asked = True

    def answer(self) -> Any:
        """What the call that was asked for gave. :raises OptkitError: where it failed, or the process is gone."""
        self.asked = False
        try:
            state, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self.lost() from error
        if state == "error":
            raise OptkitError(f"the worker on {self.device} failed: {value}")
        return value

    def lost(self) -> OptkitError:
        self.process.join(PATIENCE)
        return OptkitError(f"the worker on {self.device} is gone (exit code {self.process.exitcode}); see the log, or leave out parallel")

    def dismiss(self) -> None:
        """No more calls: the process ends by itself once it has read that."""
        self.connection.close()

    def close(self) -> None:
        """End the process: by itself, or after a while by force."""
        self.dismiss()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def settle(workers: list[Worker]) -> list[Any]:
    """The answers of all workers that were asked; every one is fetched, even where one failed, so that none is left for the next call."""
    answers, failure = [], None
    for worker in workers:
        if worker.asked:
            try:
                answers.append(worker.answer())
            except OptkitError as error:
                failure = failure or error
    if failure:
        raise failure
    return answers


def portable(trial: TrialContext) -> TrialContext:
    """The context without what belongs to this process."""
    return dataclasses.replace(trial, engine=None, notes={}, changes={}, kernels={}, calibration=[], report=silent)


def silent(text: str) -> None:
    """Progress is reported by the first process alone."""


# ---------------------------------------------------------------- in the worker's process


def serve(
    connection: Connection, model: PreTrainedModel, device: str, seed: int, threads: int, prepare: Callable[[Any], Any] | None
) -> None:
    """Place the model, then answer one call after another until there are no more."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(seed)
    engine: Any = None
    try:
        model = prepare(model) if prepare else model
        nn.Module.to(model, torch.device(device))  # transformers' own refuses quantized models, whose tensors move well
        failure = None
    except Exception as error:
        failure = describe(error)
    while True:
        try:
            call, arguments = connection.recv()
        except EOFError:
            break
        try:
            if failure:
                raise OptkitError(failure)
            answer = None
            if call == "build":
                engine = build(model, *arguments)
            elif call == "random":
                set_random_state(model.device, *arguments)
            else:
                answer = plain(getattr(engine, call)(*arguments[:-1], **arguments[-1]))
            connection.send(("ok", answer))
        except Exception as error:
            connection.send(("error", describe(error)))
    if engine is not None:
        engine.close()
    leave()


def random_state(device: torch.device) -> bytes:
    """The state of the generator that draws tokens on this device."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.numpy().tobytes()


def set_random_state(device: torch.device, state: bytes) -> None:
    tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensor, device)
    else:
        torch.set_rng_state(tensor)


def joined_already() -> bool:
    """Whether this process is in torch's process group."""
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """Leave torch's process group, where there is one; all its processes do so at the same time, each with its engine closed: recorded
    graphs hold on to the group, which would wait for them."""
    if joined_already():
        gc.collect()
        dist.destroy_process_group()


def build(model: PreTrainedModel, trial: TrialContext) -> Engine:
    """The engine that the owner of the role ``engine`` builds; transformers' where the plan has none."""
    points = entry_points(group="optkit.techniques", name=trial.technique)
    if not points:
        return TransformersEngine(model, trial)
    (point,) = points
    return point.load().build_engine(model=model, trial=trial)


def plain(answer: Any) -> Any:
    """Without tensors of a device: rows of scores as numpy arrays; distributions are the first process's business."""
    if isinstance(answer, list):
        return [row.cpu().numpy() if isinstance(row, torch.Tensor) else row for row in answer]
    for _ in answer:  # a generator: do the work
        pass
    return None


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
