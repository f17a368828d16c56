"""`python -m rivals.unlabelled`: ways to choose α by images without labels, against α = 0.5.

Each way sees the probabilities of a test set at every α and no label, and names an α. All ways were
written down before any of them was measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.special import entr

from radapter_serve.cli import run as run_command
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import ClassificationSet, EvaluationSet
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.models import Candidate
from radapter_serve.evaluation.run import evaluate_scored
from radapter_serve.evaluation.sets import open_set
from rivals.flags import Flags, check_seeds
from rivals.judge import models_of
from rivals.layout import markdown, spread, with_interval
from rivals.make import command_line, machine, publish, say
from rivals.method import Method, learned
from rivals.run import Run
from rivals.tables import TABLES

ROW = "R-Adapter"  # of the main table
GRID = tuple(round(0.1 * step, 1) for step in range(11))
USUAL = "always 0.5"
LABELLED = "validation in distribution, with its labels"
EACH = "each image its own, least entropy"


@dataclass(frozen=True)
class Answers:
    """What one run says of a data set at every α of `GRID`.

    Attributes:
        said: class of each image, integer [A, N].
        entropy: of the probabilities of each image, in nats, float [A, N].
        evenness: entropy of the mean of the probabilities over the images, in nats, float [A].
        labels: of each image, integer [N].
    """

    said: NDArray[np.int64]
    entropy: Floats
    evenness: Floats
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, probabilities: Sequence[Floats], labels: NDArray[np.int64]) -> Answers:
        """Of probabilities [N, C] at each α."""
        return cls(
            np.stack([one.argmax(axis=1) for one in probabilities]),
            np.stack([entr(one).sum(axis=1) for one in probabilities]),
            np.array([entr(one.mean(axis=0)).sum() for one in probabilities]),
            labels,
        )

    @property
    def accuracy(self) -> Floats:
        """At each α, in per cent, [A]."""
        return np.asarray(100 * (self.said == self.labels).mean(axis=1))

    @property
    def agreement(self) -> Floats:
        """Share of the images of which two α say the same, [A, A]."""
        return np.asarray((self.said[:, None] == self.said[None]).mean(axis=2))


def least_entropy(answers: Answers) -> int:
    """Where the mean entropy is least: the place of that α in the grid."""
    return int(answers.entropy.mean(axis=1).argmin())


def most_information(answers: Answers) -> int:
    """Where the classes tell most of the images: evenness less mean entropy."""
    return int((answers.evenness - answers.entropy.mean(axis=1)).argmax())


def neighbours(answers: Answers) -> int:
    """Where the answers are most like those of the α on either side; an end has one side."""
    same = np.diagonal(answers.agreement, offset=1)
    sides = [same[max(place - 1, 0) : place + 1].mean() for place in range(len(same) + 1)]
    return int(np.argmax(sides))


def all_others(answers: Answers) -> int:
    """Where the answers are most like those of all α together."""
    return int(answers.agreement.mean(axis=1).argmax())


WAYS: dict[str, Callable[[Answers], int]] = {
    USUAL: lambda answers: GRID.index(0.5),
    "least mean entropy": least_entropy,
    "most information": most_information,
    "agreement of neighbours": neighbours,
    "agreement with all": all_others,
}


@dataclass(frozen=True)
class Outcome:
    """What came of a way on a test set.

    Attributes:
        alpha: that it chose; their mean where each image has its own.
        regret: how far it stays below the best α, in points.
    """

    alpha: float
    regret: float


def of_each_image(answers: Answers) -> tuple[float, float]:
    """The mean α, and the accuracy in per cent, where each image is answered by the α at which its
    entropy is least.
    """
    best = answers.entropy.argmin(axis=0)
    said = answers.said[best, np.arange(len(best))]
    return float(np.take(GRID, best).mean()), 100 * float((said == answers.labels).mean())


def outcomes(answers: Mapping[str, Answers], validation: Answers) -> dict[str, dict[str, Outcome]]:
    """What each way chooses for each test set, and what it loses by that.

    Args:
        answers: of the test sets, by name.
        validation: of the images that choose one α for all sets, by their labels.
    """
    best = int(validation.accuracy.argmax())
    found: dict[str, dict[str, Outcome]] = {}
    for name, one in answers.items():
        accuracy = one.accuracy
        places = {way: choose(one) for way, choose in WAYS.items()} | {LABELLED: best}
        reached = {way: (GRID[place], accuracy[place]) for way, place in places.items()}
        for way, (alpha, value) in (reached | {EACH: of_each_image(one)}).items():
            outcome = Outcome(alpha, float(accuracy.max() - value))
            found.setdefault(way, {})[name] = outcome
    return found


def answers_of(models: Sequence[Candidate], data: EvaluationSet) -> Answers:
    """What models say of a set of images with one label each."""
    if not isinstance(data, ClassificationSet):
        raise RAdapterError(f"{data.entry.name} is no set of images with one label each")
    scored = evaluate_scored(models, data)
    # R-Adapter does not learn the scale, so that of any α is that of all.
    found = [models[0].probabilities(one.cosines) for one in scored if one.cosines is not None]
    return Answers.of(found, np.asarray(data.labels))


def table(found: Sequence[Mapping[str, Mapping[str, Outcome]]]) -> str:
    """Ways down, data sets across, as Markdown; each has what is lost, and the mean α.

    Args:
        found: by seed, from `outcomes`.
    """
    sets = list(found[0][USUAL])
    rows = []
    for way in found[0]:
        means = [_lost(one[way]) for one in found]
        leads = [_lost(one[USUAL]) - own for one, own in zip(found, means, strict=True)]
        lead = "" if way == USUAL else with_interval(leads, "+")
        of_sets = []
        for name in sets:
            those = [one[way][name] for one in found]
            alpha = mean(one.alpha for one in those)
            of_sets.append(f"{spread([one.regret for one in those])} (α {alpha:.1f})")
        rows.append([way, spread(means), lead, *of_sets])
    return markdown(["way", "mean of the sets", f"ahead of {USUAL}", *sets], rows)


def _lost(of_sets: Mapping[str, Outcome]) -> float:
    return mean(one.regret for one in of_sets.values())


def unlabelled(
    flags: tyro.conf.OmitArgPrefixes[Flags],
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    rate: float = 5e-4,
) -> None:
    """Let each way choose α for each test set and seed; print how far it stays below the best α,
    and write it as Markdown.

    Args:
        flags: as of rivals.table; what it has learned counts.
        seeds: R-Adapter learns once for each.
        rate: its learning rate.
    """
    check_seeds(seeds)
    benchmark = flags.benchmark()
    validation = open_set(benchmark.suite, benchmark.own_validation(), limit=flags.limit)
    sets = benchmark.sets("test", flags.limit)
    row = TABLES["main"].rows[ROW]
    method: Method = dataclasses.replace(row, settings={**row.settings, "learning_rate": rate})
    found = []
    for seed in seeds:
        say(f"{ROW}, seed {seed}")
        run = Run({**benchmark.given, "seed": seed}, flags.out / "learned")
        models = models_of(learned(method, run), run.of(method.settings), GRID)
        assert models is not None  # R-Adapter's end is a plain CLIP
        answers = {data.entry.name: answers_of(models, data) for data in sets}
        found.append(outcomes(answers, answers_of(models, validation)))
    parts = [
        "# α without labels",
        f"`{command_line('rivals.unlabelled')}`, {datetime.date.today()}, {machine()}.\n"
        f"Benchmark {benchmark.name}, {ROW} at the rate {rate:g}, seeds"
        f" {', '.join(map(str, seeds))}. In points: how far the accuracy at the α that a way"
        " chooses stays below that of the best α of 0, 0.1 to 1, mean ± standard deviation over the"
        " seeds, and the mean of these α. What a way is ahead of"
        f" {USUAL} by has its interval of 95 %.",
        table(found),
    ]
    publish(parts, flags.out / "unlabelled.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(unlabelled, argv, prog="python -m rivals.unlabelled")


if __name__ == "__main__":
    sys.exit(main())
