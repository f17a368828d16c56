"""The choice of α on validation data, and the file that stores it next to the adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import paired_difference
from radapter_serve.evaluation.rows import (
    KEPT_METRIC,
    KEPT_WELL,
    LOST_MUCH,
    Row,
    by_shift,
    what_is_kept,
)
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.files import checker, first_problem, write_text

FILE = "alpha.json"
RULE = (
    "auto is the smallest alpha above 0 that is not significantly different from the best one on"
    " the same images (their paired difference is within its 95 % interval; like the"
    " one-standard-error rule of Breiman et al., 1984), and at most the run's own. Where alpha 0 is"
    f" not different either, it is the largest of these alphas that keeps {KEPT_WELL:.0%} of the"
    " base's answers among common nouns, or the smallest if that was not measured; 0 if there is"
    f" none. It never keeps less than {LOST_MUCH:.0%} of them. best has the highest score; of"
    " equal ones it is the smallest. The score is the mean over validation sets, and where some are"
    " shifted, the mean of the two means"
)
_DIGITS = 8  # decimals to which scores are compared


@dataclass(frozen=True)
class ValidationSet:
    """A validation set that α is chosen on: fields of its rows."""

    shift: str
    metric: str
    n: int
    set_digest: str


@dataclass(frozen=True)
class CurvePoint:
    """The figures of one α on the validation sets, all in [0, 1].

    Attributes:
        alpha: the α.
        score: according to the rule of the choice.
        behind: distance from the best score.
        plus_minus: half-width of the 95 % interval of `behind`.
        kept: mean of the rows' `kept`; None if it was not measured.
        metrics: each validation set's metric by the set's name.
    """

    alpha: float
    score: float
    behind: float
    plus_minus: float
    kept: float | None
    metrics: dict[str, float]

    @property
    def as_good(self) -> bool:
        """True if the score is not significantly different from the best."""
        return round(self.behind - self.plus_minus, _DIGITS) <= 0


@dataclass(frozen=True)
class Choice:
    """The α that `auto` takes, the best one, and how they were found.

    Attributes:
        alpha: the α that `auto` takes, in [0, 1].
        best: the α with the highest score.
        own_alpha: the α of the adapter's recipe, which `auto` does not exceed.
        rule: the rule of the choice, in words.
        curve: the figures of each α; see `CurvePoint`.
        sets: the validation sets, by name.
        adapter_digest: digest of the adapter that α was chosen for.
    """

    alpha: float
    best: float
    own_alpha: float
    rule: str
    curve: list[CurvePoint]
    sets: dict[str, ValidationSet]
    adapter_digest: str

    @property
    def smallest(self) -> float:
        """The smallest α above 0 whose score is not significantly different from the best."""
        equal = [point.alpha for point in self.curve if point.alpha and point.as_good]
        return min(equal, default=self.best)

    @property
    def kept(self) -> float | None:
        """The fraction of the base's answers that the chosen α keeps, in [0, 1]; None if
        unknown.
        """
        return kept_at(self.curve, self.alpha)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the choice for the user, one line each."""
        by_score = min(self.smallest, self.own_alpha)
        base_is_as_good = any(point.alpha == 0.0 and point.as_good for point in self.curve)
        lines = []
        if base_is_as_good and self.alpha:
            why = "the smallest that is as good"
            if self.kept is not None:
                why = f"the largest as good that keeps {KEPT_WELL:.0%} of the base's answers"
            lines.append(
                "alpha 0, the base as it was, is not significantly different from the best: these"
                " images are too few to show that training helped, or it did not. So auto takes"
                f" alpha {self.alpha:g}, {why}; the run's own is {self.own_alpha:g}."
            )
        elif base_is_as_good:
            lines.append(
                "alpha 0, the base as it was, is not significantly different from the best, and no"
                f" alpha up to the run's own {self.own_alpha:g} is as good and keeps"
                f" {KEPT_WELL:.0%} of the base's answers: auto takes 0, which is the base."
                " Try a lower learning rate."
            )
        elif self.alpha < by_score:
            lines.append(
                f"alpha {by_score:g} is better on these images, but keeps less than"
                f" {LOST_MUCH:.0%} of the base's answers, so auto takes alpha {self.alpha:g};"
                f" radapter-export --alpha best takes {self.best:g}."
            )
        elif self.smallest > self.own_alpha:
            lines.append(
                f"alpha {self.best:g} is better on these images than the run's own alpha"
                f" {self.own_alpha:g}, which auto does not exceed; radapter-export --alpha best"
                " takes it."
            )
        if self.kept is not None:
            lines.append(what_is_kept(self.alpha, self.kept))
        if not by_shift(self.sets)[1]:
            lines.append(
                "No validation set is shifted, so this choice says nothing about images in other"
                " styles than yours."
            )
        return tuple(lines)

    def table(self) -> Table:
        """One row for each α: score, distance from the best, and share kept, in per cent."""
        out = Table(title="Validation: per cent")
        has_kept = any(point.kept is not None for point in self.curve)
        kept_column = [KEPT_METRIC] if has_kept else []
        for column in ("α", "score", "behind the best", *kept_column, *self.sets):
            out.add_column(column, justify="right")
        out.add_column("")
        marks = {"auto": self.alpha, "best": self.best, "the run's own": self.own_alpha}
        for point in self.curve:
            behind = f"{100 * point.behind:.2f} ± {100 * point.plus_minus:.2f}"
            cells = [f"{point.alpha:g}", f"{100 * point.score:.2f}", behind]
            if has_kept:
                cells.append("" if point.kept is None else f"{100 * point.kept:.1f}")
            cells += [f"{100 * point.metrics[name]:.2f}" for name in self.sets]
            cells.append(", ".join(name for name, mark in marks.items() if mark == point.alpha))
            out.add_row(*cells, style="bold" if point.alpha == self.alpha else None)
        return out


def kept_at(curve: Sequence[CurvePoint], alpha: float) -> float | None:
    """The fraction of the base's answers that an α keeps, in [0, 1]; None if unknown."""
    return next((point.kept for point in curve if point.alpha == alpha), None)


def choose(rows: Sequence[Row], own_alpha: float) -> Choice:
    """Choose α from the rows of one adapter at every α on every validation set."""
    kinds = {(row.dense == PROPOSALS, row.proposals is not None) for row in rows}
    if len(kinds) > 1:
        raise RAdapterError(
            "alpha is chosen with a mean over validation sets, and figures of dense segmentation,"
            " of true masks and of a network's masks can't be averaged; keep one of these kinds"
            " among the sets with split: validation"
        )
    adapter_digest = rows[0].adapter_digest
    assert adapter_digest is not None
    sets = {
        row.dataset: ValidationSet(row.shift, row.metric, row.n, row.set_digest) for row in rows
    }
    groups = [names for names in by_shift(sets) if names]
    if not by_shift(sets)[0]:
        raise RAdapterError(
            "alpha can't be chosen without an in-distribution validation set (split: validation)"
        )

    # Score each α. The in-distribution and the shifted group weigh the same, and so do the sets of
    # a group.
    weights = {name: 1 / len(names) / len(groups) for names in groups for name in names}
    models: dict[float, dict[str, Row]] = {}
    for row in rows:
        assert row.alpha is not None
        models.setdefault(row.alpha, {})[row.dataset] = row
    scores = {
        alpha: sum(weights[name] * row.metrics[row.metric] for name, row in of_set.items())
        for alpha, of_set in sorted(models.items())
    }
    # Rounding ties scores that differ by floating-point error alone; the smaller α wins a tie.
    best = max(scores, key=lambda alpha: (round(scores[alpha], _DIGITS), -alpha))

    # Compare each α with the best.
    curve = []
    for alpha, score in scores.items():
        of_set = models[alpha]
        distances = {name: _behind(models[best][name], row) for name, row in of_set.items()}
        behind = sum(weights[name] * distance for name, (distance, _) in distances.items())
        # The data sets are independent, so their variances add up.
        variance = sum((weights[name] * half) ** 2 for name, (_, half) in distances.items())
        shares = [row.metrics[KEPT_METRIC] for row in of_set.values() if KEPT_METRIC in row.metrics]
        kept = sum(shares) / len(shares) if shares else None
        metrics = {name: row.metrics[row.metric] for name, row in of_set.items()}
        curve.append(CurvePoint(alpha, score, behind, sqrt(variance), kept, metrics))

    return Choice(pick(curve, own_alpha), best, own_alpha, RULE, curve, sets, adapter_digest)


def pick(curve: Sequence[CurvePoint], own_alpha: float) -> float:
    """The α that `RULE` takes from figures by rising α, the first of them 0 if it is measured. An α
    whose fraction of kept answers is unknown is not limited by it.
    """
    limited = [point for point in curve if point.alpha <= own_alpha]
    equal = [point for point in limited if point.alpha and point.as_good]
    if curve[0].alpha == 0.0 and curve[0].as_good:
        gentle = [point.alpha for point in equal if point.kept and point.kept >= KEPT_WELL]
        unknown = [point.alpha for point in equal if point.kept is None]
        chosen = max(gentle, default=min(unknown, default=0.0))
    else:
        chosen = min((point.alpha for point in equal), default=own_alpha)
        lasting = [
            point.alpha
            for point in limited
            if point.alpha <= chosen and (point.kept is None or point.kept >= LOST_MUCH)
        ]
        chosen = max(lasting, default=chosen)
    return chosen


def _behind(best: Row, row: Row) -> tuple[float, float]:
    """Distance of a row from the best α's row of the same data set, and the half-width of its 95 %
    interval, both in [0, 1].
    """
    # Pair the rows over images, if both have a result of each.
    best_results = best.per_image
    results = row.per_image
    if best_results is not None and results is not None and len(results) > 1:
        return paired_difference([best_results], [results])
    # Otherwise take the interval of the best row.
    score = best.metrics[best.metric]
    behind = score - row.metrics[row.metric]
    interval = (best.intervals or {}).get(best.metric)
    if interval is None:  # such as mIoU of a single image
        return behind, 0.0
    return behind, score - interval[0]


def save_choice(choice: Choice, adapter: str | Path) -> Path:
    """Write `alpha.json` next to an adapter file or into a run's folder; returns its path."""
    path = choice_file(adapter)
    write_text(path, json.dumps(asdict(choice), indent=2))
    return path


def read_choice(adapter: str | Path, digest: str) -> Choice:
    """Read the choice for a run or an adapter file with this digest; refuses that of another."""
    path = choice_file(adapter)
    again = f"choose it with radapter-eval --adapter {path.parent} --alpha auto"
    try:
        choice = checker(Choice).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RAdapterError(f"no alpha was chosen for {path.parent}; {again}") from None
    except ValidationError as error:
        raise RAdapterError(f"could not read {path}: {first_problem(error)}; {again}") from error
    if choice.adapter_digest != digest:
        raise RAdapterError(f"{path} was chosen for another adapter; {again}")
    return choice


def choice_file(adapter: str | Path) -> Path:
    """The file with the choice for an adapter file or a run."""
    adapter = Path(adapter)
    return (adapter if adapter.is_dir() else adapter.parent) / FILE
