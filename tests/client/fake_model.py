"""A stand-in for the task models in a real tritonserver: answers follow from a digest of the input.

An image whose bytes are JSON is an order: {"sleep": seconds} waits first, {"error": "[code] sentence"} fails,
{"crash": true} ends the model's process, {"bug": true} raises. Triton's Python stub runs a copy of this file.
"""

import hashlib
import json
import os
import time

import numpy as np
import triton_python_backend_utils as pb

DIM = 4


def embed(data: bytes) -> np.ndarray:
    """Unit-length float32 [DIM] that only these bytes have."""
    digest = np.frombuffer(hashlib.sha256(data).digest()[: 2 * DIM], np.uint16).astype(np.float32)
    return digest / np.linalg.norm(digest)


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        self.name, self.version = args["model_name"], int(args["model_version"])

    def execute(self, requests: list) -> list:
        responses = []
        for request in requests:
            try:
                responses.append(pb.InferenceResponse(self.answer(request)))
            except ValueError as error:
                invalid = pb.TritonError(str(error), pb.TritonError.INVALID_ARG)
                responses.append(pb.InferenceResponse(error=invalid))
        return responses

    def answer(self, request) -> list:
        def read(name: str):
            tensor = pb.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        rows = read("text" if self.name == "embed_text" else "image")[:, 0]
        for row in rows:
            self.obey(row)
        if self.name != "classify":
            output = "text_embeds" if self.name == "embed_text" else "image_embeds"
            return [pb.Tensor(output, np.stack([embed(row) for row in rows]))]
        labels, label_set, templates, top_k = read("labels"), read("label_set"), read("templates"), read("top_k")
        if label_set is not None:
            if label_set[0, 0] != b"letters":
                raise ValueError(f"[unknown_label_set] no label set {label_set[0, 0].decode()!r}; there are: letters")
            labels = np.array([[b"a", b"b", b"c"]] * len(rows), np.object_)
        if labels is None:
            raise ValueError("[no_labels] give labels or a label_set")
        suffix = b"" if templates is None else b"|".join(templates[0])
        count = min(5 if top_k is None else int(top_k[0, 0]), labels.shape[1])
        best, scores = [], []
        for row, names in zip(rows, labels, strict=True):
            raw = np.array([int.from_bytes(hashlib.sha256(row + name + suffix).digest()[:4], "big") for name in names])
            order = np.argsort(-raw, kind="stable")[:count]
            best.append([names[index] for index in order])
            scores.append((raw / raw.sum())[order])
        return [pb.Tensor("label", np.array(best, np.object_)), pb.Tensor("score", np.array(scores, np.float32))]

    def obey(self, row: bytes) -> None:
        if not row.startswith(b"{"):
            return
        order = json.loads(row)
        time.sleep(order.get("sleep", 0))
        if "error" in order:
            raise ValueError(order["error"])
        if order.get("crash"):
            os._exit(1)
        if order.get("bug"):
            raise RuntimeError("a bug in the model")
