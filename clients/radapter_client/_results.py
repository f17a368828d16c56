"""What the client's methods return."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ._exceptions import ModelNotFound, ServerError


@dataclass(frozen=True)
class Classification:
    """The best labels of one image.

    Args:
        labels: best first.
        scores: of these labels, in [0, 1]; over all labels of the request they sum to 1 (softmax models).
        release: the version of the release that answered.
    """

    labels: list[str]
    scores: list[float]
    release: int

    @property
    def top(self) -> str:
        """The best label."""
        return self.labels[0]


@dataclass(frozen=True)
class Release:
    """What one served version is made of.

    Args:
        version: integer that all models of the release share.
        alpha: the adapter's weight in it, in [0, 1]; 0 is the untouched base.
        embed_dim: width D of its embeddings.
        logit_scale: factor on the cosine before the softmax.
        templates: the prompt templates used where a request brings none.
        label_sets: name to facts of each label set that `classify` knows by name.
        facts: the whole of its release.json.
    """

    version: int
    alpha: float
    architecture: str
    precision: str
    embed_dim: int
    logit_scale: float
    templates: list[str]
    label_sets: dict[str, Any]
    facts: dict[str, Any] = field(repr=False)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Release:
        try:
            return cls(
                version=int(facts["version"]),
                alpha=float(facts["alpha"]),
                architecture=facts["architecture"],
                precision=facts["precision"],
                embed_dim=int(facts["embed_dim"]),
                logit_scale=float(facts["logit_scale"]),
                templates=list(facts["templates"]),
                label_sets=dict(facts["label_sets"]),
                facts=facts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"the server describes its release in a way unknown to this client: {error!r}") from error


def read_releases(config: Mapping[str, Any]) -> list[Release]:
    """The releases that a model's configuration names in its parameters, oldest first."""
    texts = {key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()}
    keys = [key for key in texts if key.startswith("release.")] or [key for key in texts if key == "release"]
    if not keys:
        raise ServerError("the server says nothing of its release: its models were not written by radapter-export")
    try:
        facts = [json.loads(texts[key]) for key in keys]
    except ValueError as error:
        raise ServerError(f"the server's release description is not JSON: {error}") from error
    return sorted((Release.from_facts(fact) for fact in facts), key=lambda release: release.version)


def pick_release(releases: list[Release], version: int | None) -> Release:
    """The release of this version, or the newest."""
    if version is None:
        return releases[-1]
    for release in releases:
        if release.version == version:
            return release
    served = ", ".join(str(release.version) for release in releases)
    raise ModelNotFound(f"the server does not serve release {version}; it serves {served}")
