"""A stand-in for the task models in a real tritonserver: answers follow from a digest of the input.

An image whose bytes are JSON is an order: {"sleep": seconds} waits first, {"work": seconds}
computes first, and {"watch": file} waits until the caller has left and then writes the file.
Triton's Python stub runs a copy of this file.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np

DIM = 4


def embed(data: bytes) -> np.ndarray:
    """Unit-length float32 [DIM] that only these bytes have."""
    digest = np.frombuffer(hashlib.sha256(data).digest()[: 2 * DIM], np.uint16).astype(np.float32)
    return digest / np.linalg.norm(digest)


def ranked(image: bytes, labels: list) -> list:
    """The labels in an order that only this image has."""
    return sorted(labels, key=lambda label: hashlib.sha256(image + label).digest())


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        from radapter_serve.triton.backlog import Surplus

        self.name = args["model_name"]
        self.surplus = Surplus()
        self.surplus.open(self.name)

    def execute(self, requests: list) -> list:
        import triton_python_backend_utils as pb

        refused = self.surplus.take(len(requests))
        too_many = pb.TritonError("[overloaded] too many requests wait", pb.TritonError.UNAVAILABLE)
        responses = [pb.InferenceResponse(error=too_many) for _ in range(refused)]
        for request in requests[refused:]:
            inputs = {}
            for name in ("text", "image", "labels"):
                tensor = pb.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    inputs[name] = tensor.as_numpy()
            outputs = self.answer(inputs, request.is_cancelled)
            tensors = [pb.Tensor(name, array) for name, array in outputs.items()]
            responses.append(pb.InferenceResponse(tensors))
        return responses

    def answer(self, inputs: dict, is_cancelled) -> dict:
        for image in inputs.get("image", np.empty(0)).ravel():
            obey(image, is_cancelled)
        if self.name == "embed_text":
            return {"text_embeds": np.stack([embed(text) for text in inputs["text"][:, 0]])}
        if self.name == "embed_image":
            return {"image_embeds": np.stack([embed(image) for image in inputs["image"][:, 0]])}
        if self.name == "classify":
            names = inputs.get("labels", np.full(inputs["image"].shape, b"a", np.object_))
            rows = zip(inputs["image"][:, 0], names.tolist(), strict=True)
            labels = np.array([ranked(image, row) for image, row in rows], np.object_)
            return {"label": labels, "score": np.ones(labels.shape, np.float32)}
        if self.name == "segment":
            labels = inputs.get("labels", np.array([b"a"], np.object_))
            scores = np.ones(len(labels), np.float32)
            return {"mask": np.zeros((4, 5), np.uint16), "label": labels, "score": scores}
        texts = {"id": b"a.jpg", "metadata": b"{}"}
        hits = {name: np.array([value], np.object_) for name, value in texts.items()}
        return {**hits, "score": np.ones(1, np.float32)}


def obey(image: bytes, is_cancelled) -> None:
    """Do what an image orders that is JSON."""
    if not image.startswith(b"{"):
        return
    order = json.loads(image)
    time.sleep(order.get("sleep", 0))
    end = time.monotonic() + order.get("work", 0)
    while time.monotonic() < end:
        pass
    if "watch" in order:
        end = time.monotonic() + 20
        while not is_cancelled() and time.monotonic() < end:
            time.sleep(0.01)
        Path(order["watch"]).write_text("cancelled" if is_cancelled() else "late")
