"""A client names adapters of a real engine, in this process and over HTTP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import urllib3

from radapter_client import Client, InvalidRequest, Receipt
from radapter_serve import Model
from radapter_serve.release.adapters import AdapterFacts, Factors, add, read_list, shortened
from radapter_serve.release.release import Release
from radapter_serve.release.repository import MODELS
from tests.helpers.small_release import png
from tests.helpers.ways import in_process

TEXTS = ["a red bicycle", "two dogs"]


@pytest.fixture
def matrix(sealed: Path) -> np.ndarray:
    """The matrix of an adapter "anna", beside release 2."""
    release = Release.load(sealed / MODELS[-1] / "2")
    width = release.embed_dim
    matrix = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32) * 0.3
    facts = AdapterFacts(release.text_tower.digest(release.alpha), width, alpha=0.5)
    factors: Factors = (matrix,)
    add(sealed, "anna", facts, factors)
    return matrix


def digest_of_anna(repository: Path) -> str:
    return shortened(read_list(repository)["anna"].digest)


def check(client: Client, matrix: np.ndarray, digest: str) -> None:
    plain = client.embed_texts(TEXTS)
    for alpha, expected_alpha in ((None, 0.5), (0.25, 0.25)):
        expected = plain + expected_alpha * plain @ matrix.T.astype(np.float64)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        embeds = client.embed_texts(TEXTS, adapter="anna", alpha=alpha)
        np.testing.assert_allclose(embeds, expected, atol=1e-6)
        answers = client.classify([png(0), png(1)], ["a cat", "a dog"], adapter="anna", alpha=alpha)
        expected_receipt = Receipt(2, "anna", expected_alpha, adapter_digest=digest)
        assert {answer.receipt for answer in answers} == {expected_receipt}
        segmentation = client.segment(png(0), ["a"], adapter="anna", alpha=alpha)
        assert segmentation.receipt == expected_receipt
    plain_receipt = client.classify(png(0), ["a cat"]).receipt
    assert plain_receipt is not None and plain_receipt.adapter is None
    with pytest.raises(InvalidRequest, match="nearest are: anna") as error:
        client.embed_texts(TEXTS, adapter="ana")
    assert error.value.code == "unknown_adapter"


def test_a_model_in_this_process(sealed: Path, matrix: np.ndarray) -> None:
    with Model(sealed) as model:
        check(model, matrix, digest_of_anna(sealed))


def test_a_server_over_http(sealed: Path, matrix: np.ndarray, tmp_path: Path) -> None:
    with in_process(sealed, tmp_path) as running:
        with Client(running.url) as client:
            check(client, matrix, digest_of_anna(sealed))
            expected = client.embed_texts("a", adapter="anna")
        body = {"model": "anna", "input": "a", "encoding_format": "float"}
        answer = urllib3.request("POST", f"{running.url}/v1/embeddings", json=body)
        [row] = answer.json()["data"]
        np.testing.assert_allclose(row["embedding"], expected, atol=1e-6)
        assert answer.json()["receipt"] == {
            "release": 2,
            "adapter": "anna",
            "adapter_digest": digest_of_anna(sealed),
            "alpha": 0.5,
        }
        models = urllib3.request("GET", f"{running.url}/v1/models").json()["data"]
        assert [model["id"] for model in models if "parent" in model] == ["anna"]
