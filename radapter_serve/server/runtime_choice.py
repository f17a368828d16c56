"""Which runtime serves a release on this machine: any that computes what torch computed, or the
fastest of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from radapter_serve.encoders.cuda import find_gpu
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.tensorrt.plan import check_plan
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.config import ServedEncoder, encoders_of
from radapter_serve.release.repository import AUTO, RUNTIMES, TENSORRT
from radapter_serve.server.installation import Installation
from radapter_serve.threads import threads_per_instance

BATCHES = (1, 8)
_ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """One encoder by one runtime, on this machine.

    Attributes:
        encoder: its name.
        runtime: one of `RUNTIMES`.
        seconds: median for a batch of each of `BATCHES`; empty if it is left out.
        distance: 1 − cosine to torch's embeddings, the largest.
        why: why it is left out.
    """

    encoder: str
    runtime: str
    seconds: Mapping[int, float]
    distance: float = math.nan
    why: str = ""


@dataclass
class Configured:
    """The encoders of a repository as this machine is to serve them.

    Attributes:
        configs: of each encoder, by name: its runtime and its threads.
        runtime: of all of them; None if each has its own.
        measured: what was measured to choose the runtime; nothing if it was given.
        version_compatible: whether an engine brings a runtime of its own, code that Triton runs
            only if told to.
        checked: the encoders that have been compared with torch's embeddings, by name.
    """

    configs: dict[str, str] = field(default_factory=dict)
    runtime: str | None = None
    measured: list[Measured] = field(default_factory=list)
    version_compatible: bool = False
    checked: set[str] = field(default_factory=set)


def configure(
    repository: Path,
    releases: Sequence[int],
    runtime: str | None,
    threads: int,
    installation: Installation,
    progress: Callable[[str], None],
) -> Configured:
    """Choose the runtime of each encoder, and check that it computes what torch computed.

    Args:
        repository: the model repository.
        releases: those to be served; as the configs say if there are none.
        runtime: of all encoders; as exported if None; `AUTO` takes the fastest.
        threads: that the instances of an encoder share.
        installation: what can run them.
        progress: called with a short line before each step.

    Raises:
        RAdapterError: the server lacks the runtime, it does not compute the same, or there is no
            encoder to run by it.
    """
    encoders = encoders_of(repository, releases)
    if runtime is not None and not encoders:
        raise RAdapterError(
            f"{repository} holds no encoder of radapter-export; leave --runtime {runtime} out"
        )
    per_instance = {
        encoder.name: threads_per_instance(threads, encoder.instances) for encoder in encoders
    }
    found = Configured()
    chosen = runtime
    if runtime == AUTO:
        found.measured = measure(encoders, per_instance, installation.backends, progress)
        chosen = fastest(found.measured)
    found.runtime = chosen
    for encoder in encoders:
        own = chosen or encoder.runtime
        if own not in installation.backends:
            raise RAdapterError(
                f"{installation.binary} has no backend {own}, which {encoder.name} asks for"
            )
        files = [encoder.file(version, own) for version in encoder.versions]
        if own == TENSORRT:
            plans = [check_plan(file.parent) for file in files]
            found.version_compatible |= any(plan.options.version_compatible for plan in plans)
        if found.measured:
            found.checked.add(encoder.name)
        elif own != encoder.runtime:
            progress(f"checking {encoder.name} by {own}")
            try:
                check(encoder, own, per_instance[encoder.name])
            except RAdapterError as error:
                raise RAdapterError(
                    f"{error}; leave --runtime out ({encoder.name} was exported for"
                    f" {encoder.runtime}), or export for it: radapter-export --runtime {own}"
                ) from error
            found.checked.add(encoder.name)
        found.configs[encoder.name] = encoder.configured(own, per_instance[encoder.name])
    return found


def check(
    encoder: ServedEncoder, runtime: str, threads: int | None = None
) -> tuple[float, EncoderGraph]:
    """1 − cosine between a runtime's embeddings and torch's, the largest over all samples of all
    served versions.

    The newest version comes with it, loaded.

    Raises:
        RAdapterError: the runtime is not installed, cannot load a graph, or differs by more than
            was allowed at export.
    """
    bounds = encoder.bounds
    distance = 0.0
    newest = None
    for version in encoder.versions:
        name = f"{encoder.name} of release {version}, run by {runtime} on this machine,"
        samples = Samples.load(encoder.folder / str(version))
        loaded = _load(encoder, version, runtime, threads)
        agreement = compare(name, loaded, samples, None)
        if not agreement.within(bounds):
            raise RAdapterError(
                f"{name} differs from torch by up to {agreement.max_error:.2e} (1 - cosine up to "
                f"{1 - agreement.min_cosine:.1e}), and {bounds} is allowed"
            )
        distance = max(distance, 1 - agreement.min_cosine)
        newest = loaded
    assert newest is not None  # an encoder is served in a version at least
    return distance, newest


def measure(
    encoders: Sequence[ServedEncoder],
    threads: Mapping[str, int],
    backends: Collection[str],
    progress: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Check each encoder with each runtime, and time the newest version of those that agree; they
    take turns.

    Args:
        encoders: of a repository.
        threads: of an instance of each encoder, by name.
        backends: what the server can run.
        progress: called with a short line before each step.
    """
    found = []
    for encoder in encoders:
        runs: dict[str, EncoderGraph] = {}
        distances = {}
        reasons = {}
        for runtime in RUNTIMES:
            progress(f"checking {encoder.name} by {runtime}")
            try:
                if runtime not in backends:
                    raise RAdapterError("this tritonserver has no such backend")
                distances[runtime], runs[runtime] = check(encoder, runtime, threads[encoder.name])
            except RAdapterError as error:
                reasons[runtime] = str(error)
        progress(f"measuring {encoder.name}")
        *_, (values, _) = Samples.load(encoder.folder / str(encoder.versions[-1])).batches()
        seconds = {
            batch: _take_turns(runs, [np.resize(each, (batch, *each.shape[1:])) for each in values])
            for batch in BATCHES
        }
        for runtime in RUNTIMES:
            medians = (
                {batch: seconds[batch][runtime] for batch in BATCHES} if runtime in runs else {}
            )
            distance = distances.get(runtime, math.nan)
            why = reasons.get(runtime, "")
            found.append(Measured(encoder.name, runtime, medians, distance, why))
    return found


def fastest(measured: Sequence[Measured]) -> str:
    """The runtime that needs the least time for a row, over all encoders and `BATCHES`.

    Raises:
        RAdapterError: none can run all encoders.
    """
    costs = {}
    for runtime in RUNTIMES:
        own = [one for one in measured if one.runtime == runtime]
        if own and all(one.seconds for one in own):
            costs[runtime] = sum(
                seconds / batch for one in own for batch, seconds in one.seconds.items()
            )
    if not costs:
        reasons = "; ".join(
            f"{one.encoder} by {one.runtime}: {one.why}" for one in measured if one.why
        )
        raise RAdapterError(f"no runtime can run all encoders: {reasons}")
    return min(costs, key=costs.__getitem__)


def _load(encoder: ServedEncoder, version: int, runtime: str, threads: int | None) -> EncoderGraph:
    return EncoderGraph(
        encoder.file(version, runtime),
        runtime,
        precision=encoder.facts.precision,
        threads=threads,
        device=_device(encoder, runtime),
    )


def _device(encoder: ServedEncoder, runtime: str) -> int | None:
    """Where Triton will place ONNX Runtime: on a GPU if there is one, unless the config says
    KIND_CPU.
    """
    if runtime == "openvino":
        return None
    kinds = {group.kind for group in encoder.config.instance_group}
    if runtime == encoder.runtime and model_config_pb2.ModelInstanceGroup.KIND_CPU in kinds:
        return None
    try:
        find_gpu()
    except RAdapterError:
        return None
    return 0


def _take_turns(
    runs: Mapping[str, EncoderGraph], values: Sequence[NDArray[Any]]
) -> dict[str, float]:
    """Median seconds of each, after a warm-up."""
    times: dict[str, list[float]] = {runtime: [] for runtime in runs}
    for number in range(_ROUNDS + 1):
        for runtime, run in runs.items():
            start = time.perf_counter()
            run(*values)
            if number:
                times[runtime].append(time.perf_counter() - start)
    return {runtime: statistics.median(taken) for runtime, taken in times.items()}
