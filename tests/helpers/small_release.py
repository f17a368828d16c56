"""A release small enough to be made in a blink: linear encoders, everything else as the exporter
writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from tritonclient.grpc import model_config_pb2

from radapter_export.repository import add_tensors
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.labels import load_label_sets
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import complete, run_together
from radapter_serve.release.agreement import LEAST_COSINE, Samples
from radapter_serve.release.config import configure, named_releases, read_config
from radapter_serve.release.integrity import write_sums
from radapter_serve.release.release import Release
from radapter_serve.release.repository import MODELS
from radapter_serve.tasks.labels import embed_labels

SOURCES = Path(__file__).parents[2] / "model_repository"
SIZE = 16
GRID = 4
WIDTH = 8
VOCABULARY = 49408
TASKS = ("embed_image", "embed_text", "segment", "classify")
# Of all these releases, whoever fitted it.
CONFIDENCE = {
    **{"scale": 6.0, "bias": -1.0, "temperature": 2.0, "dataset": "photos", "n": 200, "classes": 4},
    **{"ece_before": 0.2, "ece_after": 0.05, "label_ece": 0.01},
    **{"min_score": 0.1, "false_answers": 0.5},
}
LABELS = ["red", "green", "blue, azure", "a striped thing"]


def unit_length(source: str, target: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("ReduceL2", [source, "last"], ["norm"], keepdims=1),
        helper.make_node("Div", [source, "norm"], [target]),
    ]


def graph(
    name: str,
    nodes: list,
    inputs: list,
    output: str,
    weights: dict[str, np.ndarray],
    shape: tuple[int, ...] = (),
) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    constants.append(numpy_helper.from_array(np.array([-1]), "last"))
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *shape, WIDTH])]
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs, constants), opset_imports=opset
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def image_encoder(random: np.random.Generator) -> onnx.ModelProto:
    weight = random.normal(size=(SIZE * SIZE * 3, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "middle"], ["centred"]),
        helper.make_node("Flatten", ["centred"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["sum"]),
        *unit_length("sum", "image_embeds"),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])]
    return graph(
        "image",
        nodes,
        inputs,
        "image_embeds",
        {"weight": weight, "middle": np.array(120, np.float32)},
    )


def patch_encoder(random: np.random.Generator) -> onnx.ModelProto:
    patch = SIZE // GRID
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "middle"], ["centred"]),
        helper.make_node("Reshape", ["centred", "cut"], ["pieces"]),
        helper.make_node("Transpose", ["pieces"], ["patches"], perm=[0, 1, 3, 2, 4, 5]),
        helper.make_node("Reshape", ["patches", "rows"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["sum"]),
        *unit_length("sum", "patch_embeds"),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])]
    weights = {
        "middle": np.array(120, np.float32),
        "cut": np.array([0, GRID, patch, GRID, patch, 3]),
        "rows": np.array([0, GRID, GRID, patch * patch * 3]),
        "weight": random.normal(size=(patch * patch * 3, WIDTH)).astype(np.float32),
    }
    return graph("patches", nodes, inputs, "patch_embeds", weights, (GRID, GRID))


def text_encoder(random: np.random.Generator) -> onnx.ModelProto:
    table = random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    table[0] = 0  # padding adds nothing: cropping to the longest text is exact
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "length"], ["sum"], keepdims=0),
        *unit_length("sum", "text_embeds"),
    ]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", "length"])]
    return graph("text", nodes, inputs, "text_embeds", {"table": table, "length": np.array([1])})


def samples(name: str, model: onnx.ModelProto, random: np.random.Generator) -> Samples:
    """Inputs, and what onnx's own interpreter makes of them."""
    shape = (SIZE, SIZE, 3) if name != "text_encoder" else (5,)
    kind, most = (np.uint8, 256) if name != "text_encoder" else (np.int32, VOCABULARY)
    inputs = [random.integers(0, most, (batch, *shape), dtype=kind) for batch in (1, 3)]
    [source] = [tensor.name for tensor in model.graph.input]
    run: Callable[[None, dict[str, np.ndarray]], Any] = ReferenceEvaluator(model).run
    return Samples(inputs, [run(None, {source: values})[0] for values in inputs])


@functools.cache
def clip_tokenizer() -> tuple[bytes, dict[str, Any]]:
    """CLIP's `tokenizer.json`, and the `tokenizer` entry of a release."""
    import open_clip  # here: it loads slowly

    from radapter_export.tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        spec = write_tokenizer(open_clip.get_tokenizer("ViT-B-32"), path, dynamic_length=True)
        return path.read_bytes(), spec


def write_release(
    repository: Path, version: int, seed: int, *, dense: bool = True, tasks: Sequence[str] = TASKS
) -> None:
    random = np.random.default_rng(seed)
    release: dict[str, Any] = {
        "format": 1,
        "version": version,
        "alpha": 0.5,
        "architecture": "ViT-B-32",
        "base_digest": "sha256:1",
        "adapter_digest": f"sha256:{seed}",
        "precision": "fp32",
        "runtime": "onnxruntime",
        "agreement": {"tolerance": 1e-4, "min_cosine": LEAST_COSINE},
        "preprocess": {
            "size": SIZE,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
        "embed_dim": WIDTH,
        "logit_scale": 10.0,
        "logit_bias": None,
        "templates": ["a photo of a {}."],
        "max_batch_size": 64,
        "dense": {"way": "naclip", "grid": GRID} if dense else None,
        "crop": MaskCrop().to_dict(),
        "confidence": CONFIDENCE,
        "dynamic_alpha": False,
        "adapters": [],
        "label_sets": {},
        "tools": {},
        "created": "",
    }
    encoders = {"image_encoder": image_encoder(random), "text_encoder": text_encoder(random)}
    if dense:
        encoders["patch_encoder"] = patch_encoder(random)
    for name, model in encoders.items():
        folder = repository / name / str(version)
        folder.mkdir(parents=True)
        onnx.save(model, folder / "model.onnx")
        samples(name, model, random).save(folder)
    for name in tasks:
        folder = repository / name / str(version)
        folder.mkdir(parents=True)
        shutil.copy(SOURCES / name / "model.py", folder)
        file, release["tokenizer"] = clip_tokenizer()
        (folder / "tokenizer.json").write_bytes(file)
        Release.from_dict(release).save(folder)
    for name in (*encoders, *tasks):
        text = (SOURCES / name / "config.template.pbtxt").read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        add_tensors(config, name)
        path = repository / name / "config.pbtxt"
        before = named_releases(read_config(path)) if path.exists() else {}
        for one in (*before.values(), Release.from_dict(release)):
            config.parameters[f"release.{one.version}"].string_value = json.dumps(one.to_dict())
        config.parameters["release"].string_value = json.dumps(release)
        config.version_policy.specific.versions[:] = [*before, version]
        for tensor in [*config.input, *config.output]:
            if tensor.name == "image" and tensor.data_type == model_config_pb2.TYPE_UINT8:
                tensor.dims[:] = [SIZE, SIZE, 3]
            if tensor.name.endswith("_embeds"):
                tensor.dims[:] = [WIDTH] if len(tensor.dims) == 1 else [GRID, GRID, WIDTH]
        if name in encoders:
            configure(config, release["runtime"], release["precision"], release["max_batch_size"])
        path.write_text(text_format.MessageToString(config))
    local = Local(repository, version)
    for name in ("classify", "segment"):
        sets = repository / name / str(version) / "label_sets"
        sets.mkdir()
        complete(embed_labels(local.loaded, LABELS, ["a {}"])).save(sets / "colours.npz")
    write_sums(repository, version)


def seal(repository: Path, *versions: int) -> None:
    """Give releases what an export gives them besides their models: configs and digests."""
    for version in versions:
        for model in MODELS:
            if (folder := repository / model / str(version)).is_dir():
                config = read_config(repository / model / "config.pbtxt")
                own = config.parameters[f"release.{version}"].string_value
                for name in [name for name in config.parameters if name.startswith("release")]:
                    del config.parameters[name]
                config.parameters["release"].string_value = config.parameters[
                    f"release.{version}"
                ].string_value = own
                config.version_policy.specific.versions[:] = [version]
                (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
        write_sums(repository, version)


@functools.cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "tokenizer.json", Release.load(folder).tokenizer)


@functools.cache
def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Local:
    """An encoder in this process, by ONNX Runtime alone, which notes in `calls` the shapes that it
    got; `loaded` is the release with this encoder.
    """

    def __init__(self, repository: Path, version: int) -> None:
        folder = repository / "classify" / str(version)
        self.calls: list[tuple[int, ...]] = []
        self._repository = repository
        self._version = version
        release = Release.load(folder)
        self.loaded = LoadedRelease(
            release,
            self,
            _tokenizer(folder),
            read_label_sets=lambda loaded: load_label_sets(folder / "label_sets"),
        )

    def images(self, pixels: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
        return self._run("image_encoder", "image", pixels)

    def patches(self, pixels: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
        return self._run("patch_encoder", "image", pixels)

    def tokens(self, tokens: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
        return self._run("text_encoder", "tokens", tokens)

    def close(self) -> None:
        pass

    def changed(self, **facts: Any) -> LoadedRelease:
        """The release as if its facts were others."""
        release = dataclasses.replace(self.loaded.release, **facts)
        alpha = float(np.float32(release.alpha))
        return self.loaded._changed(release=release, exported_alpha=alpha)

    def _run(self, name: str, tensor: str, array: np.ndarray) -> np.ndarray:
        self.calls.append(array.shape)
        session = _session(self._repository / name / str(self._version) / "model.onnx")
        return session.run(None, {tensor: array})[0]


def together(tasks: Any, *encode: Any) -> list[Any]:
    """The answer of each task, or its `TaskError`, which a test tells apart."""
    return run_together(tasks, *encode)


def png(seed: int = 0, width: int = 30, height: int = 20, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )
