"""The served releases of a model repository, kept in `served.json` from the first
`radapter-release` on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.release.repository import newest_export, releases_of

FILE = "served.json"


@dataclass(frozen=True)
class Served:
    """The served releases, of which the highest answers callers that name none, and those that
    `rollback` goes back to.
    """

    releases: tuple[int, ...]
    before: tuple[int, ...] = ()

    @classmethod
    def load(cls, repository: Path) -> Served:
        """Read `served.json`; the newest export where none was chosen yet."""
        path = repository / FILE
        found = releases_of(repository)
        if not path.exists():
            return cls(tuple(newest_export(repository)))
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            numbers = [sorted({int(one) for one in text[name]}) for name in ("releases", "before")]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise RAdapterError(
                f"could not read {path}: {error}; choose what is served: radapter-release load N"
            ) from error
        releases, before = numbers
        if not releases or (lost := [one for one in releases if one not in found]):
            named = ", ".join(map(str, lost)) if releases else "none"
            raise RAdapterError(
                f"{path} says that release {named} is served, and {repository} holds"
                f" {', '.join(map(str, found)) or 'none'}; choose one of them: radapter-release"
                " load N"
            )
        return cls(tuple(releases), tuple(one for one in before if one in found))

    def next(self, releases: Sequence[int]) -> Served:
        """The state once these releases have taken over."""
        return Served(tuple(sorted(set(releases))), self.releases)

    def save(self, repository: Path) -> None:
        """Write `served.json`, for the next start."""
        with staged(repository / FILE) as path:
            path.write_text(
                json.dumps({"releases": self.releases, "before": self.before}), encoding="utf-8"
            )
