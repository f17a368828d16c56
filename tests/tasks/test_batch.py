"""Every kind of bad request in one batch with good ones: each gets what it would get alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_serve.server.launch import OUR_BACKENDS
from tests.helpers.fake_triton import Request, Response, Tensor, TritonError, install, load
from tests.helpers.needs_triton import needs_triton
from tests.helpers.small_release import SOURCES, png, png_header
from tests.server.test_backends import arguments

pytestmark = needs_triton
# Of each model a right request, and wrong ones with the code that callers get.
CASES: dict[str, tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    "embed_text": (
        {"text": [[b"a cat"]]},
        [
            ({}, "invalid_argument"),
            ({"text": [[b"\xff"]]}, "invalid_argument"),
            (
                {"text": [[b"a"]], "alpha": np.array([[np.nan]], np.float32)},
                "invalid_argument",
            ),
        ],
    ),
    "classify": (
        {"image": [[png(7)]], "labels": [[b"cat", b"dog"]]},
        [
            ({"image": [[png(7)]]}, "no_labels"),
            ({"image": [[png_header(60_000, 60_000)]], "labels": [[b"a"]]}, "image_too_large"),
            ({"image": [[png(7)], [b"nonsense"]], "labels": [[b"a"]] * 2}, "invalid_image"),
        ],
    ),
    "segment": (
        {"image": [png(7)], "labels": [b"cat", b"dog"]},
        [
            ({"image": [b"nonsense"], "labels": [b"a"]}, "invalid_image"),
            (
                {
                    "image": [png(7)],
                    "labels": [b"a"],
                    "proposals": np.empty((0, 20, 30), np.uint8),
                },
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

    return make


def same(one: Response, other: Response) -> None:
    assert one.error() == other.error()
    if not one.has_error():
        for name, values in one.outputs().items():
            expected = other.outputs()[name]
            if values.dtype == np.float32:
                np.testing.assert_allclose(values, expected, atol=1e-6)
            else:
                np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("name", CASES)
def test_good_requests_between_bad_ones_are_answered_as_alone(model, name, capfd):
    made = model(name)
    good, bad = CASES[name]
    together = made.execute([Request(**one) for wrong, _ in bad for one in (good, wrong)])
    [expected] = made.execute([Request(**good)])
    for response in together[::2]:
        same(response, expected)
    for response, (wrong, code) in zip(together[1::2], bad, strict=True):
        [alone] = made.execute([Request(**wrong)])
        same(response, alone)
        assert str(response.error()).startswith(f"[{code}] ") and "\n" not in response.error()
        assert response.error().code == "INVALID_ARG"
    assert "Traceback" not in capfd.readouterr().err


def test_tokens_that_no_text_has_are_refused_alone(repository, monkeypatch):
    install(monkeypatch)
    encoder = load(OUR_BACKENDS["onnxruntime"] / "model.py")
    facts = {"release": {"string_value": '{"tokenizer": {"context_length": 77}}'}}
    encoder.initialize(arguments(repository, "text_encoder", parameters=facts))
    rows: tuple[Any, ...] = (
        [[1, 2, 3]],
        [[]],
        [[1, -1, 3]],
        [[1] * 78],
        [[1, 10**6, 3]],
        [[1, 2, 3]],
    )
    requests = [Request(tokens=np.array(row, np.int32)) for row in rows]
    first, *refused, last = encoder.execute(requests)
    same(first, last)
    for response in refused:
        assert response.error().startswith("[invalid_argument] ")


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
        ("Failed to increase the shared memory pool size for key '/x7_1' to 9", "[overloaded] ima"),
        ("Stub process 'image_encoder_0_0' is not healthy.", "[restarting] image_encoder is being"),
        ("no /home/me/file.onnx here", "[encoder_failed] image_encoder version 2 failed: no ... h"),
    ],
)
def test_what_an_encoder_says_names_no_path_and_no_shared_memory(
    model, monkeypatch, capfd, said, told
):
    install(monkeypatch, lambda name, inputs: Response(error=TritonError(said, "INTERNAL")))
    [response] = model("embed_image").execute([Request(image=[[png(7)]])])
    assert response.error().startswith(told) and "/" not in response.error()
    retryable = re.match(r"\[(restarting|overloaded|server_stopping)\]", told)
    assert (response.error().code == "UNAVAILABLE") == bool(retryable)
