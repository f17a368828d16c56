"""`Encoder`, which encodes images and texts of one release; `GraphEncoder`, which runs its exported
graphs; and the timed steps of a request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import ENCODER_FAILED, Alpha, TaskError, redact
from radapter_serve.encoders.runtimes import load_graph
from radapter_serve.release.repository import RUNTIMES, TENSORRT

ENCODER = "_encoder"  # suffix of the names of steps that call an encoder


class Encoder(Protocol):
    """Encodes images and texts of one release; `alpha` is None if it is folded into the weights."""

    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] -> float32 [B, D] of unit length."""

    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] -> float32 [B, g, g, D]; only if the release has `dense`."""

    def tokens(self, tokens: NDArray[np.int32], alpha: Alpha | None = None) -> NDArray[np.float32]:
        """int32 [B, L] -> float32 [B, D] of unit length."""

    def close(self) -> None:
        """Close open resources."""


class GraphEncoder:
    """The graphs of a release in this process: image_encoder, text_encoder, patch_encoder."""

    def __init__(self, graphs: Mapping[str, EncoderGraph]) -> None:
        self.graphs = graphs

    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._encode("image_encoder", pixels, alpha)

    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._encode("patch_encoder", pixels, alpha)

    def tokens(self, tokens: NDArray[np.int32], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._encode("text_encoder", tokens, alpha)

    def close(self) -> None:
        """Do nothing: the graphs are freed with their last reference."""

    def _encode(self, name: str, rows: NDArray[Any], alpha: Alpha | None) -> NDArray[np.float32]:
        graph = self.graphs[name]
        try:
            with step(name):
                return graph(rows) if alpha is None else graph(rows, alpha)
        except Exception as error:  # runtimes' errors have no common base
            raise TaskError(ENCODER_FAILED, f"{name} failed: {redact(str(error))}") from error


class EncoderGraph:
    """A graph of an encoder in one of `RUNTIMES`, on GPU `device` or, for None, on the CPU;
    `parameters` are those of the encoder's config.pbtxt.
    """

    def __init__(
        self,
        path: Path,
        runtime: str = "onnxruntime",
        *,
        precision: str = "fp32",
        threads: int | None = None,
        device: int | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        options = dict(parameters or {})
        if precision == "bf16":  # for OpenVINO, if the CPU has it; others have it in the graph
            options["HINT_BF16"] = "YES"
        name = RUNTIMES[runtime].threads
        if name is not None and threads is not None:
            options[name] = str(threads)
        if runtime == TENSORRT:
            from radapter_serve.encoders.plans import check_plan

            check_plan(path.parent)
            device = 0
        self._graph = load_graph(path, runtime, options, device=device)

    def __call__(self, *values: NDArray[np.generic]) -> NDArray[np.float32]:
        """Encode a batch, an array for each input, to float32 [B, D] or [B, g, g, D]."""
        feed = dict(zip(self._graph.inputs, values, strict=True))
        [embeds] = self._graph.run(feed, self._graph.outputs[:1])
        return np.asarray(embeds, dtype=np.float32)


@dataclass(frozen=True)
class Step:
    """A part of the work on a request, with the steps inside it."""

    name: str  # "engine", a task or an encoder
    start: int  # in nanoseconds since 1970
    end: int
    parts: tuple[Step, ...] = ()


_taken: ContextVar[list[Step] | None] = ContextVar("steps", default=None)


@contextlib.contextmanager
def collected(into: list[Step] | None = None) -> Iterator[list[Step]]:
    """Collect this thread's steps in the block, as they end, in `into` or a new list."""
    steps = [] if into is None else into
    token = _taken.set(steps)
    try:
        yield steps
    finally:
        _taken.reset(token)


def add_steps(steps: Iterable[Step]) -> None:
    """Add steps of another thread to those of this thread, if these are collected."""
    taken = _taken.get()
    if taken is not None:
        taken.extend(steps)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Record the block as a step of this thread, even if it fails."""
    start = time.time_ns()
    began = time.monotonic_ns()  # the wall clock may be set meanwhile
    try:
        with collected() as parts:
            yield
    finally:
        end = start + time.monotonic_ns() - began
        add_steps([Step(name, start, end, tuple(parts))])


def encoder_ms(steps: Iterable[Step]) -> float:
    """Milliseconds of these steps in which encoders ran."""
    total_ms = 0.0
    for taken in steps:
        if taken.name.endswith(ENCODER):
            total_ms += (taken.end - taken.start) / 1e6
        else:
            total_ms += encoder_ms(taken.parts)
    return total_ms
