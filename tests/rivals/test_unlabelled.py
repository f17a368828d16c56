"""α chosen by images without labels: each way by answers that were written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rivals.unlabelled import (
    EACH,
    GRID,
    LABELLED,
    USUAL,
    WAYS,
    Answers,
    Outcome,
    main,
    outcomes,
    table,
)
from tests.rivals.test_table import benchmark_file as benchmark_file

LABELS = np.array([0, 1, 0, 1])


def answers(sure: dict[int, float], said: dict[int, list[int]] | None = None) -> Answers:
    """Of two classes: every image is right and has 0.6, unless the place of an α has another
    probability or other answers.
    """
    found = []
    for place in range(len(GRID)):
        high = sure.get(place, 0.6)
        classes = np.array((said or {}).get(place, LABELS))
        rows = np.full((len(LABELS), 2), 1 - high)
        rows[np.arange(len(LABELS)), classes] = high
        found.append(rows.astype(np.float32))
    return Answers.of(found, LABELS)


def test_entropy_and_evenness_are_by_hand() -> None:
    one = answers({3: 0.75}, {3: [0, 0, 0, 0]})
    nats = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert one.entropy[3] == pytest.approx([nats] * 4)
    assert one.evenness[3] == pytest.approx(nats)  # the mean of equal rows
    assert one.evenness[2] == pytest.approx(np.log(2))  # of as many images of one as of the other
    assert one.accuracy.tolist() == [100] * 3 + [50] + [100] * 7


def test_certain_answers_that_are_all_alike_tell_nothing() -> None:
    """At 0.8 all images are one class for sure; at 0.3 the classes are told apart."""
    one = answers({3: 0.9, 8: 0.99}, {8: [0, 0, 0, 0]})
    assert WAYS["least mean entropy"](one) == 8
    assert WAYS["most information"](one) == 3


def test_agreement_is_with_both_sides_or_with_all() -> None:
    """Answers change at every α but from 0.6 to 0.8; those of 0.2 are those of five others."""
    first = [0, 0, 0, 0]
    said = {
        place: [place % 2, 1 - place % 2, (place // 2) % 2, (place // 4) % 2] for place in range(11)
    }
    said |= {place: [1, 1, 1, 1] for place in (6, 7, 8)}
    assert WAYS["agreement of neighbours"](answers({}, said)) == 7
    mixed = {place: first if place % 2 == 0 else [1, 1, 1, place % 2] for place in range(11)}
    mixed[5] = [0, 0, 1, 1]
    one = answers({}, mixed)
    same = [[np.mean(np.equal(mixed[a], mixed[b])) for b in range(11)] for a in range(11)]
    assert one.agreement == pytest.approx(np.array(same))
    assert WAYS["agreement with all"](one) == int(np.argmax(np.mean(same, axis=1)))


def test_regret_is_to_the_best_alpha_of_the_set() -> None:
    """At 0.5 a half of the answers are right, at 0.9, where they are surest, three of four."""
    one = answers({9: 0.99}, {5: [0, 0, 0, 0], 9: [0, 1, 0, 0]})
    validation = answers({}, {place: [1, 0, 1, 0] for place in range(11) if place != 5})
    found = outcomes({"set": one}, validation)
    assert found[USUAL] == {"set": Outcome(0.5, 50.0)}
    assert found["least mean entropy"] == {"set": Outcome(0.9, 25.0)}
    assert found[EACH]["set"].regret == 25.0
    assert found[EACH]["set"].alpha == pytest.approx(0.9)
    assert found[LABELLED] == {"set": Outcome(0.5, 50.0)}  # validation finds 0.5 best
    lead = {
        row.split(" | ")[0].strip("| "): row.split(" | ")[2] for row in table([found]).split("\n")
    }
    assert lead["least mean entropy"] == "+25.0"
    assert lead[LABELLED] == "+0.0"


def test_each_image_may_have_its_own_alpha() -> None:
    """The surest answer to images 0 and 1 is at 0.1, to images 2 and 3 at 0.7: all are right."""
    one = answers({}, {place: [1, 0, 1, 0] for place in range(11)})
    for place, images in ((1, [0, 1]), (7, [2, 3])):
        one.said[place, images] = LABELS[images]
        one.entropy[place, images] = 0.01
    outcome = outcomes({"set": one}, one)[EACH]["set"]
    assert outcome.alpha == pytest.approx(0.4)
    assert outcome.regret == 50.0 - 100.0


@pytest.mark.slow
def test_the_command_writes_the_table(benchmark_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ["--data", str(benchmark_file), "--out", str(out), "--seeds", "0", "1"]
    assert main(call) == 0
    rows = [line for line in (out / "unlabelled.md").read_text().splitlines() if line[:1] == "|"]
    heads = ["way", "mean of the sets", f"ahead of {USUAL}", "same", "other", "third"]
    assert [head.strip() for head in rows[0].strip("|").split("|")] == heads
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == [*WAYS, LABELLED, EACH]
    for row in rows[2:]:
        mean, _, same, other, third = (cell.strip() for cell in row.strip("|").split("|")[1:])
        assert same == other == third and same.startswith(mean)  # the sets have the same images


@pytest.mark.slow
def test_a_suite_without_validation_is_refused_in_one_line(
    benchmark_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(suite.read_text().replace("split: validation", "split: test"))
    assert main(["--data", str(benchmark_file), "--out", str(tmp_path / "out")]) == 2
    assert "0 sets with split: validation and shift: id" in capsys.readouterr().err
