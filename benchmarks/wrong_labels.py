"""How many of the labels in doubt are wrong: drawings of which some labels were exchanged, a run of
them, and what `radapter-eval --doubtful` lists.

python benchmarks/wrong_labels.py --data DATA/drawings
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import RESULTS, Report, say, with_spread

from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.demo.data import BASE
from radapter_serve.evaluation.doubtful import Doubtful
from radapter_serve.evaluation.start import doubtful
from radapter_serve.training import train

SHARES = (0.05, 0.1)  # of labels that are exchanged
LISTED = 50


def exchanged(labels: Sequence[str], names: Sequence[str], share: float, seed: int) -> list[str]:
    """The labels, a share of them exchanged for another class, which the seed draws."""
    generator = np.random.default_rng(seed)
    found = list(labels)
    for number in generator.permutation(len(labels))[: round(share * len(labels))].tolist():
        others = [name for name in names if name != labels[number]]
        found[number] = others[generator.integers(len(others))]
    return found


def precision(listed: Sequence[Doubtful], wrong: set[int], count: int) -> float:
    """The share of the first images of a list whose label is wrong, in per cent."""
    return 100 * sum(one.number in wrong for one in listed[:count]) / count


# What a list may be sorted by; the last is what the command sorts by.
ORDERS: dict[str, Callable[[Doubtful], float]] = {
    "the base alone": lambda one: one.base_margin,
    "the run alone": lambda one: one.run_margin,
    "both": lambda one: min(one.base_margin, one.run_margin),
}


def measured(data: Path, share: float, seed: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Train on drawings with wrong labels; of each order the precision of the first 50, and of as
    many as are wrong, in per cent.
    """
    files = sorted((data / "train").resolve().glob("*/*.png"))
    true = [file.parent.name for file in files]
    lines = read_label_file(data / "classes.txt")
    labels = exchanged(true, [split_label(line)[0] for line in lines], share, seed)
    folder.mkdir()
    with (folder / "drawings.csv").open("w", encoding="utf-8", newline="") as table:
        rows = [(str(file), label) for file, label in zip(files, labels, strict=True)]
        csv.writer(table).writerows([("image", "label"), *rows])
    had = [line for line in lines if split_label(line)[0] in labels]
    (folder / "classes.txt").write_text("\n".join(had), encoding="utf-8")
    run = train(
        architecture=f"local-dir:{BASE}",
        data=f"csv:{folder}/drawings.csv",
        classes=folder / "classes.txt",
        templates=str(data / "templates.txt"),
        batch_size=64,
        epochs=5,
        workers=0,
        threads=1,
        tracker="none",
        save_every=None,
        seed=seed,
        out=folder / "run",
    )
    listed, _ = doubtful(run, len(files), out=folder)
    wrong = {number for number in range(len(files)) if labels[number] != true[number]}
    return {
        name: tuple(
            precision(sorted(listed, key=order, reverse=True), wrong, count)
            for count in (LISTED, len(wrong))
        )  # type: ignore[misc]
        for name, order in ORDERS.items()
    }


def main() -> None:
    """Train with each share and seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the drawings, DATA/drawings")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each share")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    report = Report(
        "wrong_labels",
        "Labels in doubt",
        "A share of the labels of 1,380 coloured drawings of 248 things is exchanged for another"
        " class; a run learns from them at full rank, 5 epochs in batches of 64, from the demo's"
        " base. Precision: of the first images of the list, those whose label was exchanged, in %,"
        f" mean ± standard deviation over {arguments.seeds} seeds. Chance is the share.",
        timed=False,
    )
    rows = []
    for share in SHARES:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ORDERS}
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as name:
                one = measured(arguments.data, share, seed, Path(name, "data"))
            say(f"{share:.0%}, seed {seed}: {one}")
            for order, figures in one.items():
                found[order].append(figures)
        for order, figures in found.items():
            cells = [with_spread(column) for column in zip(*figures, strict=True)]
            rows.append([f"{share:.0%} wrong, {order}", *cells])
    columns = ["labels, sorted by", f"precision of {LISTED}", "of as many as are wrong"]
    report.table("Precision, %", columns, rows)
    report.note(
        "The fewer labels are wrong, the fewer of a list are: the figures of the least share are"
        " the lowest. Where `both` equals `the run alone`, the run doubts less than the base."
    )
    report.write(arguments.out)


if __name__ == "__main__":
    main()
