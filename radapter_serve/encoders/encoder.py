"""`Encoder`, which encodes images and texts of one release: `GraphEncoder` calls its exported
graphs, `ServerEncoder` asks a live server; and the timed spans of a request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radapter_client import Client, RAdapterClientError
from radapter_serve.contract.embeddings import DEFAULT_POINT, Point
from radapter_serve.contract.errors import ENCODER_FAILED, Alpha, Encode, TaskError, redact
from radapter_serve.encoders.runtimes import load_graph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import RUNTIMES, TENSORRT

ENCODER = "_encoder"  # suffix of the names of spans that call an encoder


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
    """The graphs of a release by their names: image_encoder, text_encoder, patch_encoder; in this
    process, or functions that ask Triton for them.
    """

    def __init__(self, graphs: Mapping[str, Encode]) -> None:
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
            with span(name):
                return graph(rows) if alpha is None else graph(rows, alpha)
        except TaskError:
            raise
        except Exception as error:  # runtimes' errors have no common base
            raise TaskError(ENCODER_FAILED, f"{name} failed: {redact(str(error))}") from error


class ServerEncoder:
    """Encoders and tokenizer of a live server's release, to which the client is pinned; texts are
    those of an adapter, if `point` names one.
    """

    def __init__(self, client: Client, url: str, point: Point = DEFAULT_POINT) -> None:
        self.client = client
        self._url = url
        self._point = point

    def at(self, point: Point) -> ServerEncoder:
        """The encoders with the texts of an adapter."""
        return ServerEncoder(self.client, self._url, point)

    def point_of(self, alpha: Alpha | float | None) -> dict[str, Any]:
        """Arguments of a call: the adapter with its α, or else the α of the encoders."""
        if self._point.adapter:
            return {"adapter": self._point.adapter, "alpha": self._point.alpha}
        # All rows have the same α.
        return {"alpha": None if alpha is None else float(np.ravel(alpha)[0])}

    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._embed(self.client.embed_images, pixels, alpha)

    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        raise TaskError(ENCODER_FAILED, f"{self._url} gives no dense embeddings")

    def tokens(self, tokens: NDArray[Any], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._embed(self.client.embed_texts, tokens, alpha)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Wrap texts as rows, without tokens: the server has the tokenizer."""
        return [[text] for text in texts]

    def batch(self, rows: Sequence[Any]) -> NDArray[Any]:
        """The texts of rows."""
        return np.array([text for (text,) in rows], object)

    def ask(self, task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of the client; its errors become a `TaskError`."""
        try:
            return task(*arguments, **options)
        except RAdapterClientError as error:
            raise TaskError(error.code or ENCODER_FAILED, f"{self._url}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def _embed(
        self, task: Callable[..., Any], rows: NDArray[Any], alpha: Alpha | None
    ) -> NDArray[np.float32]:
        embeds = self.ask(task, list(rows), **self.point_of(alpha))
        return np.asarray(embeds, np.float32)


class EncoderGraph:
    """A graph of an encoder in one of `RUNTIMES`, on GPU `device` or, for None, on the CPU."""

    def __init__(
        self,
        path: Path,
        runtime: str = "onnxruntime",
        *,
        precision: str = "fp32",
        threads: int | None = None,
        device: int | None = None,
    ) -> None:
        if not path.exists():
            make = "run: radapter-export"
            if runtime == TENSORRT:
                make = f"build it here with: radapter-build-engine {path.parents[2]}"
            raise RAdapterError(f"{path}, which {runtime} needs, does not exist; {make}")
        options = dict(RUNTIMES[runtime].parameters)
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
class Span:
    """The time that a part of the work on a request took, with the spans inside it."""

    name: str  # "engine", a task or an encoder
    start: int  # in nanoseconds since 1970
    end: int
    parts: tuple[Span, ...] = ()


_spans: ContextVar[list[Span] | None] = ContextVar("spans", default=None)


@contextlib.contextmanager
def collect_spans(into: list[Span] | None = None) -> Iterator[list[Span]]:
    """Collect this thread's spans in the block, as they end, in `into` or a new list."""
    spans = [] if into is None else into
    token = _spans.set(spans)
    try:
        yield spans
    finally:
        _spans.reset(token)


def add_spans(spans: Iterable[Span]) -> None:
    """Add spans of another thread to those of this thread, if these are collected."""
    collected = _spans.get()
    if collected is not None:
        collected.extend(spans)


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Record the block as a span of this thread, even if it fails."""
    start = time.time_ns()
    began = time.monotonic_ns()  # the wall clock may be set meanwhile
    try:
        with collect_spans() as parts:
            yield
    finally:
        end = start + time.monotonic_ns() - began
        add_spans([Span(name, start, end, tuple(parts))])


def encoder_ms(spans: Iterable[Span]) -> float:
    """Milliseconds of these spans in which encoders ran."""
    total_ms = 0.0
    for part in spans:
        if part.name.endswith(ENCODER):
            total_ms += (part.end - part.start) / 1e6
        else:
            total_ms += encoder_ms(part.parts)
    return total_ms
