"""Every kind of bad request in one batch with good ones: each gets what it would get alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radapter_serve.server.installation import OUR_BACKENDS
from tests.helpers.fake_triton import Request, Response, Tensor, TritonError, install, load
from tests.helpers.needs_triton import needs_triton
from tests.helpers.small_release import SOURCES, png, png_header
from tests.server.test_backends import arguments

pytestmark = needs_triton
GOOD = {"image": [[png(7)]], "labels": [[b"cat", b"dog"]]}
F32 = np.float32
LABELS = [b"cat", b"dog"]
# Of each model: a request that is right, then those that are not, with the code that their callers
# get.
BAD: dict[str, tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    "embed_image": (
        {"image": [[png(7)]]},
        [
            ({}, "invalid_argument"),
            ({"alpha": np.array([[0.5]], F32)}, "invalid_argument"),
            ({"image": [[b"nonsense"]]}, "invalid_image"),
            ({"image": [[b""]]}, "invalid_image"),
            ({"image": [[png(1)[:60]]]}, "invalid_image"),
            ({"image": [[png_header(60_000, 60_000)]]}, "image_too_large"),
            ({"image": [[png(7)]], "alpha": np.array([[np.nan]], F32)}, "invalid_argument"),
            ({"image": [[png(7)], [b"nonsense"]]}, "invalid_image"),
        ],
    ),
    "embed_text": (
        {"text": [[b"a cat"]]},
        [
            ({}, "invalid_argument"),
            ({"text": [[b" "]]}, "invalid_argument"),
            ({"text": [[b"\xff"]]}, "invalid_argument"),
            ({"text": [[b"x" * 10_001]]}, "invalid_argument"),
            ({"text": [[b"a cat"]], "alpha": np.array([[2]], F32)}, "invalid_argument"),
        ],
    ),
    "classify": (
        GOOD,
        [
            ({"labels": [LABELS]}, "invalid_argument"),
            ({"image": [[png(7)]]}, "no_labels"),
            ({"image": [[b"nonsense"]], "labels": [LABELS]}, "invalid_image"),
            ({**GOOD, "labels": np.empty((1, 0), object)}, "invalid_argument"),
            ({**GOOD, "labels": [[b"\xff"]]}, "invalid_argument"),
            ({**GOOD, "labels": [[b"cat", b"cat"]]}, "invalid_argument"),
            ({**GOOD, "templates": np.empty((1, 0), object)}, "invalid_argument"),
            ({**GOOD, "templates": [[b"no place"]]}, "invalid_argument"),
            ({**GOOD, "templates": [[b"{}" * 400]]}, "invalid_argument"),
            ({**GOOD, "label_set": [[b"colours"]]}, "invalid_argument"),
            ({"image": [[png(7)]], "label_set": [[b"colors"]]}, "unknown_label_set"),
            ({**GOOD, "top_k": np.array([[0]], np.int32)}, "invalid_argument"),
            ({**GOOD, "alpha": np.array([[-1]], F32)}, "invalid_argument"),
        ],
    ),
    "segment": (
        {"image": [png(7)], "labels": LABELS},
        [
            ({"labels": LABELS}, "invalid_argument"),
            ({"image": [png(7)]}, "no_labels"),
            ({"image": [b"nonsense"], "labels": LABELS}, "invalid_image"),
            (
                {"image": [png(7)], "labels": LABELS, "templates": np.empty(0, object)},
                "invalid_argument",
            ),
            ({"image": [png(7)], "labels": np.empty(0, object)}, "invalid_argument"),
            (
                {"image": [png(7)], "labels": LABELS, "threshold": np.array([np.nan], F32)},
                "invalid_argument",
            ),
            (
                {"image": [png(7)], "labels": LABELS, "stride": np.array([0], np.int32)},
                "invalid_argument",
            ),
            (
                {"image": [png(7)], "labels": LABELS, "proposals": np.empty((0, 20, 30), np.uint8)},
                "invalid_argument",
            ),
        ],
    ),
}


@pytest.fixture
def model(repository, local, monkeypatch):
    """A model.py of the repository, whose encoders run in this process."""
    encoders = {
        "image_encoder": ("image_embeds", local.images),
        "text_encoder": ("text_embeds", local.tokens),
        "patch_encoder": ("patch_embeds", local.patches),
    }

    def encode(name: str, inputs: list[np.ndarray]) -> Response:
        output, run = encoders[name]
        return Response([Tensor(output, run(*inputs))])

    install(monkeypatch, encode)

    def make(name: str) -> Any:
        made = load(SOURCES / name / "model.py")
        made.initialize({"model_repository": str(repository / name), "model_version": "2"})
        return made

    return SimpleNamespace(load=make, encoders=encoders)


def same(one: Response, other: Response) -> None:
    assert one.error() == other.error()
    if not one.has_error():
        for name, values in one.outputs().items():
            expected = other.outputs()[name]
            if values.dtype == np.float32:
                np.testing.assert_allclose(values, expected, atol=1e-6)
            else:
                np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("name", BAD)
def test_good_requests_between_bad_ones_are_answered_as_alone(model, name, capfd):
    made = model.load(name)
    good, bad = BAD[name]
    requests = [one for wrong, _ in bad for one in (good, wrong)] + [good]
    together = made.execute([Request(**one) for one in requests])
    [expected] = made.execute([Request(**good)])
    for request, response in zip(requests, together, strict=True):
        if request is good:
            same(response, expected)
        else:
            [alone] = made.execute([Request(**request)])
            same(response, alone)
    errors = [response.error() for response in together[1::2]]
    assert [str(error).partition("] ")[0].lstrip("[") for error in errors] == [
        code for _, code in bad
    ]
    assert all(error.code == "INVALID_ARG" and "\n" not in error for error in errors)
    assert "Traceback" not in capfd.readouterr().err


def test_a_task_without_a_tokenizer_of_its_own_is_loaded(model, repository, tmp_path):
    """An export writes none for `embed_image` and `retrieve`."""
    copy = shutil.copytree(repository, tmp_path / "copy")
    (copy / "embed_image" / "2" / "tokenizer.json").unlink()
    made = load(SOURCES / "embed_image" / "model.py")
    made.initialize({"model_repository": str(copy / "embed_image"), "model_version": "2"})
    [response] = made.execute([Request(image=[[png(7)]])])
    assert response.outputs()["image_embeds"].shape == (1, 8)
    assert made.loaded.tokenizer.encode(["a cat"])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_tokens_that_no_text_has(repository, monkeypatch, backend):
    install(monkeypatch)
    model = load(OUR_BACKENDS / backend / "model.py")
    facts = {"release": {"string_value": '{"tokenizer": {"context_length": 77}}'}}
    model.initialize(arguments(repository, "text_encoder", parameters=facts))

    def tokens(*values: int, shape: tuple[int, ...] = (1, -1)) -> Request:
        return Request(tokens=np.array(values, np.int32).reshape(shape))

    good = tokens(1, 2, 3)
    bad = [
        Request(),
        tokens(shape=(0, 0)),
        tokens(shape=(1, 0)),
        tokens(1, -1, 3),
        tokens(*[1] * 78),
    ]
    if backend == "onnxruntime":  # OpenVINO takes zeros for what lies outside the vocabulary
        bad.append(tokens(1, 10**6, 3))
    together = model.execute([one for wrong in bad for one in (good, wrong)] + [good])
    [expected] = model.execute([good])
    for response in together[::2]:
        same(response, expected)
    for response in together[1::2]:
        assert (
            response.error().startswith("[invalid_argument] ")
            and response.error().code == "INVALID_ARG"
        )


HANGS = """
import threading, time
import pytest
from tests.helpers import fake_triton
fake_triton.install(pytest.MonkeyPatch())
from radapter_serve.triton import responses
responses.HUNG = 0.5
requests = [fake_triton.Request(text=[["a"]])]
answered = responses.answer(requests, lambda some: [{} for _ in some])
time.sleep(1)
print(len(answered), flush=True)
responses.answer(requests, lambda some: threading.Event().wait())
"""


def test_what_hangs_ends_its_process_and_says_where() -> None:
    command = [sys.executable, "-c", HANGS]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert "in answer" in done.stderr and "in wait" in done.stderr


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "Failed to increase the shared memory pool size for key '/radapter_serve_x7_1' to 9",
            "[overloaded] image_encoder has more to do than it can take on; ask again in a moment,"
            " with fewer requests at once",
        ),
        (
            "no /home/me/file.onnx here",
            "[encoder_failed] image_encoder version 2 failed: no ... here",
        ),
        (
            "Stub process 'image_encoder_0_0' is not healthy.",
            "[restarting] image_encoder is being started again; ask again in a few seconds",
        ),
    ],
)
def test_what_an_encoder_says_names_no_path_and_no_shared_memory(
    model, monkeypatch, capfd, said, told
):
    install(monkeypatch, lambda name, inputs: Response(error=TritonError(said, "INTERNAL")))
    [response] = model.load("embed_image").execute([Request(**BAD["embed_image"][0])])
    assert response.error() == told
    retryable = re.match(r"\[(restarting|overloaded|server_stopping)\]", told)
    assert (response.error().code == "UNAVAILABLE") == bool(retryable)
