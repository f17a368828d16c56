"""`radapter-export`: fold an adapter, export, check, and add releases to a model repository."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
from rich.console import Console
from rich.table import Table

from radapter_serve.cli import guard
from radapter_serve.errors import RAdapterError

RUNS = Path("runs")


def export(
    alpha: Sequence[float],
    adapter: str | None = None,
    base: str | None = None,
    pretrained: str | None = None,
    model_repository: str = "model_repository",
    merged: str = "merged",
    label_set: Sequence[str] = (),
    templates: str | None = None,
    tolerance: float = 1e-4,
    max_batch_size: int = 64,
) -> None:
    """Fold an adapter into its base at one or several alphas, export the towers, check them against torch with the
    adapters attached, and write a merged checkpoint and a release in a model repository for each."""
    label_sets = _label_sets(label_set)
    path = Path(adapter) if adapter else newest_run()
    console = Console(stderr=True)
    with console.status("starting") as status:
        start = time.perf_counter()
        from radapter_export import export_release  # torch and onnx take seconds to load: not for --help

        releases = export_release(
            path,
            list(alpha),
            base=base,
            pretrained=pretrained,
            model_repository=model_repository,
            merged=merged,
            label_sets=label_sets,
            templates=templates,
            tolerance=tolerance,
            max_batch_size=max_batch_size,
            progress=status.update,
        )
    seconds = time.perf_counter() - start
    table = Table(title=f"{path}: {len(releases)} release{'s' if len(releases) > 1 else ''} in {seconds:.0f} s")
    for column in ("release", "alpha", "graph", "MB", "max error", "min cosine", "seconds"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for release in releases:
        for graph in release.graphs:
            agreement = graph.agreement
            table.add_row(
                str(release.version),
                f"{release.alpha:g}",
                graph.name,
                f"{graph.size / 1e6:.1f}",
                f"{agreement.max_error:.1e}",
                f"{agreement.min_cosine:.7f}",
                f"{graph.seconds:.1f}",
            )
    out = Console()
    out.print(table)
    out.print(f"Merged: {', '.join(str(release.merged) for release in releases)}", soft_wrap=True)
    repository = "" if model_repository == "model_repository" else f" --model-repository {model_repository}"
    out.print(f"Next:   radapter-serve{repository}", soft_wrap=True)


def newest_run() -> Path:
    """The newest adapter file in ./runs.

    Raises:
        RAdapterError: there is none.
    """
    found = sorted(RUNS.glob("*/adapter.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RAdapterError(
            f"no run with an adapter in {RUNS.absolute()}; train one with radapter-train, or give --adapter FILE"
        )
    return found[-1]


def _label_sets(pairs: Sequence[str]) -> dict[str, str]:
    label_sets: dict[str, str] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise RAdapterError(f"--label-set {pair}: write NAME=FILE, such as --label-set animals=animals.txt")
        if name in label_sets:
            raise RAdapterError(f"--label-set {name} is given twice")
        label_sets[name] = file
    return label_sets


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog="radapter-export", description=export.__doc__)
    add = parser.add_argument
    add("--alpha", type=float, nargs="+", required=True, metavar="A", help="re-scaling from 0 to 1; each is a release")
    add("--adapter", type=str, metavar="RUN", help="run folder or adapter file (default: the newest run in ./runs)")
    add("--base", type=str, metavar="NAME", help="open_clip model or local-dir:PATH (default: the adapter's)")
    add("--pretrained", type=str, metavar="TAG", help="open_clip tag or checkpoint (default: the adapter's)")
    add("--model-repository", type=str, default="model_repository", metavar="FOLDER", help="what radapter-serve serves")
    add("--merged", type=str, default="merged", metavar="FOLDER", help="for the merged checkpoint")
    add("--label-set", action="append", default=[], metavar="NAME=FILE", help="classes to embed now; may be repeated")
    add("--templates", type=str, metavar="FILE", help="prompt templates: a file or a built-in set (default: the run's)")
    add("--tolerance", type=float, default=1e-4, metavar="X", help="largest difference from torch per component")
    add("--max-batch-size", type=int, default=64, metavar="N", help="images or texts in one batch of the server")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `export`."""
    arguments = _parser().parse_args(argv)
    return guard(lambda: export(**vars(arguments)), prog="radapter-export")


if __name__ == "__main__":
    raise SystemExit(main())
