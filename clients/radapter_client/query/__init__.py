"""radapter-query: the client on the command line. A new subcommand is one function, and one entry
in `main`.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg

from .._client import Client
from .._exceptions import RAdapterClientError
from .._url import DEFAULT_URL
from .inputs import ImageFiles, read_examples, read_lines, read_weights
from .output import Found, Pictures, check_output, report, to_json, write_whole

PROG = "radapter-query"


@dataclass(frozen=True)
class Server:
    """What every command takes.

    Args:
        url: one of http://HOST:8000, https://HOST, grpc://HOST:8001 and grpcs://HOST; the
            environment variable RADAPTER_SERVER sets the default. RADAPTER_API_KEY holds the API
            key that radapter-gateway asks for.
        model: answer in this process, without a server: a model repository, a run, a folder with a
            checkpoint, or what else `radapter_serve.Model` takes; the URL is not asked then.
        indexes: folder of the indexes that --model searches.
        release: version of the release to use; the newest if none is given.
        timeout: seconds that a request may take.
        shrink_to: px; photos whose shorter side has more are made so small before they are sent,
            except to segment; they are sent as they are if none is given.
        json: print JSON, one object a line, instead of tables.
    """

    url: str = field(default_factory=lambda: os.environ.get("RADAPTER_SERVER") or DEFAULT_URL)
    model: str | None = None
    indexes: Path = Path("indexes")
    release: int | None = None
    timeout: float = 60.0
    shrink_to: int | None = None
    json: bool = False

    def client(self) -> Client:
        if self.model is not None:
            return _local(self)
        key = os.environ.get("RADAPTER_API_KEY") or None  # no flag: others can read a command line
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            client = Client(
                self.url,
                release=self.release,
                timeout=self.timeout,
                api_key=key,
                shrink_to=self.shrink_to,
            )
        for note in notes:
            print(f"note: {note.message}", file=sys.stderr)
        return client


def _local(server: Server) -> Client:
    """A model in this process."""
    # By its name: the client needs nothing of radapter_serve, unless it is asked for this.
    serve = importlib.import_module("radapter_serve.model")
    named = server.model if server.release is None else f"{server.model}@{server.release}"
    try:
        local: Client = serve.Model(named, indexes=server.indexes, timeout=server.timeout)
    except serve.RAdapterError as error:
        raise RAdapterClientError(str(error)) from error
    return local


@dataclass(frozen=True)
class Labels:
    """What images or their pixels can be called; one of the first three has to be given.

    Args:
        labels: such as "a cat" "a dog"; synonyms after commas.
        labels_file: one label a line, synonyms after commas, # comments.
        label_set: a set that was exported with the release, which many labels are better as.
        templates: prompts with {} for the label; the release's own if none are given.
        alpha: from 0 to 1, of a release that takes any; the release's own if none is given.
    """

    labels: Annotated[tuple[str, ...], arg(metavar="LABEL [LABEL ...]")] = ()
    labels_file: Path | None = None
    label_set: str | None = None
    templates: Annotated[tuple[str, ...], arg(metavar="TEMPLATE [TEMPLATE ...]")] = ()
    alpha: float | None = None

    def arguments(self, optional: bool = False) -> dict[str, Any]:
        given = sum(map(bool, (self.labels, self.labels_file, self.label_set)))
        if given > 1 or not (given or optional):
            raise RAdapterClientError("give one of --labels, --labels-file and --label-set")
        labels = (
            self.labels or None
            if self.labels_file is None
            else read_lines(self.labels_file, "a label")
        )
        known = {"labels": labels, "label_set": self.label_set, "templates": self.templates or None}
        return {**known, "alpha": self.alpha}


@dataclass(frozen=True)
class Pixels:
    """How pixels get their labels.

    Args:
        threshold: probability below which a pixel is background; no pixel is if none is given.
        short_side: px of the working image that windows go over; 1.5 windows if none is given.
        stride: px from one window to the next; half a window if none is given.
        refine: steps of refinement along edges, of which 10 are usual; 0 if none is given.
    """

    threshold: float | None = None
    short_side: int | None = None
    stride: int | None = None
    refine: int | None = None


Images = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE [IMAGE ...]")]


def classify(
    images: Images,
    labels: OmitArgPrefixes[Labels],
    server: OmitArgPrefixes[Server],
    top_k: int | None = None,
    multi_label: FlagCreatePairsOff[bool] = False,
    threshold: float | None = None,
    calibrated: FlagCreatePairsOff[bool] = False,
    unknown: float | None = None,
    examples: Path | None = None,
    example_weight: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="W|LABEL=W")] = (),
    out: Path | None = None,
) -> int:
    """The best labels of images.

    Args:
        images: JPEG, PNG or WebP files, and folders of them; what cannot be read in a folder is
            left out.
        top_k: labels to show; 5 if none is given, and all with --multi-label.
        multi_label: score each label by itself, so that several can be right, or none.
        threshold: show labels that score at least this, from 0 to 1; 0.5 if none is given.
        calibrated: scores that say how often a label is right, of a release that was exported with
            validation data.
        unknown: answer "unknown" where the best label scores less than this by itself, from 0 to
            1, of a release that was exported with validation data.
        examples: folder with a folder of images for each label that has some, called as the label;
            the folders are the labels where none are given.
        example_weight: of a label's examples beside its text, from 0 to 1, for all labels or as
            LABEL=W for one, a flag each; 1 leaves the text out, and 0.5 is taken if none is given.
        out: file to write instead, .csv (a row for each label) or .jsonl (a line for each image).
    """
    files = ImageFiles(images)
    arguments = labels.arguments(optional=examples is not None)
    shown = None if examples is None else read_examples(examples)
    arguments |= {
        "top_k": top_k,
        "multi_label": multi_label,
        "threshold": threshold,
        "calibrated": calibrated,
        "unknown": unknown,
        "examples": shown,
        "example_weight": read_weights(example_weight, shown or {}),
    }
    with server.client() as client:

        def found() -> Iterator[Found]:
            for image, one in files.answers(lambda some: client.classify(some, **arguments), 64):
                pairs = zip(one.labels, one.scores, strict=True)
                yield (
                    {"image": image, **vars(one)},
                    [{"image": image, "label": a, "score": b} for a, b in pairs],
                )

        report(found(), ("image", "label", "score"), out, server.json)
    return int(files.left_out)


def segment(
    images: Images,
    labels: OmitArgPrefixes[Labels],
    pixels: OmitArgPrefixes[Pixels],
    server: OmitArgPrefixes[Server],
    save: Path | None = None,
    save_mask: Path | None = None,
    font: str | None = None,
    out: Path | None = None,
) -> int:
    """Which label each pixel of an image has.

    Args:
        images: JPEG, PNG or WebP files, and folders of them; what cannot be read in a folder is
            left out.
        save: picture to write, .png or .jpg: colours and a legend. For several images, a folder of
            them.
        save_mask: .png to write: the index of each pixel's label. For several images, a folder of
            them.
        font: TrueType font for legends beyond the Latin alphabet.
        out: file to write instead, .csv (a row for each label that occurs) or .jsonl (a line for
            each image).
    """
    if font is not None:
        from .._overlay import read_font

        read_font(font, 20)
    files = ImageFiles(images)
    arguments = labels.arguments() | vars(pixels)
    pictures = Pictures("--save", save, files, ".png", ".jpg")
    masks = Pictures("--save-mask", save_mask, files, ".png")
    if save is not None and save == save_mask:
        raise RAdapterClientError(
            f"--save and --save-mask are both {save}; give them names of their own"
        )
    with server.client() as client:

        def found() -> Iterator[Found]:
            for image, one in files.answers(lambda some: client.segment(some, **arguments), 8):
                if save is not None:
                    pictures.write(image, one.overlay(font=font))
                if save_mask is not None:
                    mask = one.mask if len(one.labels) > 256 else one.mask.astype(np.uint8)
                    masks.write(image, Image.fromarray(mask))
                facts = {
                    name: getattr(one, name) for name in ("labels", "shares", "scores", "release")
                }
                rows = sorted(
                    zip(one.shares, one.labels, one.scores, strict=True), key=lambda row: -row[0]
                )
                flat = [
                    {"image": image, "label": name, "share": a, "score": b}
                    for a, name, b in rows
                    if a
                ]
                yield {"image": image, "size": one.mask.shape[::-1], **facts}, flat

        report(found(), ("image", "label", "share", "score"), out, server.json)
    for written in filter(None, (save, save_mask)):
        if not server.json:
            print(written)
    return int(files.left_out)


def search(
    server: OmitArgPrefixes[Server],
    index: str,
    text: Annotated[Positional[tuple[str, ...]], arg(metavar="[TEXT ...]")] = (),
    image: tuple[str, ...] = (),
    id: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
    top_k: int = 10,
    where: str | None = None,
    min_score: float | Literal["calibrated"] | None = None,
    offset: int | None = None,
    index_version: str | None = None,
    save: Path | None = None,
) -> None:
    """The images of an index that are nearest to a text or an image.

    Several texts, images and ids, at most 16, are one query: the weighted sum of their embeddings.

    Args:
        index: name of an index that radapter-index build wrote.
        text: what to search for, such as "a red bicycle".
        image: files of images to find the like of.
        id: images of the index to find the like of, by their ids.
        weights: of texts, images and ids, in this order; negative ones lead away. 1 each if none
            are given.
        top_k: hits to show.
        where: condition on the metadata, such as "year > 2020".
        min_score: cosine from -1 to 1 from which images are shown, or calibrated: the one that the
            release was exported with, of a search by one text.
        offset: hits to leave out before the first; pages begin with --offset 0.
        index_version: of the index, as the first page names it; another one is refused.
        save: .html to write: a page of thumbnails.
    """
    if save is not None:
        check_output("--save", save, ".html")
    with server.client() as client:
        hits = client.search(
            text,
            image=image,
            id=id,
            weights=weights or None,
            index=index,
            top_k=top_k,
            where=where,
            min_score=min_score,
            offset=offset,
            index_version=index_version,
            thumbnails=save is not None,
        )
        used = client.release().version if save is not None else None
    if save is not None:
        from .gallery import page

        facts = {"index": index, "where": where, "hits": len(hits), "release": used}
        known = {name: str(value) for name, value in facts.items() if value is not None}
        # One image alone is shown; of several parts, their names are.
        names = [*text, *(Path(one).name for one in image), *id]
        alone = image[0] if len(names) == len(image) == 1 else None
        content = page(hits, " + ".join(names), alone, known)
        write_whole(save, lambda file: file.write(content))
    if server.json:
        for hit in hits:
            found = {"id": hit.id, "score": hit.score, "metadata": hit.metadata}
            if hits.index_version is not None:
                found["index_version"] = hits.index_version
            print(to_json(found))
        return
    table = Table(Column("score", justify="right"), "id", "metadata")
    for hit in hits:
        about = ", ".join(f"{key}: {value}" for key, value in hit.about.items())
        table.add_row(
            f"{hit.score:.4f}", Text(hit.id, overflow="fold"), Text(about, overflow="fold")
        )
    if hits:
        Console().print(table)
    else:
        print("nothing was found")
    if hits.index_version is not None:
        print(f"index version: {hits.index_version}")
    if save is not None:
        print(save)


def embed_image(
    images: Images,
    server: OmitArgPrefixes[Server],
    out: Path = Path("image_embeds.npy"),
    alpha: float | None = None,
) -> None:
    """Writes embeddings of images: float32 [N, D], unit length.

    Args:
        images: JPEG, PNG or WebP files, and folders of them in the order of their names.
        out: .npy to write.
        alpha: from 0 to 1, of a release that takes any; the release's own if none is given.
    """
    check_output("--out", out, ".npy")
    with server.client() as client:
        _save_embeds(out, client.embed_images(ImageFiles(images).paths, alpha=alpha), server)


def embed_text(
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT [TEXT ...]")],
    server: OmitArgPrefixes[Server],
    out: Path = Path("text_embeds.npy"),
    alpha: float | None = None,
) -> None:
    """Writes embeddings of texts: float32 [N, D], unit length.

    Args:
        texts: such as "a photo of a cat."
        out: .npy to write.
        alpha: from 0 to 1, of a release that takes any; the release's own if none is given.
    """
    check_output("--out", out, ".npy")
    if not texts:
        raise RAdapterClientError('give texts, such as "a photo of a cat."')
    with server.client() as client:
        _save_embeds(out, client.embed_texts(texts, alpha=alpha), server)


def _save_embeds(out: Path, embeds: npt.NDArray[np.float32], server: Server) -> None:
    write_whole(out, lambda file: np.save(file, embeds))
    shape = {"file": str(out), "shape": embeds.shape}
    print(
        to_json(shape) if server.json else f"{out}: float32 [{embeds.shape[0]}, {embeds.shape[1]}]"
    )


def release(server: OmitArgPrefixes[Server]) -> None:
    """What the server serves: α, model, label sets; with --json everything, such as all
    templates.
    """
    with server.client() as client:
        used = client.release()
        served = client.releases()
    if server.json:
        print(to_json({"release": used.facts, "served": [release.version for release in served]}))
        return
    many = len(used.templates)
    facts = {
        "release": used.version,
        "α": f"{used.alpha:g}, or any from 0 to 1 by request" if used.dynamic_alpha else used.alpha,
        "architecture": used.architecture,
        "precision": used.precision,
        "embedding width": used.embed_dim,
        "templates": (
            used.templates[0]
            if many == 1
            else f"{many}, such as {used.templates[0]!r}"
            if many
            else "none"
        ),
        "label sets": ", ".join(sorted(used.label_sets)) or "none",
        "EXIF orientation": "images are turned by it" if used.exif_orientation else "is ignored",
        "adapter": used.facts.get("adapter_digest", "unknown"),
        "exported": used.facts.get("created", "unknown"),
        "served": ", ".join(f"{release.version} (α = {release.alpha:g})" for release in served),
    }
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(str(value), overflow="fold"))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0, 1 where images were left out, 2 for an error, 130 after
    Ctrl-C.
    """
    if "--version" in (sys.argv[1:] if argv is None else argv):
        print(PROG, version("radapter-serve"))
        return 0
    commands = (classify, segment, search, embed_image, embed_text, release)
    named = {command.__name__.replace("_", "-"): command for command in commands}
    description = (
        "Asks a server that radapter-serve started, or with --model a model in this process."
    )
    with suppress(AttributeError):  # names of files that are not UTF-8 are printed as they are
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            named, prog=PROG, description=description, args=argv
        )
        sys.stdout.flush()
    except RAdapterClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        # For the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0
