"""The precision that fp32 graphs are computed in: as exported, or in bf16 with OpenVINO where the
processor has bf16.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Agreement, Samples, compare
from radapter_serve.release.release import IN_BF16, Release
from radapter_serve.release.repository import (
    AUTO,
    ENCODERS,
    MODELS,
    PATCH_ENCODER,
    RUNTIMES,
    TENSORRT,
)

Precision = Literal["fp32", "bf16", "auto"]
CPU_FACTS = Path("/proc/cpuinfo")
RUNS = 3  # timed, of which the quickest counts: other programs only slow a run down


@dataclass(frozen=True)
class Choice:
    """A runtime and a precision for all encoders, each None if it is that of the export; `note`
    says why, for people. If they were tried, it has by the numbers of releases and the encoders'
    names the loaded graphs and their agreement with torch.
    """

    runtime: str | None
    precision: str | None = None
    note: str = ""
    graphs: Mapping[int, Mapping[str, EncoderGraph]] = field(default_factory=dict)
    agreements: Mapping[int, Mapping[str, Agreement]] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """The largest 1 - cosine of any encoder that was tried."""
        encoders = [of for each in self.agreements.values() for of in each.values()]
        return max((1 - agreement.min_cosine for agreement in encoders), default=0.0)

    def facts(self, release: Release) -> Release:
        """A release as it is computed with this choice, with the agreement that was measured."""
        measured = self.agreements.get(release.version, {})
        return release.computed_in(self.precision, self.runtime, measured)


AS_EXPORTED = Choice(None)
Attempt = Callable[[str | None, str | None], Choice]  # of a runtime and a precision


def bf16_of_processor() -> str:
    """The name of what computes bf16 in this processor, AMX or AVX-512; empty if nothing does."""
    try:
        facts = CPU_FACTS.read_text()
    except OSError:
        return ""
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")):
        if re.search(rf"\b{flag}\b", facts):
            return name
    return ""


def choose(
    repository: Path,
    versions: Sequence[int],
    runtime: str | None,
    precision: str | None,
    threads: int,
    *,
    on_gpu: bool = False,
    device: int | None = None,
    compared: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Choose the runtime and the precision of releases on this machine: of those that agree with
    torch's stored embeddings, AUTO takes the precision that encodes images fastest, and the runtime
    that usually does (docs/export.md). `compared` compares those of the export, too.
    """
    releases = [Release.load(repository / MODELS[-1] / str(version)) for version in versions]
    if not releases:
        if runtime is not None:
            raise RAdapterError(f"{repository} holds no release; leave --runtime {runtime} out")
        return AS_EXPORTED
    for release in releases:
        stored = release.precision
        allowed = [stored, "bf16", AUTO] if stored == "fp32" else [stored, AUTO]
        if precision not in (None, *allowed):
            raise RAdapterError(
                f"precision is {precision}, but release {release.version} was exported in {stored};"
                f" allowed for it are {', '.join(allowed)}"
            )
    lowered = [release for release in releases if release.precision != "fp32"]
    exported = releases[-1]
    processor = bf16_of_processor()
    can = (
        bool(processor)
        and importlib.util.find_spec("openvino") is not None
        and not on_gpu
        and runtime != "onnxruntime"
        and (runtime or exported.runtime) != TENSORRT
    )

    def attempt(runtime: str | None, precision: str | None) -> Choice:
        return try_encoders(repository, releases, runtime, precision, threads, device, say)

    note = ""
    if precision == AUTO and lowered:
        kept = lowered[-1]
        note = f"precision as exported: release {kept.version} is in {kept.precision} already"
        precision = None
    elif precision == AUTO and can:
        own = exported.runtime if runtime in (None, AUTO) else runtime
        return _fastest(attempt, own, repository)
    elif precision == AUTO:
        note = "precision fp32: bf16 needs a processor with bf16, and OpenVINO on it"
        precision = None
    elif precision is None and can and len(lowered) < len(releases):
        note = (
            f"this processor has {processor}: --precision auto tries bf16 on it, measures how"
            " much faster images are, and keeps it if all cosines are within"
            f" {1 - IN_BF16.min_cosine:.0e} of torch's; docs/serving.md has the figures of one"
        )
    elif precision == "bf16" and len(lowered) < len(releases):
        if on_gpu or runtime not in (None, AUTO, "openvino"):
            where = "a GPU" if on_gpu else runtime
            raise RAdapterError(
                f"--precision bf16 is computed with OpenVINO on the CPU, and not with {where};"
                " leave it out, or take --runtime openvino on the CPU"
            )
        if not processor:
            raise RAdapterError(
                "--precision is bf16, but this processor has no bf16 (neither amx_bf16 nor"
                f" avx512_bf16 in {CPU_FACTS}); allowed here are fp32 and {AUTO}"
            )
        choice = attempt("openvino", "bf16")
        note = f"precision bf16 with openvino: 1 - cosine at most {choice.distance:.0e}"
        return replace(choice, note=note)

    if compared or runtime not in (None, exported.runtime):
        return replace(_first(attempt, runtime, precision, exported, on_gpu=on_gpu), note=note)
    return Choice(runtime, precision, note)


def _first(
    attempt: Attempt, runtime: str | None, precision: str | None, exported: Release, *, on_gpu: bool
) -> Choice:
    """Choose a runtime if its encoders agree with torch; of AUTO the first, usually the fastest."""
    order = [runtime]
    if runtime == AUTO and on_gpu:
        order = [TENSORRT, "onnxruntime", "openvino"]
    elif runtime == AUTO:
        order = ["openvino", "onnxruntime"]
        if exported.quantization is not None and exported.quantization.kind == "dynamic":
            order.reverse()  # for int8 with ranges found at run time
    reasons = []
    for each in order:
        try:
            # The facts keep the agreement of the export.
            return replace(attempt(each, precision), agreements={})
        except RAdapterError as error:
            reasons.append(str(error))
    why = "; ".join(reasons)
    if runtime == AUTO:
        why = f"no runtime can run all encoders: {why}"
    elif runtime is not None:
        why += (
            f"; leave --runtime out (release {exported.version} was exported for"
            f" {exported.runtime}), or export for it: radapter-export --runtime {runtime}"
        )
    raise RAdapterError(why)


def _fastest(attempt: Attempt, own: str | None, repository: Path) -> Choice:
    """Choose the fastest of the release's own runtime in fp32, and OpenVINO in bf16, else in fp32;
    only the fastest encoders stay in memory.
    """
    first = (own, "fp32")
    best = attempt(*first)
    seconds = least = quickest(repository, best)
    reason = ""
    for way in (("openvino", "bf16"), ("openvino", "fp32")):
        # Where bf16 is faster, fp32 with the same runtime is not tried.
        if way == first or best.precision == "bf16":
            continue
        try:
            other = attempt(*way)
        except RAdapterError as error:
            reason = f"; {error}"
            continue
        taken = quickest(repository, other)
        if taken < least:
            best = other
            least = taken
        del other
    if (best.runtime, best.precision) == first:
        note = "nothing else was faster"
    else:
        note = (
            f"images {seconds / least:.1f} times as fast as {first[1]} with {first[0]},"
            f" 1 - cosine at most {best.distance:.0e}"
        )
    if best.precision != "bf16":
        note += reason
    return replace(
        best,
        precision="bf16" if best.precision == "bf16" else None,
        note=f"precision {best.precision} with {best.runtime}: {note}",
    )


def load_graphs(
    repository: Path, release: Release, threads: int, device: int | None = None
) -> dict[str, EncoderGraph]:
    """Load the encoders of a release in its runtime and precision; ONNX Runtime's on a GPU if
    `device` is given.
    """
    return {
        name: EncoderGraph(
            repository / name / str(release.version) / RUNTIMES[release.runtime].file,
            release.runtime,
            precision=release.precision,
            threads=threads,
            device=device if release.runtime == "onnxruntime" else None,
        )
        for name in ENCODERS
        if release.dense or name != PATCH_ENCODER
    }


def try_encoders(
    repository: Path,
    releases: Sequence[Release],
    runtime: str | None,
    precision: str | None,
    threads: int,
    device: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Load the encoders of releases, and compare them with torch."""
    graphs: dict[int, dict[str, EncoderGraph]] = {}
    agreements: dict[int, dict[str, Agreement]] = {}
    for release in releases:
        number = release.version
        computed = release.computed_in(precision, runtime)
        say(f"loading release {number}")
        graphs[number] = load_graphs(repository, computed, threads, device)
        agreements[number] = {}
        for name, graph in graphs[number].items():
            how = f"{name} of release {number} in {computed.precision} with {computed.runtime}"
            say(f"comparing {how} with torch's embeddings")
            samples = Samples.load(repository / name / str(number))
            agreements[number][name] = compare(how, graph, samples, computed.bounds)
    return Choice(runtime, precision, "", graphs, agreements)


def quickest(repository: Path, choice: Choice) -> float:
    """Seconds of the quickest of some runs of the newest image encoder on all its samples."""
    newest = max(choice.graphs)
    samples = Samples.load(repository / "image_encoder" / str(newest))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for inputs, _reference in samples.batches():
            choice.graphs[newest]["image_encoder"](*inputs)
        times.append(time.perf_counter() - start)
    return min(times)
