"""What a server is to load: its models with their versions and configs, for some releases of a
repository.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import (
    check,
    config_of,
    encoders_of,
    name_releases,
    without_queue_policy,
)
from radapter_serve.release.release import TASKS, Release
from radapter_serve.release.repository import (
    CONFIG,
    MODELS,
    releases_of,
    releases_with_digest,
    versions_of,
)

#: what embeds the queries to an index
EMBEDDING = ("image_encoder", "text_encoder", "embed_image", "embed_text")
MAX_KEPT_RELEASES = 2  # releases that are loaded for the sake of indexes alone


@dataclass(frozen=True)
class ModelEntry:
    """A model as a server loads it: versions, and the text of a config.pbtxt that names them."""

    versions: tuple[int, ...]
    config: str

    def at(self, versions: Collection[int]) -> ModelEntry:
        """The same in other versions."""
        config = parsed(self.config)
        config.version_policy.specific.versions[:] = sorted(versions)
        return ModelEntry(tuple(sorted(versions)), str(text_format.MessageToString(config)))


@functools.lru_cache(maxsize=64)
def processes_of(model: ModelEntry) -> int:
    """How many processes a model has whose backend gives one to each instance of each version."""
    groups = parsed(model.config).instance_group
    return len(model.versions) * (sum(group.count or 1 for group in groups) or 1)


def parsed(text: str) -> Any:
    """A `ModelConfig` from the text of a config.pbtxt."""
    return text_format.Parse(text, model_config_pb2.ModelConfig(), allow_unknown_field=True)


def models_of(repository: Path) -> dict[str, list[int]]:
    """The models of a repository and their versions.

    Raises:
        RAdapterError: no such folder, or it holds no release.
    """
    if not repository.is_dir():
        raise RAdapterError(
            f"the model repository {repository} does not exist; make it with: radapter-export"
        )
    models = {
        path.parent.name: versions
        for path in sorted(repository.glob("*/config.pbtxt"))
        if (versions := versions_of(path.parent))
    }
    if not models:
        raise RAdapterError(
            f"the model repository {repository} holds no release; make one with: radapter-export"
        )
    return models


def plan_models(
    repository: Path, releases: Sequence[int], kept: Sequence[int], encoders: Mapping[str, str]
) -> dict[str, ModelEntry]:
    """The models of some releases, in the order of loading.

    The configs of tasks name the releases that are served, for clients to read. Those of encoders
    name none: with a config that stays the same, Triton goes on with the versions that it has and
    loads the others next to them.

    Args:
        repository: the model repository.
        releases: served.
        kept: whose embeddings alone are served, for the indexes that they made.
        encoders: the config of each for this machine, by name.
    """
    found = {}
    facts = {version: Release.load(repository / MODELS[-1] / str(version)) for version in releases}
    for model in MODELS:
        there = versions_of(repository / model)
        versions = [one for one in releases if one in there]
        if not versions:
            continue
        config = (
            parsed(encoders[model])
            if model in encoders
            else config_of(repository, model, versions[-1])
        )
        named = versions if model in TASKS else ()
        name_releases(config, {version: facts[version] for version in named})
        without_queue_policy(config)
        more = [one for one in kept if one in there and model in EMBEDDING]
        found[model] = ModelEntry((), text_format.MessageToString(config)).at({*versions, *more})
    return found


def other_models(repository: Path, encoders: Mapping[str, str]) -> dict[str, ModelEntry]:
    """Models that belong to no release, as their owner wrote them.

    In a repository without `classify`, which has the releases, these are all that there are.

    Args:
        repository: the model repository.
        encoders: the config of each for this machine, by name.
    """
    released = MODELS if releases_of(repository) else ()
    return {
        path.parent.name: ModelEntry(
            tuple(versions), encoders.get(path.parent.name) or path.read_text(encoding="utf-8")
        )
        for path in sorted(repository.glob(f"*/{CONFIG}"))
        if path.parent.name not in released and (versions := versions_of(path.parent))
    }


def kept_for_indexes(
    repository: Path, releases: Sequence[int], indexes: Path
) -> dict[int, list[str]]:
    """Older releases that made an index that is still there, with the names of the indexes; the
    newest first.

    A newer release than those that are served is none of them: it would answer callers that name no
    release. Nor is one whose files are not those of its export, or whose encoders cannot be loaded
    next to the others.

    Args:
        repository: the model repository.
        releases: served.
        indexes: folder of the indexes.
    """
    from radapter_serve.index.index import releases_of  # a base installation has not its libraries

    found: dict[int, list[str]] = {}
    for name, made in releases_of(indexes).items() if releases else ():
        matching = releases_with_digest(repository, made.digest, made.alpha)
        older = [one for one in matching if one < max(releases)]
        if older and not set(matching) & set(releases):
            found.setdefault(older[-1], []).append(name)
    fitting = [
        version for version in sorted(found, reverse=True) if _fits(repository, releases, version)
    ]
    return {version: found[version] for version in fitting[:MAX_KEPT_RELEASES]}


def _fits(repository: Path, releases: Sequence[int], version: int) -> bool:
    try:
        check(repository, [version])
        live = {one.name: one.config for one in encoders_of(repository, releases)}
        own = {one.name: one.config for one in encoders_of(repository, [version])}
    except RAdapterError:
        return False
    return not any(difference(live[name], own[name]) for name in own if name in EMBEDDING)


def difference(one: Any, other: Any) -> str:
    """Why versions of an encoder with these configs cannot be loaded side by side; empty if they
    can.
    """
    for field in ("backend", "default_model_filename", "max_batch_size"):
        if getattr(one, field) != getattr(other, field):
            return f"its {field} is {getattr(other, field)!r} and not {getattr(one, field)!r}"
    for kind in ("input", "output"):
        if list(getattr(one, kind)) != list(getattr(other, kind)):
            return f"its {kind}s have other shapes or types"
    return ""
