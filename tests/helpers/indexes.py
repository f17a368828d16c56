"""What lies in the folder of an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from radapter_serve.index.facts import FACTS


def generation(out: Path) -> Path:
    """The folder of the generation that counts."""
    return out / str(json.loads((out / FACTS).read_text())["generation"])


def table(out: Path) -> Path:
    """The folder of its table."""
    return generation(out) / "images.lance"


def point_again(out: Path) -> None:
    """Have a server open the generation again, which it does where `index.json` has other bytes."""
    (out / FACTS).write_bytes((out / FACTS).read_bytes() + b"\n")


def said(out: Path) -> dict[str, Any]:
    """What its `index.json` says."""
    facts: dict[str, Any] = json.loads((generation(out) / FACTS).read_text())
    return facts


def say(out: Path, facts: dict[str, Any]) -> None:
    """Have it say something else."""
    (generation(out) / FACTS).write_text(json.dumps(facts))
