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

from radapter_serve.server.launch import OUR_BACKENDS
from tests.helpers.fake_triton import Request, Response, Tensor, TritonError, install, load
from tests.helpers.needs_triton import needs_triton
from tests.helpers.small_release import SOURCES, png, png_header
from tests.server.test_backends import arguments

pytestmark = needs_triton
LABELS = [b"cat", b"dog"]
# Of each model a right request, and changes of it with the code that callers get; None takes an
# input out.
GOOD: dict[str, dict[str, Any]] = {
    "embed_image": {"image": [[png(7)]]},
    "embed_text": {"text": [[b"a cat"]]},
    "classify": {"image": [[png(7)]], "labels": [LABELS]},
    "segment": {"image": [png(7)], "labels": LABELS},
}
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "embed_image": [
        ({"image": None}, "invalid_argument"),
        ({"image": [[png_header(60_000, 60_000)]]}, "image_too_large"),
        ({"image": [[png(7)], [b"nonsense"]]}, "invalid_image"),
    ],
    "embed_text": [
        *(({"text": [[text]]}, "invalid_argument") for text in (b" ", b"\xff", b"x" * 10_001)),
        ({"alpha": np.array([[np.nan]], np.float32)}, "invalid_argument"),
    ],
    "classify": [
        ({"labels": None}, "no_labels"),
        ({"labels": np.empty((1, 0), object)}, "invalid_argument"),
        ({"labels": None, "label_set": [[b"colors"]]}, "unknown_label_set"),
    ],
    "segment": [
        ({"image": [b"nonsense"]}, "invalid_image"),
        ({"proposals": np.empty((0, 20, 30), np.uint8)}, "invalid_argument"),
    ],
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
    good = GOOD[name]
    changed = [{**good, **change} for change, _ in BAD[name]]
    bad = [{key: one for key, one in wrong.items() if one is not None} for wrong in changed]
    requests = [one for wrong in bad for one in (good, wrong)] + [good]
    together = made.execute([Request(**one) for one in requests])
    [expected] = made.execute([Request(**good)])
    for request, response in zip(requests, together, strict=True):
        if request is good:
            same(response, expected)
        else:
            [alone] = made.execute([Request(**request)])
            same(response, alone)
    errors = [response.error() for response in together[1::2]]
    for error, (_, code) in zip(errors, BAD[name], strict=True):
        assert str(error).startswith(f"[{code}] ")
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
    model = load(OUR_BACKENDS[backend] / "model.py")
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
        ("Failed to increase the shared memory pool size for key '/x7_1' to 9", "[overloaded] ima"),
        ("Stub process 'image_encoder_0_0' is not healthy.", "[restarting] image_encoder is being"),
        ("no /home/me/file.onnx here", "[encoder_failed] image_encoder version 2 failed: no ... h"),
    ],
)
def test_what_an_encoder_says_names_no_path_and_no_shared_memory(
    model, monkeypatch, capfd, said, told
):
    install(monkeypatch, lambda name, inputs: Response(error=TritonError(said, "INTERNAL")))
    [response] = model.load("embed_image").execute([Request(**GOOD["embed_image"])])
    assert response.error().startswith(told) and "/" not in response.error()
    retryable = re.match(r"\[(restarting|overloaded|server_stopping)\]", told)
    assert (response.error().code == "UNAVAILABLE") == bool(retryable)
