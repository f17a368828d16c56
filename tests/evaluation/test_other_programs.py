"""The same figure by three programs: accuracy and recall of a release by radapter-eval, by
clip-benchmark on its merged checkpoint, and by mteb through the server's /v1/embeddings.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from radapter_export.release import ExportedRelease, export_release
from radapter_export.settings import ExportSettings
from radapter_serve import evaluate
from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.demo.data import BASE, FINE_TUNED, prepare, prepare_scenes
from tests.helpers.ways import in_process

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

TEMPLATE = "a drawing of {}"
SAME = 5e-4  # to the third decimal; mteb itself rounds to the fifth
PAGE = Path(__file__).parents[2] / "docs" / "choose-alpha.md"
Figures = dict[str, float]


def published(program: str) -> Figures:
    """The figures of a program in the table of docs/choose-alpha.md."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| figure |"))
    column = [cell.strip(" `") for cell in lines[start].split("|")].index(program)
    figures = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        cells = [cell.strip() for cell in line.split("|")]
        if cells[column]:
            figures[cells[1].split("`")[1]] = float(cells[column]) / 100
    return figures


class Data:
    """Drawings by class, and scenes with captions, as each program reads them."""

    def __init__(self, folder: Path) -> None:
        drawings = prepare(folder / "drawings", styles=(FINE_TUNED,))
        scenes = prepare_scenes(folder / "scenes", train=0, test=40)
        self.names = [split_label(line)[0] for line in read_label_file(drawings.classes)]
        self.classes = folder / "classes.txt"
        self.classes.write_text("\n".join(self.names) + "\n", encoding="utf-8")
        self.drawings = drawings.test[FINE_TUNED]
        self.images = sorted(self.drawings.rglob("*.png"))
        self.labels = [self.names.index(path.parent.name) for path in self.images]
        self.captions = scenes.test[FINE_TUNED] / "captions.csv"
        self.of_scenes: dict[Path, list[str]] = {}
        with self.captions.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                place = self.captions.parent / row["image"]
                self.of_scenes.setdefault(place, []).append(row["caption"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    pytest.importorskip("resvg_py", reason="pip install -e '.[demo]'")
    return Data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedRelease:
    """The demo's base as a release."""
    folder = tmp_path_factory.mktemp("release")
    settings = ExportSettings(
        checkpoint=f"local-dir:{BASE}",
        model_repository=folder / "model_repository",
        merged=folder / "merged",
    )
    [release] = export_release((), None, settings)
    return release


@pytest.fixture(scope="module")
def ours(
    data: Data, exported: ExportedRelease, tmp_path_factory: pytest.TempPathFactory
) -> Figures:
    """The figures by radapter-eval."""
    folder = tmp_path_factory.mktemp("ours")
    figures: Figures = {}
    for task, fields in (
        (
            "classification",
            {
                "data": f"imagefolder:{data.drawings}",
                "classes": str(data.classes),
                "templates": [TEMPLATE],
            },
        ),
        ("retrieval", {"data": f"csv:{data.captions}"}),
    ):
        suite = folder / f"{task}.yaml"
        content = {"name": task, "task": task, "sets": [{"name": task, **fields}]}
        suite.write_text(yaml.safe_dump(content), encoding="utf-8")
        repository = exported.merged.parent / "model_repository"
        done = evaluate(suite=suite, model_repository=str(repository), out=folder / task)
        figures |= done.rows[0].metrics
    for name, value in published("radapter-eval").items():
        assert value == pytest.approx(figures[name], abs=SAME), name
    return figures


class Pictures:
    """A data set of images and what belongs to each, as torch's loaders take it."""

    def __init__(self, items: list[tuple[Path, Any]], transform: Any) -> None:
        self.items = items
        self.transform = transform
        self.classes = range(248)  # clip-benchmark counts them

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, belonging = self.items[index]
        return self.transform(Image.open(path).convert("RGB")), belonging


def test_clip_benchmark(data: Data, exported: ExportedRelease, ours: Figures) -> None:
    pytest.importorskip("clip_benchmark", reason="pip install -e '.[integrations]'")
    import torch
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from clip_benchmark.models import load_clip
    from torch.utils.data import DataLoader

    model, transform, tokenizer = load_clip(
        model_type="open_clip",
        model_name=f"local-dir:{exported.merged}",
        pretrained="",
        cache_dir=None,
        device="cpu",
    )
    drawings: Any = Pictures(list(zip(data.images, data.labels, strict=True)), transform)
    accuracy = zeroshot_classification.evaluate(
        model,
        DataLoader(drawings, batch_size=64),
        tokenizer,
        data.names,
        [TEMPLATE.replace("{}", "{c}")],
        "cpu",
        amp=False,
    )
    assert accuracy["acc1"] == pytest.approx(ours["acc1"], abs=SAME)
    assert accuracy["acc5"] == pytest.approx(ours["acc5"], abs=SAME)
    assert accuracy["acc1"] > 0.3  # of 248 classes

    scenes: Any = Pictures(list(data.of_scenes.items()), transform)

    def collated(batch: list[tuple[Any, list[str]]]) -> tuple[Any, list[list[str]]]:
        return torch.stack([image for image, _ in batch]), [captions for _, captions in batch]

    recall = zeroshot_retrieval.evaluate(
        model,
        DataLoader(scenes, batch_size=16, collate_fn=collated),
        tokenizer,
        "cpu",
        amp=False,
        recall_k_list=[1, 5],
    )
    for name, value in recall.items():
        assert value == pytest.approx(ours[name], abs=SAME), name
    for name, value in published("clip-benchmark").items():
        assert value == pytest.approx({**accuracy, **recall}[name], abs=SAME), name


def test_mteb_through_openais_api(data: Data, exported: ExportedRelease, ours: Figures) -> None:
    mteb = pytest.importorskip("mteb", reason="pip install -e '.[integrations]'")
    import openai
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    def facts(name: str, task: str, score: str, category: str) -> Any:
        return TaskMetadata(
            name=name,
            description=name,
            dataset={"path": name, "revision": "1"},
            type=task,  # type: ignore[arg-type]
            category=category,  # type: ignore[arg-type]
            modalities=["image", "text"],
            eval_langs=["eng-Latn"],
            main_score=score,
        )

    class Drawings(AbsTaskZeroShotClassification):  # type: ignore[misc]
        metadata = facts("Drawings", "ZeroShotClassification", "accuracy", "i2t")

        def load_data(self, **_: Any) -> None:  # type: ignore[override]
            columns = {"image": [Image.open(path) for path in data.images], "label": data.labels}
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return [TEMPLATE.format(name) for name in data.names]

    class Scenes(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = facts("Scenes", "Any2AnyRetrieval", "hit_rate_at_1", "t2i")

        def load_data(self, **_: Any) -> None:  # type: ignore[override]
            images = [Image.open(path) for path in data.of_scenes]
            places = [path.name for path in data.of_scenes]
            texts: dict[str, list[str]] = {"id": [], "text": []}
            right: dict[str, dict[str, int]] = {}
            for place, captions in zip(places, data.of_scenes.values(), strict=True):
                for number, caption in enumerate(captions):
                    texts["id"].append(f"{place}-{number}")
                    texts["text"].append(caption)
                    right[f"{place}-{number}"] = {place: 1}
            split: Any = {
                "corpus": Dataset.from_dict({"id": places, "image": images}),
                "queries": Dataset.from_dict(texts),
                "relevant_docs": right,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    class Served(AbsEncoder):  # type: ignore[misc]
        """A release behind OpenAI's API, where an image is a data URL."""

        def __init__(self, client: Any) -> None:
            self.client = client
            self.mteb_model_meta = ModelMeta.create_empty(
                {"name": "radapter/served", "modalities": ["image", "text"]}
            )

        def encode(self, inputs: Any, **_: Any) -> Any:
            rows = []
            for batch in inputs:
                texts_and_images = list(batch["text"]) if "text" in batch else []
                for image in batch.get("image", ()):
                    content = io.BytesIO()
                    image.save(content, "png")
                    coded = base64.b64encode(content.getvalue()).decode()
                    texts_and_images.append(f"data:image/png;base64,{coded}")
                answer = self.client.embeddings.create(model="radapter", input=texts_and_images)
                rows += [each.embedding for each in answer.data]
            return np.array(rows, np.float32)

    repository = exported.merged.parent / "model_repository"
    with in_process(repository, Path("indexes")) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        result = mteb.evaluate(
            Served(client),
            [Drawings(), Scenes()],
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": 32},
            show_progress_bar=False,
        )
    [accuracy, recall] = [task.scores["test"][0] for task in result.task_results]
    theirs = {"acc1": accuracy["accuracy"]}
    for count in (1, 5):
        theirs[f"image_retrieval_recall@{count}"] = recall[f"hit_rate_at_{count}"]
    for name, value in theirs.items():
        assert value == pytest.approx(ours[name], abs=SAME), name
    assert published("mteb") == pytest.approx(theirs, abs=SAME)
