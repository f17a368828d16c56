"""Checking releases in a second server next to the one that runs; only this machine reaches it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tritonclient.grpc
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from radapter_serve.contract.alpha import Encode
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.config import encoders_of
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer


def verify_in_second_server(
    server: TritonServer, releases: Sequence[int], say: Callable[[str], None] = lambda line: None
) -> None:
    """Load releases as a server would, ask each of their tasks once, and compare their encoders
    with torch's samples.

    Args:
        server: as which they are loaded: its repository, runtime and threads.
        releases: numbers.
        say: called with a short line before each step.

    Raises:
        RAdapterError: a model does not load, a task does not answer, or an encoder gives other
            embeddings than torch.
    """
    repository = server.config.model_repository
    config = ServerConfig(
        repository,
        Endpoints.on_free_ports(),
        releases=releases,
        indexes=Path(os.devnull),  # there are none
        runtime=server.checks.runtime,
        threads=server.config.threads,
    )
    say(f"trying release {', '.join(map(str, releases))} next to the running one")
    with TritonServer(config) as second:
        address = second.grpc_url.removeprefix("grpc://")
        with tritonclient.grpc.InferenceServerClient(address) as client:
            for encoder in encoders_of(repository, releases):
                for version in encoder.versions:
                    say(f"comparing {encoder.name} of release {version} with torch's embeddings")
                    samples = Samples.load(encoder.folder / str(version))
                    compare(
                        f"{encoder.name} of release {version}",
                        _encode(
                            client,
                            encoder.name,
                            version,
                            [one.name for one in encoder.config.input],
                        ),
                        samples,
                        encoder.bounds,
                    )


def _encode(
    client: tritonclient.grpc.InferenceServerClient, model: str, version: int, inputs: list[str]
) -> Encode:
    def encode(*arrays: NDArray[np.generic]) -> NDArray[np.float32]:
        tensors = []
        for name, array in zip(inputs, arrays, strict=True):
            tensor = tritonclient.grpc.InferInput(
                name, list(array.shape), np_to_triton_dtype(array.dtype)
            )
            tensors.append(tensor.set_data_from_numpy(array))
        reply = client.infer(model, tensors, str(version), client_timeout=120.0)
        [output] = reply.get_response().outputs
        return np.asarray(reply.as_numpy(output.name), np.float32)

    return encode
