"""Images of test data that are validation data, too: the figures of what they choose are too
high.
"""

from __future__ import annotations

from radapter_serve.evaluation.evaluation_set import EvaluationSet


class Overlap:
    """Compares the images of test sets with those of validation sets, by the digests of their
    files.

    Attributes:
        warnings: a line for each test set that has some in common.
    """

    def __init__(self) -> None:
        self._set_of: dict[str, str] = {}
        self.warnings: list[str] = []

    def chosen_by(self, data: EvaluationSet) -> None:
        """Take a set that something is chosen by."""
        self._set_of |= dict.fromkeys(data.contents, data.entry.name)

    def tested(self, data: EvaluationSet) -> None:
        """Take a test set."""
        found = [self._set_of[digest] for digest in data.contents if digest in self._set_of]
        if found:
            self.warnings.append(
                f"{data.entry.name}: warning: {len(found)} of its {len(data)} images are validation"
                f" images of {', '.join(sorted(set(found)))} too; the figures of what they chose"
                " are too high"
            )
