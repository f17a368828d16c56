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
    _url,
)
from radapter_client._results import pick_release, read_hits, read_releases
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


@pytest.mark.parametrize(
    "name", ["classify", "segment", "search", "embed_images", "is_ready", "release"]
)
def test_methods_have_their_own_signature_and_words(name: str):
    """They are written once for both clients, and look like methods of either."""
    own = AsyncClient(transport=AsyncRecorder())
    for method in (getattr(CLIENT, name), getattr(own, name)):
        assert inspect.signature(method).parameters["timeout"].default is None
        assert "self" not in inspect.signature(method).parameters
        assert method.__name__ == name and "Example:" in method.__doc__
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters


def test_public_names_have_an_example():
    for name in radapter_client.__all__:
        thing = getattr(radapter_client, name)
        if name != "ImageLike":
            text = " ".join(thing.__doc__.split())
            assert "Example:" in text or "as in `" in text, name
    for name in dir(Client):
        if not name.startswith("_") and name != "close":
            assert "Example:" in getattr(Client, name).__doc__, name


class Cats:
    """The example of Transport's docstring."""

    def send(self, request: Request, timeout: float) -> Any:
        rows = len(request.inputs["image"])
        scores = np.ones((rows, 1), np.float32)
        return Reply(1, {"label": np.full((rows, 1), b"cat", object), "score": scores})

    def close(self) -> None:
        pass


def test_transport_of_the_user():
    code = "".join(inspect.getsource(Cats.send).split())
    assert code in "".join(str(radapter_client.Transport.__doc__).split())
    with Client(transport=Cats(), release=1) as client:
        assert client.classify(b"photo", ["cat", "dog"]).top == "cat"
        assert [found.top for found in client.classify([b"photo"] * 40, ["cat", "dog"])] == [
            "cat"
        ] * 40


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
    found = asyncio.run(main())
    assert answers == found
    assert list(map(str, recorder.requests)) == list(map(str, other.requests))
    assert recorder.timeouts == other.timeouts and set(recorder.timeouts) == {3, 7}
    assert [request.version for request in recorder.inferences[1:3]] == [
        "1",
        "1",
    ]  # of one call, from one release


def test_drawn_exception_tree_is_the_tree():
    def draw(kind: type[Any], indent: int = 0) -> list[tuple[int, str]]:
        below: list[type[Any]] = kind.__subclasses__()
        return [(indent, kind.__name__)] + [line for sub in below for line in draw(sub, indent + 1)]

    drawn = []
    for line in inspect.cleandoc(
        str(sys.modules[radapter_client.Timeout.__module__].__doc__)
    ).splitlines()[2:]:
        name = line.lstrip(" │├└─").split()[0]
        drawn.append((line.index(name) // 4, name))
    assert drawn == draw(radapter_client.RAdapterClientError)


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


def test_the_newest_release_is_the_one_of_the_highest_number():
    parameters = {}
    for version in (2, 10, 9):  # in no order, and not in that of text either
        text = described(version)["parameters"]["release"]["string_value"]
        parameters[f"release.{version}"] = {"string_value": text}
    found = read_releases({"parameters": parameters})
    assert [release.version for release in found] == [2, 9, 10]
    assert pick_release(found, None).version == 10
    assert pick_release(found, 9).version == 9
    with pytest.raises(radapter_client.ModelNotFound, match="release 3; it serves 2, 9, 10"):
        pick_release(found, 3)


# URLs


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("grpc://localhost:8001", "grpc://localhost:8001"),
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
        port = server.getsockname()[1]
        http, grpc = f"http://127.0.0.1:{port}", f"grpc://127.0.0.1:{port}"
        for urls, asked in (
            ((http, grpc), http),
            ((nobody, grpc), grpc),
            ((nobody, nobody), nobody),
        ):
            monkeypatch.setattr(_url, "DEFAULT_URLS", urls)
            assert repr(kind()) == f"{kind.__name__}({asked!r})"
    with pytest.raises(radapter_client.ServerUnavailable, match="no answer from .*radapter-serve"):
        Client(retries=0).release()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8001",
        "",
        "ftp://localhost",
        "http://:8000",
        "grpc://localhost:99999",
        "grpc://localhost/path",
        "http://me:secret@localhost",
        "http://localhost/?a=b",
        "http://[::1",
        "http://localhost\n",
        b"http://localhost",
    ],
)
def test_bad_url_names_the_allowed_ones(url):
    for kind in (radapter_client.Client, radapter_client.AsyncClient):
        with pytest.raises(
            radapter_client.InvalidURL, match="allowed are http://.*https://.*grpc://.*grpcs://"
        ):
            kind(url)


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
    return [
        rgb,
        rgba,
        rgba.convert("LA"),
        palette,
        transparent,
        profiled,
        deep,
        *modes,
        rgb.crop((0, 0, 1, 1)),
    ]


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
    if image.mode == "I;16":  # which older Pillows cannot resize
        return
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
        resized, wanted = (x.resize((16, 16), resample) for x in (back, image))
        assert resized.convert("RGBA").tobytes() == wanted.convert("RGBA").tobytes()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "F", "I", "RGBa"])
def test_mode_that_png_would_change_is_refused(mode: str):
    image = Image.new("RGBA", (4, 4)).convert(mode) if mode == "RGBa" else Image.new(mode, (4, 4))
    with pytest.raises(
        radapter_client.InvalidImage, match=rf"mode {mode} .* allowed are RGB.*convert\('RGB'\)"
    ):
        sent(image)


def test_pixels_beyond_the_palette_are_refused():
    image = Image.new("P", (4, 4), 200)
    image.putpalette([0, 0, 0, 255, 0, 0])
    with pytest.raises(radapter_client.InvalidImage, match="beyond its palette"):
        sent(image)


@given(st.integers(1, 20), st.integers(1, 20), st.booleans(), st.integers(0, 2**32 - 1))
def test_array_arrives_to_the_bit(height: int, width: int, grey: bool, seed: int):
    shape = (height, width) if grey else (height, width, 3)
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    for view in (array, array[::-1, ::-1]):
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
        (photo(1600, 1200), (597, 448), "JPEG"),
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
    [
        photo(600, 448),
        photo(40, 30),
        photo(1600, 1200, "PNG", "P"),
        photo(1600, 1200)[:500],
        b"no image",
    ],
)
def test_what_is_small_or_no_photo_is_sent_as_it_is(data: bytes):
    recorder = Recorder()
    with Client(transport=recorder, release=1, shrink_to=448) as client:
        client.classify(data, ["a"])
        client.search(image=data, index="photos")
        client.segment(photo(1600, 1200), ["a"])
    images = [request.inputs["image"].ravel()[0] for request in recorder.inferences]
    assert images == [data, data, photo(1600, 1200)]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photos_that_are_made_small_stay_turned(turn: int, kind: str):
    """Whoever turns what is sent as its EXIF says sees what the whole photo shows, made small."""
    data = photo(800, 600, kind, "RGB" if kind == "JPEG" else "RGBA", turn)
    recorder = Recorder()
    with Client(transport=recorder, release=1, shrink_to=64) as client:
        client.embed_images([data])
    sent = recorder.inferences[0].inputs["image"][0, 0]
    with Image.open(io.BytesIO(sent)) as small, Image.open(io.BytesIO(data)) as whole:
        found = ImageOps.exif_transpose(small)
        expected = ImageOps.exif_transpose(whole).resize(found.size, Image.Resampling.BICUBIC)
        assert min(found.size) == 64
        difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
        assert np.abs(difference).mean() < 4


def test_nothing_that_a_caller_hands_in_is_changed():
    """Neither images nor arrays, lists and dicts, by any call."""
    whole = photo(4000, 3000, turn=6)
    opened = Image.open(io.BytesIO(whole))
    untouched = Image.open(io.BytesIO(whole))
    palette = Image.fromarray(pixels(100, 140, 3)).quantize(200)
    array = pixels(300, 400, 3)
    masks = np.ones((1, 4, 5), np.float32)
    scores = np.ones((1, 1))
    labels = ["a", "b"]
    examples: Any = {"a": [opened]}
    weights = {"a": 0.25}
    before = [
        palette.tobytes(),
        array.tobytes(),
        masks.tobytes(),
        scores.tobytes(),
        dict(palette.info),
    ]
    with Client(transport=Recorder(), release=1, shrink_to=64) as client:
        client.classify([opened, palette, array], labels)
        assert opened.size == (4000, 3000)
        client.classify(opened, labels, examples=examples, example_weight=weights)
        client.search(image=[opened, palette, array], index="i", weights=[1, 2, 3])
        client.embed_images([opened, array])
        found = client.segment(PIXELS, labels, proposals=masks, proposal_scores=scores)
        found.overlay(palette.resize((5, 4)))
    after = [
        palette.tobytes(),
        array.tobytes(),
        masks.tobytes(),
        scores.tobytes(),
        dict(palette.info),
    ]
    assert after == before
    assert (labels, examples, weights) == (["a", "b"], {"a": [opened]}, {"a": 0.25})
    assert (opened.size, opened.info, dict(opened.getexif())) == (
        untouched.size,
        untouched.info,
        dict(untouched.getexif()),
    )
    assert opened.tobytes() == untouched.tobytes()
    assert dict(opened.getexif()) == dict(untouched.getexif())


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("no/such/file.jpg", "no/such/file.jpg: No such file"),
        (Path("/"), "is a folder; give the images in it"),
        ("a\0b", "null byte"),
        (b"", "zero bytes"),
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\].*allowed are uint8 \[H, W, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (5, "int; allowed are a path"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image(image, why: str):
    with pytest.raises(radapter_client.InvalidImage, match=why) as caught:
        sent(image)
    assert caught.value.code == "invalid_image"


def test_broken_and_empty_files(tmp_path: Path):
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(radapter_client.InvalidImage, match="empty file"):
        sent(empty)
    Image.fromarray(pixels(64, 64, 3)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with (
        Image.open(tmp_path / "half.png") as lazy,
        pytest.raises(radapter_client.InvalidImage, match="cannot read"),
    ):
        sent(lazy)


def oriented(value: int) -> Image.Image:
    """An image, and the EXIF orientation that a phone would give it."""
    image = Image.fromarray(pixels(31, 45, 3))
    image.info["exif"] = exif(value).tobytes()
    return image


def exif(value: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = value
    return found


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_travels_with_the_pixels(value: int, tmp_path: Path):
    """A file, its bytes and Pillow's image of it are one image to the server, whatever its release
    does with EXIF.
    """
    path = tmp_path / "image.png"
    Image.fromarray(pixels(31, 45, 3)).save(path, exif=exif(value))
    with Image.open(path) as opened:
        copies = [
            sent(path),
            sent(path.read_bytes()),
            sent(opened),
            sent(opened.convert("RGB")),
            sent(oriented(value)),
        ]
        turned = ImageOps.exif_transpose(opened)
    for data in copies:
        with Image.open(io.BytesIO(data)) as back:
            assert back.tobytes() == Image.fromarray(pixels(31, 45, 3)).tobytes()
            assert back.getexif().get(0x0112, 1) == value
            assert ImageOps.exif_transpose(back).tobytes() == turned.tobytes()
    with Image.open(
        io.BytesIO(sent(turned))
    ) as back:  # what was turned already is not turned again
        assert back.getexif().get(0x0112, 1) == 1 and back.tobytes() == turned.tobytes()


@pytest.mark.parametrize("broken", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x" * 9])
def test_broken_exif_is_no_error(broken: bytes):
    image = Image.fromarray(pixels(31, 45, 3))
    image.info["exif"] = broken
    with Image.open(io.BytesIO(sent(image))) as back:
        assert back.tobytes() == image.tobytes()


def test_one_image_or_several():
    ones: list[Any] = [
        "a.jpg",
        Path("a.jpg"),
        b"x",
        Image.new("L", (1, 1)),
        pixels(4, 4, 3),
        pixels(4, 4),
    ]
    for one in ones:
        try:
            assert not isinstance(CLIENT.classify(one, ["a"]), list)
        except radapter_client.InvalidImage as error:
            assert "a.jpg" in str(error)
    for several in ([b"x"], (b"x",), [], pixels(2, 4, 4, 3), iter([b"x"])):
        assert isinstance(CLIENT.classify(several, ["a"]), list)


# Labels that stand alone


def test_labels_that_stand_alone_are_asked_for():
    recorder = Recorder()
    with Client(transport=recorder, release=1) as client:
        client.classify(b"x", ["a", "b"])
        client.classify([b"x", b"y"], ["a", "b"], multi_label=True)
        client.classify(
            b"x", ["a", "b"], multi_label=True, threshold=0.25, top_k=3, calibrated=True
        )
        client.classify(b"x", ["a", "b"], calibrated=True)
        with pytest.raises(
            radapter_client.InvalidRequest, match="threshold without multi_label=True"
        ):
            client.classify(b"x", ["a"], threshold=0.5)
        with pytest.raises(radapter_client.InvalidRequest, match="threshold"):
            client.classify(b"x", ["a"], multi_label=True, threshold=1.5)
    sent = [
        {
            name: array.tolist()
            for name, array in request.inputs.items()
            if name not in ("image", "labels")
        }
        for request in recorder.inferences
    ]
    assert sent == [
        {"top_k": [[5]]},
        {"multi_label": [[True], [True]]},
        {"top_k": [[3]], "multi_label": [[True]], "threshold": [[0.25]], "calibrated": [[True]]},
        {"top_k": [[5]], "calibrated": [[True]]},
    ]
    assert recorder.inferences[1].inputs["multi_label"].dtype == np.bool_


def test_examples_are_sent_with_the_first_image_alone():
    recorder = Recorder()
    with Client(transport=recorder, release=1, batch_size=2) as client:
        shown: dict[str, Any] = {"mug": [b"m1", b"m2"], "cup": b"c"}
        client.classify([b"x", b"y", b"z"], ["cup", "tin", "mug"], examples=shown, unknown=0.25)
        client.classify(b"x", examples=shown, example_weight=1)
        by_label: dict[str, float] = {"mug": 0.75}
        client.classify(b"x", ["cup", "mug", "tin"], examples=shown, example_weight=by_label)
        with pytest.raises(radapter_client.InvalidRequest, match="'tin', which has no examples"):
            client.classify(b"x", ["mug", "cup", "tin"], examples=shown, example_weight={"tin": 1})
        with pytest.raises(radapter_client.InvalidRequest, match="example_weight is 2; allowed"):
            client.classify(b"x", examples=shown, example_weight={"mug": 2})
    first, second, alone, apart = [request.inputs for request in recorder.inferences]
    assert apart["example_weight"].tolist() == [[0.5, 0.75, 0.5]]
    assert first["examples"].tolist() == [[b"m1", b"m2", b"c"], [b"", b"", b""]]
    assert first["example_labels"].tolist() == [[2, 2, 0]] * 2
    assert first["example_labels"].dtype == np.int32
    assert first["unknown"].tolist() == [[0.25]] * 2 and "example_weight" not in first
    assert second["examples"].tolist() == [[b"m1", b"m2", b"c"]]
    assert alone["labels"].tolist() == [[b"mug", b"cup"]]
    assert alone["example_weight"].tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": {"mug": b"x"}, "labels": ["cup"]}, "examples has 'mug', which is not among"),
        ({"examples": {"mug": b"x"}, "label_set": "all"}, "examples are for labels"),
        ({"examples": {}, "labels": ["cup"]}, "no examples"),
        ({"examples": [b"x"], "labels": ["cup"]}, "examples is a value of type list; give images"),
        ({"examples": {"cup": ["/no/such.png"]}}, "an example of 'cup': .*no/such.png"),
        ({"examples": {"cup": b"x"}, "example_weight": float("nan")}, "example_weight is nan"),
        ({"labels": ["cup"], "example_weight": 0.5}, "example_weight without examples"),
        ({"labels": ["cup"], "unknown": 2}, "unknown is 2; allowed"),
        ({"examples": {"cup": bytes(17 * 2**20)}}, "examples of 17 MiB; at most 16 MiB"),
    ],
)
def test_bad_examples_are_refused_before_anything_is_sent(options, message):
    recorder = Recorder()
    with (
        Client(transport=recorder, release=1) as client,
        pytest.raises(radapter_client.InvalidRequest, match=message) as raised,
    ):
        client.classify(b"x", **options)
    assert not isinstance(raised.value, radapter_client.InvalidImage)
    assert not recorder.inferences


def test_labels_that_fill_up_a_row_are_left_out():
    class Filled(Recorder):
        def _outputs(self, request):
            labels = np.array([[b"a", b"b"], [b"a", b""], [b"", b""]], object)
            return {"label": labels, "score": np.array([[0.9, 0.6], [0.7, 0], [0, 0]], np.float32)}

    with Client(transport=Filled(), release=1) as client:
        found = client.classify([b"x"] * 3, ["a", "b"], multi_label=True)
    assert [one.labels for one in found] == [["a", "b"], ["a"], []]
    assert [len(one.scores) for one in found] == [2, 1, 0]
    assert [one.top for one in found] == ["a", "a", ""]


# Batches

MAX_BYTES = 32 * 2**20


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([0, 1, 10, 20, 33]), max_size=8), st.integers(1, 5))
def test_batches(sizes: list[int], rows: int):
    """Runs of at most `rows` images and 32 MiB, or of one image, and none shorter than it must
    be.
    """
    recorder = Recorder()
    images = [bytes([index + 1]) + bytes(size * 2**20) for index, size in enumerate(sizes)]
    Client(transport=recorder, release=1, batch_size=rows, concurrency=1).embed_images(images)
    runs = [[image for [image] in request.inputs["image"]] for request in recorder.inferences]
    assert [image for run in runs for image in run] == images
    for run in runs:
        assert 1 <= len(run) <= rows
        assert len(run) == 1 or sum(map(len, run)) <= MAX_BYTES
    for run, following in itertools.pairwise(runs):
        assert len(run) == rows or sum(map(len, [*run, following[0]])) > MAX_BYTES


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


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, 'no labels: give labels=.*label_set="NAME"'),
        ({"labels": []}, "no labels"),
        ({"labels": "a cat"}, "labels takes a list, not one str"),
        ({"labels": [1]}, "labels takes texts, not 1"),
        ({"labels": ["\ud800"]}, "not Unicode"),
        ({"labels": ["a"], "label_set": "b"}, "not both"),
        ({"labels": ["a"], "templates": []}, "no templates"),
        ({"labels": ["a"], "top_k": 0}, "top_k is 0; allowed"),
        ({"labels": ["a"], "top_k": 1.5}, "top_k is 1.5"),
        ({"labels": ["a"], "top_k": True}, "top_k is True"),
        ({"labels": ["a"], "alpha": 1.5}, "alpha is 1.5; allowed are numbers from 0 to 1"),
        ({"labels": ["a"], "alpha": float("nan")}, "alpha is nan"),
        ({"labels": ["a"], "timeout": 0}, "timeout is 0; allowed are seconds above 0"),
    ],
)
def test_bad_arguments_of_classify(arguments, why: str):
    with pytest.raises(radapter_client.InvalidRequest, match=why):
        CLIENT.classify(b"x", **arguments)


MASK = np.ones((1, 4, 5), bool)
PIXELS = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"labels": None}, "no labels: give labels="),
        ({"threshold": True}, "threshold is True"),
        ({"stride": 2.5}, "stride is 2.5; allowed are whole numbers from 1"),
        ({"refine": -1}, "refine is -1; allowed are whole numbers from 0"),
        ({"proposal_scores": [[1.0]]}, "proposal_scores without proposals"),
        ({"proposals": MASK, "proposal_weight": -1}, "proposal_weight is -1"),
        ({"proposals": MASK, "proposal_scores": [[1], [1]]}, r"\[2, 1\]; needed are \[1, C\]"),
        (
            {"proposals": MASK[0]},
            r"of shape \[4, 5\]; allowed: bool, uint8 from 0 to 255, or float",
        ),
        ({"proposals": MASK[:0]}, r"proposals of shape \[0, 4, 5\]"),
        ({"proposals": MASK.transpose(0, 2, 1)}, "of 4 x 5 pixels .* for an image of 5 x 4"),
        ({"proposals": MASK * 1}, "proposals of int64 from 1 to 1"),
        ({"proposals": MASK * np.nan}, "proposals of float64 from nan"),
        ({"proposals": MASK.astype(np.uint8)}, r"above 1 of 255; send proposals.astype\(bool\)"),
        ({"proposals": [[[1], [1, 2]]]}, "proposals is no array of numbers"),
        ({"proposals": np.broadcast_to(MASK, (10**8, 4, 5))}, "are 1.9 GiB; a request holds 1.5"),
    ],
)
def test_bad_arguments_of_segment(arguments, why: str):
    with pytest.raises(radapter_client.InvalidRequest, match=why):
        CLIENT.segment(PIXELS, **{"labels": ["a"], **arguments})


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float16, np.float32, np.float64])
def test_proposals_are_sent_as_0_to_255(kind, tmp_path: Path):
    values = np.array([[[0, 1, 1, 0, 1]] * 4], kind)
    if kind == np.uint8:
        values *= 255
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    for image in (PIXELS, tmp_path / "image.png", (tmp_path / "image.png").read_bytes()):
        recorder = Recorder()
        Client(transport=recorder, release=1).segment(image, ["a"], proposals=values)
        found = recorder.requests[0].inputs["proposals"]
        assert found.dtype == np.uint8 and found.tolist() == [[[0, 255, 255, 0, 255]] * 4]
        with pytest.raises(radapter_client.InvalidRequest, match="5 x 3 pixels"):
            CLIENT.segment(image, ["a"], proposals=values[:, 1:])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_proposals_between_0_and_1_are_rounded(kind: type):
    values: Any = np.array([[[0.001, 0.003, 0.5, 0.9975, 0.999]] * 4], kind)
    recorder = Recorder()
    Client(transport=recorder, release=1).segment(PIXELS, ["a"], proposals=values)
    # of 255: 0.255, 0.765, 127.5 (half to even), 254.36, 254.745
    assert recorder.requests[0].inputs["proposals"].tolist() == [[[0, 1, 128, 254, 255]] * 4]


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


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"index": "i"}, "give a text to search for, image="),
        ({"text": ["a"] * 9, "image": [b"x"] * 9, "index": "i"}, "18 texts.*at most 16"),
        ({"text": 3, "index": "i"}, "text takes a list, not one int"),
        ({"id": b"a", "index": "i"}, "id takes a list, not one bytes"),
        ({"text": "a", "weights": [1, 2], "index": "i"}, r"weights has the shape \[2\]; \[1\] is"),
        ({"text": "a", "weights": ["b"], "index": "i"}, "weights is no array of numbers"),
        ({"text": "a", "weights": [1e39], "index": "i"}, "weights are .*allowed are finite"),
        ({"text": "a", "index": "i", "min_score": 1.01}, "min_score is 1.01; allowed are numbers"),
        ({"text": "a", "index": "i", "min_score": True}, "min_score is True; allowed"),
        ({"text": "a", "index": "i", "min_score": "high"}, "min_score is 'high'; .*'calibrated'"),
        ({"text": "a", "index": None}, "index takes texts, not None"),
        ({"text": "a", "index": "i", "top_k": 2**31}, "top_k is 2147483648"),
        ({"image": "no.jpg", "index": "i"}, "cannot read the image no.jpg"),
    ],
)
def test_bad_arguments_of_search(arguments, why: str):
    with pytest.raises(radapter_client.InvalidRequest, match=why):
        CLIENT.search(**arguments)


def test_what_a_search_sends_and_what_it_makes_of_the_answer():
    asked: list[Request] = []

    class Recorder:
        def send(self, request: Request, _: float) -> Any:
            asked.append(request)
            outputs = {
                "id": np.array([b"a.jpg"], object),
                "score": np.array([0.5], np.float32),
                "metadata": np.array([b"{}"], object),
                "index_version": np.array([b"g-1"], object),
            }
            return Reply(1, {name: outputs[name] for name in request.outputs})

        def close(self) -> None:
            pass

    with Client(transport=Recorder(), release=1) as client:
        plain = client.search("cat", index="i")
        assert plain == [radapter_client.Hit("a.jpg", 0.5, {})]
        assert plain.index_version is None
        sent = {name: array.tolist() for name, array in asked[-1].inputs.items()}
        assert sent == {"text": [b"cat"], "index": [b"i"], "top_k": [10]}
        assert asked[-1].outputs == ("id", "score", "metadata")
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
        sent = {name: array.tolist() for name, array in asked[-1].inputs.items()}
        assert sent == {
            "text": [b"cat", b"dog"],
            "image": [b"x", b"y"],
            "id": [b"z.jpg"],
            "weight": [1, -0.5, 2, 0, 0.25],
            "index": [b"i"],
            "top_k": [10],
            "min_score": [0.25],
            "offset": [0],
            "index_version": [b"g-1"],
        }
        assert {str(array.dtype) for array in asked[-1].inputs.values()} == {
            "object",
            "float32",
            "int32",
        }
        client.search("cat", index="i", min_score="calibrated")
        assert asked[-1].inputs["calibrated"].tolist() == [True]


def test_one_image_or_text_has_one_embedding():
    assert CLIENT.embed_texts("a text").shape == CLIENT.embed_texts(["a text"])[0].shape
    image = np.zeros((4, 4, 3), np.uint8)
    assert CLIENT.embed_images(image).shape == CLIENT.embed_images([image])[0].shape
    assert CLIENT.encode_text("a").ndim == CLIENT.encode_image(image).ndim == 1
    table = np.eye(3)
    assert np.array_equal(CLIENT.similarity(table, table[:2]), table[:, :2])
    assert CLIENT.similarity(table, table[1]).tolist() == [0, 1, 0]


def test_results_show_themselves_in_a_line():
    names = [f"a label with a long name {number}" for number in range(1000)]
    for result in (
        Classification(names, [0.123456789] * 1000, 1),
        Segmentation(np.zeros((2, 2), np.uint16), names, [0.5] * 1000, 1),
        Hit("photos/" * 100, 0.5, dict.fromkeys(names, "value" * 100)),
        Hits(Hit(name, 0.25, {}) for name in names),
    ):
        assert len(repr(result)) < 250 and "\n" not in repr(result)
    assert repr(Classification(["a"], [0.25], 3)) == (
        "Classification(labels=['a'], scores=[0.25], release=3)"
    )


def test_other_bad_arguments():
    for name in ("batch_size", "concurrency", "release"):
        zero: Any = {name: 0}
        with pytest.raises(radapter_client.InvalidRequest, match=f"{name} is 0"):
            radapter_client.Client(**zero)
    with pytest.raises(radapter_client.InvalidRequest, match="takes a list, not one int"):
        CLIENT.embed_images(3)  # type: ignore[arg-type]


def test_hits_are_read_with_all_that_they_have():
    scores = np.array([0.5, 0.25], np.float32)
    metadata = ['{"path": "a.jpg"}', "{}"]
    first, second = read_hits(["a.jpg", "\ufffd"], scores, metadata, [b"jpeg", b""])
    assert (first.id, first.score, first.metadata) == ("a.jpg", 0.5, {"path": "a.jpg"})
    assert (second.id, second.score, second.metadata) == ("\ufffd", 0.25, {})
    assert (first.thumbnail, second.thumbnail) == (b"jpeg", None)
