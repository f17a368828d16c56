"""Adapters beside a release: what a request gets is what a fold of its adapter computes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import urllib3

from radapter_client import Client, Values
from radapter_export import export
from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.cli.release import main as command
from radapter_serve.clip.base import Base, load_base
from radapter_serve.contract.embeddings import Point
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.labels import prompts_of, split_label
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.loaded import LoadedRelease, load_release
from radapter_serve.encoders.precision import bf16_of_processor
from radapter_serve.engine.engine import Engine
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.release import adapters
from radapter_serve.release.release import Confidence
from radapter_serve.release.repository import releases_of
from radapter_serve.tasks import embed
from radapter_serve.tasks.embed import Labels, look_up
from tests.conftest import export_into
from tests.helpers.asking import tritonserver
from tests.helpers.graphs import quick_exports
from tests.helpers.small_release import photos_in, png
from tests.helpers.text_adapters import TEXTS, WIDTH, encoded, export_base, folded, text_adapter
from tests.helpers.ways import WAYS

CONFIDENCE = Confidence(
    scale=7.0,
    bias=-1.0,
    dataset="cross-validation",
    n=120,
    classes=2,
    ece_before=0.1,
    label_ece=0.1,
    min_score=0.2,
)


@pytest.fixture(scope="module")
def base(tiny_clip_dir: str) -> Base:
    return load_base(tiny_clip_dir)


@pytest.fixture(scope="module")
def adapters_of_base(base: Base) -> dict[str, Adapter]:
    """Adapters by name."""
    return {"anna": text_adapter(base, 1), "bob": text_adapter(base, 2, rank=3, alpha=1.0)}


def save_all(adapters: dict[str, Adapter], folder: Path) -> None:
    for name, adapter in adapters.items():
        (folder / name).mkdir()
        save_adapter(adapter, folder / name / "adapter.safetensors")


@pytest.fixture
def runs(adapters_of_base: dict[str, Adapter], tmp_path: Path) -> dict[str, Adapter]:
    """The adapters, each in a folder of its name."""
    save_all(adapters_of_base, tmp_path)
    return adapters_of_base


@pytest.fixture(scope="module")
def exported(
    adapters_of_base: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory, common: Path
) -> Path:
    """A release of the base, α 0, with both adapters beside it."""
    folder = tmp_path_factory.mktemp("exported")
    save_all(adapters_of_base, folder)
    repository = export_base(folder, common, folder / "anna")
    for name in adapters_of_base:
        where = ["--model-repository", str(repository)]
        assert command(["add-adapter", name, str(folder / name), *where]) == 0
    return repository


@pytest.fixture
def repository(exported: Path, runs: dict[str, Adapter], tmp_path: Path) -> Path:
    """A copy of the release, which a test may change."""
    return shutil.copytree(exported, tmp_path / "model_repository")


@pytest.fixture
def engine(repository: Path) -> Iterator[Engine]:
    with Engine([load_release(repository)]) as engine:
        yield engine


def ask(engine: Engine, model: str, **values: Any) -> dict[str, Any]:
    reply = engine.infer(model, "", Values(values))
    return dict(reply.outputs.items())


@pytest.mark.parametrize("name", ["anna", "bob"])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_texts_equal_those_of_the_folded_adapter(base, runs, repository, engine, name, alpha):
    values: dict[str, Any] = {"text": TEXTS, "adapter": name}
    if alpha is not None:
        values["alpha"] = alpha
    outputs = ask(engine, "embed_text", **values)
    expected_alpha = runs[name].metadata.alpha if alpha is None else alpha
    expected = folded(base, runs[name], expected_alpha, TEXTS)
    np.testing.assert_allclose(outputs["text_embeds"], expected, atol=1e-6)
    receipts = [json.loads(text) for text in outputs["receipt"].ravel()]
    folder = next((repository / "adapters").glob(f"{name}@*")).name
    receipt = {
        "release": 1,
        "adapter": name,
        "adapter_digest": folder.partition("@")[2],
        "alpha": expected_alpha,
    }
    assert receipts == [receipt] * len(TEXTS)


def test_an_adapter_is_checked_in_the_serving_precision(base, runs, repository):
    """Texts in bf16 are farther from torch than those of an fp32 release may be."""
    if not (bf16_of_processor() and importlib.util.find_spec("openvino")):
        pytest.skip("this processor has no bf16, or openvino is not installed")
    with Engine.open(repository, precision="bf16", threads=1) as engine:
        embeds = ask(engine, "embed_text", text=TEXTS, adapter="anna")["text_embeds"]
    expected = folded(base, runs["anna"], runs["anna"].metadata.alpha, TEXTS)
    np.testing.assert_allclose(embeds, expected, atol=2e-2)


def test_images_and_requests_without_an_adapter_equal_the_bases(base, engine):
    images = [png(0), png(1)]
    embeds = [
        ask(engine, "embed_image", image=images, **point)["image_embeds"]
        for point in ({}, {"adapter": "anna"})
    ]
    np.testing.assert_array_equal(*embeds)
    expected = encoded(base, TEXTS)
    outputs = ask(engine, "embed_text", text=TEXTS)
    np.testing.assert_allclose(outputs["text_embeds"], expected, atol=1e-6)
    assert json.loads(outputs["receipt"][0][0]) == {
        "release": 1,
        "adapter": None,
        "adapter_digest": None,
        "alpha": 0.0,
    }


def test_labels_are_mapped_prompt_by_prompt(base, runs, engine):
    """The mean over templates does not commute with the map."""
    adapter = runs["anna"]
    prompts = [
        ["a cat", "the cat, twice", "a kitty", "the kitty, twice"],
        ["a dog", "the dog, twice"],
    ]
    means = [folded(base, adapter, 0.7, texts).mean(0) for texts in prompts]
    labels = np.stack([mean / np.linalg.norm(mean) for mean in means])
    image = ask(engine, "embed_image", image=[png(3)])["image_embeds"]
    logits = float(base.model.state_dict()["logit_scale"].exp()) * image @ labels.T
    expected = np.exp(logits) / np.exp(logits).sum()
    for names in ({"label_set": "classes"}, {"labels": ("cat, kitty", "dog")}):
        outputs = ask(
            engine, "classify", image=[png(3)], adapter="anna", alpha=0.7, top_k=2, **names
        )
        scores = dict(zip(outputs["label"][0], outputs["score"][0], strict=True))
        np.testing.assert_allclose([scores[b"cat"], scores[b"dog"]], expected[0], atol=1e-5)


def test_scores_are_calibrated_at_the_adapter_s_own_alpha(base, runs, engine, repository, capsys):
    meta = replace(runs["anna"].metadata, confidence=asdict(CONFIDENCE))
    run = repository.parent / "anna"
    save_adapter(Adapter(runs["anna"].tensors, meta), run / "adapter.safetensors")

    def add(*options: str) -> str:
        folder = ["--model-repository", str(repository), "--replace"]
        assert command(["add-adapter", "anna", str(run), *folder, *options]) == 0
        return capsys.readouterr().out

    def scores(**values: Any) -> np.ndarray:
        request = {"image": [png(3)], "labels": ("cat", "dog"), "adapter": "anna", "top_k": 2}
        outputs = ask(engine, "classify", multi_label=True, threshold=0.0, **request, **values)
        return np.asarray(outputs["score"])

    with pytest.raises(TaskError, match=r"the adapter anna has no calibrated.*--recipe quick"):
        scores()
    assert "not calibrated" not in add()
    image = ask(engine, "embed_image", image=[png(3)])["image_embeds"][0]
    texts = ["a cat", "the cat, twice", "a dog", "the dog, twice"]
    pairs = folded(base, runs["anna"], 0.5, texts).reshape(2, 2, -1).mean(1)
    cosines = pairs @ image / np.linalg.norm(pairs, axis=1)
    expected = 1 / (1 + np.exp(-(CONFIDENCE.scale * cosines + CONFIDENCE.bias)))
    np.testing.assert_allclose(scores()[0], np.sort(expected)[::-1], atol=1e-5)
    with pytest.raises(TaskError, match=r"anna are calibrated at alpha 0.5, not at 0.3"):
        scores(alpha=0.3)
    assert "not calibrated" in add("--alpha", "0.3")
    with pytest.raises(TaskError, match="the adapter anna has no calibrated"):
        scores()


def test_a_search_has_the_least_score_of_its_adapter(base, runs, repository, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(20):
        (photos / f"{number:02}.png").write_bytes(png(number))
    indexes = tmp_path / "indexes"
    build(str(photos), indexes / "photos", load_release(repository))
    [text] = folded(base, runs["anna"], 0.5, ["a red bicycle"])
    with Engine([load_release(repository, indexes=indexes)]) as engine:
        images = [png(number) for number in range(20)]
        cosines = np.sort(ask(engine, "embed_image", image=images)["image_embeds"] @ text)[::-1]
        least = float((cosines[6] + cosines[7]) / 2)
        confidence = asdict(replace(CONFIDENCE, min_score=least))
        meta = replace(runs["anna"].metadata, confidence=confidence)
        save_adapter(Adapter(runs["anna"].tensors, meta), tmp_path / "anna/adapter.safetensors")
        folder = ["--model-repository", str(repository), "--replace"]
        assert command(["add-adapter", "anna", str(tmp_path / "anna"), *folder]) == 0
        query: dict[str, Any] = {"index": "photos", "text": ["a red bicycle"], "top_k": 20}
        outputs = ask(engine, "retrieve", adapter="anna", calibrated=True, **query)
        np.testing.assert_allclose(outputs["score"], cosines[:7], atol=1e-6)
        with pytest.raises(TaskError, match="the scores of the adapter anna.*0.5, not at 0.25"):
            ask(engine, "retrieve", adapter="anna", calibrated=True, alpha=0.25, **query)
        with pytest.raises(TaskError, match="the adapter bob has no calibrated scores"):
            ask(engine, "retrieve", adapter="bob", calibrated=True, **query)


@pytest.mark.parametrize("way", ["process", pytest.param("triton", marks=pytest.mark.triton)])
def test_hits_of_an_adapter_are_those_of_its_folded_export(repository, tmp_path, common, way):
    """Both search one index of the base; an image as the query leaves the adapter out."""
    indexes = tmp_path / "indexes"
    build(photos_in(tmp_path / "photos", 12), indexes / "photos", load_release(repository))
    queries: list[dict[str, Any]] = [{"text": text} for text in TEXTS] + [{"image": png(50)}]

    def scores(client: Client, **point: Any) -> list[dict[str, float]]:
        answers = [client.search(index="photos", top_k=12, **query, **point) for query in queries]
        return [{hit.id: hit.score for hit in hits} for hits in answers]

    export_into(tmp_path / "folded", common, tmp_path / "anna", [0.7])
    folded = load_release(tmp_path / "folded" / "model_repository", indexes=indexes)
    with Client(transport=Engine([folded])) as client:
        expected = scores(client)
    with WAYS[way](repository, indexes) as running, Client(running.url, timeout=120) as client:
        of_base = scores(client)
        of_anna = scores(client, adapter="anna", alpha=0.7)
    assert [len(each) for each in of_anna] == [12] * len(queries)
    for hits, fold in zip(of_anna, expected, strict=True):
        assert hits == pytest.approx(fold, abs=1e-6)
    assert of_anna[-1] == of_base[-1]
    for hits, plain in zip(of_anna[:-1], of_base[:-1], strict=True):
        assert max(abs(hits[id] - plain[id]) for id in plain) > 1e-2


def test_the_next_adapter_encodes_no_prompt_again(engine):
    encoder = engine._served[1].loaded.encoder  # type: ignore[attr-defined]
    names = {"image": [png(3)], "labels": ("cat, kitty", "dog"), "templates": ("a {}", "one {}")}
    ask(engine, "classify", adapter="anna", **names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "tokens", None)  # calling it fails
        ask(engine, "classify", adapter="anna", alpha=0.1, **names)
    adapters_of = engine._served[1].loaded.adapters  # type: ignore[attr-defined]
    adapters_of.get("bob")  # its check asks the encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "tokens", None)
        ask(engine, "classify", adapter="bob", **names)


class TestStoredPrompts:
    """The export stores the prompts of label sets, which the server maps one by one."""

    def scores(self, engine: Engine, **values: Any) -> np.ndarray:
        request = {"image": [png(3)], "label_set": "animals", "adapter": "anna", "top_k": 3}
        outputs = ask(engine, "classify", **request, **values)
        order = np.argsort(outputs["label"][0])
        return np.asarray(outputs["score"][0])[order]

    def test_no_prompt_is_encoded(self, base, runs, engine):
        loaded = engine._served[1].loaded
        loaded.adapters.get("anna")  # its check asks the encoder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaded.encoder, "tokens", None)  # calling it fails
            # Nor is there a turn to wait for.
            patch.setattr("radapter_serve.tasks.table._FEW_PROMPTS", 0)
            patch.setattr(engine._served[1], "label_sets", None)
            scores = self.scores(engine)
            other = self.scores(engine, alpha=0.9)
        assert np.abs(other - scores).max() > 1e-4
        label_set = loaded.label_sets["animals"]
        embeds = [
            folded(base, runs["anna"], 0.5, prompts_of(split_label(line), label_set.templates))
            for line in label_set.lines
        ]
        assert len(embeds[0]) > 1
        means = np.stack([each.mean(0) for each in embeds])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        place = loaded.place(Point("anna", 0.5))
        mapped = complete(look_up(loaded, Labels(label_set="animals"), place).embed(None))
        np.testing.assert_allclose(mapped.embeds, means, atol=1e-6)
        # The prompts are of the exported text tower: an adapter of another tower has none.
        names = label_set.lines, label_set.templates
        assert loaded.stored_prompts(*names, place) is not None
        facts = replace(place.adapter.facts, text_tower="sha256:" + "0" * 64)
        other = replace(place, adapter=replace(place.adapter, facts=facts))
        assert loaded.stored_prompts(*names, other) is None
        # That tower may be a fine-tune.
        tower = replace(loaded.release.text_tower, change="sha256:" + "1" * 64)
        tuned = LoadedRelease(
            replace(loaded.release, alpha=0.5, text_tower=tower),
            loaded.encoder,
            loaded.tokenizer,
            read_label_sets=loaded._read_label_sets,
            adapters=loaded._adapters,
        )
        facts = replace(facts, text_tower=tower.digest(0.5))
        beside = replace(place, adapter=replace(place.adapter, facts=facts))
        assert tuned.stored_prompts(*names, beside) is not None
        assert tuned.stored_prompts(*names, place) is None

    def test_many_prompts_are_mapped_in_parts(self, engine, monkeypatch):
        expected = self.scores(engine, alpha=0.4)
        engine._served[1].loaded.label_cache._entries.clear()
        monkeypatch.setattr(embed, "_MAPPED", 1)
        np.testing.assert_allclose(self.scores(engine, alpha=0.4), expected, atol=1e-6)

    def test_they_are_not_limited_as_prompts_that_are_encoded(self, engine, monkeypatch):
        monkeypatch.setattr("radapter_serve.contract.labels.MAX_PROMPTS", 4)
        self.scores(engine)
        loaded = engine._served[1].loaded
        monkeypatch.setattr(loaded, "_stored_prompts", {"animals": None})
        with pytest.raises(TaskError, match="prompts"):
            self.scores(engine, alpha=0.6)

    @pytest.mark.parametrize("damage", ["cut", "gone", "older"])
    def test_without_the_file_the_prompts_are_encoded(self, repository, capsys, damage):
        path = repository / "text_encoder" / "1" / "animals.prompts.npy"
        with Engine([load_release(repository)]) as engine:
            expected = self.scores(engine)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-4] + b"abcd")
        else:
            path.unlink()
        loaded = load_release(repository)
        if damage == "older":
            facts = loaded.release.label_sets["animals"]
            loaded.release.label_sets["animals"] = replace(facts, prompts=None)
        with Engine([loaded]) as engine:
            np.testing.assert_allclose(self.scores(engine), expected, atol=1e-6)
        assert ("is damaged" in capsys.readouterr().err) == (damage != "older")

    def test_the_digests_of_the_release_have_it(self, repository, capsys):
        folder = ["--model-repository", str(repository)]
        assert command(["verify", *folder]) == 0
        path = repository / "text_encoder" / "1" / "animals.prompts.npy"
        path.write_bytes(path.read_bytes()[:-4] + b"abcd")
        assert command(["verify", *folder]) == 2
        assert path.name in capsys.readouterr().err


def test_an_export_of_adapters_alone_has_their_base_and_them(base, runs, tmp_path):
    folder = tmp_path / "model_repository"
    with quick_exports():
        summary = export(
            adapters={name: tmp_path / name for name in runs},
            model_repository=folder,
            merged=tmp_path / "merged",
        )
    assert summary.alpha == 0
    with Engine([load_release(folder)]) as engine:
        for name, adapter in runs.items():
            outputs = ask(engine, "embed_text", text=TEXTS, adapter=name)
            expected = folded(base, adapter, adapter.metadata.alpha, TEXTS)
            np.testing.assert_allclose(outputs["text_embeds"], expected, atol=1e-6)

    # What can't lie beside it is refused before anything is exported.
    other = replace(runs["bob"].metadata, text_tower="sha256:" + "0" * 64)
    save_adapter(Adapter(runs["bob"].tensors, other), tmp_path / "other.safetensors")
    for more, words in (
        ({"anna": tmp_path / "bob"}, "'anna' already; .*add-adapter anna .*bob --replace"),
        (
            {"carl": tmp_path / "anna", "dora": tmp_path / "other.safetensors"},
            "'carl' and 'dora' were trained with different text towers.* dora=.*other",
        ),
    ):
        with pytest.raises(RAdapterError, match=words):
            export(adapters=more, model_repository=folder, merged=tmp_path / "merged")
    assert releases_of(folder) == [1]
    assert sorted(adapters.read_list(folder)) == sorted(runs)


def test_adapters_of_another_text_tower_than_the_release_are_refused_before_the_export(
    runs, tmp_path
):
    places = {name: tmp_path / name for name in ("model_repository", "merged")}
    names = {"anna": tmp_path / "anna"}
    with quick_exports():
        for points in ({"alpha": 0.5}, {"adapter": tmp_path / "bob"}, {"alpha": "dynamic"}):
            with pytest.raises(RAdapterError, match="'anna' was trained with another text tower"):
                export(adapters=names, **places, **points)
            assert not any(place.exists() for place in places.values())
        # One release of their base is enough: of the same call, or an earlier one.
        export(adapters=names, adapter=tmp_path / "bob", alpha=[0, 0.5], **places)
        export(adapters={"bob": tmp_path / "bob"}, alpha=0.5, **places)
    assert sorted(adapters.read_list(places["model_repository"])) == ["anna", "bob"]
    assert releases_of(places["model_repository"]) == [1, 2, 3]


def test_an_adapter_at_alpha_0_is_said_to_answer_as_the_base(repository, tmp_path, capsys):
    for alpha, expected in (("0", True), ("0.5", False)):
        folder = ["--model-repository", str(repository), "--alpha", alpha, "--replace"]
        assert command(["add-adapter", "anna", str(tmp_path / "anna"), *folder]) == 0
        assert ("it answers as the base does" in capsys.readouterr().out) == expected


def test_unknown_names_and_adapters_of_another_base_are_refused(
    base, engine, repository, tmp_path, capsys
):
    for name, message in (("ana", "nearest are: anna"), ("../anna", "unknown_adapter")):
        with pytest.raises(TaskError, match=message):
            ask(engine, "embed_text", text=["a"], adapter=name)
    with pytest.raises(TaskError, match="alpha is 2"):
        ask(engine, "embed_text", text=["a"], adapter="anna", alpha=2.0)

    def refused(adapter: Adapter) -> str:
        save_adapter(adapter, tmp_path / "x.safetensors")
        folder = ["--model-repository", str(repository)]
        assert command(["add-adapter", "x", str(tmp_path / "x.safetensors"), *folder]) == 2
        return capsys.readouterr().err

    meta = text_adapter(base, 3).metadata
    keys = ("visual.proj", "text_projection")
    tensors = {key: torch.zeros(WIDTH, WIDTH) for key in keys}
    export = f"radapter-export --adapter {tmp_path / 'x.safetensors'}"
    assert f"as a release of its own: {export}" in refused(Adapter(tensors, meta))
    other = replace(meta, text_tower="sha256:" + "0" * 64)
    words = refused(Adapter(text_adapter(base, 3).tensors, other))
    assert f"as a release of its own: {export}; or its base" in words
    assert f"{export} --alpha 0" in words
    # A file may name the base's tower with another width.
    thin = Adapter({"text_projection": torch.eye(3)}, meta)
    assert f"as a release of its own: {export}" in refused(thin)
    assert sorted(adapters.read_list(repository)) == ["anna", "bob"]
    # So may a file that another hand has put beside the release.
    facts = adapters.AdapterFacts(text_tower=meta.text_tower or "", width=3, alpha=1.0)
    adapters.add(repository, "thin", facts, (np.eye(3, dtype=np.float32),))
    message = (
        "'thin' maps embeddings of width 3, and those of release 1 have 32; remove it with"
        " radapter-release remove-adapter thin"
    )
    with pytest.raises(TaskError, match=message):
        ask(engine, "embed_text", text=["a"], adapter="thin")


@pytest.mark.triton
def test_triton_maps_stored_prompts(repository, tmp_path):
    request: dict[str, Any] = {"label_set": "animals", "adapter": "anna", "top_k": 3}
    with Client(transport=Engine([load_release(repository)])) as client:
        expected = client.classify(png(3), **request)
    path = repository / "text_encoder" / "1" / "animals.prompts.npy"
    with tritonserver(repository, indexes=tmp_path) as server, Client(server.http_url) as client:
        answer = client.classify(png(3), **request)
        # The rows that the processes have mapped are all that they read.
        rows = np.load(path, mmap_mode="r+")
        rows *= -1
        rows.flush()
        mapped = client.classify(png(3), **request, alpha=0.9)
    assert answer.labels == expected.labels
    np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-6)
    assert mapped.labels == expected.labels[::-1]


@pytest.mark.triton
def test_triton_answers_with_adapters_and_takes_new_ones(base, runs, repository, tmp_path):
    def ask(url: str, name: str) -> tuple[int, Any]:
        inputs = [
            {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [TEXTS[0]]},
            {"name": "adapter", "shape": [1, 1], "datatype": "BYTES", "data": [name]},
        ]
        url = f"{url}/v2/models/embed_text/infer"
        answer = urllib3.request("POST", url, json={"inputs": inputs}, timeout=60)
        return answer.status, answer.json()

    with tritonserver(repository, indexes=tmp_path) as server:
        for name, adapter in runs.items():
            status, answer = ask(server.http_url, name)
            assert status == 200
            outputs = {output["name"]: output["data"] for output in answer["outputs"]}
            expected = folded(base, adapter, adapter.metadata.alpha, TEXTS[:1])[0]
            np.testing.assert_allclose(outputs["text_embeds"], expected, atol=1e-6)
            assert json.loads(outputs["receipt"][0])["adapter"] == name
        assert "unknown_adapter" in ask(server.http_url, "carl")[1]["error"]
        folder = str(tmp_path / "anna")
        added = ["add-adapter", "carl", folder, "--model-repository", str(repository)]
        assert command(added) == 0
        assert ask(server.http_url, "carl")[0] == 200
        adapters.remove_adapter(repository, "anna")
        assert "unknown_adapter" in ask(server.http_url, "anna")[1]["error"]


@pytest.mark.parametrize(("count", "expected"), [(10_000, True), (10_001, False)])
def test_classes_with_too_many_prompts_are_no_label_set(base, tmp_path, count, expected):
    adapter = text_adapter(base, 1)
    classes = [f"thing {number}" for number in range(count)]
    metadata = replace(adapter.metadata, classes=classes)
    save_adapter(Adapter(adapter.tensors, metadata), tmp_path / "adapter.safetensors")
    facts, _ = adapters.read_run(tmp_path)
    assert ("classes" in facts.label_sets) == expected
