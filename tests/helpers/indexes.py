"""Read and write the files in the folder of an index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from radapter_serve.index.facts import FACTS, BuildPlan, IndexFacts, MadeBy
from tests.helpers.small_models import release


def generation(out: Path) -> Path:
    """The folder of the generation that counts."""
    return out / str(json.loads((out / FACTS).read_text())["generation"])


def index_facts(out: Path) -> dict[str, Any]:
    """The content of its `index.json`."""
    facts: dict[str, Any] = json.loads((generation(out) / FACTS).read_text())
    return facts


def write_index_facts(out: Path, facts: dict[str, Any]) -> None:
    """Write other facts into it."""
    (generation(out) / FACTS).write_text(json.dumps(facts))


def write_facts(out: Path, digest: str) -> None:
    """Make an index of nothing but its facts, as a release of this digest would make it at alpha
    0.5.
    """
    made_by = replace(MadeBy.of(release(1, embed_dim=16)), image_digest=digest)
    plan = BuildPlan("photos", "/photos", "image", {}, 128, True, "refuse", made_by, {})
    facts = IndexFacts(plan, 0, ["path"], {}, None, None, "", "")
    (out / "g-0123456789abcdef").mkdir(parents=True)
    (out / "g-0123456789abcdef" / FACTS).write_text(facts.to_json())
    (out / FACTS).write_text(json.dumps({"generation": "g-0123456789abcdef"}))
