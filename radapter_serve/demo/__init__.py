"""`radapter-demo`: a small base model, emoji drawings of several vendors, and every step from data
to answer. Nothing else imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoSettings:
    """Settings of a demo.

    Attributes:
        out: folder for all that the demo makes: images, runs, pictures, merged checkpoints, model
            repository, index.
        seed: of the fine-tuning.
        steps: optimizer steps of each fine-tuning; the demo's own if none is given.
        alpha: re-scaling of the exported release, from 0 to 1; the recipe's if none is given.
        limit: images of each data set at most that are evaluated; all if none is given.
    """

    out: Path = Path("demo-output")
    seed: int = 0
    steps: int | None = None
    alpha: float | None = None
    limit: int | None = None
