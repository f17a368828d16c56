"""An engine through the client: what it answers and what it refuses."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL.PngImagePlugin import PngImageFile

from radapter_client import (
    Client,
    InvalidImage,
    InvalidRequest,
    ModelNotFound,
    RAdapterClientError,
    Request,
    Timeout,
)
from radapter_serve.contract import images as preprocess
from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.loaded import load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.errors import RAdapterError
from radapter_serve.index import index as module
from radapter_serve.model import Model
from tests.helpers.fake_upstream import until
from tests.helpers.small_release import Local, png, seal
from tests.helpers.walks import check_walk


@pytest.fixture(scope="module")
def engine(repository: Path) -> Iterator[Engine]:
    with Engine.open(repository) as engine:
        yield engine


def texts(*values: bytes) -> np.ndarray:
    return np.array([[value] for value in values], object)


def test_releases_refusals_and_one_output_alone(engine: Engine) -> None:
    """tests/server/test_releases_served.py shows that all answers are those of the tasks."""
    client = Client(transport=engine)
    assert [release.version for release in client.releases()] == [1, 2]
    for number in (1, 2):
        pinned = Client(transport=engine, release=number)
        assert pinned.is_ready() and pinned.classify(png(0), ["a"]).release == number
    for inputs, message in (
        ({"texts": texts(b"a")}, "no input 'texts'; it has text, adapter, alpha"),
        ({"text": texts(b"\xff")}, "UTF-8"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            engine.send(Request("infer", "embed_text", inputs=inputs), 10)
    with pytest.raises(ModelNotFound, match="no release 99 of embed_text here; there are 1, 2"):
        Client(transport=engine, release=99).embed_texts(["a"])
    with pytest.raises(ModelNotFound, match="there is no task 'image_encoder'; there are"):
        engine.send(Request("infer", "image_encoder"), 10)
    with pytest.raises(InvalidImage):
        client.classify(b"x", ["a"])
    with pytest.raises(InvalidRequest, match="no index 'photos'"):
        client.search("a", index="photos")
    inputs = {"image": texts(png(0)), "labels": np.array([[b"a", b"b"]], object)}
    reply = engine.send(Request("infer", "classify", inputs=inputs, outputs=["score"]), 10)
    assert set(reply.outputs) == {"score"} and reply.version == 2


def test_needs_of_callers_of_several_tasks_are_encoded_together(repository: Path) -> None:
    local = Local(repository, 2)
    encode = local.images
    jobs = [("embed_image", png(0)), ("classify", png(1)), ("embed_image", png(2))]
    with Engine([local.loaded]) as engine, ThreadPoolExecutor(3) as pool:
        expected = [asked(engine, *job) for job in jobs]
        [served] = engine._served.values()
        local.calls.clear()

        def images(pixels: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
            if not local.calls:  # the first caller's image takes until the two others wait
                until(lambda: len(served.queues["images"]._waiting) == 2)
            return encode(pixels)

        local.images = images  # type: ignore[method-assign]
        answers = list(pool.map(lambda job: asked(engine, *job), jobs))
    assert [shape[0] for shape in local.calls] == [1, 2]
    for outputs, others in zip(answers, expected, strict=True):
        for output, values in others.items():
            if values.dtype == object:
                np.testing.assert_array_equal(outputs[output], values)
            else:
                np.testing.assert_allclose(outputs[output], values, atol=1e-6)


def test_releases_are_replaced_from_one_request_to_the_next(repository: Path) -> None:
    """A prepared release has answered its probes."""
    old = Local(repository, 1)
    new: Any = Local(repository, 2)
    with Engine([old.loaded]) as engine:
        assert engine.versions() == [1]
        prepared = engine.prepare([new.loaded])
        assert engine.versions() == [1] and new.calls  # it was asked, and is not served yet
        calls = len(old.calls)
        engine.commit(prepared)
        assert engine.versions() == [2]
        [release] = engine.releases("embed_text")
        assert release.version == 2 and len(old.calls) == calls
        with pytest.raises(ModelNotFound, match="no release 1"):
            Client(transport=engine, release=1).embed_texts(["a"])
        broken: Any = Local(repository, 1)
        broken.tokens = Mock(side_effect=TaskError("encoder_failed", "no"))
        with pytest.raises(TaskError, match="encoder_failed"):
            engine.prepare([broken.loaded])
        assert engine.versions() == [2]
        # A served release is not asked again: a new one may be what a broken one waits for.
        new.tokens = broken.tokens
        assert [*engine.prepare([new.loaded, Local(repository, 1).loaded])] == [2, 1]


def test_a_replaced_release_is_closed_and_freed_after_its_last_request(
    repository: Path, tmp_path: Path
) -> None:
    old = load_release(repository, 1, indexes=tmp_path)
    assert old.adapters is not None and not old.adapters.entries()
    threads = set(threading.enumerate())
    new = Local(repository, 2).loaded
    begun = threading.Event()
    gate = threading.Event()

    def is_held() -> bool:
        begun.set()
        assert gate.wait(30)
        return False

    gc.disable()
    try:
        with Engine([old]) as engine, ThreadPoolExecutor(1) as pool:
            released = weakref.ref(old)
            del old
            client = Client(transport=engine)
            client.embed_images([png(0), png(1)])
            with pytest.raises(InvalidRequest, match="no index"):
                client.search("a", index="photos")
            decoding = set(threading.enumerate()) - threads
            answer = pool.submit(asked, engine, "embed_image", png(2), cancelled=is_held)
            assert begun.wait(30)
            engine.commit(engine.prepare([new]))
            assert released() is not None
            gate.set()
            assert answer.result(30)["image_embeds"].shape == (1, 8)
            del answer
            until(lambda: released() is None)
            until(lambda: not any(thread.is_alive() for thread in decoding if is_decoder(thread)))
    finally:
        gc.enable()


def is_decoder(thread: threading.Thread) -> bool:
    return thread.name.startswith("decode")


def test_tasks_are_answered_while_the_first_search_opens_indexes(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "index.json").touch()
    begun = threading.Event()
    gate = threading.Event()

    def open_slowly(folder: Path) -> None:
        begun.set()
        assert gate.wait(60)
        raise RAdapterError("no index")

    monkeypatch.setattr(module, "open_index", open_slowly)
    with Engine.open(repository, indexes=tmp_path) as engine, ThreadPoolExecutor(2) as pool:
        client = Client(transport=engine)
        search = pool.submit(client.search, "a", index="photos")
        assert begun.wait(30)
        assert client.classify(png(0), ["a", "b"]).top
        # Another search waits only as long as its caller does.
        with pytest.raises(Timeout):
            Client(transport=engine, timeout=0.5, retries=0).search("b", index="photos")
        assert not search.done()
        gate.set()
        assert isinstance(search.exception(60), InvalidRequest)


def test_nobody_waits_longer_than_they_said(engine: Engine) -> None:
    labels = np.array([[f"label {number}".encode() for number in range(2000)]], object)
    with pytest.raises(Timeout):
        engine.send(
            Request("infer", "classify", inputs={"image": texts(png(0)), "labels": labels}), 0.001
        )


def test_a_closed_engine_says_so_and_leaves_no_thread(repository: Path) -> None:
    before = set(threading.enumerate())
    engine = Engine.open(repository)
    client = Client(transport=engine)
    client.embed_images([png(0), png(1)])
    client.close()
    with pytest.raises(RAdapterClientError, match="closed"):
        client.embed_texts(["a"])
    with pytest.raises(RAdapterClientError, match="the model is closed"):
        engine.send(Request("infer", "embed_text", inputs={"text": texts(b"a")}), 10)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]


def test_a_release_that_is_broken_or_not_there_is_refused(repository: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(repository, tmp_path / "copy")
    (copy / "image_encoder" / "2" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(RAdapterError, match="image_encoder/2/model.onnx differs"):
        Engine.open(copy)
    seal(copy, 2)  # as if it had been exported so
    with pytest.raises(RAdapterError, match=r"cannot load .*image_encoder.2.model.onnx"):
        Engine.open(copy)
    with pytest.raises(RAdapterError, match="no release 7"):
        Engine.open(f"{copy}@7")
    with Engine.open(f"{copy}@1") as engine:
        assert engine.versions() == [1]


SMALL = png(0)
LARGE = png(1, 60, 50)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> preprocess.ImageFile:
    """`LARGE`, which is one here."""
    monkeypatch.setattr(preprocess, "LARGE_MEMORY", 8 * 60 * 49)
    monkeypatch.setattr(preprocess, "POLL_SECONDS", 0.01)
    file = preprocess.read_header(LARGE)
    assert file.is_large
    assert not preprocess.read_header(SMALL).is_large
    return file


def asked(engine: Engine, task: str, image: bytes, **how: Any) -> dict[str, np.ndarray]:
    inputs = {"image": np.array([[image]], object), "labels": np.array([[b"a", b"b"]], object)}
    if task == "segment":
        inputs = {name: value[0] for name, value in inputs.items()}
    if task == "embed_image":
        del inputs["labels"]
    return dict(engine.infer(task, "", inputs, **how).outputs)


def test_large_images_are_few_and_keep_no_small_ones_waiting(
    repository: Path, large: preprocess.ImageFile
) -> None:
    # More than batches of a task may run at once.
    tasks = [*["embed_image"] * 4, *["classify"] * 4, "segment"]
    engine = Engine([Local(repository, 2).loaded], max_waiting=4 * len(tasks))
    Engine([], max_waiting=4)  # has a limit of its own
    looks = [0] * len(tasks)  # whether the caller of a task has left

    def look(number: int) -> bool:
        looks[number] += 1
        return False

    expected = {task: asked(engine, task, LARGE) for task in set(tasks)}
    with ThreadPoolExecutor(len(tasks)) as pool:
        with preprocess.turn(large, limit=engine.large_images):
            answers = [
                pool.submit(asked, engine, task, LARGE, cancelled=partial(look, number))
                for number, task in enumerate(tasks)
            ]
            # Before it decodes, before it waits and while it does
            until(lambda: min(looks) >= 3, 60)
            for task in expected:
                assert asked(engine, task, SMALL, deadline=time.monotonic() + 60)
            with pytest.raises(TaskError, match=r"\[overloaded\] too many requests with large im"):
                asked(engine, "classify", LARGE, deadline=time.monotonic() + 60)
            assert not any(answer.done() for answer in answers)
        for task, answer in zip(tasks, answers, strict=True):
            for name, values in expected[task].items():
                np.testing.assert_array_equal(answer.result(60)[name], values)


@pytest.mark.parametrize("task", ["embed_image", "classify", "segment"])
def test_who_has_left_or_waited_too_long_decodes_nothing(
    engine: Engine, large: preprocess.ImageFile, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(engine, task, SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(TaskError, match=r"\[cancelled\]"):
            asked(engine, task, SMALL, cancelled=lambda: True)
    busy = preprocess.turn(large, limit=engine.large_images)
    with busy, pytest.raises(TaskError, match=r"\[timed_out\]"):
        asked(engine, task, LARGE, deadline=time.monotonic() + 0.05)


def test_two_images_are_segmented_at_once_and_a_third_waits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = time.monotonic() + 60
    limit = engine._served[2].segmentations
    with limit():
        assert asked(engine, "segment", SMALL, deadline=soon)
        with limit():
            with pytest.raises(TaskError, match=r"\[timed_out\]"):
                asked(engine, "segment", SMALL, deadline=time.monotonic() + 0.2)
            assert asked(engine, "classify", SMALL, deadline=soon)
            monkeypatch.setattr(limit, "_max_waiting", 0)
            with pytest.raises(TaskError, match=r"\[overloaded\] too many requests to segment"):
                asked(engine, "segment", SMALL, deadline=soon)
    assert asked(engine, "segment", SMALL, deadline=soon)


def test_a_request_takes_the_way_that_the_page_describes(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(png(0, kind="JPEG"))
    model = Model(repository)
    model.classify(tmp_path / "cat.jpg", ["a bird"])
    labels = ["a cat", "a dog"]
    check_walk("Follow one request", lambda: model.classify(tmp_path / "cat.jpg", labels))
