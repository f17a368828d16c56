"""Requests and results of a client, through a transport that records."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import io
import itertools
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import radapter_client
from radapter_client import (
    AsyncClient,
    Client,
    Hit,
    Hits,
    ModelNotFound,
    RAdapterClientError,
    Reply,
    Request,
    Segmentation,
    ServerUnavailable,
    Timeout,
    _wire,
)
from radapter_client._results import read_releases
from radapter_client._sending import CANCELLED, Sender
from tests.helpers.stand_ins import Recorder, described

CLIENT = Client(transport=Recorder(), release=1)


def sent(image: Any, **options: Any) -> bytes:
    """The bytes of one image that reach the server."""
    recorder = Recorder()
    Client(transport=recorder, release=1, **options).embed_images([image])
    return recorder.requests[0].inputs["image"][0, 0]


def test_exported_names():
    public = {name for name in vars(radapter_client) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(vars(radapter_client)[name])}
    assert public - modules == set(radapter_client.__all__)
    assert radapter_client.__all__ == sorted(radapter_client.__all__)


def test_the_asynchronous_client_has_the_same_methods_and_asks_the_same():
    names = {name for name in vars(Client) if not name.startswith("_")}
    for name in names - {"close", "similarity"}:
        method, awaited = getattr(Client, name), getattr(AsyncClient, name)
        assert inspect.iscoroutinefunction(awaited) and awaited.__doc__ == method.__doc__
        assert inspect.signature(awaited) == inspect.signature(method)
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters

    def calls(client: Any) -> list[Any]:
        return [
            lambda: client.classify(b"x", ["a"], timeout=3),
            lambda: client.classify([b"x"] * 3, ["a"]),
            lambda: client.embed_texts([]),
            lambda: client.embed_texts(["a"] * 3),
            lambda: client.segment(PIXELS, ["a"]),
            lambda: client.search("a", index="i"),
            lambda: client.is_ready(),
            lambda: client.release(),
            lambda: client.indexes(),
        ]

    recorder = Recorder()
    other = Recorder()
    options: dict[str, Any] = {"batch_size": 2, "concurrency": 1, "timeout": 7}

    async def main() -> list[str]:
        async with AsyncClient(transport=other, **options) as client:
            return [str(await call()) for call in calls(client)]

    with Client(transport=recorder, **options) as client:
        assert [str(call()) for call in calls(client)] == asyncio.run(main())
    assert list(map(str, recorder.requests)) == list(map(str, other.requests))
    for seconds in (recorder.timeouts, other.timeouts):  # a call's own is that of the whole call
        assert 2 < seconds[0] < 3 and set(seconds[1:]) == {7}
    # Of one call, from one release.
    assert [request.version for request in recorder.inferences[1:3]] == ["1", "1"]


class Away(Recorder):
    """A server that is not there."""

    def send(self, request: Request, timeout: float) -> Any:
        super().send(request, timeout)
        raise ServerUnavailable("x")


def test_waits_between_tries_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("radapter_client._sending.time.sleep", waits.append)
    transport = Away()
    options: dict[str, Any] = {"timeout": 1000, "concurrency": 1, "progress": False}
    sender = Sender(transport, retries=10, **options)
    part = lambda: Request("config", "classify")  # noqa: E731
    with pytest.raises(ServerUnavailable):
        sender.ask([part], sender.limit(None))
    for wait, most in zip(waits, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5], strict=True):
        assert most / 2 <= wait <= most
    assert transport.timeouts[0] == 1000 and len(transport.timeouts) == 11
    for wait, left in zip(waits, transport.timeouts[1:], strict=True):
        assert left <= 1000 - wait  # a retry has what is left of the time-out
    with pytest.raises(ServerUnavailable):  # a wait beyond the time-out is not begun
        sender.ask([part], sender.limit(0.01))
    assert len(waits) == 10


def test_a_client_that_is_closed_in_a_call_does_not_try_again() -> None:
    class Closes(Away):
        def send(self, request: Request, timeout: float) -> Any:
            sender.close()
            return super().send(request, timeout)

    transport = Closes()
    sender = Sender(transport, retries=3, timeout=1000, concurrency=1, progress=False)
    with pytest.raises(RAdapterClientError, match="closed in the middle of a call"):
        sender.ask([lambda: Request("config", "classify")], sender.limit(None))
    assert len(transport.timeouts) == 1


def test_a_call_that_is_cancelled_while_it_waits_for_its_next_try_ends() -> None:
    class SetInTheWait(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return True

    transport = Away()
    sender = Sender(transport, timeout=9, retries=3, concurrency=1, progress=False)

    def ask() -> None:
        CANCELLED.set(SetInTheWait())
        sender.ask([lambda: Request("config", "classify")], sender.limit(None))

    with pytest.raises(RAdapterClientError, match="the call was cancelled"):
        contextvars.copy_context().run(ask)
    assert len(transport.requests) == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_calls_time_out_is_for_all_of_its_requests(kind: type) -> None:
    class Slow(Recorder):
        def send(self, request: Request, timeout: float) -> Any:
            if request.action == "infer":
                time.sleep(0.1)
            return super().send(request, timeout)

    async def main(**options: Any) -> int:
        client = kind(transport=Slow(), batch_size=1, concurrency=2, timeout=5)
        answer = client.embed_texts(["a"] * 12, **options)
        return len(await answer if kind is AsyncClient else answer)

    assert asyncio.run(main()) == asyncio.run(main(timeout=30)) == 12
    with pytest.raises(Timeout, match="the call's time-out is over"):
        asyncio.run(main(timeout=0.25))  # of 0.6 s


def test_the_concurrency_of_an_asynchronous_client_is_for_lists() -> None:
    class Together(Recorder):
        def send(self, request: Request, timeout: float) -> Any:
            meeting.wait(20)
            return super().send(request, timeout)

    meeting = threading.Barrier(16)

    async def main() -> None:
        async with AsyncClient(transport=Together(), release=1, concurrency=2) as client:
            await asyncio.gather(*(client.embed_texts(["a"]) for _ in range(16)))

    asyncio.run(main())


def test_a_list_is_begun_again_a_few_times_only() -> None:
    """A server may name another release each time that it is asked."""

    class Changing(Recorder):
        def send(self, request: Request, timeout: float) -> Any:
            super().send(request, timeout)
            if request.action == "config":
                return described(len(self.requests))
            raise ModelNotFound("another release took over")

    transport = Changing()
    with pytest.raises(ModelNotFound):
        Client(transport=transport, batch_size=1, concurrency=1).embed_texts(["a"] * 2)
    assert [request.action for request in transport.requests].count("config") == 4


def test_releases_are_in_the_order_of_their_numbers():
    parameters: dict[str, Any] = {}
    for version in (2, 10, 9):  # in no order, and not in that of text either
        parameters |= described(version)["parameters"]
    releases = read_releases({"parameters": parameters})
    assert [release.version for release in releases] == [2, 9, 10]


# URLs


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("grpc://localhost", "grpc://localhost:8001"),
        ("http://localhost/", "http://localhost:8000"),
        ("HTTPS://Example.org/triton/", "https://example.org:443/triton"),
        ("grpcs://example.org", "grpcs://example.org:443"),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_url(url: str, whole: str):
    assert repr(Client(url)) == f"Client({whole!r})"


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8001", "ftp://localhost", "http://:8000", "grpc://localhost:99999"),
        *("grpc://localhost/path", "http://me:secret@localhost", "http://localhost/?a=b"),
        *("http://[::1", "http://localhost\n", b"http://localhost"),
    ],
)
def test_a_bad_url_is_refused_with_the_allowed_ones(url):
    with pytest.raises(radapter_client.InvalidURL, match="allowed are http://.*grpcs://"):
        Client(url)


def test_without_a_url_http_is_asked_or_grpc_where_only_that_listens(monkeypatch: Any):
    nobody = "http://127.0.0.1:9"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for urls, asked in (
            ((f"http://{address}", f"grpc://{address}"), f"http://{address}"),
            ((nobody, f"grpc://{address}"), f"grpc://{address}"),
            ((nobody, nobody), nobody),
        ):
            monkeypatch.setattr(_wire, "DEFAULT_URLS", urls)
            assert repr(AsyncClient()) == f"AsyncClient({asked!r})"


# Images


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def images() -> list[Image.Image]:
    rgb = Image.fromarray(pixels(31, 45, 3))
    rgba = Image.fromarray(pixels(31, 45, 4))
    transparent = rgb.quantize(16)
    transparent.info["transparency"] = bytes(range(16))
    profiled = rgb.copy()
    profiled.info["icc_profile"] = b"x" * 100_000
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (31, 45)).astype(np.uint16))
    modes = [rgb.convert("L"), rgb.convert("1"), rgba.convert("LA"), rgb.quantize(200)]
    return [rgb, rgba, transparent, profiled, deep, *modes, rgb.crop((0, 0, 1, 1))]


@pytest.mark.parametrize(
    "image", images(), ids=lambda image: f"{image.mode}-{image.width}-{len(image.info)}"
)
def test_pil_image_arrives_to_the_bit(image: Image.Image):
    data = sent(image)
    back = Image.open(io.BytesIO(data))
    assert (back.format, back.mode, back.size) == ("PNG", image.mode, image.size)
    assert back.tobytes() == image.tobytes()
    assert "icc_profile" not in back.info
    assert len(data) < 2 * len(image.tobytes()) + 2000
    # Preprocess: resize in the image's own mode, then convert.
    if image.mode != "I;16":  # which older Pillows cannot resize
        resized, wanted = (x.resize((16, 16), Image.Resampling.BICUBIC) for x in (back, image))
        assert resized.convert("RGBA").tobytes() == wanted.convert("RGBA").tobytes()
    if image.mode in ("RGB", "L"):
        view = np.asarray(image)[::-1, ::-1]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent(view)))), view)


def exif(value: int, **more: str) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = value
    if more:
        data[0x010E] = more["description"]
    return data


def photo(width: int, height: int, kind: str = "JPEG", mode: str = "RGB", turn: int = 1) -> bytes:
    image = Image.fromarray(pixels(9, 13, 3)).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, kind, exif=exif(turn, description="a secret"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "size", "kind"),
    [
        ((600, 800, "JPEG", "RGB", 6), (224, 299), "JPEG"),
        ((800, 600, "JPEG", "L", 3), (299, 224), "JPEG"),
        ((400, 300, "PNG", "RGBA"), (299, 224), "PNG"),
        ((400, 300, "WEBP"), (299, 224), "JPEG"),
    ],
)
def test_photos_are_made_small_before_they_are_sent(form: Any, size, kind: str):
    data = photo(*form)
    small = sent(data, shrink_to=224)
    with Image.open(io.BytesIO(small)) as image, Image.open(io.BytesIO(data)) as whole:
        assert (image.size, image.format, image.mode) == (size, kind, whole.mode)
        assert image.getexif().get(0x0112, 1) == whole.getexif().get(0x0112, 1)
        assert b"a secret" not in small
        expected = np.asarray(whole.resize(size, Image.Resampling.BICUBIC), np.float64)
        assert np.abs(np.asarray(image, np.float64) - expected).mean() < 2


@pytest.mark.parametrize("what", ["small", "palette", "broken", "no image"])
def test_what_is_small_or_no_photo_is_sent_as_it_is(what: str):
    data = b"no image"
    if what != "no image":
        form: Any = {"small": (300, 224), "palette": (400, 300, "PNG", "P")}
        data = photo(*form.get(what, (400, 300)))[: 500 if what == "broken" else None]
    recorder = Recorder()
    with Client(transport=recorder, release=1, shrink_to=224) as client:
        client.classify(data, ["a"])
        client.search(image=data, index="photos")
        client.segment(photo(400, 300), ["a"])
    images = [request.inputs["image"].ravel()[0] for request in recorder.inferences]
    assert images == [data, data, photo(400, 300)]


def test_nothing_that_a_caller_hands_in_is_changed():
    """Neither images nor arrays, lists and dicts, by any call."""
    whole = photo(400, 300, turn=6)
    opened = Image.open(io.BytesIO(whole))
    untouched = Image.open(io.BytesIO(whole))
    palette = Image.fromarray(pixels(100, 140, 3)).quantize(200)
    array = pixels(90, 120, 3)
    masks = np.ones((1, 4, 5), np.float32)
    scores = np.ones((1, 1))
    labels = ["a", "b"]
    examples: Any = {"a": [opened]}
    weights = {"a": 0.25}

    def state() -> list[Any]:
        arrays = [thing.tobytes() for thing in (palette, array, masks, scores)]
        return [*arrays, dict(palette.info), [*labels], {**examples}, {**weights}]

    before = state()
    with Client(transport=Recorder(), release=1, shrink_to=64) as client:
        client.classify([opened, palette, array], labels)
        client.classify(opened, labels, examples=examples, example_weight=weights)
        client.search(image=[opened, palette, array], index="i", weights=[1, 2, 3])
        client.embed_images([opened, array])
        answer = client.segment(PIXELS, labels, proposals=masks, proposal_scores=scores)
        answer.overlay(palette.resize((5, 4)))
    assert state() == before
    assert (opened.size, opened.info) == (untouched.size, untouched.info)
    assert dict(opened.getexif()) == dict(untouched.getexif())
    assert opened.tobytes() == untouched.tobytes()


BEYOND = Image.new("P", (4, 4), 200)
BEYOND.putpalette([0, 0, 0, 255, 0, 0])  # without a colour of this number


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no/such/file.jpg", "no/such/file.jpg: No such file"),
        (Path("/"), "directory"),
        ("a\0b", "null byte"),
        (Image.open(io.BytesIO(photo(64, 64, "PNG")[:2000])), "cannot read"),
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\].*allowed are uint8 \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "uint8"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (None, "allowed are a path"),
        (Image.new("CMYK", (4, 4), 200), "mode CMYK .*'RGB'"),  # PNG would change it
        (BEYOND, "pixels beyond its palette"),
    ],
)
def test_a_value_that_is_no_image(image, message: str):
    with pytest.raises(radapter_client.InvalidImage, match=message) as error:
        sent(image)
    assert error.value.code == "invalid_image"


@pytest.mark.parametrize("value", [1, 5, 6])
def test_orientation_travels_with_the_pixels(value: int, tmp_path: Path):
    """A file, its bytes and Pillow's image of it are one image to the server."""
    path = tmp_path / "image.png"
    plain = Image.fromarray(pixels(31, 45, 3))
    plain.save(path, exif=exif(value))
    copied = plain.copy()
    copied.info["exif"] = exif(value).tobytes()
    with Image.open(path) as opened:
        images = [path, path.read_bytes(), opened, opened.convert("RGB"), copied]
        copies = [sent(image) for image in images]
        turned = ImageOps.exif_transpose(opened)
    for data in copies:
        with Image.open(io.BytesIO(data)) as back:
            assert back.tobytes() == plain.tobytes()
            assert back.getexif().get(0x0112, 1) == value
            assert ImageOps.exif_transpose(back).tobytes() == turned.tobytes()
    with Image.open(io.BytesIO(sent(turned))) as back:  # which is not turned again
        assert back.getexif().get(0x0112, 1) == 1 and back.tobytes() == turned.tobytes()


@pytest.mark.parametrize("value", [0, 9])
def test_an_orientation_that_exif_does_not_have_is_upright(value: int):
    photo = Image.new("RGB", (20, 30))
    photo.info["exif"] = exif(value).tobytes()
    with Image.open(io.BytesIO(sent(photo))) as back:
        assert back.getexif().get(0x0112) is None


def test_one_image_or_several():
    images: list[Any] = ["a.jpg", Path("a.jpg"), b"x", Image.new("L", (1, 1))]
    for image in (*images, pixels(4, 4, 3), pixels(4, 4)):
        try:
            assert not isinstance(CLIENT.classify(image, ["a"]), list)
        except radapter_client.InvalidImage as error:
            assert "a.jpg" in str(error)
    for several in ([b"x"], (b"x",), [], pixels(2, 4, 4, 3), iter([b"x"])):
        assert isinstance(CLIENT.classify(several, ["a"]), list)


# Requests


def test_options_are_sent_with_each_row_and_examples_with_the_first_image_alone():
    recorder = Recorder()
    shown: dict[str, Any] = {"mug": [b"m1", b"m2"], "cup": b"c"}
    options: dict[str, Any] = {"multi_label": True, "threshold": 0.25, "top_k": 3}
    with Client(transport=recorder, release=1, batch_size=2) as client:
        client.classify([b"x", b"y"], ["a", "b"], **options)
        client.classify([b"x", b"y", b"z"], ["cup", "tin", "mug"], examples=shown, unknown=0.25)
        client.classify(b"x", examples=shown, example_weight=1)
        by_label: dict[str, float] = {"mug": 0.75}
        client.classify(b"x", ["cup", "mug", "tin"], examples=shown, example_weight=by_label)
    plain, first, second, alone, apart = [request.inputs for request in recorder.inferences]
    assert {name: array.tolist() for name, array in plain.items()} == {
        **{"labels": [[b"a", b"b"]] * 2, "image": [[b"x"], [b"y"]]},
        **{name: [[value]] * 2 for name, value in options.items()},
    }
    assert [str(plain[name].dtype) for name in options] == ["bool", "float32", "int32"]
    assert apart["example_weight"].tolist() == [[0.5, 0.75, 0.5]]
    assert first["examples"].tolist() == [[b"m1", b"m2", b"c"], [b"", b"", b""]]
    assert first["example_labels"].tolist() == [[2, 2, 0]] * 2
    assert first["example_labels"].dtype == np.int32
    assert first["unknown"].tolist() == [[0.25]] * 2 and "example_weight" not in first
    assert second["examples"].tolist() == [[b"m1", b"m2", b"c"]]
    assert alone["labels"].tolist() == [[b"mug", b"cup"]]
    assert alone["example_weight"].tolist() == [[1.0]]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([0, 1, 10, 20, 33]), max_size=8), st.integers(1, 5))
def test_batches(sizes: list[int], rows: int):
    """Of at most `rows` images and 32 KiB, or of one image, and none shorter than it must be."""
    recorder = Recorder()
    images = [bytes([index + 1]) + bytes(size * 2**10) for index, size in enumerate(sizes)]
    most = 32 * 2**10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radapter_client._client.MAX_BYTES", most)
        Client(transport=recorder, release=1, batch_size=rows, concurrency=1).embed_images(images)
    runs = [[image for [image] in request.inputs["image"]] for request in recorder.inferences]
    assert [image for run in runs for image in run] == images
    for run in runs:
        assert 1 <= len(run) <= rows
        assert len(run) == 1 or sum(map(len, run)) <= most
    for run, following in itertools.pairwise(runs):
        assert len(run) == rows or sum(map(len, [*run, following[0]])) > most


def test_examples_count_for_the_size_of_a_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("radapter_client._client.MAX_BYTES", 100)
    recorder = Recorder()
    Client(transport=recorder).classify([bytes(30)] * 3, ["a"], examples={"a": bytes(50)})
    assert len(recorder.inferences) == 3


def test_every_method_sends_its_alpha():
    recorder = Recorder()
    with Client(transport=recorder, release=1) as client:
        client.embed_texts("a", alpha=0.25)
        client.embed_images(b"x", alpha=0.25)
        client.classify(b"x", ["a"], alpha=0.25)
        client.segment(PIXELS, ["a"], alpha=0.25)
    alphas = [request.inputs["alpha"].ravel().tolist() for request in recorder.inferences]
    assert alphas == [[0.25]] * 4


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40), st.integers(1, 3000), st.integers(0, 80))
def test_classify_keeps_requests_moderate(count: int, labels: int, templates: int):
    recorder = Recorder()
    names = [f"label {index}" for index in range(labels)]
    prompts = [f"{index} {{}}" for index in range(templates)] or None
    Client(transport=recorder).classify([b"x"] * count, names, templates=prompts)
    assert sum(len(request.inputs["image"]) for request in recorder.inferences) == count
    assert {request.version for request in recorder.inferences} == {
        "1" if len(recorder.inferences) > 1 else ""
    }
    for request in recorder.inferences:
        rows = len(request.inputs["image"])
        assert {len(array) for array in request.inputs.values()} == {rows}
        assert rows == 1 or rows * (labels + templates) <= 8192
        assert [name.decode() for name in request.inputs["labels"][-1]] == names


MASK = np.ones((1, 4, 5), bool)
PIXELS = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("method", "arguments", "word"),
    [
        *(("classify", {"labels": labels}, "labels takes") for labels in ("a cat", [1])),
        ("classify", {"labels": ["\ud800"]}, "not Unicode"),
        *(("classify", {"top_k": top_k}, "top_k is") for top_k in (-1, 1.5, True, 2**31)),
        ("classify", {"alpha": "high"}, "alpha is 'high'; allowed are numbers"),
        ("classify", {"timeout": 0}, "timeout is 0; allowed are seconds above 0"),
        ("classify", {"examples": {"mug": b"x"}}, "'mug', which is not among"),
        ("classify", {"examples": [b"x"]}, "examples is a value of type list"),
        ("classify", {"examples": {"a": 5}}, "^examples takes a list, not one int"),
        ("classify", {"examples": {"a": ["/no/such.png"]}}, "an example of 'a': .*no/such.png"),
        ("classify", {"examples": {"a": b"x"}, "example_weight": {"b": 1}}, "'b', which is not"),
        ("classify", {"example_weight": 1}, "no examples: give some"),
        ("segment", {"proposals": MASK * 1}, "proposals of int64; allowed: bool, uint8 from 0"),
        ("segment", {"proposals": MASK * np.nan}, "proposals of float64"),
        ("segment", {"proposals": [[[1], [1, 2]]]}, "not an array of numbers"),
        ("search", {"text": None}, "give a text, an image or an id"),
        *(("search", {"min_score": score}, "min_score is") for score in (True, "high")),
        ("search", {"image": "no.jpg"}, "cannot read the image no.jpg"),
        ("embed_images", {"images": 3}, "takes a list, not one int"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(method, arguments, word: str):
    usual: dict[str, dict[str, Any]] = {
        "classify": {"images": b"x", "labels": ["a"]},
        "segment": {"images": PIXELS, "labels": ["a"]},
        "search": {"text": "a", "index": "i"},
        "embed_images": {},
    }
    recorder = Recorder()
    with (
        Client(transport=recorder, release=1) as client,
        pytest.raises(radapter_client.InvalidRequest, match=word) as error,
    ):
        getattr(client, method)(**usual[method] | arguments)
    assert error.value.code in ("invalid_argument", "invalid_image")
    assert not recorder.inferences


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float16, np.float64])
def test_proposals_are_sent_as_0_to_255(kind: type):
    values: Any = np.array([[[0, 1, 1, 0, 1]] * 4], kind)
    expected = [0, 255, 255, 0, 255]
    if kind == np.uint8:
        values *= 255
    if kind == np.float64:
        values[..., :] = 0.001, 0.003, 0.5, 0.9975, 0.999
        expected = [0, 1, 128, 254, 255]  # of 0.255, 0.765, 127.5 (half to even), 254.36, 254.745
    recorder = Recorder()
    Client(transport=recorder, release=1).segment([PIXELS], ["a"], proposals=[values])
    masks = recorder.requests[0].inputs["proposals"]
    assert masks.dtype == np.uint8 and masks.tolist() == [[expected] * 4]


@pytest.mark.parametrize("turns", [True, False])
def test_segmentation_knows_whether_its_release_turned_the_image(turns: bool):
    recorder = Recorder(preprocess={"exif_orientation": turns})
    client = Client(transport=recorder, release=1)
    # The mask has 4 x 5 pixels.
    image = Image.fromarray(PIXELS.transpose(1, 0, 2) if turns else PIXELS)
    image.info["exif"] = exif(6).tobytes()
    plain, turned = client.segment([PIXELS, image], ["a"])
    assert turned.exif_orientation == client.release().exif_orientation == turns
    assert plain.overlay(legend=False).size == turned.overlay(legend=False).size == (5, 4)
    recorder.requests.clear()
    client.segment(PIXELS, ["a"])
    assert len(recorder.requests) == 1  # nothing is asked where it does not matter


def test_what_a_search_sends_and_what_it_makes_of_the_answer():
    class Searched(Recorder):
        def _outputs(self, request: Request) -> dict[str, Any]:
            outputs = {
                "id": np.array([b"a.jpg"], object),
                "score": np.array([0.5], np.float32),
                "metadata": np.array([b"{}"], object),
                "index_version": np.array([b"g-1"], object),
                "receipt": np.array([b'{"release": 1, "adapter": null, "alpha": 0.5}'], object),
            }
            return {name: outputs[name] for name in request.outputs}

    recorder = Searched()
    with Client(transport=recorder, release=1) as client:
        plain = client.search("cat", index="i")
        assert plain == [Hit("a.jpg", 0.5, {})] and plain.index_version is None
        assert [*recorder.requests[-1].outputs] == ["id", "score", "metadata", "receipt"]
        assert {*recorder.requests[-1].inputs} == {"text", "index", "top_k"}
        paged = client.search(
            ["cat", "dog"],
            image=[b"x", b"y"],
            id="z.jpg",
            weights=[1, -0.5, 2, 0, 0.25],
            index="i",
            min_score=0.25,
            offset=0,
            index_version="g-1",
        )
        assert paged.index_version == "g-1"
        inputs = recorder.requests[-1].inputs
        assert {name: array.tolist() for name, array in inputs.items()} == {
            **{"text": [b"cat", b"dog"], "image": [b"x", b"y"], "id": [b"z.jpg"]},
            **{"weight": [1, -0.5, 2, 0, 0.25], "index": [b"i"], "top_k": [10]},
            **{"min_score": [0.25], "offset": [0], "index_version": [b"g-1"]},
        }
        kinds = {str(array.dtype) for array in inputs.values()}
        assert kinds == {"object", "float32", "int32"}
        client.search("cat", index="i", min_score="calibrated")
        assert recorder.requests[-1].inputs["calibrated"].tolist() == [True]


def test_results_show_themselves_in_a_line():
    names = [f"a label with a long name {number}" for number in range(1000)]
    for result in (
        Segmentation(np.zeros((2, 2), np.uint16), names, [0.5] * 1000, 1),
        Hit("photos/" * 100, 0.5, dict.fromkeys(names, "value" * 100)),
        Hits(Hit(name, 0.25, {}) for name in names),
    ):
        assert len(repr(result)) < 250 and "\n" not in repr(result)


@pytest.mark.parametrize("plain", [False, True])
def test_empty_labels_that_fill_up_a_row_are_left_out(plain: bool) -> None:
    """Of a reply of arrays, or one of plain values."""
    rows: list[list[Any]] = [["ä", "b"], ["ä", ""], ["", ""]]
    encoded = [[label.encode() for label in row] for row in rows]
    labels: Any = rows if plain else np.array(encoded, object)

    class Filled(Recorder):
        def send(self, request: Any, timeout: float) -> Any:
            scores = np.array([[0.75, 0.5], [0.25, 0], [0, 0]], np.float32)
            return Reply(1, radapter_client.Values({"label": labels, "score": scores}))

    with Client(transport=Filled(), release=1) as client:
        answers = client.classify([b"x"] * 3, ["ä", "b"], multi_label=True)
    assert [answer.labels for answer in answers] == [["ä", "b"], ["ä"], []]
    assert [answer.scores for answer in answers] == [[0.75, 0.5], [0.25], []]
    assert [answer.top for answer in answers] == ["ä", "ä", ""]
