"""Right requests of every task, in JSON and in binary: the start of mutations, and what the good
client asks.
"""

from __future__ import annotations

import base64
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
_DATATYPES = {"i": "INT32", "f": "FP32", "u": "UINT8", "b": "BOOL"}

Headers = dict[str, "str | None"]


@dataclass
class Ask:
    """A request that still has its structure: `head` is the JSON of its body, `tail` the binary
    tensors behind it. A header of None is left out.
    """

    model: str
    head: Any
    tail: bytes = b""
    binary: bool = False
    headers: Headers = field(default_factory=dict)
    path: str | None = None

    @property
    def body(self) -> bytes:
        return json.dumps(self.head).encode() + self.tail

    def raw(self, body: bytes | None = None) -> bytes:
        """The whole message, with another body if one is given."""
        body = self.body if body is None else body
        length: Headers = {LENGTH: str(len(body) - len(self.tail))} if self.binary else {}
        path = self.path or f"/v2/models/{self.model}/infer"
        return message("POST", path, {**length, **self.headers}, body)


def message(method: str, path: str, headers: Headers, body: bytes = b"") -> bytes:
    """A request of HTTP/1.1 with a key."""
    usual: Headers = {
        "Host": "gateway",
        "Authorization": f"Bearer {KEY}",
        TYPE: "application/octet-stream" if LENGTH in headers else "application/json",
        "Content-Length": str(len(body)),
    }
    named = {**usual, **headers}
    lines = [f"{name}: {value}" for name, value in named.items() if value is not None]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("utf-8", "surrogateescape") + body


def ask(model: str, inputs: dict[str, Any], *, binary: bool = False) -> Ask:
    """A request for a task, with texts and images as lists and numbers as arrays."""
    batch = [] if model in ("segment", "retrieve") else [1]
    tensors = []
    tail = b""
    for name, value in inputs.items():
        is_list = isinstance(value, list)
        tensor: dict[str, Any] = {
            "name": name,
            "shape": [*batch, *([len(value)] if is_list else value.shape)],
            "datatype": "BYTES" if is_list else _DATATYPES[value.dtype.kind],
        }
        if binary:
            packed = pack(value)
            tensor["parameters"] = {"binary_data_size": len(packed)}
            tail += packed
        else:
            tensor["data"] = list(map(as_text, value)) if is_list else value.ravel().tolist()
        tensors.append(tensor)
    head: dict[str, Any] = {"id": "1", "inputs": tensors}
    if binary:
        head["parameters"] = {"binary_data_output": True}
    elif model == "retrieve":
        head["outputs"] = [{"name": "id"}, {"name": "score"}, {"name": "metadata"}]
    return Ask(model, head, tail, binary)


def pack(value: Any) -> bytes:
    """A tensor in the protocol's binary form."""
    if not isinstance(value, list):
        return bytes(value.tobytes())
    texts = [one.encode("utf-8", "surrogatepass") if isinstance(one, str) else one for one in value]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def as_text(value: str | bytes) -> str:
    """A text, or the bytes of an image as base64."""
    return value if isinstance(value, str) else base64.b64encode(value).decode()


def number(value: float, kind: Any = np.float32) -> Any:
    return np.array([value], kind)


def right(random: Random) -> Ask:
    """A right request of some task."""
    kind = random.choice(["PNG", "JPEG", "WEBP"])
    image = [png(random.randrange(8), random.randrange(8, 60), random.randrange(8, 60), kind)]
    labels = [f"label {place}" for place in range(random.randrange(1, 5))]
    choice: dict[str, Any] = random.choice([{"labels": labels}, {"label_set": [LABEL_SET]}])
    small = {"refine": number(2, np.int32), "short_side": number(24, np.int32)}
    masks = np.full((2, 20, 20), 255, np.uint8)
    masks[1, :10] = 0
    search = {"index": [INDEX], "top_k": number(2, np.int32)}
    limits = {"min_score": number(-0.5), "where": ["width > 10 AND NOT (height = 3)"]}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("embed_image", {"image": image}),
        ("embed_text", {"text": [random.choice(["a cat", "ein Fahrrad", "猫", "x" * 300])]}),
        ("classify", {"image": image, **choice}),
        ("classify", {"image": image, "labels": labels, "templates": ["a photo of a {}.", "{}"]}),
        ("classify", {"image": image, **choice, "top_k": number(1, np.int32)}),
        ("segment", {"image": image, **choice, "threshold": number(0.5)}),
        ("segment", {"image": image, **choice, **small, "stride": number(8, np.int32)}),
        ("segment", {"image": [png(1, 20, 20)], "labels": ["a", "b"], "proposals": masks}),
        ("retrieve", {"image": image, **search}),
        ("retrieve", {"text": ["a cat"], **search, **limits}),
    ]
    model, inputs = random.choice(requests)
    return ask(model, inputs, binary=random.random() < 0.5)


def good() -> dict[str, Ask]:
    """What the good client asks of each task, again and again."""
    image = [png(5, 40, 30)]
    return {
        "embed_image": ask("embed_image", {"image": image}),
        "embed_text": ask("embed_text", {"text": ["a striped thing"]}, binary=True),
        "classify": ask("classify", {"image": image, "labels": ["red", "green", "blue"]}),
        "segment": ask("segment", {"image": image, "label_set": [LABEL_SET]}, binary=True),
        "retrieve": ask("retrieve", {"text": ["a cat"], "index": [INDEX], "where": ["width > 10"]}),
    }
