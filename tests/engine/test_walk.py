"""The walk of a request on the page is the one that it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from radapter_serve.model import Model
from tests.helpers.small_release import png
from tests.helpers.walks import check_walk


def test_a_request_takes_the_way_that_the_page_describes(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(png(0, kind="JPEG"))
    model = Model(repository)
    model.classify(tmp_path / "cat.jpg", ["a bird"])
    labels = ["a cat", "a dog"]
    check_walk("Follow one request", lambda: model.classify(tmp_path / "cat.jpg", labels))


def test_a_model_needs_neither_grpc_nor_protobuf(repository: Path) -> None:
    code = (
        "import sys; from radapter_serve import Model;"
        f"Model({str(repository)!r}).embed_texts(['a cat']);"
        "heavy = ('grpc', 'google.protobuf', 'tritonclient', 'pyarrow', 'torch');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
