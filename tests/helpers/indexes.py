"""What lies in the folder of an index."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.encoders.loaded import LoadedRelease, Need, complete
from radapter_serve.index.facts import FACTS, IndexFacts, MadeBy, Plan
from radapter_serve.index.index import Indexes
from radapter_serve.tasks.retrieve import Retrieved, RetrieveRequest, retrieve


def generation(out: Path) -> Path:
    """The folder of the generation that counts."""
    return out / str(json.loads((out / FACTS).read_text())["generation"])


def retrieving(
    loaded: LoadedRelease,
    indexes: Path,
    query: NDArray[np.float32],
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[RetrieveRequest], Retrieved]:
    """The task `retrieve` of a release, to which everything is one query, float32 [D], of unit
    length; by the clock it asks again what was published last.
    """
    own = copy.copy(loaded)
    own.indexes = indexes
    opened = Indexes(own, clock=clock)

    def embed(needs: Sequence[Need]) -> list[NDArray[np.float32]]:
        return [np.stack([query] * len(need.rows)) for need in needs]

    return lambda request: complete(retrieve(opened, request), embed)


def said(out: Path) -> dict[str, Any]:
    """What its `index.json` says."""
    facts: dict[str, Any] = json.loads((generation(out) / FACTS).read_text())
    return facts


def say(out: Path, facts: dict[str, Any]) -> None:
    """Have it say something else."""
    (generation(out) / FACTS).write_text(json.dumps(facts))


def search_little(out: Path) -> None:
    """Have a search of a big index look into one cell, for one candidate."""
    facts = said(out)
    facts["nearest"] |= {"nprobes": 1, "candidates": 1}
    say(out, facts)


def write_facts(out: Path, digest: str) -> None:
    """Make an index of nothing but its facts, as a release of this digest would make it at alpha
    0.5.
    """
    made = MadeBy("ViT-B-32", 0.5, False, 1, "fp32", 16, digest)
    plan = Plan("photos", "/photos", "image", {}, 128, True, "refuse", made, {})
    facts = IndexFacts(plan, 0, ["path"], {}, None, "", "")
    (out / "g-0123456789abcdef").mkdir(parents=True)
    (out / "g-0123456789abcdef" / FACTS).write_text(facts.to_json())
    (out / FACTS).write_text(json.dumps({"generation": "g-0123456789abcdef"}))
