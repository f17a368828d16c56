"""Segmentation, evaluated: known answers, and the same masks whichever way a model runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.encoders.loaded import LoadedRelease, load_release, served_release
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation import start
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.models import Candidate, from_adapter, from_merged, from_release
from radapter_serve.evaluation.rows import Results, Row
from radapter_serve.evaluation.run import evaluate_set, evaluate_suite, open_set
from radapter_serve.evaluation.suite import Entry, Suite, load_suite
from radapter_serve.release.release import Dense
from tests.conftest import export_into
from tests.helpers.small_models import preprocess, release
from tests.helpers.ways import in_process

NAMES = ["sky", "grass", "cow", "barn"]
SIZE = 32
PATCH = 8
ALL_RIGHT = {"miou": 1.0, "pixel_accuracy": 1.0, "mean_class_accuracy": 1.0}


def by_colour(pixels: NDArray[np.uint8], *, dense: bool) -> Floats:
    """Embed a patch as the class of the colour at its centre, a crop as the votes of its pixels."""
    at = (np.abs(pixels[..., :1].astype(int) - np.arange(len(NAMES)) * 60) < 30).astype(np.float32)
    if dense:
        return at[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    votes = at.sum((1, 2)) + 1e-6
    return np.asarray(votes / np.linalg.norm(votes, axis=1, keepdims=True), np.float32)


class Fake:
    """An encoder and a tokenizer: `see` sees an image, a text is its place in `names`."""

    def __init__(self, names: Sequence[str], see: Callable[..., Floats]) -> None:
        self.names = list(names)
        self.see = see

    def images(self, pixels: NDArray[np.uint8], alpha: object = None) -> Floats:
        return self.see(pixels, dense=False)

    def patches(self, pixels: NDArray[np.uint8], alpha: object = None) -> Floats:
        return self.see(pixels, dense=True)

    def tokens(self, tokens: NDArray[np.int32], alpha: object = None) -> Floats:
        return np.eye(len(self.names), dtype=np.float32)[tokens[:, 0]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.names.index(text)] for text in texts]

    def batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        return np.array(rows, np.int32)

    def close(self) -> None:
        pass


def candidate(fake: Fake, size: int, **facts: Any) -> Candidate:
    """A model by a fake, whose prompts are the names alone; `facts` are those of a release."""
    fields = {"templates": ["{}"], "preprocess": preprocess(size, "bilinear"), **facts}
    loaded = LoadedRelease(release(3, **fields), fake, fake)  # type: ignore[arg-type]
    return Candidate("oracle", None, {}, loaded)


def oracle() -> Candidate:
    crop = MaskCrop(fill=(255, 255, 255))
    fake = Fake(NAMES, by_colour)
    return candidate(
        fake, SIZE, crop=crop, dense=Dense("naclip", 0), logit_scale=100.0, max_batch_size=4
    )


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` of 6 images whose red tells their class, with an ignored border, and `found` masks."""
    root = tmp_path_factory.mktemp("masked")
    generator = np.random.default_rng(0)
    for folder in ("data/images", "data/masks", "found"):
        (root / folder).mkdir(parents=True)
    for number in range(6):
        # Rectangles with sides of 32 pixels at least: several patches.
        cells = generator.integers(0, len(NAMES), (3, 4), dtype=np.uint8)
        labels = np.kron(cells, np.ones((48, 40), np.uint8))
        noise = generator.integers(0, 255, labels.shape, np.uint8)
        pixels = np.stack([labels * 60, noise, labels], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"data/images/{number}.png")
        labels[:3] = 255
        Image.fromarray(labels).save(root / f"data/masks/{number}.png")
        overlapping = generator.integers(0, 256, (4, *labels.shape), np.uint8)
        np.savez(root / f"found/{number}.npz", masks=overlapping, scores=generator.random((4, 4)))
    (root / "data" / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return root


def suite_of(masked: Path, *sets: str) -> Suite:
    """A suite of sets `s0`, `s1`, ... with these fields."""
    lines = "".join(f"- {{name: s{number}, {fields}}}\n" for number, fields in enumerate(sets))
    text = f"task: segmentation\ndata: 'masks:data'\nshort_side: 64\nstride: 16\nsets:\n{lines}"
    (masked / "s.yaml").write_text(text, encoding="utf-8")
    return load_suite(masked / "s.yaml", masked)


def rows_of(suite: Suite, model: Candidate | None = None) -> list[Row]:
    rows = []
    for entry in suite.entries:
        [(row, _)] = evaluate_set([model or oracle()], open_set(suite, entry))
        rows.append(row)
    return rows


def test_an_oracle_of_patches_reaches_one_but_for_edges(masked: Path) -> None:
    finer = "dense: naclip, short_side: 144, stride: 8"
    coarse, fine = rows_of(suite_of(masked, "dense: naclip", finer))
    assert coarse.metrics["miou"] < fine.metrics["miou"]
    assert fine.metrics["miou"] > 0.93 and fine.metrics["pixel_accuracy"] > 0.96
    assert (coarse.n, coarse.classes, coarse.dense, coarse.size) == (6, 4, "naclip", 32)
    assert (coarse.short_side, coarse.stride, coarse.threshold) == (64, 16, None)
    assert coarse.set_digest == fine.set_digest

    # The figures of each class, and intervals.
    assert coarse.per_class is not None and coarse.intervals is not None
    counts = np.array(coarse.confusion)
    for label, of in enumerate(coarse.per_class):
        true = counts[label].sum()
        predicted = counts[:, label].sum()
        iou = counts[label, label] / (true + predicted - counts[label, label])
        assert of.name == NAMES[label] and of.n == true
        assert of.iou == pytest.approx(iou, abs=1e-4)
        assert of.recall == pytest.approx(counts[label, label] / true, abs=1e-4)
    for name, value in coarse.metrics.items():
        assert coarse.intervals[name][0] < value < coarse.intervals[name][1]


def test_the_digest_covers_images_masks_and_proposals(proposed: Path) -> None:
    entry = "dense: proposals, proposals: found"
    suite = suite_of(proposed, "dense: naclip", "dense: proposals", entry)

    def digests() -> list[str]:
        return [open_set(suite, entry).set_digest for entry in suite.entries]

    first = digests()
    assert digests() == first and len(set(first)) == 3
    labels = np.array(Image.open(proposed / "data/masks/3.png"))
    labels[-1, -1] = (labels[-1, -1] + 1) % 4
    Image.fromarray(labels).save(proposed / "data/masks/3.png")
    second = digests()
    Image.new("RGB", (labels.shape[1], labels.shape[0])).save(proposed / "data/images/0.png")
    third = digests()
    assert all(len(set(of_set)) == 3 for of_set in zip(first, second, third, strict=True))
    np.savez(proposed / "found/0.npz", masks=np.ones((1, *labels.shape)), scores=np.ones((1, 4)))
    assert [a == b for a, b in zip(third, digests(), strict=True)] == [True, True, False]


def test_an_object_without_a_pixel_is_no_proposal(masked: Path, tmp_path: Path) -> None:
    size = {"height": 144, "width": 160}
    nothing, everything = (
        {"image_id": 1, "category_id": 1, "segmentation": {"size": [144, 160], "counts": counts}}
        for counts in ([144 * 160], [0, 144 * 160])
    )
    content = {
        "images": [{"id": 1, "file_name": "1.png", **size}],
        "categories": [{"id": 1, "name": "sky"}],
        "annotations": [nothing, everything],
    }
    (tmp_path / "objects.json").write_text(json.dumps(content), encoding="utf-8")
    images = masked / "data" / "images"
    how: Any = {"name": "o", "dense": "proposals", "images": images}
    entry = Entry("coco:objects.json", "segmentation", **how)
    data: Any = open_set(Suite("s", (entry,), data_root=tmp_path), entry)
    assert len(data.prepare(oracle(), 0).masks) == 1


def test_true_masks_reach_one_and_background_is_a_class_without_a_prompt(masked: Path) -> None:
    of_class = "threshold: 0.5, background: grass"
    crops, dense, background, without = rows_of(
        suite_of(
            masked,
            "dense: proposals",
            f"dense: naclip, {of_class}",
            f"dense: proposals, {of_class}",
            "dense: proposals, threshold: 0.5",
        )
    )
    assert crops.metrics == background.metrics == ALL_RIGHT and crops.short_side is None
    # The oracle sees no class where grass is: equal cosines.
    assert dense.metrics["pixel_accuracy"] > 0.8
    assert without.metrics["pixel_accuracy"] == 1.0


COSINES = np.array(
    [[0.2, 0.9, 0.4, 0.3], [0.8, 0.1, 0.3, 0.2], [0.5, 0.4, 0.1, 0.2], [0.1, 0.4, 0.9, 0.2]],
    np.float32,
)
SCALE = 3.0


def fixed() -> Candidate:
    """A model that gives the crops of an image the cosines of the table, one after the other."""
    fake = Fake(NAMES, lambda crops, dense: COSINES[: len(crops)])
    return candidate(fake, 4, crop=MaskCrop(fill=(0, 0, 0)), logit_scale=SCALE, max_batch_size=8)


def rewrite(folder: Path, change: Callable[[NDArray[Any], NDArray[Any]], dict[str, Any]]) -> None:
    """Write other masks and scores into the files of proposals."""
    for path in sorted((folder / "found").iterdir()):
        with np.load(path) as arrays:
            changed = change(arrays["masks"], arrays["scores"])
        np.savez(path, **changed)


@pytest.fixture
def proposed(masked: Path, tmp_path: Path) -> Path:
    """A copy of the data, whose proposals a test may change."""
    return shutil.copytree(masked, tmp_path, dirs_exist_ok=True)


def by_ovseg(folder: Path, weight: float | None) -> list[list[int]]:
    """Counts by true and found class, by sum_q (p_proposal^(1-w) p_clip^w) mask_q of each pixel."""
    logits = SCALE * COSINES.astype(float)
    clip = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    counts = np.zeros((4, 5), int)
    for file in (folder / "found").iterdir():
        with np.load(file) as proposals:
            classes = clip
            if weight is not None:
                classes = proposals["scores"].astype(float) ** (1 - weight) * clip**weight
            masks = proposals["masks"] / 255
        best = np.einsum("qc,qhw->chw", classes, masks).argmax(0)
        truth = np.asarray(Image.open(folder / "data" / "masks" / f"{file.stem}.png"))
        np.add.at(counts, (truth[truth < 255], best[truth < 255]), 1)
    return counts.tolist()


def test_scores_and_masks_are_fused_as_ovseg_does(proposed: Path) -> None:
    entry = "dense: proposals, proposals: found"
    weights = (0.0, 0.45, 1.0)
    sets = [f"{entry}, proposal_weight: {weight}" for weight in weights]
    *rows, usual = rows_of(suite_of(proposed, *sets, entry), fixed())
    for row, weight in zip(rows, weights, strict=True):
        assert row.confusion == by_ovseg(proposed, weight)
        assert (row.dense, row.proposals, row.proposal_weight) == ("proposals", "found", weight)
    assert usual.confusion == by_ovseg(proposed, 0.7) and usual.proposal_weight == 0.7
    assert len({json.dumps(row.confusion) for row in rows}) == 3

    # Without scores, the classes are CLIP's.
    rewrite(proposed, lambda masks, scores: {"masks": masks})
    (row,) = rows_of(suite_of(proposed, entry), fixed())
    assert row.confusion == by_ovseg(proposed, None) and row.proposal_weight is None
    with pytest.raises(RAdapterError, match="proposal_weight is 0.6 but found has no scores"):
        rows_of(suite_of(proposed, sets[0].replace("0.0", "0.6")), fixed())


def test_masks_that_are_empty_take_their_scores_along(proposed: Path) -> None:
    """The first mask has nothing above one half: the others keep the scores that they came with."""
    suite = suite_of(proposed, "dense: proposals, proposals: found")
    rewrite(proposed, lambda masks, scores: {"masks": [0 * masks[0], *masks[1:]], "scores": scores})
    (row,) = rows_of(suite, fixed())
    rewrite(proposed, lambda masks, scores: {"masks": masks[1:], "scores": scores[1:]})
    (expected,) = rows_of(suite, fixed())
    assert row.confusion == expected.confusion

    # All pixels are background if all masks are empty.
    rewrite(proposed, lambda masks, scores: {"masks": np.full(masks.shape, 0.4)})
    np.savez(proposed / "found" / "0.npz", masks=np.zeros((0, 144, 160)))
    (row,) = rows_of(suite, fixed())
    assert np.array(row.confusion)[:, 4].sum() == np.array(row.confusion).sum()


def masks_of(models: Sequence[Candidate], suite: Suite) -> dict[str, list[NDArray[np.uint16]]]:
    """The masks themselves, of each set, by the last model."""
    model = models[-1]
    masks = {}
    for entry in suite.entries:
        data: Any = open_set(suite, entry)
        query = data.query(model)
        items = [data.prepare(model, number) for number in range(len(data))]
        masks[entry.name] = [
            model.segment(item.image, query, item.masks, item.scores) for item in items
        ]
    model.close()
    return masks


def test_a_run_its_checkpoint_its_release_and_a_server_give_the_same_masks(
    masked: Path, random_adapter: Callable[..., Adapter], common: Path, tmp_path: Path
) -> None:
    suite = suite_of(
        masked,
        "threshold: null",
        "threshold: 0.26, background: cow",
        "dense: proposals",
        "dense: proposals, proposals: found, proposal_weight: 0.6",
    )
    recipe = {"dense": "naclip", "mask_padding": 0.1, "mask_square": False}
    adapter = tmp_path / "adapter.safetensors"
    save_adapter(random_adapter(task="segmentation", recipe=recipe), adapter)
    export_into(tmp_path, common, adapter, [0.6])
    repository = tmp_path / "model_repository"
    run = masks_of(from_adapter(adapter, [0.6]), suite)
    others = [
        masks_of(from_merged(tmp_path / "merged"), suite),
        masks_of(from_release(load_release(repository)), suite),
    ]
    with in_process(repository, tmp_path / "indexes") as server:
        others.append(masks_of(from_release(served_release(server.url), source="server"), suite))
    for other in others:
        for name, masks in run.items():
            for mask, same in zip(masks, other[name], strict=True):
                assert (mask == same).mean() > 0.999, name  # but for pixels between two labels
    assert len(np.unique(np.stack(run["s0"]))) > 1


def test_a_set_that_a_model_can_not_be_evaluated_on_is_refused(
    masked: Path, run_folder: Path, tmp_path: Path
) -> None:
    fake = Fake(NAMES, by_colour)
    has = candidate(fake, SIZE, dense=Dense("maskclip", 7))
    lacks = candidate(fake, SIZE)
    assert has.dense_method(None) == has.dense_method("maskclip") == "maskclip"
    assert lacks.dense_method("proposals") == "proposals"
    for model, dense in ((has, "naclip"), (lacks, None)):
        with pytest.raises(RAdapterError, match="export one with radapter-export --dense naclip"):
            model.dense_method(dense)
    suite = suite_of(masked, "dense: maskclip", "dense: null")
    models = from_adapter(run_folder, [0.5])  # its recipe names no way
    results = Results(tmp_path)
    with pytest.raises(RAdapterError, match="this model has no dense method"):
        evaluate_suite(models, suite, results)
    assert [row.dataset for row in results.rows] == ["s0"]
    models[0].close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("background: pig, threshold: 0.1", "background is 'pig', not one of the classes"),
        ("dense: naclip, short_side: 8", "data set 's0', oracle: "),
        ("dense: proposals, proposals: none", "data set 's0': no proposals"),
        ("dense: proposals, proposals: found, background: cow", "float [4, 3], a column for"),
    ],
)
def test_invalid_entries_are_refused(masked: Path, fields: str, message: str) -> None:
    with pytest.raises(RAdapterError) as error:
        rows_of(suite_of(masked, fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_error_names_the_image(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise RAdapterError("too long and thin")

    monkeypatch.setattr(Fake, "patches", refuse)
    with pytest.raises(RAdapterError, match="data set 's0', oracle: 0.png: too long and thin"):
        rows_of(suite_of(masked, "dense: naclip"))


@pytest.mark.parametrize(
    ("task", "val_data", "metric", "n"),
    [
        ("segmentation", "masks:{masked}/data", "miou", 6),
        ("retrieval", "csv:{world}/captions.csv", "image_retrieval_recall@1", 12),
    ],
)
def test_alpha_is_chosen_on_the_runs_own_validation_data(
    task: Any,
    val_data: str,
    metric: str,
    n: int,
    masked: Path,
    world: Path,
    random_adapter: Callable[..., Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = {"val_data": val_data.format(masked=masked, world=world)}
    adapter = random_adapter(alpha=0.5, task=task, recipe=recipe)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    monkeypatch.setattr(start, "GRID", (0.0, 1.0))
    evaluation = start.evaluate(tmp_path, "auto", out=tmp_path / "out")
    results = Results(tmp_path / "out")
    choice = evaluation.choice
    assert choice is not None and tmp_path / "alpha.json" in evaluation.files
    assert [point.alpha for point in choice.curve] == [0.0, 0.5, 1.0]
    assert (choice.sets["validation"].metric, choice.sets["validation"].n) == (metric, n)
    scores = {row.alpha: row.metrics[metric] for row in results.rows}
    assert scores[choice.best] == max(scores.values())
    if task == "segmentation":
        assert {row.dense for row in results.rows} == {"proposals"}
