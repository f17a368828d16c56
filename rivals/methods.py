"""All systems of the paper's tables, by the names that commands know them by."""

from __future__ import annotations

from rivals.flyp import FineTuneLikePretrain
from rivals.full import FullFineTuning
from rivals.method import Method
from rivals.radapter import ZeroShot, r_adapter

METHODS: dict[str, Method] = {
    "zero-shot": ZeroShot(),
    "ft": FullFineTuning(),
    "wise-ft": FullFineTuning(alpha=0.5),
    "flyp": FineTuneLikePretrain(),
    "wise-flyp": FineTuneLikePretrain(alpha=0.5),
    "r-adapter": r_adapter("imagenet"),
}
