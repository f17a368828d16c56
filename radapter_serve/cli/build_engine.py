"""`radapter-build-engine`: builds TensorRT engines for a model repository, on the GPU that will
serve it, without torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from radapter_serve.cli import run
from radapter_serve.encoders.plans import OPT_BATCH_SIZE, build_engines
from radapter_serve.errors import RAdapterError

PROG = "radapter-build-engine"


def build_engine(
    model_repository: tyro.conf.Positional[Path] = Path("model_repository"),
    opt_batch_size: int = OPT_BATCH_SIZE,
    tolerance: float | None = None,
) -> None:
    """Build a TensorRT engine of each encoder and release, check them against torch, and let
    TensorRT serve them.

    Run this on the GPU, and with the version of TensorRT, that will serve them, such as in NVIDIA's
    Triton container. It needs neither torch nor the adapter, as samples with torch's embeddings are
    stored next to each graph. Engines that fit already are kept.

    Args:
        model_repository: folder that radapter-export has filled.
        opt_batch_size: rows of the batch that engines are tuned for; they take all others, too.
        tolerance: largest difference from torch allowed in a component of the unit-length
            embeddings; the release's own if not given.
    """
    if tolerance is not None and not 0 < tolerance <= 1:
        raise RAdapterError(
            f"--tolerance is {tolerance:g}; allowed: more than 0, at most 1, such as 1e-4"
        )
    if opt_batch_size < 1:
        raise RAdapterError(f"--opt-batch-size is {opt_batch_size}; allowed: 1 or more")
    console = Console(stderr=True)
    with console.status("starting") as status:
        built = build_engines(
            model_repository,
            opt_batch_size=opt_batch_size,
            tolerance=tolerance,
            progress=status.update,
        )
    table = Table(title="TensorRT engines", title_justify="left")
    for column in ("release", "graph", "engine", "MB", "max error", "min cosine", "seconds"):
        table.add_column(column, justify="left" if column in ("graph", "engine") else "right")
    for plan in built:
        error = plan.agreement.max_error
        cosine = plan.agreement.min_cosine
        figures = f"{plan.size / 1e6:.1f}", f"{error:.1e}", f"{cosine:.7f}", f"{plan.seconds:.1f}"
        table.add_row(str(plan.version), plan.model, plan.how, *figures)
    Console().print(table)
    print(f"Next:   radapter-serve {shlex.quote(str(model_repository))}")


def main(argv: Sequence[str] | None = None) -> int:
    return run(build_engine, argv, prog=PROG)
