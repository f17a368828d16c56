"""The engine's answers are Triton's, to the byte: all tasks, good requests and bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Client, RAdapterClientError
from radapter_serve.encoders.loaded import load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.index import writer
from radapter_serve.index.build import build
from tests.helpers.asking import tritonserver
from tests.helpers.small_release import photos_in, png

pytestmark = pytest.mark.triton

# No label is one that a server embeds in a batch of its own when it starts ("a"): of texts that are
# embedded in another batch a runtime may round the last bit otherwise.
Ask = Callable[[Client], Any]

GOOD: dict[str, Ask] = {
    "images": lambda client: client.embed_images([png(0), png(1, kind="JPEG"), png(2, 60, 61)]),
    "texts": lambda client: client.embed_texts(["a cat", "Ölkäfer 猫", "word " * 200, "a cat"]),
    "labels": lambda client: client.classify([png(3)], ["red", "green, lime", "blue"], top_k=2),
    "label set": lambda client: client.classify(png(4), label_set="colours"),
    "calibrated": lambda client: client.classify(png(5), ["red", "green"], calibrated=True),
    "examples": lambda client: client.classify(
        [png(5), png(6)], ["red", "green"], examples={"red": [png(8), png(9)]}, example_weight=0.3
    ),
    "templates": lambda client: client.classify(png(5), ["red"], templates=["one {}", "two {}"]),
    "mask": lambda client: client.segment(png(6, 50, 40), ["sky", "sea"], threshold=0.4),
    "refined": lambda client: client.segment(png(6, 50, 40), ["sky", "sea"], refine=2),
    "proposals": lambda client: client.segment(
        png(6, 50, 40), ["sky", "sea"], proposals=np.tri(40, 50)[None] > 0
    ),
    "search by image": lambda client: client.search(
        image=png(7), index="photos", where="width > 20", thumbnails=True
    ),
    "search by parts": lambda client: client.search(
        ["red", "blue"],
        image=png(7),
        id=["3.png", "5.png"],
        weights=[1, -0.5, 0.3, 2, 0],
        index="photos",
    ),
    "search by pages": lambda client: pages(client),
    "search by FAISS": lambda client: client.search(image=png(7), index="many é", thumbnails=True),
    "calibrated search": lambda client: client.search(
        "red", index="photos", min_score="calibrated"
    ),
}
BAD: dict[str, Ask] = {
    "no image": lambda client: client.classify(b"no image", ["a"]),
    "alpha": lambda client: client.embed_texts(["a"], alpha=0.9),
    "no index": lambda client: client.search("a", index="none"),
    "another version": lambda client: client.search("a", index="photos", index_version="g-1"),
    "proposals": lambda client: client.segment(
        png(6, 50, 40), ["red"], proposals=np.ones((1, 3, 3), bool)
    ),
}


def pages(client: Client) -> list[Any]:
    """The pages of a search, and the version that they are of."""
    first = client.search("red", index="photos", top_k=3, offset=0)
    version = first.index_version
    assert version is not None
    rest = [
        client.search("red", index="photos", top_k=3, offset=offset, index_version=version)
        for offset in (3, 6)
    ]
    assert [len(page) for page in rest] == [3, 2]
    return [version, first, *rest]


@pytest.fixture(scope="module")
def both(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Client, Client]]:
    folder = tmp_path_factory.mktemp("both")
    indexes = folder / "indexes"
    release = load_release(repository)
    build(photos_in(folder / "photos", 8), indexes / "photos", release)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "EXACT", 100)  # more images are found by FAISS
        build(photos_in(folder / "many", 120), indexes / "many é", release)
    with (
        tritonserver(repository, indexes=indexes) as server,
        Client(server.grpc_url) as served,
        Engine.open(repository, indexes=indexes) as engine,
        Client(transport=engine) as here,
    ):
        yield served, here


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_both_answer_the_same(both: tuple[Client, Client], name: str) -> None:
    served, here = (answer(client, {**GOOD, **BAD}[name]) for client in both)
    assert served == here
    assert (name in BAD) == (isinstance(served, tuple) and isinstance(served[0], type))


def answer(client: Client, ask: Ask) -> Any:
    try:
        return plain(ask(client))
    except RAdapterClientError as error:
        return type(error), error.code, str(error)


def plain(answer: Any) -> Any:
    """Something to compare: arrays by their bytes, and what holds arrays by its parts."""
    if isinstance(answer, np.ndarray):
        return answer.dtype, answer.shape, answer.tobytes()
    if isinstance(answer, list):
        return [plain(item) for item in answer]
    if hasattr(answer, "__dict__"):
        return {name: plain(value) for name, value in vars(answer).items()}
    return answer
