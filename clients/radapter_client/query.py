"""radapter-query: the client on the command line. A new subcommand is one function and one block in `parser`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ._client import Client
from ._exceptions import RAdapterClientError
from ._files import check_output, read_lines, save
from ._url import ALLOWED


def classify(args: argparse.Namespace) -> None:
    labels = chosen_labels(args)
    with connect(args) as client:
        found = client.classify(
            args.images,
            labels,
            label_set=args.label_set,
            templates=args.templates,
            top_k=args.top_k,
            alpha=args.alpha,
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


def segment(args: argparse.Namespace) -> None:
    if args.font is not None:
        from ._overlay import read_font

        read_font(args.font, 20)
    if args.save is not None:
        check_output("--save", args.save, ".png", ".jpg")
    if args.save_mask is not None:
        check_output("--save-mask", args.save_mask, ".png")
        if args.save_mask == args.save:
            raise RAdapterClientError(f"--save and --save-mask are both {args.save}; give them names of their own")
    with connect(args) as client:
        found = client.segment(
            args.image,
            chosen_labels(args),
            label_set=args.label_set,
            templates=args.templates,
            alpha=args.alpha,
            threshold=args.threshold,
            short_side=args.short_side,
            stride=args.stride,
            refine=args.refine,
        )
    if args.save is not None:
        picture = found.overlay(font=args.font)
        kind = "PNG" if args.save.suffix.lower() == ".png" else "JPEG"
        save(args.save, lambda file: picture.save(file, kind, quality=90))
    if args.save_mask is not None:
        mask = found.mask if len(found.labels) > 256 else found.mask.astype(np.uint8)
        save(args.save_mask, lambda file: Image.fromarray(mask).save(file, "PNG"))
    if args.json:
        facts = {name: getattr(found, name) for name in ("labels", "shares", "scores", "release")}
        print_json({"image": args.image, "size": found.mask.shape[::-1], **facts})
        return
    table = Table("label", Column("share", justify="right"), Column("score", justify="right"))
    rows = sorted(zip(found.shares, found.labels, found.scores, strict=True), key=lambda row: -row[0])
    for share, label, score in rows:
        if share:
            table.add_row(Text(label), f"{share * 100:.1f} %", f"{score:.4f}")
    Console().print(table)
    for path in filter(None, (args.save, args.save_mask)):
        print(path)


def search(args: argparse.Namespace) -> None:
    if args.save is not None:
        check_output("--save", args.save, ".html")
    with connect(args) as client:
        hits = client.search(
            args.text,
            image=args.image,
            index=args.index,
            top_k=args.top_k,
            where=args.where,
            thumbnails=args.save is not None,
        )
        version = client.release().version if args.save is not None else None
    if args.save is not None:
        from ._gallery import page

        facts = {"index": args.index, "where": args.where, "hits": len(hits), "release": version}
        known = {name: str(value) for name, value in facts.items() if value is not None}
        content = page(hits, args.text or Path(args.image).name, args.image, known)
        save(args.save, lambda file: file.write(content))
    if args.json:
        for hit in hits:
            print_json({"id": hit.id, "score": hit.score, "metadata": hit.metadata})
        return
    table = Table(Column("score", justify="right"), "id", "metadata")
    for hit in hits:
        about = ", ".join(f"{key}: {value}" for key, value in hit.about.items())
        table.add_row(f"{hit.score:.4f}", Text(hit.id, overflow="fold"), Text(about, overflow="fold"))
    Console().print(table)
    if args.save is not None:
        print(args.save)


def embed_image(args: argparse.Namespace) -> None:
    check_output("--out", args.out, ".npy")
    with connect(args) as client:
        save_embeds(args, client.embed_images(args.images, alpha=args.alpha))


def embed_text(args: argparse.Namespace) -> None:
    check_output("--out", args.out, ".npy")
    with connect(args) as client:
        save_embeds(args, client.embed_texts(args.texts, alpha=args.alpha))


def save_embeds(args: argparse.Namespace, embeds: npt.NDArray[np.float32]) -> None:
    save(args.out, lambda file: np.save(file, embeds))
    if args.json:
        print_json({"file": str(args.out), "shape": embeds.shape})
    else:
        print(f"{args.out}: float32 [{embeds.shape[0]}, {embeds.shape[1]}]")


def release(args: argparse.Namespace) -> None:
    with connect(args) as client:
        used, served = client.release(), client.releases()
    if args.json:
        print_json({"release": used.facts, "served": [release.version for release in served]})
        return
    facts = {
        "release": used.version,
        "α": f"{used.alpha:g}, or any from 0 to 1 by request" if used.dynamic_alpha else used.alpha,
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
    label_arguments(made)
    alpha_argument(made)
    made.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to show (default: %(default)s)")

    made = command("segment", segment, "which label each pixel of an image has")
    made.add_argument("image", metavar="IMAGE", help="JPEG, PNG or WebP file")
    label_arguments(made)
    alpha_argument(made)
    made.add_argument(
        "--threshold", type=float, metavar="P", help="probability below which a pixel is background (default: none is)"
    )
    made.add_argument(
        "--short-side", type=int, metavar="PX", help="of the working image that windows go over (default: 1.5 windows)"
    )
    made.add_argument("--stride", type=int, metavar="PX", help="from one window to the next (default: half a window)")
    made.add_argument(
        "--refine", type=int, metavar="N", help="steps of refinement along edges, 10 is usual (default: 0)"
    )
    made.add_argument("--save", type=Path, metavar="FILE", help="picture to write, .png or .jpg: colours and a legend")
    made.add_argument("--save-mask", type=Path, metavar="FILE", help=".png to write: the index of each pixel's label")
    made.add_argument("--font", metavar="FILE", help="TrueType font for legends beyond the Latin alphabet")

    made = command("search", search, "the images of an index that are nearest to a text or an image")
    query = made.add_mutually_exclusive_group(required=True)
    query.add_argument("text", nargs="?", metavar="TEXT", help='such as "a red bicycle"')
    query.add_argument("--image", metavar="FILE", help="find the like of this image")
    made.add_argument("--index", required=True, metavar="NAME", help="an index that radapter-index build wrote")
    made.add_argument("--top-k", type=int, default=10, metavar="K", help="hits to show (default: %(default)s)")
    made.add_argument("--where", metavar="SQL", help='condition on the metadata, such as "year > 2020"')
    made.add_argument("--save", type=Path, metavar="FILE", help=".html to write: a page of thumbnails")

    made = command("embed-image", embed_image, "writes embeddings of images: float32 [N, D], unit length")
    made.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP file")
    made.add_argument("--out", type=Path, default=Path("image_embeds.npy"), help="file to write (default: %(default)s)")
    alpha_argument(made)

    made = command("embed-text", embed_text, "writes embeddings of texts: float32 [N, D], unit length")
    made.add_argument("texts", nargs="+", metavar="TEXT")
    made.add_argument("--out", type=Path, default=Path("text_embeds.npy"), help="file to write (default: %(default)s)")
    alpha_argument(made)

    command("release", release, "what the server serves: α, model, label sets")

    made = command("profile", profile, "where the time of a request goes")
    made.add_argument("--requests", type=int, default=10, help="how many to average (default: %(default)s)")
    return result


def label_arguments(made: argparse.ArgumentParser) -> None:
    choice = made.add_mutually_exclusive_group(required=True)
    choice.add_argument("--labels", nargs="+", metavar="LABEL", help='such as "a cat" "a dog"; synonyms after commas')
    choice.add_argument(
        "--labels-file", type=Path, metavar="FILE", help="one label a line, synonyms after commas, # comments"
    )
    choice.add_argument("--label-set", metavar="NAME", help="a set that was exported with the release")
    made.add_argument(
        "--templates", nargs="+", metavar="TEMPLATE", help="with {} for the label (default: the release's)"
    )


def alpha_argument(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--alpha", type=float, metavar="A", help="0 to 1, of a release that takes any (default: the release's own)"
    )


def chosen_labels(args: argparse.Namespace) -> list[str] | None:
    return args.labels if args.labels_file is None else read_lines(args.labels_file, "a label")


def connect(args: argparse.Namespace) -> Client:
    return Client(args.url, release=args.release, timeout=args.timeout)


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


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
