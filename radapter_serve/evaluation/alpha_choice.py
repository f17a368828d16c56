"""The choice of α on validation data, and the file that stores it next to the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import paired_difference
from radapter_serve.evaluation.rows import KEPT, Row, by_shift
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.files import checker, first_problem, staged

FILE = "alpha.json"
RULE = (
    "auto is the smallest alpha above 0 that can't be told from the best one by the same images"
    " (their paired difference is within its 95 % interval; like the one-standard-error rule of"
    " Breiman et al., 1984), and at most the run's own; where alpha 0 can't be told from the best"
    " either, the run's own. best has the highest score; of equal ones it is the smallest. The"
    " score is the mean over validation sets, and where some are shifted, the mean of the two means"
)
_DIGITS = 8  # decimals to which scores are compared
MUCH_KEPT = 0.9  # share of the base's answers; a choice that keeps less gets a note


@dataclass(frozen=True)
class ValidationSet:
    """A validation set that α is chosen on: fields of its rows."""

    shift: str
    metric: str
    n: int
    set_digest: str


@dataclass(frozen=True)
class Choice:
    """The α that `auto` takes, the best one, and how they were found.

    Attributes:
        alpha: the α that `auto` takes, in [0, 1].
        best: the α with the highest score.
        own_alpha: the α of the adapter's recipe, which `auto` does not exceed.
        rule: the rule of the choice, in words.
        curve: for each α, all in [0, 1]: `alpha`; `score` by the rule; `behind`, the distance from
            the best score, and `plus_minus`, the half-width of its interval; `kept`, the mean of
            the rows' `kept`, where measured; and each validation set's metric by its name.
        sets: the validation sets, by name.
        adapter_digest: digest of the adapter that α was chosen for.
    """

    alpha: float
    best: float
    own_alpha: float
    rule: str
    curve: list[dict[str, float]]
    sets: dict[str, ValidationSet]
    adapter_digest: str

    @property
    def smallest(self) -> float:
        """The smallest α above 0 whose score can't be told from the best."""
        equal = [point["alpha"] for point in self.curve if point["alpha"] and _as_good(point)]
        return min(equal, default=self.best)

    @property
    def kept(self) -> float | None:
        """The share of the base's answers that the chosen α keeps, in [0, 1]; None if unknown."""
        return next((point.get(KEPT) for point in self.curve if point["alpha"] == self.alpha), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the choice for the user, one line each."""
        equal = [point["alpha"] for point in self.curve if _as_good(point)]
        lines = []
        if 0.0 in equal and self.alpha == self.own_alpha:
            lines.append(
                "alpha 0, the base as it was, can't be told from the best: these images are too few"
                f" to tell that training helped, so auto takes the run's own alpha {self.alpha:g}."
            )
        elif 0.0 in equal:
            lines.append(
                "alpha 0, the base as it was, can't be told from the best, and the run's own alpha"
                f" {self.own_alpha:g} is worse: training did not help on these images. auto takes"
                f" {self.alpha:g}, the largest up to the run's own that can't be told from the"
                " best; try a lower learning rate."
            )
        elif self.alpha not in equal:
            lines.append(
                f"alpha {self.best:g} is better on these images than the run's own alpha"
                f" {self.own_alpha:g}, which auto does not exceed; radapter-export --alpha best"
                " takes it."
            )
        kept = self.kept
        if kept is not None and kept < MUCH_KEPT:
            enough = [point["alpha"] for point in self.curve if point.get(KEPT, 0.0) >= MUCH_KEPT]
            smaller = max((alpha for alpha in enough if alpha < self.alpha), default=0.0)
            instead = f"alpha {smaller:g} keeps more" if smaller else "a smaller alpha keeps more"
            lines.append(
                f"alpha {self.alpha:g} keeps {100 * kept:.1f} % of what the base answers among"
                " common nouns on these images: the answers to labels and searches that you did not"
                f" train change, too. If you need them, {instead}, and so does training with more"
                " --preserve and --preserve-words."
            )
        if not by_shift(self.sets)[1]:
            lines.append(
                "No validation set is shifted, so this choice says nothing about images in other"
                " styles than yours."
            )
        return tuple(lines)

    def table(self) -> Table:
        """One row for each α: score, distance from the best, and share kept, in per cent."""
        out = Table(title="Validation: per cent")
        has_kept = any(KEPT in point for point in self.curve)
        for column in ("α", "score", "behind the best", *([KEPT] if has_kept else []), *self.sets):
            out.add_column(column, justify="right")
        out.add_column("")
        marks = {"auto": self.alpha, "best": self.best, "the run's own": self.own_alpha}
        for point in self.curve:
            alpha = point["alpha"]
            behind = f"{100 * point['behind']:.2f} ± {100 * point['plus_minus']:.2f}"
            cells = [f"{alpha:g}", f"{100 * point['score']:.2f}", behind]
            if has_kept:
                cells.append(f"{100 * point[KEPT]:.1f}" if KEPT in point else "")
            cells += [f"{100 * point[name]:.2f}" for name in self.sets]
            cells.append(", ".join(name for name, mark in marks.items() if mark == alpha))
            out.add_row(*cells, style="bold" if alpha == self.alpha else None)
        return out


def choose(rows: Sequence[Row], own_alpha: float) -> Choice:
    """Choose α from the rows of one adapter at every α on every validation set."""
    kinds = {(row.dense == PROPOSALS, row.proposals is not None) for row in rows}
    if len(kinds) > 1:
        raise RAdapterError(
            "alpha is chosen by a mean over validation sets, and figures of dense segmentation, of"
            " true masks and of a network's masks can't be averaged; keep one of these kinds among"
            " the sets with split: validation"
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
    # The in-distribution and the shifted group weigh the same, and so do the sets of a group.
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
    curve = []
    for alpha, score in scores.items():
        distances = {name: _behind(models[best][name], row) for name, row in models[alpha].items()}
        behind = sum(weights[name] * distance for name, (distance, _) in distances.items())
        # The data sets are independent, so their variances add up.
        variance = sum((weights[name] * half) ** 2 for name, (_, half) in distances.items())
        point = {"alpha": alpha, "score": score, "behind": behind, "plus_minus": sqrt(variance)}
        kept = [row.metrics[KEPT] for row in models[alpha].values() if KEPT in row.metrics]
        if kept:
            point[KEPT] = sum(kept) / len(kept)
        metrics = {name: row.metrics[row.metric] for name, row in models[alpha].items()}
        curve.append({**point, **metrics})
    as_good = [point["alpha"] for point in curve if _as_good(point)]
    if 0.0 not in as_good:
        chosen = min(as_good[0], own_alpha)
    elif own_alpha in as_good:
        chosen = own_alpha
    else:
        chosen = max(alpha for alpha in as_good if alpha <= own_alpha)
    return Choice(chosen, best, own_alpha, RULE, curve, sets, adapter_digest)


def _as_good(point: Mapping[str, float]) -> bool:
    """True if the score of this α can't be told from the best."""
    return round(point["behind"] - point["plus_minus"], _DIGITS) <= 0


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
    path = _path(adapter)
    with staged(path) as temporary:
        temporary.write_text(json.dumps(asdict(choice), indent=2), encoding="utf-8")
    return path


def chosen(adapter: str | Path) -> Choice:
    """Read the choice for an adapter file or a run; refuses one made for another adapter."""
    from radapter_serve.adapter import load_adapter  # torch takes seconds to load

    digest = load_adapter(adapter).digest
    path = _path(adapter)
    again = f"choose by radapter-eval --adapter {path.parent} --alpha auto"
    try:
        choice = checker(Choice).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RAdapterError(f"no alpha was chosen for {path.parent}; {again}") from None
    except ValidationError as error:
        raise RAdapterError(f"could not read {path}: {first_problem(error)}; {again}") from error
    if choice.adapter_digest != digest:
        raise RAdapterError(f"{path} was chosen for another adapter; {again}")
    return choice


def _path(adapter: str | Path) -> Path:
    adapter = Path(adapter)
    return (adapter if adapter.is_dir() else adapter.parent) / FILE
