"""A loaded release: of a repository, or of a live server that is none here."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_client import RAdapterClientError
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.encoders import loaded as module
from radapter_serve.encoders.loaded import complete, load_release, served_release
from radapter_serve.errors import RAdapterError
from radapter_serve.tasks.embed import embed_labels
from tests.helpers.small_models import release
from tests.helpers.small_release import SIZE, Local, png


def test_images_are_prepared_and_embedded(local: Local) -> None:
    images = [png(0), png(1, 90, 16), png(2, kind="JPEG")]
    pixels = [local.loaded.pixels(image) for image in images]
    opened = [Image.open(io.BytesIO(image)) for image in images]
    expected = [Preprocess((SIZE, SIZE))(image) for image in opened]
    np.testing.assert_array_equal(pixels, expected)
    embeds = local.images(np.stack(expected))
    np.testing.assert_allclose(local.loaded.embed_pixels(pixels), embeds, atol=1e-6)
    patches = local.patches(np.stack(expected))
    np.testing.assert_allclose(local.loaded.embed_patches(pixels), patches, atol=1e-6)
    with pytest.raises(TaskError, match="invalid_image"):
        local.loaded.pixels(b"nonsense")


def test_a_copy_turns_images_or_leaves_them(local: Local) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    image = Image.open(io.BytesIO(png(3, SIZE, SIZE)))
    image.save(file, "JPEG", exif=exif)
    upright = local.loaded.pixels(file.getvalue())
    as_it_is = local.loaded.turned(False)
    np.testing.assert_array_equal(np.rot90(as_it_is.pixels(file.getvalue()), -1), upright)
    np.testing.assert_array_equal(local.loaded.pixels(file.getvalue()), upright)
    as_it_is.close()


def test_a_copy_at_another_alpha(local: Local) -> None:
    loaded = local.changed(dynamic_alpha=True)
    other = loaded.at(0.25)
    assert (loaded.release.alpha, other.release.alpha) == (0.5, 0.25)
    assert (loaded.request_alpha(None), other.request_alpha(None)) == (0.5, 0.25)
    assert other.label_cache is not loaded.label_cache  # which keeps what was embedded at its own
    with pytest.raises(RAdapterError, match=r"alpha is 2; allowed"):
        loaded.at(2)
    with pytest.raises(RAdapterError, match=r"--alpha dynamic"):
        local.loaded.at(0.25)


def test_the_release_of_a_repository(repository: Path, tmp_path: Path) -> None:
    for name, version, expected in (
        (str(repository), None, 2),
        (str(repository), 1, 1),
        (f"{repository}@1", None, 1),
    ):
        loaded = load_release(name, version, indexes=tmp_path)
        assert loaded.release.version == expected
        assert loaded.indexes == tmp_path
        assert loaded.origin == {"model_repository": name}
        assert set(loaded.label_sets) == {"colours"}
        local = Local(repository, expected)
        pixels = [local.loaded.pixels(png(0))]
        np.testing.assert_array_equal(
            loaded.embed_pixels(pixels), local.loaded.embed_pixels(pixels)
        )
        loaded.close()
    with pytest.raises(RAdapterError, match="no release 7 in"):
        load_release(repository, 7)


class Client:
    """A client of a server that is none."""

    facts: dict[str, Any]
    asked: list[Any]

    def __init__(self, url: str, **options: Any) -> None:
        self.asked.append((url, options))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def release(self) -> SimpleNamespace:
        return SimpleNamespace(version=3, facts=self.facts)

    def embed_images(self, images: list[np.ndarray], alpha: float | None) -> np.ndarray:
        self.asked.append(([one.shape for one in images], alpha))
        return np.ones((len(images), 2))

    def embed_texts(self, texts: list[str], alpha: float | None) -> np.ndarray:
        if "fails" in texts:
            raise RAdapterClientError("it is gone")
        self.asked.append((texts, alpha))
        return np.array([[len(text), 1] for text in texts])

    def close(self) -> None:
        self.asked.append("closed")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    monkeypatch.setattr(module, "Client", Client)
    monkeypatch.setattr(Client, "asked", [], raising=False)
    monkeypatch.setattr(Client, "facts", release(3).to_dict(), raising=False)
    return Client


@pytest.mark.parametrize(("most", "rows"), [(4, 4), (64, 16)])
def test_a_server_embeds_pixels_and_texts(client: type[Client], most: int, rows: int) -> None:
    client.facts = release(3, dynamic_alpha=True, max_batch_size=most).to_dict()
    loaded = served_release("http://localhost:8000").at(0.25)
    assert loaded.release.version == 3
    assert loaded.origin == {"url": "http://localhost:8000"}
    assert client.asked[-1] == ("http://localhost:8000", {"release": 3, "batch_size": rows})
    client.asked.clear()
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    found = loaded.embed_pixels(list(pixels))
    assert found.dtype == np.float32 and found.shape == (3, 2)
    found = loaded.embed_texts(["four", "sixsix", "four"])
    assert found.dtype == np.float32 and found[:, 0].tolist() == [4, 6, 4]
    assert client.asked == [([(4, 4, 3)] * 3, 0.25), (["four", "sixsix"], 0.25)]
    with pytest.raises(RAdapterError, match=r"http://localhost:8000: it is gone$") as error:
        loaded.embed_texts(["fails"])
    assert not isinstance(error.value, RAdapterClientError)
    # And a task says so in place of "internal error".
    with pytest.raises(TaskError, match=r"\[encoder_failed\] .*it is gone"):
        complete(embed_labels(loaded, ["fails"], ["{}"]))
    loaded.close()
    assert client.asked[-1] == "closed"


def test_nobody_there() -> None:
    with pytest.raises(RAdapterError, match=r"grpc://127.0.0.1:9: no answer") as error:
        served_release("grpc://127.0.0.1:9")
    assert not isinstance(error.value, RAdapterClientError)
