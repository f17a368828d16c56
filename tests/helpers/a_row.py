"""A row of results, of which a test sets what it is about."""

from __future__ import annotations

from typing import Any

from radapter_serve.evaluation.rows import Row


def a_row(dataset: str = "own", share: float = 0.5, **fields: Any) -> Row:
    """A row of 20 images with this share of acc1, unless `fields` says otherwise."""
    usual: dict[str, Any] = {
        "dataset": dataset,
        "task": "zeroshot_classification",
        "source": "adapter",
        "alpha": 0.5,
        "shift": "id",
        "split": "test",
        "metric": "acc1",
        "n": 20,
        "set_digest": f"sha256:{dataset}",
        "adapter_digest": "sha256:2",
        "metrics": {"acc1": share},
        "runtime": 1.5,
    }
    return Row(**{**usual, **fields})
