"""What can be checked without a server: names, URLs, images to the bit, batches, errors, arguments."""

from __future__ import annotations

import inspect
import io
import itertools
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import radapter_client
from radapter_client import _exceptions, _files
from radapter_client._base import MAX_BYTES, MAX_STRINGS
from radapter_client._images import chunks, encode_image, is_one_image, size_bound
from radapter_client._url import parse_url
from radapter_serve.inputs.labels import read_label_file

CLIENT = radapter_client.Client("http://localhost:1")


def test_exported_names():
    public = {name for name in vars(radapter_client) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(vars(radapter_client)[name])}
    assert public - modules == set(radapter_client.__all__)
    assert radapter_client.__all__ == sorted(radapter_client.__all__)


def test_twins_have_the_same_methods_and_arguments():
    def signatures(kind: type) -> dict[str, object]:
        members = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        return {
            name: "property" if isinstance(value, property) else [*inspect.signature(value).parameters.values()]
            for name, value in members.items()
        }

    assert signatures(radapter_client.Client) == signatures(radapter_client.AsyncClient)
    constructors = [
        inspect.signature(kind).parameters for kind in (radapter_client.Client, radapter_client.AsyncClient)
    ]
    assert constructors[0] == constructors[1]


def test_drawn_exception_tree_is_the_tree():
    def draw(kind: type, indent: int = 0) -> list[tuple[int, str]]:
        return [(indent, kind.__name__)] + [line for sub in kind.__subclasses__() for line in draw(sub, indent + 1)]

    drawn = []
    for line in inspect.cleandoc(_exceptions.__doc__).splitlines()[2:]:
        name = line.lstrip(" │├└─").split()[0]
        drawn.append((line.index(name) // 4, name))
    assert drawn == draw(radapter_client.RAdapterClientError)


def test_imports_neither_torch_nor_the_server_side():
    code = (
        "import sys, radapter_client, radapter_client.query, radapter_client._grpc, radapter_client._http\n"
        "heavy = {'torch', 'open_clip', 'radapter_serve', 'radapter_export', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


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
    assert str(parse_url(url)) == whole


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8001",
        "localhost",
        "",
        "ftp://localhost",
        "http://",
        "http://:8000",
        "grpc://localhost:port",
        "grpc://localhost:99999",
        "grpc://localhost/path",
        "http://me:secret@localhost",
        "http://localhost/?a=b",
        "http://local host",
        "http://[::1",
        "http://localhost\n",
        None,
        b"http://localhost",
    ],
)
def test_bad_url_names_the_allowed_ones(url):
    for kind in (radapter_client.Client, radapter_client.AsyncClient):
        with pytest.raises(radapter_client.InvalidURL, match="allowed are grpc://.*grpcs://.*http://.*https://"):
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
    return [rgb, rgba, rgba.convert("LA"), palette, transparent, profiled, deep, *modes, rgb.crop((0, 0, 1, 1))]


@pytest.mark.parametrize("image", images(), ids=lambda image: f"{image.mode}-{image.width}-{len(image.info)}")
def test_pil_image_arrives_to_the_bit(image: Image.Image):
    data = encode_image(image)
    back = Image.open(io.BytesIO(data))
    assert (back.format, back.mode, back.size) == ("PNG", image.mode, image.size)
    assert back.tobytes() == image.tobytes()
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
    with pytest.raises(radapter_client.InvalidImage, match=rf"mode {mode} .* allowed are RGB.*convert\('RGB'\)"):
        encode_image(image)


def test_pixels_beyond_the_palette_are_refused():
    image = Image.new("P", (4, 4), 200)
    image.putpalette([0, 0, 0, 255, 0, 0])
    with pytest.raises(radapter_client.InvalidImage, match="beyond its palette"):
        encode_image(image)


@given(st.integers(1, 20), st.integers(1, 20), st.booleans(), st.integers(0, 2**32 - 1))
def test_array_arrives_to_the_bit(height: int, width: int, grey: bool, seed: int):
    shape = (height, width) if grey else (height, width, 3)
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    for view in (array, array[::-1, ::-1]):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_image(view)))), view)


def test_file_is_sent_as_it_is(tmp_path: Path):
    path = tmp_path / "ein Bild.jpg"
    Image.fromarray(pixels(8, 8, 3)).save(path)
    data = path.read_bytes()
    assert encode_image(path) == encode_image(str(path)) == encode_image(data) == encode_image(memoryview(data)) == data


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("no/such/file.jpg", "no/such/file.jpg: No such file"),
        (Path("/"), "Is a directory"),
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
        encode_image(image)
    assert caught.value.code == "invalid_image"


def test_broken_and_empty_files(tmp_path: Path):
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(radapter_client.InvalidImage, match="empty file"):
        encode_image(empty)
    Image.fromarray(pixels(64, 64, 3)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with Image.open(tmp_path / "half.png") as lazy, pytest.raises(radapter_client.InvalidImage, match="cannot read"):
        encode_image(lazy)


def test_one_image_or_several():
    assert all(map(is_one_image, ["a.jpg", Path("a.jpg"), b"x", Image.new("L", (1, 1)), pixels(4, 4, 3), pixels(4, 4)]))
    assert not any(map(is_one_image, [["a.jpg"], ("a.jpg",), [], pixels(2, 4, 4, 3), iter([b"x"])]))


# Batches


@given(st.lists(st.integers(0, 100)), st.integers(1, 10), st.integers(1, 200))
def test_chunks(sizes: list[int], max_rows: int, max_bytes: int):
    runs = chunks(sizes, max_rows, max_bytes)
    assert [index for run in runs for index in run] == list(range(len(sizes)))
    for run in runs:
        assert 1 <= len(run) <= max_rows
        assert len(run) == 1 or sum(sizes[index] for index in run) <= max_bytes
    for run, following in itertools.pairwise(runs):  # none is shorter than it must be
        assert len(run) == max_rows or sum(sizes[index] for index in [*run, following[0]]) > max_bytes


@given(st.integers(1, 40), st.integers(1, 3000), st.integers(0, 80))
def test_classify_keeps_requests_moderate(count: int, labels: int, templates: int):
    names = [f"label {index}" for index in range(labels)]
    prompts = [f"{index} {{}}" for index in range(templates)] or None
    plan = CLIENT._classify([b"x"] * count, names, None, prompts, 3)
    requests = [part() for part in plan.parts]
    assert sum(len(request.inputs["image"]) for request in requests) == count
    assert plan.one_release == (len(requests) > 1)
    for request in requests:
        rows = len(request.inputs["image"])
        assert {len(array) for array in request.inputs.values()} == {rows}
        assert rows == 1 or rows * (labels + templates) <= MAX_STRINGS
        assert [name.decode() for name in request.inputs["labels"][-1]] == names
        assert request.inputs["top_k"].tolist() == [[3]] * rows


def test_large_images_are_split_by_bytes():
    array = np.zeros((2000, 2000, 3), np.uint8)
    plan = CLIENT._embed_images([array] * 7)
    assert size_bound(array) * 2 < MAX_BYTES < size_bound(array) * 3
    assert len(plan.parts) == 4


# Errors


@pytest.mark.parametrize(
    ("grpc", "http", "text", "kind", "code", "message"),
    [
        (
            "INVALID_ARGUMENT",
            "400",
            "[invalid_image] row 3: not an image",
            "InvalidImage",
            "invalid_image",
            "row 3: not",
        ),
        ("INVALID_ARGUMENT", "400", "[image_too_large] 9 GP", "InvalidImage", "image_too_large", "9 GP"),
        ("INTERNAL", "500", "[no_labels] give labels", "InvalidRequest", "no_labels", "give labels"),
        ("INTERNAL", "500", "[encoder_failed] it did", "ServerError", "encoder_failed", "it did"),
        ("INVALID_ARGUMENT", "400", "[a_new_code] new", "InvalidRequest", "a_new_code", "new"),
        ("INVALID_ARGUMENT", "400", "[request id: <id_unknown>] batch-size", "InvalidRequest", None, "batch-size"),
        ("NOT_FOUND", "404", "model 'x' has no version 7", "ModelNotFound", None, "version 7.*radapter-query release"),
        (
            "NOT_FOUND",
            "404",
            "Request for unknown model: 'segment' is not found",
            "ModelNotFound",
            None,
            "no model 'segment': .*radapter-export",
        ),
        ("INVALID_ARGUMENT", "400", "[no_patch_encoder] export", "ModelNotFound", "no_patch_encoder", "^export$"),
        ("INTERNAL", "500", "[unknown_index] no such", "InvalidRequest", "unknown_index", "no such"),
        ("INTERNAL", "500", "[index_mismatch] old", "InvalidRequest", "index_mismatch", "old"),
        ("UNAVAILABLE", "503", "not ready", "ServerUnavailable", None, "not ready"),
        ("DEADLINE_EXCEEDED", "504", "late", "Timeout", None, "late"),
        (
            "INTERNAL",
            "500",
            "failed, message: X: y\n\nAt:\n  /a.py(3): b",
            "ServerError",
            None,
            "failed, message: X: y$",
        ),
        ("INTERNAL", "500", "", "ServerError", None, "answered"),
    ],
)
def test_errors_of_the_server(grpc: str, http: str, text: str, kind: str, code: str | None, message: str):
    for status in (grpc, http):
        error = _exceptions.from_server(status, text)
        assert type(error) is getattr(radapter_client, kind)
        assert error.code == code
        assert re.search(message, str(error))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, 'no labels: give labels=.*label_set="NAME"'),
        ({"labels": []}, "no labels"),
        ({"labels": "a cat"}, "labels takes a list, not one str"),
        ({"labels": [1]}, "labels takes texts, not int 1"),
        ({"labels": ["\ud800"]}, "not Unicode"),
        ({"labels": ["a"], "label_set": "b"}, "not both"),
        ({"label_set": 3}, "label_set takes texts"),
        ({"labels": ["a"], "templates": "a {}"}, "templates takes a list"),
        ({"labels": ["a"], "templates": []}, "no templates"),
        ({"labels": ["a"], "top_k": 0}, "top_k is 0; allowed"),
        ({"labels": ["a"], "top_k": 1.5}, "top_k is 1.5"),
        ({"labels": ["a"], "top_k": True}, "top_k is True"),
        ({"labels": ["a"], "timeout": 0}, "timeout is 0; allowed are seconds above 0"),
        ({"labels": ["a"], "timeout": float("nan")}, "timeout is nan"),
        ({"labels": ["a"], "timeout": "1"}, "timeout is '1'"),
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
        ({"threshold": 1.5}, "threshold is 1.5; allowed are numbers from 0 to 1"),
        ({"threshold": True}, "threshold is True"),
        ({"short_side": 0}, "short_side is 0; allowed are whole numbers from 1"),
        ({"stride": 2.5}, "stride is 2.5"),
        ({"refine": -1}, "refine is -1; allowed are whole numbers from 0"),
        ({"proposal_scores": [[1.0]]}, "proposal_scores without proposals"),
        ({"proposal_weight": 0.5}, "proposal_weight without proposals"),
        ({"proposals": MASK, "proposal_weight": -1}, "proposal_weight is -1"),
        ({"proposals": MASK, "proposal_scores": [[1], [1]]}, r"shape \[2, 1\]; needed are \[1, C\]"),
        ({"proposals": MASK[0]}, r"proposals of shape \[4, 5\]; allowed: bool, uint8 from 0 to 255, or float"),
        ({"proposals": MASK[:0]}, r"proposals of shape \[0, 4, 5\]"),
        ({"proposals": MASK.transpose(0, 2, 1)}, "proposals of 4 x 5 pixels .* for an image of 5 x 4"),
        ({"proposals": MASK * 1}, "proposals of int64 from 1 to 1"),
        ({"proposals": MASK * 1.5}, "proposals of float64 from 1.5 to 1.5"),
        ({"proposals": MASK * np.nan}, "proposals of float64 from nan"),
        ({"proposals": MASK.astype(np.uint8)}, r"above 1 of 255; send proposals.astype\(bool\)"),
        ({"proposals": [[[1], [1, 2]]]}, "proposals is no array of numbers"),
        ({"proposals": np.broadcast_to(MASK, (100_000_000, 4, 5))}, "are 1.9 GiB; a request holds 1.5: send fewer"),
        ({"proposals": "masks.npy"}, "proposals is no array of numbers"),
    ],
)
def test_bad_arguments_of_segment(arguments, why: str):
    with pytest.raises(radapter_client.InvalidRequest, match=why):
        CLIENT.segment(PIXELS, **{"labels": ["a"], **arguments})


def test_each_image_of_a_list_has_proposals_of_its_own():
    with pytest.raises(radapter_client.InvalidRequest, match="proposals has 1 entries for 2 images"):
        CLIENT.segment([PIXELS, PIXELS], ["a"], proposals=[MASK])


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float16, np.float32, np.float64])
def test_proposals_are_sent_as_0_to_255(kind, tmp_path: Path):
    values = np.array([[[0, 1, 1, 0, 1]] * 4], kind)
    if kind == np.uint8:
        values *= 255
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    for image in (PIXELS, tmp_path / "image.png", (tmp_path / "image.png").read_bytes()):
        [part] = CLIENT._segment(image, ["a"], None, None, None, None, None, None, values, None, None).parts
        sent = part().inputs["proposals"]
        assert (sent.dtype, sent.tolist()) == (np.uint8, [[[0, 255, 255, 0, 255]] * 4])
        wrong = CLIENT._segment(image, ["a"], None, None, None, None, None, None, values[:, 1:], None, None).parts[0]
        with pytest.raises(radapter_client.InvalidRequest, match="5 x 3 pixels"):
            wrong()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"index": "i"}, "give a text to search for, or image="),
        ({"text": "a", "image": b"x", "index": "i"}, "and not both"),
        ({"image": [b"x"], "index": "i"}, "image takes one image, not list"),
        ({"text": ["a"], "index": "i"}, "text takes texts, not list"),
        ({"text": "a", "index": None}, "index takes texts, not NoneType"),
        ({"text": "a", "index": "i", "top_k": 0}, "top_k is 0"),
        ({"text": "a", "index": "i", "where": 3}, "where takes texts"),
        ({"image": "no.jpg", "index": "i"}, "cannot read the image no.jpg"),
    ],
)
def test_bad_arguments_of_search(arguments, why: str):
    with pytest.raises(radapter_client.InvalidRequest, match=why):
        CLIENT.search(**arguments)


def test_other_bad_arguments():
    with pytest.raises(radapter_client.InvalidRequest, match="requests is 0; allowed are whole numbers from 1"):
        CLIENT.profile(requests=0)
    for name in ("batch_size", "concurrency", "release"):
        with pytest.raises(radapter_client.InvalidRequest, match=f"{name} is 0"):
            radapter_client.Client(**{name: 0})
    with pytest.raises(radapter_client.InvalidRequest, match="takes a list, not one str"):
        CLIENT.embed_texts("a text")
    with pytest.raises(radapter_client.InvalidRequest, match="takes a list, not one PosixPath"):
        CLIENT.embed_images(Path("a.jpg"))
    with pytest.raises(radapter_client.InvalidRequest, match="takes a list, not one int"):
        CLIENT.embed_images(3)


def test_nobody_there(protocol: str):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with radapter_client.Client(f"{protocol}://127.0.0.1:{port}", timeout=5) as client:
        with pytest.raises(radapter_client.ServerUnavailable, match=rf"{protocol}://127.0.0.1:{port}.*radapter-serve"):
            client.embed_texts(["x"])
        assert not client.is_ready()


def test_not_a_triton_server(protocol: str):
    """Someone who accepts and never says a word, or hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with (
            radapter_client.Client(f"{protocol}://127.0.0.1:{port}", timeout=0.3) as client,
            pytest.raises((radapter_client.Timeout, radapter_client.ServerUnavailable)),
        ):
            client.embed_texts(["x"])


def test_closed_client_says_so(protocol: str):
    client = radapter_client.Client(f"{protocol}://localhost:1")
    client.close()
    client.close()
    with pytest.raises(radapter_client.RAdapterClientError, match="closed"):
        client.embed_texts(["x"])


@pytest.mark.parametrize("count", [1, 20])
def test_closed_between_the_start_of_a_call_and_its_requests(protocol: str, count: int, monkeypatch):
    client = radapter_client.Client(f"{protocol}://127.0.0.1:1", batch_size=1, release=1)

    def start(timeout: float | None) -> float:
        client.close()
        return 0.3

    monkeypatch.setattr(client, "_start", start)
    with pytest.raises(radapter_client.RAdapterClientError, match="closed in the middle|no answer"):
        client.embed_texts(["x"] * count)


def test_label_files_are_read_as_the_exporter_reads_them(tmp_path: Path):
    path = tmp_path / "labels.txt"
    path.write_text("\ufeff# animals\n\ncat, kitty\n  ein Hündchen \r\nC# code\n   # no label\n", encoding="utf-8")
    assert _files.read_lines(path, "a label") == read_label_file(path) == ["cat, kitty", "ein Hündchen", "C# code"]
