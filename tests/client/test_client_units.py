"""What can be checked without a server, through a transport that records: names, URLs, images,
batches, arguments.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import itertools
import socket
import subprocess
import sys
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
    Classification,
    Client,
    Hit,
    Hits,
    Reply,
    Request,
    Segmentation,
    _wire,
)
from radapter_client._results import pick_release, read_releases
from tests.helpers.stand_ins import AsyncRecorder, Recorder, described

CLIENT = Client(transport=Recorder(), release=1)


def sent(image: Any) -> bytes:
    """What reaches the server of one image."""
    recorder = Recorder()
    Client(transport=recorder, release=1).embed_images([image])
    return recorder.requests[0].inputs["image"][0, 0]


def test_exported_names():
    public = {name for name in vars(radapter_client) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(vars(radapter_client)[name])}
    assert public - modules == set(radapter_client.__all__)
    assert radapter_client.__all__ == sorted(radapter_client.__all__)


@pytest.mark.parametrize("name", ["classify", "search", "embed_images", "is_ready"])
def test_methods_have_their_own_signature_and_words(name: str):
    """They are written once for both clients, and look like methods of either."""
    for client in (CLIENT, AsyncClient(transport=AsyncRecorder())):
        method = getattr(client, name)
        assert inspect.signature(method).parameters["timeout"].default is None
        assert "self" not in inspect.signature(method).parameters
        assert method.__name__ == name and "Example:" in method.__doc__
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters


def test_transport_of_the_user():
    """The example of Transport's docstring"""
    lines = inspect.cleandoc(str(radapter_client.Transport.__doc__)).splitlines()
    start = lines.index("    ```python") + 1
    code = "\n".join(line[4:] for line in lines[start : lines.index("    ```")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radapter_client._methods.encode_image", lambda image: b"x")
        patch.setattr("radapter_client._arguments.encode_image", lambda image: b"x")
        exec(code, {**vars(radapter_client), "np": np, "Any": Any})


def test_both_clients_ask_the_same_of_their_transport():
    recorder = Recorder()
    other = AsyncRecorder()

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
            lambda: client.releases(),
            lambda: client.indexes(),
        ]

    async def main() -> list[str]:
        async with AsyncClient(transport=other, batch_size=2, concurrency=1, timeout=7) as client:
            return [str(await call()) for call in calls(client)]

    with Client(transport=recorder, batch_size=2, concurrency=1, timeout=7) as client:
        answers = [str(call()) for call in calls(client)]
    assert answers == asyncio.run(main())
    assert list(map(str, recorder.requests)) == list(map(str, other.requests))
    assert recorder.timeouts == other.timeouts and set(recorder.timeouts) == {3, 7}
    # Of one call, from one release.
    assert [request.version for request in recorder.inferences[1:3]] == ["1", "1"]


def test_grpc_clients_that_outlive_their_modules_end_in_silence():
    """Where torch is loaded, modules stay to the end, and are emptied before what they refer to."""
    code = (
        "import ctypes, sys\n"
        "from radapter_client import Client\n"
        "left, closed = Client('grpc://127.0.0.1:1'), Client('grpc://127.0.0.1:1')\n"
        "closed.close()\n"
        "for name in ('__main__', 'grpc._channel'):\n"
        "    ctypes.pythonapi.Py_IncRef(ctypes.py_object(sys.modules[name]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_releases_are_in_the_order_of_their_numbers():
    parameters = {}
    for version in (2, 10, 9):  # in no order, and not in that of text either
        parameters[f"release.{version}"] = described(version)["parameters"]["release"]
    found = read_releases({"parameters": parameters})
    assert [release.version for release in found] == [2, 9, 10]
    assert pick_release(found, None).version == 10


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


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_without_a_url_http_is_asked_or_grpc_where_only_that_listens(kind: Any, monkeypatch: Any):
    nobody = "http://127.0.0.1:9"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for urls, asked in (
            ((f"http://{address}", f"grpc://{address}"), f"http://{address}"),
            ((nobody, f"grpc://{address}"), f"grpc://{address}"),
            ((nobody, nobody), nobody),
        ):
            monkeypatch.setattr(_wire, "DEFAULT_URLS", urls)
            assert repr(kind()) == f"{kind.__name__}({asked!r})"
    with pytest.raises(radapter_client.ServerUnavailable, match="no answer from .*radapter-serve"):
        Client(retries=0).release()


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


# Images


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def images() -> list[Image.Image]:
    rgb = Image.fromarray(pixels(31, 45, 3))
    rgba = Image.fromarray(pixels(31, 45, 4))
    palette = rgb.quantize(200)
    transparent = rgb.quantize(16)
    transparent.info["transparency"] = bytes(range(16))
    profiled = rgb.copy()
    profiled.info["icc_profile"] = b"x" * 100_000
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (31, 45)).astype(np.uint16))
    modes = [rgb.convert(mode) for mode in ("L", "1")]
    one_pixel = rgb.crop((0, 0, 1, 1))
    return [rgb, rgba, rgba.convert("LA"), palette, transparent, profiled, deep, *modes, one_pixel]


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
    # What preprocessing does: resize in the image's own mode, then convert.
    if image.mode != "I;16":  # which older Pillows cannot resize
        resized, wanted = (x.resize((16, 16), Image.Resampling.BICUBIC) for x in (back, image))
        assert resized.convert("RGBA").tobytes() == wanted.convert("RGBA").tobytes()
    array = np.asarray(image)
    if array.dtype == np.uint8 and image.mode in ("RGB", "L"):
        view = array[::-1, ::-1]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent(view)))), view)


def photo(width: int, height: int, kind: str = "JPEG", mode: str = "RGB", turn: int = 1) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    exif[0x010E] = "a secret"
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "size", "kind"),
    [
        (photo(1200, 1600, turn=6), (448, 597), "JPEG"),
        (photo(900, 450), (896, 448), "JPEG"),
        (photo(1600, 1200, mode="L"), (597, 448), "JPEG"),
        (photo(1600, 1200, "PNG", "RGBA"), (597, 448), "PNG"),
        (photo(1600, 1200, "WEBP"), (597, 448), "JPEG"),
    ],
)
def test_photos_are_made_small_before_they_are_sent(data: bytes, size, kind: str):
    recorder = Recorder()
    with Client(transport=recorder, release=1, shrink_to=448) as client:
        client.embed_images([data])
    sent = recorder.inferences[0].inputs["image"][0, 0]
    with Image.open(io.BytesIO(sent)) as image, Image.open(io.BytesIO(data)) as whole:
        assert (image.size, image.format, image.mode) == (size, kind, whole.mode)
        assert image.getexif().get(0x0112, 1) == whole.getexif().get(0x0112, 1)
        assert b"a secret" not in sent
        expected = np.asarray(whole.resize(size, Image.Resampling.BICUBIC), np.float64)
        assert np.abs(np.asarray(image, np.float64) - expected).mean() < 2


@pytest.mark.parametrize(
    "data",
    [photo(600, 448), photo(1600, 1200, "PNG", "P"), photo(1600, 1200)[:500], b"no image"],
)
def test_what_is_small_or_no_photo_is_sent_as_it_is(data: bytes):
    recorder = Recorder()
    with Client(transport=recorder, release=1, shrink_to=448) as client:
        client.classify(data, ["a"])
        client.search(image=data, index="photos")
        client.segment(photo(1600, 1200), ["a"])
    images = [request.inputs["image"].ravel()[0] for request in recorder.inferences]
    assert images == [data, data, photo(1600, 1200)]


def test_nothing_that_a_caller_hands_in_is_changed():
    """Neither images nor arrays, lists and dicts, by any call."""
    whole = photo(800, 600, turn=6)
    opened = Image.open(io.BytesIO(whole))
    untouched = Image.open(io.BytesIO(whole))
    palette = Image.fromarray(pixels(100, 140, 3)).quantize(200)
    array = pixels(300, 400, 3)
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
        (Path("/"), "is a folder"),
        ("a\0b", "null byte"),
        (b"", "zero bytes"),
        (Image.open(io.BytesIO(photo(64, 64, "PNG")[:2000])), "cannot read"),
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\].*allowed are uint8 \[H, W, 3\]"),
        *((np.zeros(shape, np.uint8), "uint8") for shape in ((3, 4, 4), (0, 4, 3))),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        *((value, "allowed are a path") for value in (5, None)),
        # PNG would change these.
        *((Image.new(mode, (4, 4), 200), f"mode {mode} .*'RGB'") for mode in ("CMYK", "F", "I")),
        (BEYOND, "pixels beyond its palette"),
    ],
)
def test_a_value_that_is_no_image(image, message: str):
    with pytest.raises(radapter_client.InvalidImage, match=message) as error:
        sent(image)
    assert error.value.code == "invalid_image"


def oriented(value: int) -> Image.Image:
    """An image, and the EXIF orientation that a phone would give it."""
    image = Image.fromarray(pixels(31, 45, 3))
    image.info["exif"] = exif(value).tobytes()
    return image


def exif(value: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = value
    return found


@pytest.mark.parametrize("value", [1, 5, 6])
def test_orientation_travels_with_the_pixels(value: int, tmp_path: Path):
    """A file, its bytes and Pillow's image of it are one image to the server, whatever its release
    does with EXIF.
    """
    path = tmp_path / "image.png"
    Image.fromarray(pixels(31, 45, 3)).save(path, exif=exif(value))
    with Image.open(path) as opened:
        images = [path, path.read_bytes(), opened, opened.convert("RGB"), oriented(value)]
        copies = [sent(image) for image in images]
        turned = ImageOps.exif_transpose(opened)
    for data in copies:
        with Image.open(io.BytesIO(data)) as back:
            assert back.tobytes() == Image.fromarray(pixels(31, 45, 3)).tobytes()
            assert back.getexif().get(0x0112, 1) == value
            assert ImageOps.exif_transpose(back).tobytes() == turned.tobytes()
    with Image.open(io.BytesIO(sent(turned))) as back:  # which is not turned again
        assert back.getexif().get(0x0112, 1) == 1 and back.tobytes() == turned.tobytes()


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


def options_of(request: Request) -> dict[str, Any]:
    """The inputs of a request but its images and labels."""
    return {
        name: array.tolist()
        for name, array in request.inputs.items()
        if name not in ("image", "labels")
    }


def test_labels_are_scored_by_themselves_where_that_is_asked_for():
    recorder = Recorder()
    with Client(transport=recorder, release=1) as client:
        client.classify([b"x", b"y"], ["a", "b"], multi_label=True)
        options: dict[str, Any] = {"threshold": 0.25, "top_k": 3, "calibrated": True}
        client.classify(b"x", ["a", "b"], multi_label=True, **options)
        client.classify(b"x", ["a", "b"], calibrated=True)
    assert list(map(options_of, recorder.inferences)) == [
        {"multi_label": [[True], [True]]},
        {"top_k": [[3]], "multi_label": [[True]], "threshold": [[0.25]], "calibrated": [[True]]},
        {"top_k": [[5]], "calibrated": [[True]]},
    ]
    assert recorder.inferences[0].inputs["multi_label"].dtype == np.bool_


def test_examples_are_sent_with_the_first_image_alone():
    recorder = Recorder()
    with Client(transport=recorder, release=1, batch_size=2) as client:
        shown: dict[str, Any] = {"mug": [b"m1", b"m2"], "cup": b"c"}
        client.classify([b"x", b"y", b"z"], ["cup", "tin", "mug"], examples=shown, unknown=0.25)
        client.classify(b"x", examples=shown, example_weight=1)
        by_label: dict[str, float] = {"mug": 0.75}
        client.classify(b"x", ["cup", "mug", "tin"], examples=shown, example_weight=by_label)
    first, second, alone, apart = [request.inputs for request in recorder.inferences]
    assert apart["example_weight"].tolist() == [[0.5, 0.75, 0.5]]
    assert first["examples"].tolist() == [[b"m1", b"m2", b"c"], [b"", b"", b""]]
    assert first["example_labels"].tolist() == [[2, 2, 0]] * 2
    assert first["example_labels"].dtype == np.int32
    assert first["unknown"].tolist() == [[0.25]] * 2 and "example_weight" not in first
    assert second["examples"].tolist() == [[b"m1", b"m2", b"c"]]
    assert alone["labels"].tolist() == [[b"mug", b"cup"]]
    assert alone["example_weight"].tolist() == [[1.0]]


# Batches


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0, 1, 10, 20, 33]), max_size=8), st.integers(1, 5))
def test_batches(sizes: list[int], rows: int):
    """Runs of at most `rows` images and 32 KiB, or of one image, and none shorter than it must
    be.
    """
    recorder = Recorder()
    images = [bytes([index + 1]) + bytes(size * 2**10) for index, size in enumerate(sizes)]
    most = 32 * 2**10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radapter_client._methods.MAX_BYTES", most)
        Client(transport=recorder, release=1, batch_size=rows, concurrency=1).embed_images(images)
    runs = [[image for [image] in request.inputs["image"]] for request in recorder.inferences]
    assert [image for run in runs for image in run] == images
    for run in runs:
        assert 1 <= len(run) <= rows
        assert len(run) == 1 or sum(map(len, run)) <= most
    for run, following in itertools.pairwise(runs):
        assert len(run) == rows or sum(map(len, [*run, following[0]])) > most


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40), st.integers(1, 3000), st.integers(0, 80))
def test_classify_keeps_requests_moderate(count: int, labels: int, templates: int):
    recorder = Recorder()
    names = [f"label {index}" for index in range(labels)]
    prompts = [f"{index} {{}}" for index in range(templates)] or None
    Client(transport=recorder).classify([b"x"] * count, names, templates=prompts, top_k=3)
    assert sum(len(request.inputs["image"]) for request in recorder.inferences) == count
    assert {request.version for request in recorder.inferences} == {
        "1" if len(recorder.inferences) > 1 else ""
    }
    for request in recorder.inferences:
        rows = len(request.inputs["image"])
        assert {len(array) for array in request.inputs.values()} == {rows}
        assert rows == 1 or rows * (labels + templates) <= 8192
        assert [name.decode() for name in request.inputs["labels"][-1]] == names
        assert request.inputs["top_k"].tolist() == [[3]] * rows


# Arguments

MASK = np.ones((1, 4, 5), bool)
PIXELS = np.zeros((4, 5, 3), np.uint8)
MUG: dict[str, Any] = {"mug": b"x"}
NAN = float("nan")


@pytest.mark.parametrize(
    ("method", "arguments", "word"),
    [
        ("classify", {"labels": None}, "no labels"),
        ("classify", {"labels": []}, "no labels"),
        *(("classify", {"labels": labels}, "labels takes") for labels in ("a cat", [1])),
        ("classify", {"labels": ["\ud800"]}, "not Unicode"),
        ("classify", {"templates": []}, "an empty list of labels or templates"),
        *(("classify", {"top_k": top_k}, "top_k is") for top_k in (0, 1.5, True, 2**31)),
        ("classify", {"alpha": "high"}, "alpha is 'high'; allowed are numbers"),
        ("classify", {"timeout": 0}, "timeout is 0; allowed are seconds above 0"),
        ("classify", {"examples": MUG}, "'mug', which is not among"),
        ("classify", {"examples": {}}, "no examples"),
        ("classify", {"examples": [b"x"]}, "examples is a value of type list"),
        ("classify", {"examples": {"a": ["/no/such.png"]}}, "an example of 'a': .*no/such.png"),
        ("classify", {"examples": {"a": bytes(17 * 2**20)}}, "examples of 17 MiB"),
        ("classify", {"examples": {"a": b"x"}, "example_weight": {"b": 1}}, "'b', which has no"),
        ("segment", {"refine": -1}, "refine is -1; allowed are whole numbers from 0"),
        ("segment", {"proposals": MASK[0]}, r"shape \[4, 5\]; allowed: bool, uint8 from 0 to 255"),
        ("segment", {"proposals": MASK[:0]}, r"shape \[0, 4, 5\]"),
        ("segment", {"proposals": MASK.transpose(0, 2, 1)}, "of 4 x 5 pixels .* of 5 x 4"),
        ("segment", {"proposals": MASK * 1}, "int64 from 1 to 1"),
        ("segment", {"proposals": MASK * np.nan}, "float64 from nan"),
        ("segment", {"proposals": [[[1], [1, 2]]]}, "no array of numbers"),
        ("segment", {"proposals": np.broadcast_to(MASK, (10**8, 4, 5))}, "are 1.9 GiB"),
        ("search", {"text": None}, "give a text to search for"),
        ("search", {"weights": ["b"]}, "weights is 'b'; allowed are numbers"),
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
    assert error.value.code in ("invalid_argument", "no_labels", "invalid_image")
    assert not recorder.inferences


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float16, np.float64])
def test_proposals_are_sent_as_0_to_255(kind: type, tmp_path: Path):
    values: Any = np.array([[[0, 1, 1, 0, 1]] * 4], kind)
    expected = [0, 255, 255, 0, 255]
    if kind == np.uint8:
        values *= 255
    if kind == np.float64:
        values[..., :] = 0.001, 0.003, 0.5, 0.9975, 0.999
        expected = [0, 1, 128, 254, 255]  # of 0.255, 0.765, 127.5 (half to even), 254.36, 254.745
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    for image in (PIXELS, tmp_path / "image.png", (tmp_path / "image.png").read_bytes()):
        recorder = Recorder()
        Client(transport=recorder, release=1).segment(image, ["a"], proposals=values)
        masks = recorder.requests[0].inputs["proposals"]
        assert masks.dtype == np.uint8 and masks.tolist() == [[expected] * 4]


def test_proposals_of_a_turned_image():
    """Either size is sent: which is right, the release decides."""
    image = Image.fromarray(PIXELS)
    image.info["exif"] = exif(6).tobytes()
    for masks in (MASK, MASK.transpose(0, 2, 1)):
        CLIENT.segment(image, ["a"], proposals=masks)
    with pytest.raises(
        radapter_client.InvalidRequest, match="5 x 3 pixels .* for an image of 4 x 5 or 5 x 4"
    ):
        CLIENT.segment(image, ["a"], proposals=MASK[:, 1:])


@pytest.mark.parametrize("turns", [True, False])
def test_segmentation_knows_whether_its_release_turned_the_image(turns: bool):
    recorder = Recorder(preprocess={"exif_orientation": turns})
    client = Client(transport=recorder, release=1)
    image = Image.fromarray(
        PIXELS.transpose(1, 0, 2) if turns else PIXELS
    )  # the mask has 4 x 5 pixels
    image.info["exif"] = exif(6).tobytes()
    plain, found = client.segment([PIXELS, image], ["a"])
    assert found.exif_orientation == client.release().exif_orientation == turns
    assert plain.overlay(legend=False).size == found.overlay(legend=False).size == (5, 4)
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
            }
            return {name: outputs[name] for name in request.outputs}

    recorder = Searched()
    with Client(transport=recorder, release=1) as client:
        plain = client.search("cat", index="i")
        assert plain == [Hit("a.jpg", 0.5, {})] and plain.index_version is None
        assert recorder.requests[-1].outputs == ("id", "score", "metadata")
        sent = options_of(recorder.requests[-1])
        assert sent == {"text": [b"cat"], "index": [b"i"], "top_k": [10]}
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
    assert repr(Classification(["a"], [0.123456789], 3)) == (
        "Classification(labels=['a'], scores=[0.1235], release=3)"
    )


@pytest.mark.parametrize("rows", [[["a", "b"], ["a", ""], ["", ""]], [[b"a", b"b"], [b"a", b""]]])
@pytest.mark.parametrize("plain", [False, True])
def test_empty_labels_that_fill_up_a_row_are_left_out(rows: list[list[Any]], plain: bool) -> None:
    """Of a reply of arrays, or one of plain values."""

    labels: Any = rows if plain else np.array(rows, object)

    class Filled(Recorder):
        def send(self, request: Any, timeout: float) -> Any:
            scores = np.array([[0.75, 0.5], [0.25, 0], [0, 0]], np.float32)[: len(rows)]
            return Reply(1, radapter_client.Values({"label": labels, "score": scores}))

    with Client(transport=Filled(), release=1) as client:
        answers = client.classify([b"x"] * len(rows), ["a", "b"], multi_label=True)
    assert [one.labels for one in answers] == [["a", "b"], ["a"], []][: len(rows)]
    assert [one.scores for one in answers] == [[0.75, 0.5], [0.25], []][: len(rows)]
    assert [one.top for one in answers] == ["a", "a", ""][: len(rows)]
