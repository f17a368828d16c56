"""A release small enough to be made in a blink: linear encoders, everything else as the exporter
writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image

from radapter_export.repository import TEMPLATE, TOKENIZED, config, sources
from radapter_serve.contract.facts import TokenizerFacts
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.batcher import complete, run_together
from radapter_serve.encoders.labels import load_label_sets
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.precision import bf16_of_processor
from radapter_serve.release.agreement import Samples
from radapter_serve.release.config import named_releases, read_config
from radapter_serve.release.integrity import write_sums
from radapter_serve.release.release import Confidence, Dense, Release, Tower
from radapter_serve.release.repository import CONFIG, MODELS
from radapter_serve.tasks.embed import embed_labels
from tests.helpers.small_models import preprocess
from tests.helpers.small_models import release as facts

needs_bf16 = pytest.mark.skipif(
    not bf16_of_processor() or importlib.util.find_spec("openvino") is None,
    reason="this processor has no bf16, or openvino is not installed",
)
SIZE = 16
GRID = 4
WIDTH = 8
VOCABULARY = 49408
# Of all these releases, whoever fitted it.
CONFIDENCE = Confidence(
    scale=6.0,
    bias=-1.0,
    dataset="photos",
    n=200,
    classes=4,
    ece_before=0.2,
    label_ece=0.01,
    temperature=2.0,
    ece_after=0.05,
    min_score=0.1,
    false_answers=0.5,
)
LABELS = ["red", "green", "blue, azure", "a striped thing"]


# The encoders as ONNX writes them in text; `last` and the weights are constants.
_UNIT = "norm = ReduceL2<keepdims=1>(sum, last) result = Div(sum, norm)"
ENCODERS = {
    "image_encoder": """(uint8[batch,16,16,3] image) => (float[batch,8] result) {
        floats = Cast<to=1>(image) centred = Sub(floats, middle)
        flat = Flatten(centred) sum = MatMul(flat, weight)""",
    "patch_encoder": """(uint8[batch,16,16,3] image) => (float[batch,4,4,8] result) {
        floats = Cast<to=1>(image) centred = Sub(floats, middle) pieces = Reshape(centred, cut)
        patches = Transpose<perm=[0, 1, 3, 2, 4, 5]>(pieces)
        flat = Reshape(patches, rows) sum = MatMul(flat, weight)""",
    # Padding, token 0, adds nothing: cropping to the longest text is exact.
    "text_encoder": """(int32[batch,length] tokens) => (float[batch,8] result) {
        vectors = Gather(table, tokens) sum = ReduceSum<keepdims=0>(vectors, one)""",
}


def encoder(name: str, random: np.random.Generator) -> onnx.ModelProto:
    patch = SIZE // GRID
    weights: dict[str, np.ndarray] = {"last": np.array([-1])}
    if name == "text_encoder":
        table = random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
        table[0] = 0
        weights |= {"table": table, "one": np.array([1])}
    else:
        rows = SIZE * SIZE * 3 if name == "image_encoder" else patch * patch * 3
        weights["middle"] = np.array(120, np.float32)
        weights["weight"] = random.normal(size=(rows, WIDTH)).astype(np.float32)
    if name == "patch_encoder":
        weights["cut"] = np.array([0, GRID, patch, GRID, patch, 3])
        weights["rows"] = np.array([0, GRID, GRID, patch * patch * 3])
    graph = f"{ENCODERS[name]} {_UNIT} }}".replace("result", name.replace("encoder", "embeds"))
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> graph {graph}')
    model.graph.initializer.extend(
        numpy_helper.from_array(array, key) for key, array in weights.items()
    )
    onnx.checker.check_model(model)
    return model


def samples(name: str, model: onnx.ModelProto, random: np.random.Generator) -> Samples:
    """Inputs, and what onnx's own interpreter makes of them."""
    shape = (SIZE, SIZE, 3) if name != "text_encoder" else (5,)
    kind, most = (np.uint8, 256) if name != "text_encoder" else (np.int32, VOCABULARY)
    inputs = [random.integers(0, most, (batch, *shape), dtype=kind) for batch in (1, 3)]
    [source] = [tensor.name for tensor in model.graph.input]
    run: Callable[[None, dict[str, np.ndarray]], Any] = ReferenceEvaluator(model).run
    return Samples(inputs, [run(None, {source: values})[0] for values in inputs])


@functools.cache
def clip_tokenizer() -> tuple[bytes, TokenizerFacts]:
    """CLIP's `tokenizer.json`, and the facts of a release about it."""
    import open_clip  # here: it loads slowly

    from radapter_serve.clip.tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        spec = write_tokenizer(open_clip.get_tokenizer("ViT-B-32"), path, dynamic_length=True)
        return path.read_bytes(), spec


def write_release(
    repository: Path, version: int, seed: int, *, dense: bool = True, precision: str = "fp32"
) -> None:
    random = np.random.default_rng(seed)
    tokenizer, spec = clip_tokenizer()
    release = facts(
        version,
        architecture="local-dir:/bases/of mine/tiny",
        adapter_digest=f"sha256:{seed}",
        image_tower=Tower("sha256:1", f"sha256:{seed}"),
        text_tower=Tower("sha256:4", f"sha256:{seed}"),
        tokenizer=spec,
        preprocess=preprocess(SIZE),
        embed_dim=WIDTH,
        logit_scale=10.0,
        dense=Dense("naclip", GRID) if dense else None,
        confidence=CONFIDENCE,
        precision=precision,
    )
    models = [name for name in MODELS if dense or name != "patch_encoder"]
    for name in models:
        folder = repository / name / str(version)
        folder.mkdir(parents=True)
        if name in ENCODERS:
            model = encoder(name, random)
            onnx.save(model, folder / "model.onnx")
            samples(name, model, random).save(folder)
        else:
            shutil.copy(sources() / name / "model.py", folder)
            if name in TOKENIZED:
                (folder / "tokenizer.json").write_bytes(tokenizer)
            release.save(folder)
        path = repository / name / CONFIG
        before = named_releases(read_config(path)).values() if path.exists() else ()
        for place, releases in ((path, [*before, release]), (folder / CONFIG, [release])):
            place.write_text(config(sources() / name / TEMPLATE, name, releases))
    local = Local(repository, version)
    for name in ("classify", "segment"):
        sets = repository / name / str(version) / "label_sets"
        sets.mkdir()
        complete(embed_labels(local.loaded, LABELS, ["a {}"])).save(sets / "colours.npz")
    write_sums(repository, version)


def seal(repository: Path, *versions: int) -> None:
    """Write the digests of releases that were changed, as if they had been exported so."""
    for version in versions:
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
    """An encoder in this process, with only ONNX Runtime, which notes in `calls` the shapes that it
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


def photos_in(folder: Path, count: int = 4, width: int = 30, height: int = 20) -> str:
    """Write images into a new folder, 0.png and so on; returns its path, as `build` takes it."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number, width, height))
    return str(folder)


def png(
    seed: int = 0, width: int = 30, height: int = 20, kind: str = "PNG", turn: int = 1
) -> bytes:
    """An image of random pixels; `turn` is its orientation by EXIF."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(file, kind, exif=exif if turn != 1 else b"")
    return file.getvalue()


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that has no more than its size."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", size) + chunk(b"IDAT", b"")
