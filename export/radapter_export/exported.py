"""What an export tells of what it wrote."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_export.accuracy import Accuracy
from radapter_serve.release.agreement import Agreement
from radapter_serve.release.release import Release


@dataclass(frozen=True)
class Exported:
    """A graph of a release, or a form of its weights that another library opens.

    Attributes:
        name: such as `image_encoder` or `transformers`.
        size: of its weights, in bytes.
        agreement: with torch.
        seconds: that it took to write and check.
    """

    name: str
    size: int
    agreement: Agreement
    seconds: float


@dataclass(frozen=True)
class ExportedRelease:
    """One exported release.

    Attributes:
        release: its facts, by name.
        graphs: the encoders.
        merged: folder of the merged checkpoint.
        accuracy: on validation data, by torch and by the encoders; None if it was not measured.
        warnings: what a user should know, a line each.
        forms: of the weights for other libraries, that were asked for.
        pushed: `hf-hub:NAME@COMMIT`, where it is on the hub; None if it was not sent there.
    """

    release: Release
    graphs: list[Exported]
    merged: Path
    accuracy: Accuracy | None
    warnings: list[str]
    forms: list[Exported]
    pushed: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What `release.json` holds."""
        return copy.deepcopy(self.release.to_dict())

    @property
    def version(self) -> int:
        """Number of the release in its model repository."""
        return self.release.version

    @property
    def alpha(self) -> float:
        """The re-scaling that was folded, or the default where requests may bring their own."""
        return self.release.alpha
