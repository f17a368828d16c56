"""What makes many exports in one process quick: tables that torch's exporter and CLIP's vocabulary
make anew each time are made once. The graphs themselves are kept by the exporter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from radapter_serve.clip import tokenizer

# The table of operators, which torch's exporter makes anew for every graph, is made once.
_operators = functools.cache(ONNXRegistry.from_torchlib)
ONNXRegistry.from_torchlib = staticmethod(_operators)  # type: ignore[method-assign, assignment]
# And CLIP's vocabulary is written once for each tokenizer, which the tests share.
_clip = functools.lru_cache(maxsize=8)(tokenizer._clip)


@contextmanager
def quick_exports() -> Iterator[None]:
    """Within the block `export_release` writes CLIP's vocabulary but once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radapter_serve.clip.tokenizer._clip", _clip)
        yield
