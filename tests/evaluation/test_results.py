"""Rows of results, and what is shown of them, by hand."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Variant
from radapter_serve.evaluation.evaluate import facts_of
from radapter_serve.evaluation.evaluation_set import as_seen, by_bin, by_class
from radapter_serve.evaluation.results import Results, common_unit, harmonic_means, metric_name, table
from radapter_serve.evaluation.suite import Entry, entry_of


def row(dataset: str, share: float, **fields: Any) -> dict[str, Any]:
    return {
        "dataset": dataset, "metric": "acc1", "metrics": {"acc1": share}, "shift": "id", "source": "adapter",
        "alpha": 0.5, "n": 20, "runtime": 1.5, "set_digest": f"sha256:{dataset}", "classes": 3, **fields,
    }  # fmt: skip


def test_a_figure_has_its_interval() -> None:
    rows = [row("a", 0.5, intervals={"acc1": [0.4, 0.61]}), row("b", 0.25)]
    cells = [list(column.cells) for column in table(rows, "t").columns]
    assert cells == [["adapter"], ["0.5"], ["50.00\n40.0 – 61.0"], ["25.00"], ["37.50"]]


def test_an_accuracy_has_its_calibration_error_beside_it() -> None:
    calibrated = row("a", 0.5, intervals={"acc1": [0.4, 0.61]}, metrics={"acc1": 0.5, "ece": 0.123})
    assert list(table([calibrated], "t").columns[2].cells) == ["50.00\n40.0 – 61.0\nECE 12.3"]


def test_base_and_novel_classes_of_one_model_are_joined() -> None:
    rows = [row("base", 0.5), row("other", 0.1), row("novel", 0.75), row("base", 0.9, alpha=1.0)]
    (mean,) = harmonic_means(rows, [("base", "novel")])
    assert mean == {
        "dataset": "base and novel", "metric": "harmonic_mean", "shift": "id", "source": "adapter", "alpha": 0.5,
        "n": 40, "runtime": 3.0, "set_digest": "sha256:base sha256:novel",
        "metrics": {"base": 0.5, "novel": 0.75, "harmonic_mean": pytest.approx(0.6)},
    }  # fmt: skip


def test_rows_are_written_into_new_folders_and_read_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "folder")
    results.add([row("a", 0.5)])
    results.add([row("bü", 0.25)])
    again = Results(tmp_path / "new" / "folder", resume=True)
    assert again.rows == [row("a", 0.5), row("bü", 0.25)]
    assert again.find(row("bü", 0.75, runtime=9)) == row("bü", 0.25) and again.find(row("c", 0.5)) is None


def test_figures_of_each_class() -> None:
    found = by_class(["cat, kitty", "dog"], np.array([3, 0]), recall=np.array([1 / 3, np.nan]))
    assert found == {
        "per_class": [{"class": "cat", "n": 3, "recall": 0.3333}, {"class": "dog", "n": 0, "recall": None}]
    }


def test_figures_of_each_bin_of_confidence() -> None:
    assert by_bin(np.array([[3, 0], [1.0, 0], [2, 0]])) == [
        {"n": 3, "confidence": 0.3333, "accuracy": 0.6667},
        {"n": 0, "confidence": None, "accuracy": None},
    ]


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
@pytest.mark.parametrize("turn", [True, False])
def test_a_model_sees_images_as_the_suite_asks(turn: bool, mode: str) -> None:
    image = Image.linear_gradient("L").resize((30, 20)).convert(mode)
    image.getexif()[0x0112] = 6  # a quarter turn
    image.save(out := io.BytesIO(), "JPEG", exif=image.getexif())
    data, entry = out.getvalue(), Entry("a", "x", exif_orientation=turn)
    assert as_seen(data, entry, SimpleNamespace(exif_orientation=turn)) is data  # type: ignore[arg-type]
    seen = Image.open(io.BytesIO(as_seen(data, entry, SimpleNamespace(exif_orientation=not turn))))  # type: ignore[arg-type]
    expected = Image.open(io.BytesIO(data)).convert("L" if mode == "L" else "RGB")
    assert seen.format == "PNG" and not seen.getexif()
    pixels = np.asarray(expected)
    np.testing.assert_array_equal(np.asarray(seen), np.rot90(pixels, -1) if turn else pixels)


def test_what_a_row_says_besides_its_figures() -> None:
    facts = {"model": "ViT-B-32", "pretrained": "openai", "precision": "fp32"}
    data = SimpleNamespace(
        entry=Entry("a", "x"), task="zeroshot_classification", facts={"n": 3}, how=lambda _: {"b": 4}
    )
    found = facts_of(None, data, Variant("adapter", 0.5, facts))  # type: ignore[arg-type]
    assert found == {
        "dataset": "a", "model": "ViT-B-32", "pretrained": "openai", "task": "zeroshot_classification",
        "language": "en", "source": "adapter", "alpha": 0.5, "shift": "id", "split": "test", "metric": "acc1",
        "precision": "fp32", "n": 3, "b": 4,
    }  # fmt: skip
    data.entry = Entry("a", "x", border=2, exif_orientation=False)
    found = facts_of(None, data, Variant("adapter", 0.5, facts))  # type: ignore[arg-type]
    assert (found["border"], found["exif_orientation"]) == (2, False)


def test_a_field_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(RAdapterError, match="^set 1, 'a': shift is 'far'; allowed: 'id' or 'ood'"):
        entry_of({"name": "a", "data": "x", "shift": "far"}, "set 1")


def test_metrics_are_named_as_papers_name_them() -> None:
    names = {
        "miou": "mIoU", "pixel_accuracy": "pixel acc", "mean_class_accuracy": "mean acc", "harmonic_mean": "H",
        "image_retrieval_recall@5": "image R@5", "acc1": "acc1",
    }  # fmt: skip
    assert {metric: metric_name(metric) for metric in names} == names
    assert common_unit(["miou", "miou"]) == "mIoU, %" and common_unit(["miou", "acc1"]) == "%"
