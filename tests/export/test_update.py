"""The next release from the newest one's graphs, against a full export; and what cannot be updated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from radapter_export import Release, export_release
from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import encoders_of

ENCODERS = ("image_encoder", "patch_encoder", "text_encoder")
Export = Callable[..., list[Release]]


@pytest.fixture
def export(quick: None, adapter_path: Path, tmp_path: Path) -> Export:
    """`export_release` into `tmp_path`, or into another folder there; an update does without torch's exporter."""

    def call(alphas: Any, folder: str = ".", **changes: Any) -> list[Release]:
        where = {"model_repository": tmp_path / folder / "repository", "merged": tmp_path / folder / "merged"}
        with pytest.MonkeyPatch.context() as patch:
            if changes.get("update"):
                for name in ("image", "patch", "text"):
                    patch.setattr(f"radapter_export.release.{name}_graph", None)
            return export_release(changes.pop("adapter", adapter_path), alphas, **{**where, **changes})

    return call


@pytest.fixture
def other_adapter(random_adapter: Callable[..., Adapter], adapter_path: Path, tmp_path: Path) -> Path:
    """Of the same layers, with other values."""
    adapter = random_adapter(scale=0.03, templates=["a sketch of a {}."])
    tensors = {key: tensor.flip(0).contiguous() for key, tensor in adapter.tensors.items()}
    save_adapter(Adapter(tensors, adapter.metadata), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def initializers(repository: Path, model: str, version: int) -> dict[str, bytes]:
    graph = onnx.load(repository / model / str(version) / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}


def check_equal(tmp_path: Path, updated: Release, full: Release) -> None:
    """Both in all that is served: `full` stands in the folder `full`."""
    repositories = tmp_path / "repository", tmp_path / "full" / "repository"
    for model in ENCODERS:
        found, expected = (
            initializers(r, model, v.version) for r, v in zip(repositories, (updated, full), strict=True)
        )
        assert found == expected
    for path in ("classify/{}/label_sets/animals.npz", "classify/{}/tokenizer.json", "image_encoder/{}/samples.npz"):
        one, other = (r / path.format(v.version) for r, v in zip(repositories, (updated, full), strict=True))
        assert one.read_bytes() == other.read_bytes()
    varying = ("version", "created")
    assert {k: v for k, v in updated.facts.items() if k not in varying} == {
        k: v for k, v in full.facts.items() if k not in varying
    }
    one, other = (load_file(release.merged / "open_clip_model.safetensors") for release in (updated, full))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_another_alpha(export: Export, labels_path: Path, tmp_path: Path) -> None:
    given = {"label_sets": {"animals": labels_path}, "dense": "naclip", "max_batch_size": 16}
    export([0.3], **given)
    [updated] = export([0.7], update=True)
    assert updated.version == 2
    [full] = export([0.7], "full", **given)
    check_equal(tmp_path, updated, full)
    config = (tmp_path / "repository" / "image_encoder" / "config.pbtxt").read_text(encoding="utf-8")
    assert "versions: 2" in config and "versions: 1" not in config
    # A chain of updates drifts nowhere: every one is folded from the base.
    assert [release.version for release in export([0.3, 0.7], update=True)] == [3, 4]
    for model in ENCODERS:
        assert initializers(tmp_path / "repository", model, 4) == initializers(tmp_path / "repository", model, 2)


def test_what_is_served_by_another_runtime_since_its_export_stays_so(export: Export, tmp_path: Path) -> None:
    """As radapter-build-engine leaves it, whose runtime needs a GPU."""
    pytest.importorskip("openvino")
    export([0.3])
    for encoder in encoders_of(tmp_path / "repository"):
        (encoder.folder / "config.pbtxt").write_text(encoder.configured("openvino", None), encoding="utf-8")
    [updated] = export([0.7], update=True)
    assert updated.facts["runtime"] == "openvino"
    assert {encoder.runtime for encoder in encoders_of(tmp_path / "repository")} == {"openvino"}
    [back] = export([0.7], update=True, runtime="onnxruntime")
    assert back.facts["runtime"] == "onnxruntime"


@pytest.mark.parametrize("alpha", [0.7, "dynamic"])
def test_weights_of_a_lower_precision(export: Export, other_adapter: Path, tmp_path: Path, alpha: Any) -> None:
    """Folded in fp32 and cast once, as in a full export."""
    first, given = ([0.3] if alpha == 0.7 else alpha), (alpha if alpha == "dynamic" else [alpha])
    export(first, precision="fp16")
    [updated] = export(given, adapter=other_adapter, update=True)
    assert updated.facts["precision"] == "fp16"
    export(given, "full", adapter=other_adapter, precision="fp16")
    for model in ("image_encoder", "text_encoder"):
        found = initializers(tmp_path / "repository", model, 2)
        assert found == initializers(tmp_path / "full" / "repository", model, 1)
        assert found != initializers(tmp_path / "repository", model, 1)
    with pytest.raises(RAdapterError, match="release 2 has precision fp16, which an update keeps"):
        export(given, update=True, precision="fp32")


def test_another_adapter(export: Export, labels_path: Path, other_adapter: Path, tmp_path: Path) -> None:
    given = {"label_sets": {"animals": labels_path}, "dense": "naclip"}
    [first] = export([0.3], **given)
    [updated] = export([0.7], adapter=other_adapter, update=True)
    assert updated.facts["adapter_digest"] == load_adapter(other_adapter).digest
    assert updated.facts["templates"] == first.facts["templates"]
    [full] = export([0.7], "full", adapter=other_adapter, templates=first.facts["templates"], **given)
    check_equal(tmp_path, updated, full)


def test_a_release_that_takes_any_alpha(export: Export, labels_path: Path, other_adapter: Path, tmp_path: Path) -> None:
    given = {"label_sets": {"animals": labels_path}, "dense": "naclip"}
    [first] = export("dynamic", **given)
    [updated] = export(None, adapter=other_adapter, update=True)
    assert updated.facts["dynamic_alpha"] is True
    [full] = export("dynamic", "full", adapter=other_adapter, templates=first.facts["templates"], **given)
    check_equal(tmp_path, updated, full)


def rewrite(path: Path, change: Callable[[onnx.ModelProto, onnx.TensorProto], None], name: str) -> None:
    model = onnx.load(path)
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    change(model, tensor)
    onnx.save(model, path)


def nudge(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    array = numpy_helper.to_array(tensor).copy()
    array.flat[3] += max(1e-3, 4 * np.abs(array.flat[3]) * torch.finfo(getattr(torch, str(array.dtype))).eps)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def transpose(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    array = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def rename(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["val_7" if name == tensor.name else name for name in node.input]
    tensor.name = "val_7"


ADAPTED, PLAIN = "visual.transformer.resblocks.1.mlp.c_proj.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (nudge, ADAPTED, f"other values in {ADAPTED} of image_encoder"),
        (nudge, PLAIN, f"other values in {PLAIN} of image_encoder"),
        (transpose, PLAIN, rf"{PLAIN} of shape \(64, 256\) in image_encoder, not \(256, 64\)"),
        (rename, ADAPTED, f"no initializer {ADAPTED}"),
    ],
)
def test_a_weight_that_is_not_where_it_must_be(
    export: Export, tmp_path: Path, change: Callable[..., None], name: str, message: str, precision: str
) -> None:
    export([0.3], precision=precision, **({"runtime": "openvino"} if precision == "bf16" else {}))
    rewrite(tmp_path / "repository" / "image_encoder" / "1" / "model.onnx", change, name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RAdapterError, match=f"release 1 has {message}.*export without --update"):
        export([0.7], update=True)
    assert sorted(tmp_path.rglob("*")) == before


def facts_with(tmp_path: Path, **changes: Any) -> None:
    path = tmp_path / "repository" / "classify" / "1" / "release.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_what_only_a_new_export_can_change(export: Export, labels_path: Path, tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match=r"no release in the model repository.*radapter-export"):
        export([0.7], update=True)
    export([0.3], label_sets={"animals": labels_path})
    with pytest.raises(RAdapterError, match="release 1 has its alpha folded in"):
        export("dynamic", update=True)
    with pytest.raises(RAdapterError, match="release 1 has dense none"):
        export([0.7], update=True, dense="naclip")
    facts_with(tmp_path, dynamic_alpha=True)
    with pytest.raises(RAdapterError, match="release 1 takes any alpha.*--alpha dynamic"):
        export([0.7], update=True)
    facts_with(tmp_path, dynamic_alpha=False, precision="int8")
    with pytest.raises(RAdapterError, match="int8"):
        export([0.7], update=True)
    facts_with(tmp_path, precision="fp32")
    path = tmp_path / "repository" / "classify" / "1" / "label_sets" / "animals.npz"
    with np.load(path) as file:
        old = {name: file[name] for name in ("labels", "embeds")}
    np.savez(path, **old)
    with pytest.raises(RAdapterError, match="synonyms.*--label-set animals=FILE"):
        export([0.7], update=True)
    (tmp_path / "repository" / "text_encoder" / "1" / "model.onnx").write_bytes(b"broken")
    with pytest.raises(RAdapterError):
        export([0.7], update=True)
    facts_with(tmp_path, base_digest="sha256:0123")
    with pytest.raises(RAdapterError, match="another base.*sha256:0123"):
        export([0.7], update=True)
