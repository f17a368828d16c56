"""Releases on a server: a switch under load, the way back, indexes, and a crash in the middle."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Client, InvalidRequest
from radapter_serve.cli.release import main
from radapter_serve.contract.labels import spellings
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.release.repository import Served
from radapter_serve.server.releases import find_server
from radapter_serve.server.supervisor import Supervisor
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.server.watch import SERVER
from radapter_serve.tasks.embed import Labels, embed_labels
from radapter_serve.tasks.segment import SegmentRequest, segment
from tests.helpers.asking import meanwhile
from tests.helpers.fake_upstream import until
from tests.helpers.gateway import gateway
from tests.helpers.small_release import (
    LABELS,
    Local,
    photos_in,
    png,
    seal,
)
from tests.helpers.ways import WAYS, Running

TRITON = pytest.param("triton", marks=pytest.mark.triton)
CALLERS = 2  # over each way
IMAGES = [png(number) for number in range(4)]
LABEL_SET = "色 हिन्दी 🦊"
INDEX = "fötos 写真 👩‍🔬"
TEXTS = ["a cat", "Ölkäfer", "a red thing"]
PROPOSALS = np.zeros((2, 20, 30), np.uint8)  # of the size of the images
PROPOSALS[0, :, :20] = PROPOSALS[1, 10:] = 255
SEGMENTS = {"segment": None, "proposals": PROPOSALS}
KINDS = ("image", "text", "classify", *SEGMENTS)


@pytest.fixture(scope="module")
def folder(releases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two releases and digests, of which the first is served, and photos."""
    folder = tmp_path_factory.mktemp("releases")
    repository = shutil.copytree(releases, folder / "repository")
    for path in repository.glob("*/*/label_sets/colours.npz"):
        shutil.copy(path, path.with_stem(LABEL_SET))
    seal(repository, 1, 2)
    Served((1,)).save(repository)
    photos_in(folder / "photos", len(IMAGES))
    return folder


@pytest.fixture(scope="module", params=[TRITON, "process"])
def running(request: pytest.FixtureRequest, folder: Path) -> Iterator[Running]:
    with WAYS[request.param](folder / "repository", folder / "indexes") as running:
        yield running


@pytest.fixture
def served(running: Running) -> Running:
    """The server with release 1, whatever the test before has left."""
    if running.server.served.releases != (1,):
        running.server.load([1])
    return running


def urls_of(served: Running) -> list[str]:
    """Each way in."""
    grpc = [served.server.grpc_url] if isinstance(served.server, TritonServer) else []
    return [served.url, *grpc]


def expected(repository: Path, version: int) -> dict[str, Any]:
    """The right answer of a release to each kind of request, computed here."""
    loaded = Local(repository, version).loaded
    images = loaded.embed_pixels([loaded.pixels(data) for data in IMAGES])
    labels = complete(embed_labels(loaded, LABELS, ["a photo of a {}."]))
    request = SegmentRequest(IMAGES[0], Labels(tuple(LABELS)))
    return {
        "image": images,
        "text": loaded.embed_texts(TEXTS),
        "classify": [labels.labels[np.argmax(labels.embeds @ image)] for image in images],
        "segment": complete(segment(loaded, request)),
        "proposals": complete(segment(loaded, replace(request, proposals=PROPOSALS))),
    }


def release_of_an_answer(client: Client, kind: str, known: Mapping[int, Mapping[str, Any]]) -> int:
    """The release of an answer, to which all of its rows must belong."""
    if kind in ("image", "text"):
        asked = client.embed_images(IMAGES) if kind == "image" else client.embed_texts(TEXTS)
        [version] = [
            version for version in known if np.allclose(asked, known[version][kind], atol=1e-5)
        ]
    elif kind == "classify":
        answers = client.classify(IMAGES, LABELS)
        [version] = {answer.release for answer in answers}
        assert [answer.top for answer in answers] == known[version][kind], version
    else:
        answer = client.segment(IMAGES[0], LABELS, proposals=SEGMENTS[kind])
        version = answer.release
        assert np.array_equal(answer.mask, known[version][kind].mask), version
        assert np.allclose(answer.scores, known[version][kind].scores, atol=1e-5), version
    return version


def test_a_switch_and_the_way_back_under_load(served: Running, folder: Path) -> None:
    known = {version: expected(folder / "repository", version) for version in (1, 2)}
    answers: Counter[tuple[str, str, int]] = Counter()  # by way, what was asked, and release

    def ask(way: str, client: Client, kinds: Iterator[str]) -> None:
        kind = next(kinds)
        answers[way, kind, release_of_an_answer(client, kind, known)] += 1

    ways = urls_of(served)
    with contextlib.ExitStack() as stack:
        if isinstance(served.server, TritonServer):
            ways.append(stack.enter_context(gateway(served.server)))
        for number, way in enumerate(ways * CALLERS):
            client = stack.enter_context(Client(way, batch_size=1, concurrency=2))
            kinds = itertools.cycle((*KINDS[number:], *KINDS[:number]))
            stack.enter_context(meanwhile(partial(ask, way, client, kinds)))
        for target in (2, 1):
            before = answers.copy()
            lines: list[str] = []
            served.server.load([target], lines.append)
            assert any("comparing image_encoder" in line for line in lines)
            with Client(served.url) as client:
                assert client.release().version == target
                assert [release.version for release in client.releases()] == [target]
                assert client.classify(IMAGES[0], LABELS).release == target
            awaited = [(way, kind, target) for way in ways for kind in KINDS]
            until(lambda: all(answers[each] > before[each] for each in awaited), 60)  # noqa: B023


def test_the_command_speaks_with_the_server(
    served: Running, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = folder / "repository"
    where = ["--model-repository", str(repository)]
    assert find_server(folder) is None
    assert find_server(repository) == served.folder
    assert main(["load", "2", *where]) == 0
    assert capsys.readouterr().out == "release 2 is served\n"
    assert Served.load(repository) == Served((2,), (1,))
    url = served.server.config.endpoints.http_url
    assert main(["list", *where, "--url", url]) == 0
    assert f"served at {served.url}" in capsys.readouterr().out
    assert main(["rollback", *where]) == 0
    assert capsys.readouterr().out == "release 1 is served\n"
    assert main(["load", "1", *where]) == 0
    assert capsys.readouterr().out == "release 1 is served already\n"
    assert served.server.served.releases == (1,)


def test_an_index_is_searched_while_its_release_is_served(served: Running, folder: Path) -> None:
    repository = folder / "repository"
    index = folder / "indexes" / INDEX
    build(str(folder / "photos"), index, load_release(f"{repository}@1"))
    with Client(served.url) as client:
        before = client.search("a cat", index=INDEX)
        served.server.load([1, 2])
        assert client.release().version == 2
        assert client.search("a cat", index=INDEX) == before
        assert client.search(image=IMAGES[2], index=INDEX)[0].id == "2.png"
        build(str(folder / "photos"), index, load_release(f"{repository}@2"))
        after = client.search("a cat", index=INDEX)
        assert [hit.score for hit in after] != [hit.score for hit in before]
        served.server.load([2])
        assert client.search("a cat", index=INDEX) == after
        served.server.load([1])
        with pytest.raises(InvalidRequest, match="another fine-tune"):
            client.search("a cat", index=INDEX)
    shutil.rmtree(index)


def test_names_may_have_any_letters(served: Running, folder: Path) -> None:
    build(str(folder / "photos"), folder / "indexes" / INDEX, load_release(folder / "repository@1"))
    for url in urls_of(served):
        with Client(url) as client:
            for name in spellings(LABEL_SET):
                assert client.classify(IMAGES[0], label_set=name).labels
                assert client.segment(IMAGES[0], label_set=name).labels
            for name in spellings(INDEX):
                assert client.search(image=IMAGES[1], index=name)[0].id == "1.png"
            with pytest.raises(InvalidRequest, match=f"there are: {INDEX}"):
                client.search("a cat", index="写")
            with pytest.raises(InvalidRequest, match=f"there are: colours, {LABEL_SET}"):
                client.classify(IMAGES[0], label_set="色")
    shutil.rmtree(folder / "indexes" / INDEX)


@pytest.mark.parametrize("running", [TRITON], indirect=True)
def test_a_server_that_dies_in_the_middle_of_a_switch_comes_back_as_it_was(
    served: Running,
) -> None:
    server = served.server
    assert isinstance(server, TritonServer)

    def kill(line: str) -> None:
        if line.startswith("loading embed_image"):
            server.kill(SERVER)

    with pytest.raises(RAdapterError, match="release 1 is served as before"):
        server.load([2], kill)
    lines: list[str] = []
    supervisor = Supervisor(server, lines.append)

    def is_back() -> bool:
        supervisor.step()
        return bool(lines) and "is back" in lines[-1]

    until(is_back, 90)
    assert set(map(tuple, server.models.values())) == {(1,)}
    with Client(served.url) as client:
        assert client.classify(IMAGES[0], LABELS).release == 1
    server.load([2])  # and it can be done again
    assert set(map(tuple, server.models.values())) == {(2,)}
