"""CoOp: learn the context of the prompts, one for all classes, and nothing else.

Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022. For 16-shot ImageNet its code
takes 16 vectors drawn at random, or 4 that start as "a photo of a", and the class at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rivals.context import SETTINGS, Prompted, PromptLearning
from rivals.method import paper
from rivals.run import Run
from rivals.system import System


@dataclass(frozen=True)
class CoOp(PromptLearning):
    """Context optimization.

    Attributes:
        length: vectors of the context.
        words: that the context starts as, of `length` tokens or more; None draws it at random. See
            `Prompted`.
    """

    settings: Mapping[str, Any] = paper(**SETTINGS, batch_size=32, epochs=50)
    length: int = 16
    words: str | None = None

    def start(self, run: Run) -> System:
        return Prompted(run, self.words, self.length)
