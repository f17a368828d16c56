"""Fixtures that several packages share."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.shared import common_folder, shared
from tests.helpers.small_models import random_adapter as make_adapter

if TYPE_CHECKING:
    import tritonclient.grpc as grpc

    from radapter_export import ExportedRelease
    from radapter_serve.adapter import Adapter
    from radapter_serve.clip.base import Base
    from radapter_serve.server.triton_server import TritonServer
    from tests.helpers.small_release import Local

# Data sets of Hugging Face are cached for this run alone; the variable is read at their import.
_datasets = tempfile.TemporaryDirectory(prefix="radapter-datasets-")
atexit.register(_datasets.cleanup)
os.environ["HF_DATASETS_CACHE"] = _datasets.name
# Graphs are kept from one run to the next, of each environment in a folder of its own: `.ci/run`
# tests in two at a time, whose tools differ.
_graphs = Path(__file__).parents[1] / ".pytest_cache" / "radapter" / Path(sys.prefix).name
os.environ["RADAPTER_CACHE"] = str(_graphs)
# Tests, too, import openvino without telling its makers, and without a file in the user's home.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

TINY_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spare each worker the imports of a module whose mark leaves out all of its tests."""
    if collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    mark = re.search(r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", text, re.MULTILINE)
    return True if mark and f"not {mark[1]}" in config.option.markexpr else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import without the garbage collector, and keep what was imported from it: it would look
    through a million objects that live to the end again and again.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Sends the signal of Ctrl-C to the main thread, and waits until it is heard."""

    def press() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(1)

    # Whatever a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield press
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers have in common; see tests/helpers/shared.py."""
    return common_folder(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def vocabularies_are_read_once() -> Iterator[None]:
    """Spare each model and each release the tenth of a second that reading CLIP's takes."""
    from radapter_serve.contract.facts import TokenizerFacts
    from radapter_serve.contract.tokenizer import Tokenizer

    load = Tokenizer.load
    known: dict[tuple[bytes, TokenizerFacts], Tokenizer] = {}

    def once(path: str | Path, facts: TokenizerFacts) -> Tokenizer:
        if not Path(path).is_file():
            return load(path, facts)
        key = Path(path).read_bytes(), facts
        if key not in known:
            known[key] = load(path, facts)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "load", staticmethod(once))
        module: Any = sys.modules.get("open_clip.factory")
        if module is not None:
            patch.setattr(module, "SimpleTokenizer", functools.cache(module.SimpleTokenizer))
        yield


@pytest.fixture(scope="session")
def tiny_clip_dir(common: Path) -> str:
    """`local-dir:` name of a tiny CLIP with QuickGELU and random weights, none zero or equal."""
    return f"local-dir:{shared(common, 'tiny-clip', _write_tiny_clip)}"


def _write_tiny_clip(folder: Path) -> None:
    import torch
    from open_clip import CLIP
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**TINY_CLIP)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                if "text_projection" in name or name == "visual.proj":
                    parameter.normal_(std=0.1)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_base(tiny_clip_dir: str) -> Base:
    from radapter_serve.clip.base import load_base

    return load_base(tiny_clip_dir)


@pytest.fixture(scope="session")
def random_adapter(tiny_clip_dir: str) -> Callable[..., Adapter]:
    """Makes an adapter of random values for the tiny CLIP, as `make_adapter` does."""
    return functools.partial(make_adapter, tiny_clip_dir, scale=0.2)


@pytest.fixture
def quick() -> Iterator[None]:
    """Spare `export_release` what it makes anew in each call."""
    from tests.helpers.graphs import quick_exports

    with quick_exports():
        yield


@pytest.fixture(scope="session")
def exported_tiny_clip(random_adapter: Callable[..., Adapter], common: Path) -> Path:
    """`model_repository` and `merged` of an adapter of the tiny CLIP, with a label set `four`."""

    def make(folder: Path) -> None:
        from radapter_serve.adapter import save_adapter

        save_adapter(random_adapter(scale=0.05), folder / "adapter.safetensors")
        labels = "cat, kitty\na dog in the SNOW\ndon't know\n猫"
        (folder / "labels.txt").write_text(labels, encoding="utf-8")
        _export(common, folder, (0.3, 0.8), folder)

    return shared(common, "exported", make)


@pytest.fixture(scope="session")
def dynamic_tiny_clip(exported_tiny_clip: Path, common: Path) -> Path:
    """A model repository: the adapter of `exported_tiny_clip`, α an input, by default 0.5."""
    folder = shared(
        common, "dynamic", lambda folder: _export(common, exported_tiny_clip, "dynamic", folder)
    )
    return folder / "model_repository"


def _export(common: Path, source: Path, alphas: Any, folder: Path) -> None:
    labels = {"four": source / "labels.txt"}
    export_into(folder, common, source / "adapter.safetensors", alphas, label_sets=labels)


def export_into(
    folder: Path, common: Path, adapter: Any, alphas: Any, **settings: Any
) -> list[ExportedRelease]:
    """Export into `model_repository` and `merged` of a folder, by graphs that are known."""
    from radapter_export import ExportSettings, export_release
    from tests.helpers.graphs import quick_exports

    places = {"model_repository": folder / "model_repository", "merged": folder / "merged"}
    with quick_exports():
        return export_release(adapter, alphas, ExportSettings(**{**places, **settings}))


@pytest.fixture(scope="session")
def repository(common: Path) -> Path:
    """Two small releases; what makes them is imported where a test asks for it."""

    def make(folder: Path) -> None:
        from tests.helpers.small_release import write_release

        write_release(folder, 1, seed=1, dense=False)
        write_release(folder, 2, seed=2)

    return shared(common, "release", make)


@pytest.fixture(scope="session")
def releases(common: Path) -> Path:
    """Two small releases with digests, both with patches, of which the second is served."""

    def make(folder: Path) -> None:
        from radapter_serve.release.repository import Served
        from tests.helpers.small_release import write_release

        for number in (1, 2):
            write_release(folder, number, seed=number)
        Served((2,)).save(folder)

    return shared(common, "sealed-releases", make)


@pytest.fixture
def sealed(repository: Path, tmp_path: Path) -> Path:
    """A copy of the two releases, with digests, that a test may change."""
    return shutil.copytree(repository, tmp_path / "repository")


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    from tests.helpers.asking import tritonserver

    with tritonserver(repository) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[grpc.InferenceServerClient]:
    from tests.helpers.asking import connect

    with connect(server) as client:
        yield client


@pytest.fixture
def local(repository: Path) -> Local:
    from tests.helpers.small_release import Local

    return Local(repository, 2)
