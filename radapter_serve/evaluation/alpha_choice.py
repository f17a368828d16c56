"""Choosing α on validation data, and the file that keeps the choice beside the adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import PROPOSALS
from radapter_serve.evaluation.results import by_shift, curve, own_metric
from radapter_serve.evaluation.row import Row
from radapter_serve.files import staged

FILE = "alpha.json"
RULE = (
    "the alpha with the highest mean score over in-distribution validation sets; ties go to the"
    " smallest"
)
RULE_SHIFTED = (
    "the alpha with the highest mean of two scores, those of in-distribution and of shifted"
    " validation sets; ties go to the smallest"
)


@dataclass(frozen=True)
class ValidationSet:
    """What a choice says about a validation set: as of a row."""

    shift: str
    metric: str
    n: int
    set_digest: str


@dataclass(frozen=True)
class Choice:
    """An α and how it was found.

    Attributes:
        alpha: the choice, in [0, 1].
        rule: in words.
        curve: for each α: `alpha`, `score` by the rule, and each validation set's metric, in per
            cent.
        sets: the validation sets, by name.
        adapter_digest: of the adapter that it was chosen for.
        smallest: the smallest α whose score is within the 95 % interval of the best one's, where no
            set is shifted: as far as such data can tell it is as good on it, and it keeps more of
            the base. None where a set is shifted, or a single image gives no interval.
    """

    alpha: float
    rule: str
    curve: list[dict[str, float]]
    sets: dict[str, ValidationSet]
    adapter_digest: str
    smallest: float | None = None

    @property
    def shifted(self) -> bool:
        """Whether a validation set was shifted."""
        return bool(by_shift(self.sets)[1])

    @property
    def smaller(self) -> float | None:
        """What may be taken in place of the best: `smallest`, where that is another α and not the
        base.
        """
        return self.smallest if self.smallest and self.smallest < self.alpha else None


def choose(rows: Sequence[Row]) -> Choice:
    """Choose α from rows of validation sets.

    Args:
        rows: from `evaluate`, of one adapter, every α on every validation set.

    Raises:
        RAdapterError: no set is in distribution, or different ways of segmentation would be
            averaged.
    """
    kinds = {(row.dense == PROPOSALS, row.proposals is not None) for row in rows}
    if len(kinds) > 1:
        raise RAdapterError(
            "alpha is chosen by a mean over validation sets, and dense segmentation and proposals"
            " are no mean, nor are true masks and a network's; leave all but one of them out of the"
            " sets with split: validation"
        )
    adapter_digest = rows[0].adapter_digest
    assert adapter_digest is not None
    sets = {
        row.dataset: ValidationSet(row.shift, row.metric, row.n, row.set_digest) for row in rows
    }
    groups = by_shift(sets)
    if not groups[0]:
        raise RAdapterError(
            "alpha can't be chosen without an in-distribution validation set (split: validation)"
        )
    rule = RULE_SHIFTED if groups[1] else RULE
    points = []
    for point in curve(rows):
        means = [sum(point[name] for name in group) / len(group) for group in groups if group]
        points.append({"alpha": point["alpha"], "score": sum(means) / len(means), **point})
    # Scores are rounded: where two differ by no more than the error of a sum, the smaller α wins.
    best = max(points, key=lambda point: (round(point["score"], 6), -point["alpha"]))
    at_best = [row for row in rows if row.alpha == best["alpha"]]
    smallest = None if groups[1] else _smallest(points, best, at_best)
    return Choice(best["alpha"], rule, points, sets, adapter_digest, smallest)


def _smallest(
    points: Sequence[Mapping[str, float]], best: Mapping[str, float], rows: Sequence[Row]
) -> float | None:
    """The smallest α within the interval of the best one, which has these rows; their sets are
    independent.
    """
    variance = 0.0
    for row in rows:
        interval = (row.intervals or {}).get(row.metric)
        if interval is None:
            return None
        variance += (own_metric(row) - 100 * interval[0]) ** 2
    low = best["score"] - sqrt(variance) / len(rows)
    return min(point["alpha"] for point in points if round(point["score"] - low, 6) >= 0)


def save_choice(choice: Choice, adapter: str | Path) -> Path:
    """Write `alpha.json` beside an adapter, in one piece; returns its path.

    Args:
        choice: from `choose`.
        adapter: adapter file, or the folder of a run.
    """
    path = _path(adapter)
    try:
        with staged(path) as temporary:
            temporary.write_text(json.dumps(asdict(choice), indent=2), encoding="utf-8")
    except OSError as error:
        raise RAdapterError(f"could not write {path}: {error.strerror}") from error
    return path


def load_choice(adapter: str | Path) -> Choice:
    """Read the choice that stands beside an adapter.

    Args:
        adapter: adapter file, or the folder of a run.

    Raises:
        RAdapterError: none was made, or the file is broken.
    """
    path = _path(adapter)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(Choice)}
        if set(values) != names:
            raise ValueError(
                f"it has {', '.join(sorted(values))}, and should have {', '.join(sorted(names))}"
            )
        sets = {name: ValidationSet(**of) for name, of in values["sets"].items()}
        return Choice(**{**values, "sets": sets})
    except FileNotFoundError:
        raise RAdapterError(
            f"no alpha was chosen for {path.parent}; choose one: radapter-eval --adapter"
            f" {path.parent} --alpha auto"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RAdapterError(
            f"could not read {path}: {error}; choose again: radapter-eval --alpha auto"
        ) from error


def chosen(adapter: str | Path) -> Choice:
    """The α that was chosen for an adapter, and how.

    Args:
        adapter: adapter file, or the folder of a run.

    Raises:
        RAdapterError: none was chosen, or it was for another adapter than the one that is there
            now.
    """
    from radapter_serve.adapter import load_adapter  # torch takes seconds to load

    choice = load_choice(adapter)
    if choice.adapter_digest != load_adapter(adapter).digest:
        raise RAdapterError(
            f"{_path(adapter)} was chosen for another adapter; choose again: "
            f"radapter-eval --adapter {adapter} --alpha auto"
        )
    return choice


def _path(adapter: str | Path) -> Path:
    adapter = Path(adapter)
    return (adapter if adapter.is_dir() else adapter.parent) / FILE
