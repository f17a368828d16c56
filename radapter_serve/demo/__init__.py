"""`radapter-demo`: a small base model, emoji drawings of several vendors, and every step from data
to answer. No other package imports this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoSettings:
    """Settings of a demo.

    Attributes:
        out: folder for all results of the demo: images, runs, pictures, merged checkpoints, model
            repository, index.
        seed: seed of the fine-tuning.
        steps: optimizer steps of each fine-tuning; the demo's own by default.
        alpha: α of the exported release, from 0 to 1; the recipe's by default.
        limit: the most images of each data set to evaluate; all by default.
    """

    out: Path = Path("demo-output")
    seed: int = 0
    steps: int | None = None
    alpha: float | None = None
    limit: int | None = None
