"""The files of deploy/, read once for all tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BOARD = DEPLOY / "grafana" / "boards" / "radapter.json"
RULES = DEPLOY / "prometheus-rules.yaml"
CHART = DEPLOY / "kubernetes" / "chart"


def document(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rendered(values: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """The objects of the Helm chart by kind and name, for values in place of its own."""
    import helm_python  # of the extra integrations

    with helm_python.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="radapter", namespace="radapter").values()
    documents = [document for text in texts for document in yaml.safe_load_all(text) if document]
    objects = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    assert len(objects) == len(documents)
    return objects


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of the Dockerfile and what stands behind them, by the name of their
    stage.
    """
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(str.strip, text.splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            stages[rest.rpartition(" AS ")[2]] = []
        [*stages.values()][-1].append((instruction, " ".join(rest.split())))
    return stages


def instructions(stage: str, name: str) -> list[str]:
    """Arguments of all instructions of one name in a stage."""
    return [rest for instruction, rest in stages()[stage] if instruction == name]


def command(stage: str) -> list[str]:
    """The command that an image runs."""
    (words,) = instructions(stage, "CMD")
    return [str(word) for word in json.loads(words)]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the name of each panel, alert or rule that asks Prometheus, and what it asks for."""
    for panel in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for group in document(RULES)["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])
    for rule in document(DEPLOY / "kubernetes" / "prometheus-adapter.yaml")["rules"]["custom"]:
        yield "prometheus-adapter", rule["seriesQuery"]
        yield "prometheus-adapter", rule["metricsQuery"]


def metrics() -> set[str]:
    """The names of the metrics that are asked for."""
    return {
        name
        for _, text in expressions()
        for name in re.findall(r"\b(?:nv|radapter_gateway|radapter_index)_\w+", text)
    }
