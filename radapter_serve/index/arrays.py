"""NumPy files that may be larger than memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@contextlib.contextmanager
def npy_file(
    path: Path, dtype: str | np.dtype[Any], shape: tuple[int, int]
) -> Iterator[Callable[[NDArray[Any]], Any]]:
    """Write a file as its rows come; not through a mapping, for a full disk would end the process.

    Args:
        path: of the file.
        dtype: of the file.
        shape: of the whole.

    Yields:
        What writes the next rows [B, D].
    """
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))  # type: ignore[no-untyped-call]
    with path.open("wb") as file:
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        yield lambda rows: file.write(np.ascontiguousarray(rows, dtype).tobytes())
