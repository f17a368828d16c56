"""The models that a server loads for some releases of a repository: their versions and configs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import config_of, name_releases, without_queue_policy
from radapter_serve.release.release import TASKS, Release
from radapter_serve.release.repository import CONFIG, MODELS, releases_of, versions_of

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


def parsed(text: str) -> Any:
    """A `ModelConfig` from the text of a config.pbtxt."""
    return text_format.Parse(text, model_config_pb2.ModelConfig(), allow_unknown_field=True)


def models_of(repository: Path) -> dict[str, list[int]]:
    """Models of a repository and their versions; raise an error if it holds no release."""
    if not repository.is_dir():
        raise RAdapterError(
            f"the model repository {repository} does not exist; make it with: radapter-export"
        )
    models = {
        path.parent.name: versions
        for path in sorted(repository.glob(f"*/{CONFIG}"))
        if (versions := versions_of(path.parent))
    }
    if not models:
        raise RAdapterError(
            f"the model repository {repository} holds no release; make one with: radapter-export"
        )
    return models


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
        without_queue_policy(config)
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
