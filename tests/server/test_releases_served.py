"""Releases on a server, Triton or an engine: a switch under load, the way back, indexes, and a
crash in the middle.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Client, InvalidRequest
from radapter_serve.cli.release import main
from radapter_serve.contract.labels import spellings
from radapter_serve.encoders.loaded import complete, load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.release.repository import Served
from radapter_serve.server.releases import find_server
from radapter_serve.server.supervisor import Supervisor
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.server.watch import SERVER
from radapter_serve.tasks.embed import Labels, embed_labels
from radapter_serve.tasks.segment import SegmentRequest, segment
from tests.helpers.gateway import gateway
from tests.helpers.small_release import (
    LABELS,
    Local,
    photos_in,
    png,
    seal,
    write_release,
)
from tests.helpers.ways import WAYS, Running

TRITON = pytest.param("triton", marks=pytest.mark.triton)
LOADERS = 3  # over each way
IMAGES = [png(number) for number in range(4)]
LABEL_SET = "色 हिन्दी 🦊"
INDEX = "fötos 写真 👩‍🔬"
TEXTS = ["a cat", "Ölkäfer", "a red thing"]
PROPOSALS = np.zeros((2, 20, 30), np.uint8)  # of the size of the images
PROPOSALS[0, :, :20] = PROPOSALS[1, 10:] = 255
SEGMENTS = {"segment": None, "proposals": PROPOSALS}
KINDS = ("image", "text", "classify", *SEGMENTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two releases and digests, of which the first is served, and photos."""
    folder = tmp_path_factory.mktemp("releases")
    for version in (1, 2):
        write_release(folder / "repository", version, seed=version)
        loaded = Local(folder / "repository", version).loaded
        embeds = complete(embed_labels(loaded, LABELS, ["a {}"]))
        for task in ("classify", "segment"):
            embeds.save(
                folder / "repository" / task / str(version) / "label_sets" / f"{LABEL_SET}.npz"
            )
    seal(folder / "repository", 1, 2)
    Served((1,)).save(folder / "repository")
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


class Load:
    """Callers of every task over each way, who compare each answer with what its release answers
    here.

    Attributes:
        answers: how many there were, by way, what was asked, and release.
        wrong: answers that differ, and failures.
    """

    def __init__(self, ways: Sequence[str], repository: Path) -> None:
        self.answers: Counter[tuple[str, str, int]] = Counter()
        self.wrong: list[str] = []
        self._end = threading.Event()
        self._expected: dict[int, dict[str, Any]] = {}
        for version in (1, 2):
            loaded = Local(repository, version).loaded
            images = loaded.embed_pixels([loaded.pixels(data) for data in IMAGES])
            labels = complete(embed_labels(loaded, LABELS, ["a photo of a {}."]))
            request = SegmentRequest(IMAGES[0], Labels(tuple(LABELS)))
            masked = replace(request, proposals=PROPOSALS)
            self._expected[version] = {
                "image": images,
                "text": loaded.embed_texts(TEXTS),
                "tops": [labels.labels[np.argmax(labels.embeds @ image)] for image in images],
                "segment": complete(segment(loaded, request)),
                "proposals": complete(segment(loaded, masked)),
            }
        self._threads = [
            threading.Thread(target=self._ask, args=caller)
            for caller in enumerate([*ways] * LOADERS)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int, way: str) -> None:
        with Client(way, batch_size=1, concurrency=2) as client:
            # Callers that never rest would keep the processor from the switch.
            while not self._end.wait(0.02):
                kind = KINDS[number % len(KINDS)]
                number += 1
                try:
                    self.answers[way, kind, self._answer(client, kind)] += 1
                except Exception as error:
                    self.wrong.append(f"{way}: {type(error).__name__}: {error}")

    def _answer(self, client: Client, kind: str) -> int:
        """The release of an answer, all rows of which must be its own, though each was a request of
        its own.
        """
        if kind in ("image", "text"):
            asked = client.embed_images(IMAGES) if kind == "image" else client.embed_texts(TEXTS)
            [version] = [
                version
                for version, known in self._expected.items()
                if np.allclose(asked, known[kind], atol=1e-5)
            ]
            return version
        if kind == "classify":
            answers = client.classify(IMAGES, LABELS)
            [version] = {answer.release for answer in answers}
            assert [answer.top for answer in answers] == self._expected[version]["tops"], version
            return version
        answer = client.segment(IMAGES[0], LABELS, proposals=SEGMENTS[kind])
        known = self._expected[answer.release][kind]
        assert np.array_equal(answer.mask, known.mask), answer.release
        assert np.allclose(answer.scores, known.scores, atol=1e-5), answer.release
        return answer.release


def test_a_switch_and_the_way_back_under_load(served: Running, folder: Path) -> None:
    ways = urls_of(served)
    with contextlib.ExitStack() as stack:
        if isinstance(served.server, TritonServer):
            ways.append(stack.enter_context(gateway(served.server)))
        load = stack.enter_context(Load(ways, folder / "repository"))
        for target in (2, 1):
            before = load.answers.copy()
            lines: list[str] = []
            served.server.load([target], lines.append)
            assert any("comparing image_encoder" in line for line in lines)
            with Client(served.url) as client:
                assert client.release().version == target
                assert [release.version for release in client.releases()] == [target]
                assert client.classify(IMAGES[0], LABELS).release == target
            awaited = [(way, kind, target) for way in ways for kind in KINDS]
            deadline = time.monotonic() + 60
            while not all(load.answers[answer] > before[answer] for answer in awaited):
                assert time.monotonic() < deadline, (load.answers, load.wrong[:5])
                time.sleep(0.1)
    assert not load.wrong, load.wrong[:5]


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
        with pytest.raises(InvalidRequest, match="of another release"):
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
    deadline = time.monotonic() + 90
    while not (lines and "is back" in lines[-1]):
        assert time.monotonic() < deadline, lines
        supervisor.step()
        time.sleep(0.2)
    assert set(map(tuple, server.models.values())) == {(1,)}
    with Client(served.url) as client:
        assert client.classify(IMAGES[0], LABELS).release == 1
    server.load([2])  # and it can be done again
    assert set(map(tuple, server.models.values())) == {(2,)}
