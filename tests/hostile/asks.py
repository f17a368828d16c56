"""Right requests of every task, in JSON and in binary: what mutations start from, and what the good
client asks.
"""

from __future__ import annotations

import base64
import copy
import json
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from tests.helpers.small_release import png

KEY = "radapter-hostile-suite"
LABEL_SET = "colours"
INDEX = "photos"
TYPE = "Content-Type"
LENGTH = "Inference-Header-Content-Length"
_KINDS: dict[str, str] = {"INT32": "<i4", "FP32": "<f4", "UINT8": "u1", "BOOL": "?"}

Value = Any  # a text, the bytes of an image, or numbers as a nested list


@dataclass
class Ask:
    """A request that still has its structure.

    Args:
        model: of the path.
        head: the JSON of the body.
        tail: what stands behind it, in binary.
        binary: whether the header says where JSON ends.
        headers: besides those that every request has; a value of None takes one of those out.
        path: of the request; the model's own if None.
    """

    model: str
    head: Any
    tail: bytes = b""
    binary: bool = False
    headers: dict[str, str | None] = field(default_factory=dict)
    path: str | None = None

    def copy(self) -> Ask:
        return copy.deepcopy(self)

    @property
    def body(self) -> bytes:
        return json.dumps(self.head).encode() + self.tail

    def raw(self, body: bytes | None = None) -> bytes:
        """The whole message; with another body, if one is given."""
        body = self.body if body is None else body
        own = {LENGTH: str(len(body) - len(self.tail))} if self.binary else {}
        path = self.path or f"/v2/models/{self.model}/infer"
        return message("POST", path, {**own, **self.headers}, body)


def message(method: str, path: str, headers: dict[str, str | None], body: bytes = b"") -> bytes:
    """A request of HTTP/1.1 with a key; a header whose value is None stays out."""
    usual = {
        "Host": "gateway",
        "Authorization": f"Bearer {KEY}",
        TYPE: "application/octet-stream" if LENGTH in headers else "application/json",
        "Content-Length": str(len(body)),
    }
    lines = [
        f"{name}: {value}" for name, value in {**usual, **headers}.items() if value is not None
    ]
    return (
        "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode(
            "utf-8", "surrogateescape"
        )
        + body
    )


def ask(
    model: str, inputs: dict[str, Value], *, binary: bool = False, rows: bool | None = None
) -> Ask:
    """A request for a task.

    Args:
        model: the task.
        inputs: values by name: bytes and texts as a list, numbers as an array.
        binary: whether the values travel behind the JSON.
        rows: whether the tensors begin with a row; the task's own way if None.
    """
    batched = model not in ("segment", "retrieve") if rows is None else rows
    tensors = []
    tail = b""
    for name, value in inputs.items():
        datatype = (
            "BYTES"
            if isinstance(value, list)
            else {"i": "INT32", "f": "FP32", "u": "UINT8", "b": "BOOL"}[value.dtype.kind]
        )
        shape = [len(value)] if isinstance(value, list) else list(value.shape)
        tensor: dict[str, Any] = {
            "name": name,
            "shape": [1, *shape] if batched else shape,
            "datatype": datatype,
        }
        if binary:
            packed = pack(value)
            tensor["parameters"] = {"binary_data_size": len(packed)}
            tail += packed
        else:
            tensor["data"] = (
                [as_text(one) for one in value]
                if isinstance(value, list)
                else value.ravel().tolist()
            )
        tensors.append(tensor)
    head: dict[str, Any] = {"id": "1", "inputs": tensors}
    if binary:
        head["parameters"] = {"binary_data_output": True}
    elif model == "retrieve":
        head["outputs"] = [{"name": "id"}, {"name": "score"}, {"name": "metadata"}]
    return Ask(model, head, tail, binary)


def pack(value: Value) -> bytes:
    """A tensor as the protocol has it in binary."""
    if isinstance(value, list):
        texts = [
            one.encode("utf-8", "surrogatepass") if isinstance(one, str) else one for one in value
        ]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return bytes(
        value.astype(
            _KINDS[{"i": "INT32", "f": "FP32", "u": "UINT8", "b": "BOOL"}[value.dtype.kind]]
        ).tobytes()
    )


def as_text(value: str | bytes) -> str:
    """A text, or the bytes of an image as base64."""
    return value if isinstance(value, str) else base64.b64encode(value).decode()


def right(random: Random) -> Ask:
    """A right request of some task."""
    image: list[Any] = [
        png(random.randrange(8), random.randrange(8, 60), random.randrange(8, 60), "PNG")
    ]
    if random.random() < 0.3:
        image = [png(random.randrange(8), 24, 40, random.choice(["JPEG", "WEBP"]))]
    labels: list[Any] = [f"label {number}" for number in range(random.randrange(1, 5))]
    model = random.choice(
        ["embed_image", "embed_text", "classify", "classify", "segment", "segment", "retrieve"]
    )
    inputs: dict[str, Any] = {"image": image}
    if model == "embed_text":
        inputs = {"text": [random.choice(["a cat", "ein Fahrrad", "猫", "x" * 300])]}
    elif model in ("classify", "segment"):
        inputs |= {"labels": labels} if random.random() < 0.7 else {"label_set": [LABEL_SET]}
        if "labels" in inputs and random.random() < 0.3:
            inputs["templates"] = ["a photo of a {}.", "the {}"]
    if model == "classify" and random.random() < 0.5:
        inputs["top_k"] = np.array([1], np.int32)
    if model == "segment":
        inputs |= _options(random, len(labels))
    if model == "retrieve":
        query: dict[str, Any] = {"text": ["a cat"]} if random.random() < 0.5 else {"image": image}
        inputs = {**query, "index": [INDEX], "top_k": np.array([random.randrange(1, 5)], np.int32)}
        if random.random() < 0.5:
            inputs["offset"] = np.array([0], np.int32)
            inputs["min_score"] = np.array([-0.5], np.float32)
            inputs["where"] = [
                random.choice(
                    ["width > 10", "path LIKE '%.png'", "width > 10 AND NOT (height = 3)"]
                )
            ]
    return ask(model, inputs, binary=random.random() < 0.5)


def _options(random: Random, labels: int) -> dict[str, Any]:
    if random.random() < 0.3:
        masks = np.full((2, 20, 20), 255, np.uint8)
        masks[1, :10] = 0
        return {"image": [png(1, 20, 20)], "proposals": masks}
    chosen: dict[str, Any] = {
        "threshold": np.array([0.5], np.float32),
        "refine": np.array([2], np.int32),
        "short_side": np.array([24], np.int32),
        "stride": np.array([8], np.int32),
    }
    return {name: value for name, value in chosen.items() if random.random() < 0.4}


def good() -> dict[str, Ask]:
    """What the good client asks of each task, again and again."""
    image: list[Any] = [png(5, 40, 30)]
    return {
        "embed_image": ask("embed_image", {"image": image}),
        "embed_text": ask("embed_text", {"text": ["a striped thing"]}, binary=True),
        "classify": ask("classify", {"image": image, "labels": ["red", "green", "blue"]}),
        "segment": ask("segment", {"image": image, "label_set": [LABEL_SET]}, binary=True),
        "retrieve": ask("retrieve", {"text": ["a cat"], "index": [INDEX], "where": ["width > 10"]}),
    }
