"""The models that a server loads for some releases of a repository: their versions and configs, and
a runtime for the encoders that agrees with torch on this machine.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.contract.errors import Encode
from radapter_serve.encoders.plans import check_plan
from radapter_serve.encoders.precision import Choice
from radapter_serve.encoders.tensorrt import find_gpu
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.config import (
    ServedEncoder,
    config_of,
    encoders_of,
    name_releases,
    parsed,
)
from radapter_serve.release.release import TASKS, Release
from radapter_serve.release.repository import (
    CONFIG,
    ENCODERS,
    MODELS,
    TENSORRT,
    releases_of,
    versions_of,
)

MIB = 2**20
# Memory at rest, without the graphs: tritonserver with radapter-serve, a process of an encoder and
# of a task; and an engine in one process, and each of its releases.
_TRITON = 100 * MIB
_ENCODER = 36 * MIB
_TASK = 50 * MIB
_ENGINE = 110 * MIB
_RELEASE = 16 * MIB
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class ModelEntry:
    """A model as a server loads it: versions, and the text of a config.pbtxt that names them."""

    versions: tuple[int, ...]
    config: str

    def at(self, versions: Collection[int]) -> ModelEntry:
        """The same model in other versions."""
        config = parsed(self.config)
        config.version_policy.specific.versions[:] = sorted(versions)
        return ModelEntry(tuple(sorted(versions)), str(text_format.MessageToString(config)))

    def with_instances(self, count: int | None) -> ModelEntry:
        """The same model with this number of instances; None keeps those of the config."""
        if count is None:
            return self
        config = parsed(self.config)
        for group in config.instance_group or [config.instance_group.add()]:
            group.count = count
        return ModelEntry(self.versions, str(text_format.MessageToString(config)))


@functools.lru_cache(maxsize=64)
def processes_of(model: ModelEntry) -> int:
    """Number of processes of a model whose backend has one for each instance of each version."""
    groups = parsed(model.config).instance_group
    return len(model.versions) * (sum(group.count or 1 for group in groups) or 1)


def configure_encoders(
    repository: Path, releases: Sequence[int], choice: Choice, threads: int
) -> dict[str, str]:
    """The config of each encoder for the runtime and precision of a choice, by default those of
    its export. The instances of an encoder share `threads`.
    """
    configs = {}
    for exported in encoders_of(repository, releases):
        encoder = exported.computed_in(choice.precision)
        runtime = choice.runtime or encoder.runtime
        for version in encoder.versions if runtime == TENSORRT else ():
            check_plan(encoder.folder / str(version))
        # The instances of an encoder compute at once under load, so they share the threads.
        # Different encoders do not share them: while only images come, half of the cores would
        # idle; and with texts, too, the additional threads cost no more than with one encoder.
        configs[encoder.name] = encoder.configured(runtime, max(1, threads // encoder.instances))
    return configs


def device_of(repository: Path, releases: Sequence[int]) -> int | None:
    """The GPU on which Triton would run ONNX Runtime; None without one, or if a config says CPU."""
    for encoder in encoders_of(repository, releases):
        kinds = {group.kind for group in encoder.config.instance_group}
        if (
            encoder.runtime == "onnxruntime"
            and model_config_pb2.ModelInstanceGroup.KIND_CPU in kinds
        ):
            return None
    return gpu()


def check_agreement(encoder: ServedEncoder, version: int, encode: Encode) -> None:
    """Compare an encoder with torch's embeddings at its export."""
    name = f"{encoder.name} of release {version}"
    compare(name, encode, Samples.load(encoder.folder / str(version)), encoder.facts.bounds)


def gpu() -> int | None:
    """Number of this machine's GPU; None without a GPU."""
    try:
        find_gpu()
    except RAdapterError:
        return None
    return 0


def plan_models(
    repository: Path,
    releases: Sequence[int],
    encoders: Mapping[str, str],
    facts: Mapping[int, Release],
) -> dict[str, ModelEntry]:
    """Models of some releases, in the order of loading; `encoders` has the config of each encoder
    for this machine, and `facts` each release as this machine computes it.
    """
    models = {}
    for model in MODELS:
        versions = sorted(set(releases) & set(versions_of(repository / model)))
        if not versions:
            continue
        if model in encoders:
            config = parsed(encoders[model])
        else:
            config = config_of(repository, model, versions[-1])
        # Tasks name their releases, for clients to read. Encoders do not: Triton keeps the versions
        # of an unchanged config, and loads new ones next to them.
        named = versions if model in TASKS else ()
        name_releases(config, {version: facts[version] for version in named})
        # Remove Triton's limits of a queue; `triton.backlog` says why, and replaces them.
        if config.HasField("dynamic_batching"):
            config.dynamic_batching.ClearField("default_queue_policy")
            config.dynamic_batching.ClearField("priority_queue_policy")
            config.dynamic_batching.ClearField("priority_levels")
        if not config.max_batch_size:
            config.ClearField("dynamic_batching")
        models[model] = ModelEntry((), text_format.MessageToString(config)).at(versions)
    return models


def other_models(repository: Path, encoders: Mapping[str, str]) -> dict[str, ModelEntry]:
    """Models of a repository that belong to no release, with their configs as written."""
    released = MODELS if releases_of(repository) else ()
    return {
        path.parent.name: ModelEntry(
            tuple(versions), encoders.get(path.parent.name) or path.read_text(encoding="utf-8")
        )
        for path in sorted(repository.glob(f"*/{CONFIG}"))
        if path.parent.name not in released and (versions := versions_of(path.parent))
    }


def expected_memory(
    repository: Path, releases: Collection[int], instances: Mapping[str, int]
) -> tuple[int, int, int]:
    """About how much memory releases take: in Triton, with this number of processes of each task,
    in bytes and processes, and in an engine in one process, in bytes. Measured at rest with ONNX
    Runtime on Linux; large requests take more.
    """
    graphs = 0
    encoders = 0
    for model in ENCODERS:
        for version in set(versions_of(repository / model)) & set(releases):
            files = (repository / model / str(version)).glob("model.*")
            graphs += sum(path.stat().st_size for path in files)
            encoders += 1
    tasks = len(releases) * sum(instances.get(task, 1) for task in TASKS)
    by_triton = _TRITON + encoders * _ENCODER + tasks * _TASK + graphs
    by_engine = _ENGINE + len(releases) * _RELEASE + int(1.15 * graphs)
    return by_triton, encoders + tasks, by_engine


def check_shared_memory(
    models: Mapping[str, ModelEntry], in_python: Collection[str], folder: Path = SHARED_MEMORY
) -> str | None:
    """Compare /dev/shm with the needs of models whose backends run in processes: an error if they
    could not start, a warning if many large requests may need more.
    """
    if not folder.is_dir():
        return None
    processes = batch = 0
    for model in models.values():
        config = parsed(model.config)
        if config.backend in in_python:
            processes += processes_of(model)
        for tensor in config.input:
            if tensor.data_type == model_config_pb2.TYPE_UINT8 and min(tensor.dims) > 0:
                batch = max(batch, max(1, config.max_batch_size) * math.prod(tensor.dims))

    # A process takes 1 MiB at its start and some more, and a batch on its way.
    least = 2 * processes * MIB
    enough = processes * (2 * MIB + batch)
    memory = shutil.disk_usage(folder)
    taken = memory.total - memory.free
    advised = 2 ** math.ceil(math.log2(max(1, (enough + taken) / MIB)))
    how = (
        f"in a container, set --shm-size={advised}m (Docker's default is 64 MB), or take fewer"
        f" --instances; elsewhere: mount -o remount,size={advised}m {folder}"
    )
    has = f"{folder} has {memory.free // MIB} MiB free"
    if taken >= MIB:
        has += f" beside {taken // MIB} MiB of other programs (ls -lS {folder})"
    if memory.free < least:
        raise RAdapterError(
            f"{has}, and {processes} model processes need {least // MIB} MiB; {how}"
        )
    if memory.free < enough:
        return f"{has}; many full batches at once need {enough // MIB} MiB: {how}"
    return None


def full_shared_memory(folder: Path = SHARED_MEMORY) -> str | None:
    """The sentence that /dev/shm has no space for a process or a large request; None if it has."""
    # A process takes 1 MiB at its start.
    if not folder.is_dir() or shutil.disk_usage(folder).free >= MIB:
        return None
    return (
        f"{folder} is full, so large requests are refused as overloaded; see who fills it with: ls"
        f" -lS {folder}, and make it larger: --shm-size in a container, elsewhere mount -o"
        f" remount,size=... {folder}"
    )
