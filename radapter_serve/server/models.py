"""The models that a server loads for some releases of a repository: their versions, their configs,
and the runtime of the encoders, which is any that computes here what torch computed.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.contract.errors import Encode
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.plans import check_plan
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
    AUTO,
    CONFIG,
    MODELS,
    TENSORRT,
    releases_of,
    versions_of,
)

MIB = 2**20
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


def check_repository(repository: Path) -> None:
    """Check that a repository holds a release, or another model."""
    if not repository.is_dir():
        raise RAdapterError(
            f"the model repository {repository} does not exist; make it with: radapter-export"
        )
    if not any(versions_of(path.parent) for path in repository.glob(f"*/{CONFIG}")):
        raise RAdapterError(
            f"the model repository {repository} holds no release; make one with: radapter-export"
        )


def configure(
    repository: Path,
    releases: Sequence[int],
    runtime: str | None,
    threads: int,
    backends: Collection[str],
    progress: Callable[[str], None],
) -> tuple[str | None, dict[str, str]]:
    """Choose the runtime of all encoders, None if each has that of its export, and check that it
    computes what torch computed; returns it and the text of each encoder's config.

    Without `releases` the configs say which are served; without `runtime`, by what. `backends` are
    those of the server, and the instances of an encoder share the `threads`.
    """
    encoders = encoders_of(repository, releases)
    if runtime is not None and not encoders:
        raise RAdapterError(
            f"{repository} holds no encoder of radapter-export; leave --runtime {runtime} out"
        )

    def by(runtime: str | None, *, check: bool) -> tuple[str | None, dict[str, str]]:
        """The encoders by one runtime, or by those of their export; `check` compares them all."""
        configs = {}
        for encoder in encoders:
            chosen = runtime or encoder.runtime
            if chosen not in backends:
                raise RAdapterError(
                    f"this server has no backend {chosen}, which {encoder.name} asks for"
                )
            # An encoder's instances compute at once when many ask for it. Encoders are not set
            # against each other: where only images are asked for, half of the cores would idle, and
            # where texts are, too, so many threads cost no more than they do one encoder alone
            # (benchmarks/README.md).
            per_instance = max(1, threads // encoder.instances)
            for version in encoder.versions:
                file = encoder.file(version, chosen)
                if chosen == TENSORRT:
                    check_plan(file.parent)
            if check or chosen != encoder.runtime:
                progress(f"checking {encoder.name} by {chosen}")
                try:
                    for version in encoder.versions:
                        graph = load_as_triton(encoder, version, chosen, per_instance)
                        how = f", run by {chosen} on this machine,"
                        check_agreement(encoder, version, graph, how)
                except RAdapterError as error:
                    raise RAdapterError(
                        f"{error}; leave --runtime out ({encoder.name} was exported for"
                        f" {encoder.runtime}), or export for it: radapter-export --runtime {chosen}"
                    ) from error
            configs[encoder.name] = encoder.configured(chosen, per_instance)
        return runtime, configs

    if runtime != AUTO:
        return by(runtime, check=False)

    # The first that is there and agrees with torch, of those that are usually fastest
    # (docs/export.md): on a CPU OpenVINO, but for int8 whose ranges are found at run time.
    quantization = encoders[0].facts.quantization or {}
    order = ["openvino", "onnxruntime"]
    if _gpu() is not None:
        order = [TENSORRT, "onnxruntime", "openvino"]
    elif quantization.get("kind") == "dynamic":
        order = ["onnxruntime", "openvino"]
    reasons = []
    for candidate in order:
        try:
            return by(candidate, check=True)
        except RAdapterError as error:
            reasons.append(str(error))
    raise RAdapterError(f"no runtime can run all encoders: {'; '.join(reasons)}")


def load_as_triton(
    encoder: ServedEncoder, version: int, runtime: str, threads: int
) -> EncoderGraph:
    """An encoder in this process where Triton places it: ONNX Runtime on a GPU if there is one,
    unless the config says KIND_CPU.
    """
    kinds = {group.kind for group in encoder.config.instance_group}
    on_cpu = runtime == encoder.runtime and model_config_pb2.ModelInstanceGroup.KIND_CPU in kinds
    return EncoderGraph(
        encoder.file(version, runtime),
        runtime,
        precision=encoder.facts.precision,
        threads=threads,
        device=None if runtime == "openvino" or on_cpu else _gpu(),
    )


def check_agreement(encoder: ServedEncoder, version: int, encode: Encode, how: str = "") -> None:
    """Compare an encoder of a release, as a function, with torch's embeddings of its export; raises
    an error if it differs by more than was allowed then. `how` says what runs it.
    """
    name = f"{encoder.name} of release {version}{how}"
    compare(name, encode, Samples.load(encoder.folder / str(version)), encoder.facts.bounds)


def _gpu() -> int | None:
    """The number of the GPU of this machine; None without one."""
    try:
        find_gpu()
    except RAdapterError:
        return None
    return 0


def plan_models(
    repository: Path, releases: Sequence[int], encoders: Mapping[str, str]
) -> dict[str, ModelEntry]:
    """Models of some releases, in the order of loading; `encoders` has the config of each encoder
    for this machine.

    The configs of tasks name the releases that are served, for clients to read. Those of encoders
    name none: with an unchanged config, Triton keeps the versions that it has and loads the others
    next to them.
    """
    models = {}
    facts = {version: Release.load(repository / MODELS[-1] / str(version)) for version in releases}
    for model in MODELS:
        versions = sorted(set(releases) & set(versions_of(repository / model)))
        if not versions:
            continue
        if model in encoders:
            config = parsed(encoders[model])
        else:
            config = config_of(repository, model, versions[-1])
        named = versions if model in TASKS else ()
        name_releases(config, {version: facts[version] for version in named})
        # Triton's own limits of a queue go; `triton.backlog` says why, and has others.
        if config.HasField("dynamic_batching"):
            config.dynamic_batching.ClearField("default_queue_policy")
            config.dynamic_batching.ClearField("priority_queue_policy")
            config.dynamic_batching.ClearField("priority_levels")
        if not config.max_batch_size:
            config.ClearField("dynamic_batching")
        models[model] = ModelEntry((), text_format.MessageToString(config)).at(versions)
    return models


def other_models(repository: Path, encoders: Mapping[str, str]) -> dict[str, ModelEntry]:
    """Models that belong to no release, as their owner wrote them; all models of a repository
    without `classify`, which has the releases.
    """
    released = MODELS if releases_of(repository) else ()
    return {
        path.parent.name: ModelEntry(
            tuple(versions), encoders.get(path.parent.name) or path.read_text(encoding="utf-8")
        )
        for path in sorted(repository.glob(f"*/{CONFIG}"))
        if path.parent.name not in released and (versions := versions_of(path.parent))
    }


def check_shared_memory(
    models: Mapping[str, ModelEntry], in_python: Collection[str], folder: Path = SHARED_MEMORY
) -> str | None:
    """Compare /dev/shm with what the processes of models with a backend `in_python` need.

    Raise an error if the server could not even start; return a warning if many large requests at
    once may need more than there is.
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

    # A process begins with 1 MiB, and holds a batch on its way in and another on its way out.
    least = 2 * processes * MIB
    enough = processes * (2 * MIB + batch)
    advised = 2 ** math.ceil(math.log2(max(1, enough / MIB)))
    how = (
        f"in a container, set --shm-size={advised}m (Docker's default is 64 MB), or take fewer"
        f" --instances; elsewhere: mount -o remount,size={advised}m {folder}"
    )
    memory = os.statvfs(folder)
    free = memory.f_bavail * memory.f_frsize
    size = memory.f_blocks * memory.f_frsize
    if free < least:
        raise RAdapterError(
            f"{folder} has {free // MIB} MiB free, and {processes} model processes need"
            f" {least // MIB} MiB; {how}"
        )
    if size < enough:
        return (
            f"{folder} has {size // MIB} MiB; many full batches at once need {enough // MIB} MiB:"
            f" {how}"
        )
    return None
