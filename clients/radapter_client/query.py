"""radapter-query: the client on the command line. A new subcommand is one function and one block in `parser`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ._client import Client
from ._exceptions import RAdapterClientError
from ._url import ALLOWED


def classify(args: argparse.Namespace) -> None:
    labels = args.labels
    if args.labels_file is not None:
        labels = read_lines(args.labels_file, "a label")
    with connect(args) as client:
        found = client.classify(
            args.images, labels, label_set=args.label_set, templates=args.templates, top_k=args.top_k
        )
    if args.json:
        for image, result in zip(args.images, found, strict=True):
            print_json({"image": image, "labels": result.labels, "scores": result.scores, "release": result.release})
        return
    table = Table("image", "label", Column("score", justify="right"))
    for image, result in zip(args.images, found, strict=True):
        for row, (label, score) in enumerate(zip(result.labels, result.scores, strict=True)):
            last = row + 1 == len(result.labels)
            table.add_row(Text("" if row else image), Text(label), Text(f"{score:.4f}"), end_section=last)
    Console().print(table)


def embed_image(args: argparse.Namespace) -> None:
    check_output(args.out)
    with connect(args) as client:
        save(args, client.embed_images(args.images))


def embed_text(args: argparse.Namespace) -> None:
    check_output(args.out)
    with connect(args) as client:
        save(args, client.embed_texts(args.texts))


def release(args: argparse.Namespace) -> None:
    with connect(args) as client:
        used, served = client.release, client.releases
    if args.json:
        print_json({"release": used.facts, "served": [release.version for release in served]})
        return
    facts = {
        "release": used.version,
        "α": used.alpha,
        "architecture": used.architecture,
        "precision": used.precision,
        "embedding width": used.embed_dim,
        "templates": "\n".join(used.templates),
        "label sets": ", ".join(sorted(used.label_sets)) or "none",
        "adapter": used.facts.get("adapter_digest", "unknown"),
        "exported": used.facts.get("created", "unknown"),
        "served": ", ".join(f"{release.version} (α = {release.alpha:g})" for release in served),
    }
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(str(value), overflow="fold"))
    Console().print(table)


def profile(args: argparse.Namespace) -> None:
    with connect(args) as client:
        found = client.profile(requests=args.requests)
    if args.json:
        print_json(vars(found))
    else:
        print(found)


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    group = shared.add_argument_group("server")
    group.add_argument("--url", default="grpc://localhost:8001", help=f"one of {ALLOWED} (default: %(default)s)")
    group.add_argument("--release", type=int, metavar="N", help="version of the release to use (default: the newest)")
    group.add_argument("--timeout", type=float, default=60.0, help="seconds a request may take (default: %(default)g)")
    shared.add_argument("--json", action="store_true", help="print JSON, one object a line, instead of tables")

    result = argparse.ArgumentParser(prog="radapter-query", description="Asks a server that radapter-serve started.")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[shared], help=text, description=text)
        made.set_defaults(function=function)
        return made

    made = command("classify", classify, "the best labels of images")
    made.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP file")
    choice = made.add_mutually_exclusive_group(required=True)
    choice.add_argument("--labels", nargs="+", metavar="LABEL", help='such as "a cat" "a dog"; synonyms after commas')
    choice.add_argument(
        "--labels-file", type=Path, metavar="FILE", help="one label a line, synonyms after commas, # comments"
    )
    choice.add_argument("--label-set", metavar="NAME", help="a set that was exported with the release")
    made.add_argument(
        "--templates", nargs="+", metavar="TEMPLATE", help="with {} for the label (default: the release's)"
    )
    made.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to show (default: %(default)s)")

    made = command("embed-image", embed_image, "writes embeddings of images: float32 [N, D], unit length")
    made.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP file")
    made.add_argument("--out", type=Path, default=Path("image_embeds.npy"), help="file to write (default: %(default)s)")

    made = command("embed-text", embed_text, "writes embeddings of texts: float32 [N, D], unit length")
    made.add_argument("texts", nargs="+", metavar="TEXT")
    made.add_argument("--out", type=Path, default=Path("text_embeds.npy"), help="file to write (default: %(default)s)")

    command("release", release, "what the server serves: α, model, label sets")

    made = command("profile", profile, "where the time of a request goes")
    made.add_argument("--requests", type=int, default=10, help="how many to average (default: %(default)s)")
    return result


def connect(args: argparse.Namespace) -> Client:
    return Client(args.url, release=args.release, timeout=args.timeout)


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file that are neither empty nor `#` comments."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RAdapterClientError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise RAdapterClientError(f"{path} is empty: it needs {what} a line")
    return lines


def check_output(path: Path) -> None:
    """Fails before any work where the file could not be written after it."""
    if path.suffix != ".npy":
        raise RAdapterClientError(f"--out {path} does not end in .npy")
    if not path.parent.is_dir() or path.is_dir():
        raise RAdapterClientError(f"--out {path}: {path.parent} is no folder, or the file itself is one")


def save(args: argparse.Namespace, embeds: npt.NDArray[np.float32]) -> None:
    """Writes the file whole or not at all."""
    path: Path = args.out
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, embeds)
        temporary.replace(path)
    except OSError as error:
        raise RAdapterClientError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if args.json:
        print_json({"file": str(path), "shape": embeds.shape})
    else:
        print(f"{path}: float32 [{embeds.shape[0]}, {embeds.shape[1]}]")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except RAdapterClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
