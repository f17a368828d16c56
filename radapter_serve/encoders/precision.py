"""The precision that fp32 graphs are computed in: as exported, or in bf16 by OpenVINO where the
processor has bf16.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.release import IN_BF16, Release
from radapter_serve.release.repository import AUTO, ENCODERS, MODELS, RUNTIMES, TENSORRT

Precision = Literal["fp32", "bf16", "auto"]
CPU_FACTS = Path("/proc/cpuinfo")
RUNS = 3  # timed, of which the quickest counts: other programs only slow a run down


@dataclass(frozen=True)
class Choice:
    """A runtime and a precision for all encoders, each None if it is that of the export; `note`
    says why, for people.
    """

    runtime: str | None
    precision: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Trial:
    """Seconds that a batch of images took, and the largest 1 - cosine of any encoder."""

    seconds: float
    distance: float


def has_bf16() -> bool:
    """True if this processor says that it computes in bf16."""
    try:
        facts = CPU_FACTS.read_text()
    except OSError:
        return False
    return re.search(r"\b(amx_bf16|avx512_bf16)\b", facts) is not None


def choose(
    repository: Path,
    versions: Sequence[int],
    runtime: str | None,
    precision: str | None,
    threads: int,
    *,
    on_gpu: bool = False,
) -> Choice:
    """Choose the runtime and the precision of releases on this machine. AUTO takes what encodes
    images fastest, of all that agree with torch's stored embeddings.
    """
    releases = [Release.load(repository / MODELS[-1] / str(version)) for version in versions]
    if precision not in (None, "fp32", "bf16", AUTO):
        raise RAdapterError(f"--precision is {precision}; allowed are fp32, bf16 and {AUTO}")
    for release in releases:
        if precision not in (None, release.precision) and release.precision != "fp32":
            raise RAdapterError(
                f"--precision is {precision}, but release {release.version} was exported in"
                f" {release.precision}, which is all that is allowed for it; leave --precision out"
            )
    lowered = all(release.precision != "fp32" for release in releases)
    if precision == "fp32" or lowered:
        return Choice(runtime, precision if releases else None)
    exported = runtime or releases[-1].runtime
    can = has_bf16() and importlib.util.find_spec("openvino") is not None
    free = not on_gpu and runtime != "onnxruntime" and exported != TENSORRT
    if precision is None:
        note = ""
        if can and free:
            note = (
                "this processor computes in bf16: --precision auto probably encodes several times"
                " as fast, with cosines within 2e-4"
            )
        return Choice(runtime, note=note)
    if precision == "bf16":
        if on_gpu or runtime not in (None, AUTO, "openvino"):
            where = "a GPU" if on_gpu else runtime
            raise RAdapterError(
                f"--precision bf16 is computed by OpenVINO on the CPU, and not by {where}; leave it"
                " out, or take --runtime openvino on the CPU"
            )
        if not has_bf16():
            raise RAdapterError(
                "--precision is bf16, but this processor has no bf16 (neither amx_bf16 nor"
                f" avx512_bf16 in {CPU_FACTS}); allowed here are fp32 and {AUTO}"
            )
        return Choice("openvino", "bf16")

    # AUTO: try the release as it is, then OpenVINO in both precisions.
    if not (can and free):
        return Choice(
            runtime, note="precision fp32: bf16 needs a processor with bf16, and OpenVINO on it"
        )
    first = (releases[-1].runtime if exported == AUTO else exported, "fp32")
    trials = {first: try_encoders(repository, releases, *first, threads)}
    reason = ""
    for way in (("openvino", "fp32"), ("openvino", "bf16")):
        if way not in trials:
            try:
                trials[way] = try_encoders(repository, releases, *way, threads)
            except RAdapterError as error:
                reason = f"; {error}"
    best = min(trials, key=lambda way: trials[way].seconds)
    note = f"precision {best[1]} by {best[0]}: "
    if best == first:
        return Choice(first[0], note=f"{note}nothing else was faster{reason}")
    gain = trials[first].seconds / trials[best].seconds
    note += (
        f"images {gain:.1f} times as fast as {first[1]} by {first[0]}, 1 - cosine at most"
        f" {trials[best].distance:.0e}{reason if best[1] == 'fp32' else ''}"
    )
    return Choice(best[0], "bf16" if best[1] == "bf16" else None, note)


def try_encoders(
    repository: Path, releases: Sequence[Release], runtime: str, precision: str, threads: int
) -> Trial:
    """Compare the encoders of releases with torch, and time the images of the last one."""
    seconds = 0.0
    distance = 0.0
    for release in releases:
        bounds = IN_BF16 if precision == "bf16" else release.bounds
        for name in ENCODERS:
            folder = repository / name / str(release.version)
            if not folder.is_dir():
                continue
            graph = EncoderGraph(
                folder / RUNTIMES[runtime].file,
                runtime,
                precision=precision,
                threads=threads,
                parameters=RUNTIMES[runtime].parameters,
            )
            samples = Samples.load(folder)
            how = f"{name} of release {release.version} in {precision} by {runtime}"
            agreement = compare(how, graph, samples, bounds)
            distance = max(distance, 1 - agreement.min_cosine)
            if name == "image_encoder":
                seconds = quickest(graph, samples)
    return Trial(seconds, distance)


def quickest(graph: Callable[..., object], samples: Samples) -> float:
    """Seconds of the quickest of some runs on all batches of the samples."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for inputs, _reference in samples.batches():
            graph(*inputs)
        times.append(time.perf_counter() - start)
    return min(times)
