"""`retrieve` in a real server, where FAISS names candidates; for other answers see
tests/engine/test_as_served.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tritonclient.grpc as grpc

from radapter_serve.encoders.loaded import load_release
from radapter_serve.index import writer
from radapter_serve.index.build import build
from tests.helpers.asking import connect, tensors, tritonserver
from tests.helpers.small_release import photos_in, png

pytestmark = pytest.mark.triton


def test_many_images_are_found_by_faiss_in_an_index_that_came_later(
    exported_tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "EXACT", 200)
    models = exported_tiny_clip / "model_repository"
    indexes = tmp_path / "Büro" / "indexes"
    with tritonserver(models, indexes=indexes) as server, connect(server) as client:
        build(photos_in(tmp_path / "many", 260), indexes / "many é", load_release(models))
        for number in (0, 259):
            asked = tensors(image=png(number), index="many é", top_k=3)
            wanted = [grpc.InferRequestedOutput(name) for name in ("id", "score")]
            hits = client.infer("retrieve", asked, outputs=wanted)
            assert hits.as_numpy("id")[0].decode() == f"{number}.png"
            assert hits.as_numpy("score")[0] > 0.9999
