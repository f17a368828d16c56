"""The files of a training run's folder, and where runs lie."""

from __future__ import annotations

from pathlib import Path

from radapter_serve.errors import RAdapterError

ADAPTER = "adapter.safetensors"
RECIPE = "recipe.yaml"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
RATES = "rates.json"
RUNS = Path("runs")


def newest_run() -> Path:
    """The newest adapter file in ./runs.

    Raises:
        RAdapterError: there is none.
    """
    found = sorted(RUNS.glob(f"*/{ADAPTER}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RAdapterError(
            f"no run with an adapter in {RUNS.absolute()}; train one with radapter-train, or give"
            " --adapter FILE"
        )
    return found[-1]
