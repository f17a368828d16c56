"""A stand-in for the task models in a real tritonserver: answers follow from a digest of the input.

An image whose bytes are JSON is an order: {"sleep": seconds} waits first, {"work": seconds}
computes first, {"error": "[code] sentence"} fails, {"crash": true} ends the model's process,
{"bug": true} raises, and {"watch": file} waits until the caller has left and then writes the file.
Triton's Python stub runs a copy of this file.
"""

import base64
import hashlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb
from PIL import Image

from radapter_serve.triton.backlog import Surplus

DIM = 4


def embed(data: bytes) -> np.ndarray:
    """Unit-length float32 [DIM] that only these bytes have."""
    digest = np.frombuffer(hashlib.sha256(data).digest()[: 2 * DIM], np.uint16).astype(np.float32)
    return digest / np.linalg.norm(digest)


SEGMENT = [
    *("labels", "label_set", "templates", "threshold", "short_side", "stride", "refine"),
    *("proposals", "proposal_scores", "proposal_weight", "alpha"),
]


def digest(inputs: dict) -> bytes:
    """Of the inputs that are there: name, shape, values."""
    state = hashlib.sha256()
    for name in SEGMENT:
        if inputs.get(name) is not None:
            array = np.asarray(inputs[name])
            state.update(f"{name} {array.shape} {array.dtype} {array.tolist()}".encode())
    return state.digest()


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        self.name = args["model_name"]
        self.version = int(args["model_version"])
        self.surplus = Surplus()
        self.surplus.open(self.name)

    def execute(self, requests: list) -> list:
        refused = self.surplus.take(len(requests))
        too_many = pb.TritonError("[overloaded] too many requests wait", pb.TritonError.UNAVAILABLE)
        responses = [pb.InferenceResponse(error=too_many) for _ in range(refused)]
        for request in requests[refused:]:
            try:
                responses.append(pb.InferenceResponse(self.answer(request)))
            except ValueError as error:
                invalid = pb.TritonError(str(error), pb.TritonError.INVALID_ARG)
                responses.append(pb.InferenceResponse(error=invalid))
        return responses

    def answer(self, request) -> list:
        self.is_cancelled = request.is_cancelled

        def read(name: str):
            tensor = pb.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        if self.name == "segment":
            return self.segment(read)
        if self.name == "retrieve":
            return self.retrieve(read, request.requested_output_names())
        rows = read("text" if self.name == "embed_text" else "image")[:, 0]
        for row in rows:
            self.obey(row)
        if self.name != "classify":
            output = "text_embeds" if self.name == "embed_text" else "image_embeds"
            return [pb.Tensor(output, np.stack([embed(row) for row in rows]))]
        labels = read("labels")
        label_set = read("label_set")
        templates = read("templates")
        top_k = read("top_k")
        if label_set is not None:
            if label_set[0, 0] != b"letters":
                raise ValueError(
                    f"[unknown_label_set] no label set {label_set[0, 0].decode()!r}; there are:"
                    " letters"
                )
            labels = np.array([[b"a", b"b", b"c"]] * len(rows), np.object_)
        if labels is None:
            raise ValueError("[no_labels] give labels or a label_set")
        suffix = b"" if templates is None else b"|".join(templates[0])
        count = min(5 if top_k is None else int(top_k[0, 0]), labels.shape[1])
        best = []
        scores = []
        for row, names in zip(rows, labels, strict=True):
            raw = np.array(
                [
                    int.from_bytes(hashlib.sha256(row + name + suffix).digest()[:4], "big")
                    for name in names
                ]
            )
            order = np.argsort(-raw, kind="stable")[:count]
            best.append([names[index] for index in order])
            scores.append((raw / raw.sum())[order])
        return [
            pb.Tensor("label", np.array(best, np.object_)),
            pb.Tensor("score", np.array(scores, np.float32)),
        ]

    def segment(self, read) -> list:
        """Label x + y of each pixel, modulo the labels; the first score is a digest of what the
        request brought.
        """
        image = read("image")[0]
        self.obey(image)
        labels = [b"a", b"b", b"c"] if read("labels") is None else list(read("labels"))
        labels += [] if read("threshold") is None and read("proposals") is None else [b"background"]
        if image.startswith(b"{"):
            width, height = json.loads(image).get("size", (5, 4))
        else:
            image = base64.b64decode(image) if image.startswith(b"iVBOR") else image  # PNG in JSON
            try:
                width, height = Image.open(io.BytesIO(image)).size
            except OSError:
                raise ValueError("[invalid_image] not an image") from None
        mask = np.add.outer(np.arange(height), np.arange(width)) % len(labels)
        scores = np.zeros(len(labels), np.float32)
        scores[0] = int.from_bytes(digest({name: read(name) for name in SEGMENT})[:2], "big")
        return [
            pb.Tensor("mask", mask.astype(np.uint16)),
            pb.Tensor("label", np.array(labels, np.object_)),
            pb.Tensor("score", scores),
        ]

    def retrieve(self, read, outputs: list) -> list:
        """Hits whose metadata repeat the request."""
        names = ("index", "text", "image", "where")
        given = {name: read(name)[0].decode("latin-1") for name in names if read(name) is not None}
        if given["index"] == "none":
            raise ValueError("[unknown_index] no index 'none'; there are: photos")
        if given["index"] == "old":
            raise ValueError(
                "[index_mismatch] made by another release; run: radapter-index build photos"
            )
        hits = 3 if read("top_k") is None else min(3, int(read("top_k")[0]))
        about = [
            json.dumps({**given, "rank": rank, "outputs": sorted(outputs)}).encode()
            for rank in range(hits)
        ]
        tensors = [
            pb.Tensor(
                "id",
                np.array(
                    [f"ordner/bild ü {rank}.jpg".encode() for rank in range(hits)], np.object_
                ),
            ),
            pb.Tensor("score", np.array([1 - rank / 4 for rank in range(hits)], np.float32)),
            pb.Tensor("metadata", np.array(about, np.object_)),
        ]
        if "thumbnail" in outputs:  # the last has none
            thumbnails = [b"" if rank == 2 else f"JPEG {rank}".encode() for rank in range(hits)]
            tensors.append(pb.Tensor("thumbnail", np.array(thumbnails, np.object_)))
        return tensors

    def obey(self, row: bytes) -> None:
        if not row.startswith(b"{"):
            return
        order = json.loads(row)
        time.sleep(order.get("sleep", 0))
        end = time.monotonic() + order.get("work", 0)
        while time.monotonic() < end:
            pass
        if "watch" in order:
            end = time.monotonic() + 20
            while not self.is_cancelled() and time.monotonic() < end:
                time.sleep(0.01)
            Path(order["watch"]).write_text("cancelled" if self.is_cancelled() else "late")
        if "error" in order:
            raise ValueError(order["error"])
        if order.get("crash"):
            os._exit(1)
        if order.get("bug"):
            raise RuntimeError("a bug in the model")
