"""A stand-in for Triton behind the playground: answers that are easy to compute again, for every
task.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from radapter_serve.gateway.upstream import Inference, Refused
from radapter_serve.index.facts import FACTS
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import FakeUpstream, as_bytes, config

INDEXES = ("drawings", "photos")
UNKNOWN = "no index ' '; there are: " + ", ".join(INDEXES)


def png(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_indexes(folder: Path) -> Path:
    """The folder that a gateway in front of it lists its indexes from."""
    for name in INDEXES:
        (folder / name).mkdir(parents=True)
        (folder / name / FACTS).touch()
    return folder


class SmallWorld(FakeUpstream):
    """Labels get 1 / (1 + their place) each, normalized, and the first as much more as α says; the
    left half of a picture is the first label and the right half the second; each index has three
    pictures. With `dynamic_alpha`, its release takes any α.
    """

    def __init__(self, dynamic_alpha: bool = True) -> None:
        super().__init__()
        facts = release(1) | {"dynamic_alpha": dynamic_alpha, "precision": "int8"}
        self.configs = {name: config(name, facts) for name in self.configs}

    def _answer(self, asked: Inference) -> dict[str, np.ndarray]:
        answers = {"classify": self._classify, "segment": self._segment, "retrieve": self._retrieve}
        if asked.model in answers:
            return answers[asked.model](asked.inputs)
        return super()._answer(asked)

    def _classify(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = as_bytes(given["labels"]) if "labels" in given else [b"a", b"b", b"c"]
        scores = 1 / (1 + np.arange(len(names), dtype=np.float32))
        scores[0] += given["alpha"][0, 0] if "alpha" in given else 0
        return {"label": np.array([names], object), "score": (scores / scores.sum())[None]}

    def _segment(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        width, height = Image.open(io.BytesIO(given["image"][0])).size
        names = as_bytes(given["labels"])
        mask = np.zeros((height, width), np.uint16)
        mask[:, width // 2 :] = 1
        return {
            "mask": mask,
            "label": np.array(names, object),
            "score": np.full(len(names), 0.5, np.float32),
        }

    def _retrieve(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if given["index"][0] not in INDEXES:
            raise Refused(400, "unknown_index", UNKNOWN)
        # Health asks as the engine asks itself, in UTF-8.
        asked = "picture" if "image" in given else as_bytes(given["text"])[0].decode()
        ids = [f"folder/{asked} {number}<b>" for number in range(3)]
        thumbnails = [png(colour) for colour in ("red", "green", "blue")]
        return {
            "id": np.array([one.encode() for one in ids], object),
            "score": np.array([0.9, 0.8, 0.7], np.float32),
            "metadata": np.array([b"{}"] * 3, object),
            "thumbnail": np.array(thumbnails, object),
            "index_version": np.array([b"g-1"], object),
        }
