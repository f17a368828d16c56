"""radapter-query: the client on the command line. Each sub-command is a function and an entry of
`COMMANDS`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from radapter_client import Classification, Client, Hits, InvalidImage, Segmentation
from radapter_serve.cli import printable, run
from radapter_serve.contract.images import count_kinds, list_images, without_heic
from radapter_serve.contract.labels import read_label_file
from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged

PROG = "radapter-query"
T = TypeVar("T")
Row = dict[str, Any]
Answer = tuple[Row, list[Row]]  # as a JSON object, and as rows of a table


@dataclass(frozen=True)
class Server:
    """Options of every command.

    Args:
        url: http://HOST:8000, https://HOST, grpc://HOST:8001 or grpcs://HOST; if not given, the
            environment variable RADAPTER_SERVER, else http://localhost:8000, or
            grpc://localhost:8001 if only gRPC answers. RADAPTER_API_KEY holds the API key that
            radapter-gateway asks for.
        model: answer in this process, without a server: a model repository, a run, a folder with a
            checkpoint, or any other source of `radapter_serve.Model`; --url is then ignored.
        indexes: folder of the indexes that --model searches.
        release: version of the release to use; the newest if not given.
        timeout: seconds that a request may take.
        shrink_to: px; reduce photos whose shorter side is longer to this length before they are
            sent, except to segment; not reduced if not given.
        json: print JSON, one object a line, instead of tables.
    """

    url: str | None = field(default_factory=lambda: os.environ.get("RADAPTER_SERVER") or None)
    model: str | None = None
    indexes: Path = Path("indexes")
    release: int | None = None
    timeout: float = 60.0
    shrink_to: int | None = None
    json: bool = False

    def client(self) -> Client:
        if self.model is not None:
            from radapter_serve.model import Model  # imported here, as asking a server needs less

            name = self.model
            if self.release is not None:
                if not Path(name).is_dir():
                    raise RAdapterError(
                        f"--release {self.release} is for a server or a model repository, and"
                        f" --model {name} is no folder; a revision of the hub is part of its name,"
                        " as in hf-hub:ORGANISATION/NAME@REVISION"
                    )
                name = f"{name}@{self.release}"
            return Model(name, indexes=self.indexes, timeout=self.timeout)
        key = os.environ.get("RADAPTER_API_KEY") or None  # not a flag, which other users could read
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client = Client(
                self.url,
                release=self.release,
                timeout=self.timeout,
                api_key=key,
                shrink_to=self.shrink_to,
            )
        for warning in caught:
            note(str(warning.message))
        return client


@dataclass(frozen=True)
class Labels:
    """Candidate labels; one of the first three is required, and at most one with examples.

    Args:
        labels: labels such as "a cat" "a dog"; synonyms after commas.
        labels_file: one label a line, synonyms after commas, # comments.
        label_set: a set that was exported with the release; best for many labels.
        templates: prompts with {} for the label; those of the release or the adapter if not given.
    """

    labels: Annotated[tuple[str, ...], arg(metavar="LABEL [LABEL ...]")] = ()
    labels_file: Path | None = None
    label_set: str | None = None
    templates: Annotated[tuple[str, ...], arg(metavar="TEMPLATE [TEMPLATE ...]")] = ()

    def arguments(self, optional: bool = False) -> dict[str, Any]:
        """Arguments of the client's methods for these labels."""
        sources = sum(map(bool, (self.labels, self.labels_file, self.label_set)))
        if sources > 1 or not (sources or optional):
            raise RAdapterError("give one of --labels, --labels-file and --label-set")
        labels: Sequence[str] = self.labels
        if self.labels_file is not None:
            labels = read_label_file(self.labels_file)
        return {
            "labels": labels or None,
            "label_set": self.label_set,
            "templates": self.templates or None,
        }


@dataclass(frozen=True)
class Point:
    """The adapter and its alpha.

    Args:
        adapter: name of an adapter beside the release; the release itself if not given.
        alpha: α from 0 to 1 of the adapter, or of a release that takes any; their own if not given.
    """

    adapter: str | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Shown:
    """The labels and scores that are shown.

    Args:
        top_k: labels to show; if not given, 5, or all with --multi-label.
        multi_label: score each label alone, so that several or no labels can be right.
        threshold: with --multi-label, least score of a shown label, from 0 to 1; 0.5 if not given.
        calibrated: show scores that are probabilities of being right, for a release that was
            exported with validation data.
        unknown: answer "unknown" if the best label, scored alone, has less than this, from 0 to 1,
            for a release that was exported with validation data.
    """

    top_k: int | None = None
    multi_label: FlagCreatePairsOff[bool] = False
    threshold: float | None = None
    calibrated: FlagCreatePairsOff[bool] = False
    unknown: float | None = None


@dataclass(frozen=True)
class Segments:
    """How an image is segmented.

    Args:
        threshold: probability below which a pixel is background; no background if not given.
        short_side: shorter side in px of the working image that windows go over; 1.5 windows if not
            given.
        stride: px from one window to the next; half a window if not given.
        refine: steps of refinement along edges, usually 10; 0 if not given.
    """

    threshold: float | None = None
    short_side: int | None = None
    stride: int | None = None
    refine: int | None = None


@dataclass(frozen=True)
class Query:
    """What is searched for.

    Args:
        image: image files to search with.
        id: ids of images in the index to search with.
        weights: of texts, images and ids, in this order; negative weights lead away. 1 each if not
            given.
        top_k: hits to show.
        where: condition on the metadata, such as "year > 2020".
        min_score: least cosine of a shown image, from -1 to 1, or calibrated for the one that was
            exported with the release, for a search with one text.
    """

    image: tuple[str, ...] = ()
    id: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    top_k: int = 10
    where: str | None = None
    min_score: float | Literal["calibrated"] | None = None


Paths = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE [IMAGE ...]")]


def classify(
    images: Paths,
    labels: OmitArgPrefixes[Labels],
    shown: OmitArgPrefixes[Shown],
    server: OmitArgPrefixes[Server],
    point: OmitArgPrefixes[Point],
    examples: Path | None = None,
    example_weight: float | None = None,
    out: Path | None = None,
) -> int:
    """Find the best labels of images.

    Args:
        images: JPEG, PNG or WebP files, and folders of them; unreadable files in a folder are left
            out.
        examples: folder with one folder of images for each label that has some, named as the label;
            without labels, the folders' names are the labels.
        example_weight: weight of a label's examples against its text, from 0, the text alone, to 1,
            which leaves it out; if not given, chosen with the examples.
        out: .csv file to write instead of printing, with one row for each label.
    """
    files = Images(images)
    options = labels.arguments(optional=examples is not None)
    if examples is not None:
        try:
            folders = sorted(path for path in examples.iterdir() if path.is_dir())
        except OSError as error:
            raise RAdapterError(f"cannot read {examples}: {error.strerror}") from error
        of_label = {path.name: list_images(path).images for path in folders if path.name[0] != "."}
        if not all(of_label.values()) or not of_label:
            raise RAdapterError(f"{examples} needs a folder with images for each label")
        options["examples"] = of_label
    options |= {**vars(point), **vars(shown), "example_weight": example_weight}

    def facts_and_rows(image: str, answer: Classification) -> Answer:
        pairs = zip(answer.labels, answer.scores, strict=True)
        rows = [{"image": image, "label": label, "score": score} for label, score in pairs]
        return {"image": image, **vars(answer), "receipt": receipt_of(answer)}, rows

    with server.client() as client:
        answers = files.answers(lambda paths: client.classify(paths, **options), 64)
        columns = ("image", "label", "score")
        report(itertools.starmap(facts_and_rows, answers), columns, server.json, out)
    return int(files.left_out)


def segment(
    images: Paths,
    labels: OmitArgPrefixes[Labels],
    segments: OmitArgPrefixes[Segments],
    server: OmitArgPrefixes[Server],
    point: OmitArgPrefixes[Point],
    save: Path | None = None,
    save_mask: Path | None = None,
    out: Path | None = None,
) -> int:
    """Label each pixel of images.

    Args:
        images: JPEG, PNG or WebP files, and folders of them; unreadable files in a folder are left
            out.
        save: picture to write, .png or .jpg, with colours and a legend. For several images, a
            folder of pictures.
        save_mask: .png to write, with the index of each pixel's label. For several images, a folder
            of masks.
        out: .csv file to write instead of printing, with one row for each label that occurs.
    """
    files = Images(images)
    options = {**labels.arguments(), **vars(point), **vars(segments)}
    if save is not None and save == save_mask:
        raise RAdapterError(f"--save and --save-mask are both {save}; give them different names")
    pictures = files.pictures("--save", save, ".png", ".jpg")
    masks = files.pictures("--save-mask", save_mask, ".png")

    def facts_and_rows(image: str, answer: Segmentation) -> Answer:
        if image in pictures:
            save_picture(pictures[image], answer.overlay())
        if image in masks:
            wide = len(answer.labels) > 256
            mask = answer.mask if wide else answer.mask.astype(np.uint8)
            save_picture(masks[image], Image.fromarray(mask))
        facts: Row = {"image": image, "size": answer.mask.shape[::-1]}
        for name in ("labels", "shares", "scores", "release"):
            facts[name] = getattr(answer, name)
        facts["receipt"] = receipt_of(answer)
        shares = zip(answer.shares, answer.labels, answer.scores, strict=True)
        rows = [
            {"image": image, "label": label, "share": share, "score": score}
            for share, label, score in sorted(shares, key=lambda row: -row[0])
            if share
        ]
        return facts, rows

    with server.client() as client:
        answers = files.answers(lambda paths: client.segment(paths, **options), 8)
        columns = ("image", "label", "share", "score")
        report(itertools.starmap(facts_and_rows, answers), columns, server.json, out)
    if not server.json:
        for path in filter(None, (save, save_mask)):
            print(path)
    return int(files.left_out)


def search(
    query: OmitArgPrefixes[Query],
    server: OmitArgPrefixes[Server],
    point: OmitArgPrefixes[Point],
    index: str,
    text: Annotated[Positional[tuple[str, ...]], arg(metavar="[TEXT ...]")] = (),
    save: Path | None = None,
) -> None:
    """Find the images of an index that are nearest to a text or an image.

    Several texts, images and ids, at most 16, are one query: the weighted sum of their embeddings.

    Args:
        index: name of an index that radapter-index build wrote.
        text: text to search for, such as "a red bicycle".
        save: .html file to write, a page of thumbnails.
    """
    if save is not None:
        check_output("--save", save, ".html")
    with server.client() as client:
        hits = client.search(
            text,
            index=index,
            thumbnails=save is not None,
            **{**vars(query), "weights": query.weights or None},
            **vars(point),
        )
        used = client.release().version if save is not None else None
    if hits.receipt is not None and hits.receipt.mapped is not None:
        note(
            f"the index {index} is mapped from another image tower, recall@10"
            f" {hits.receipt.mapped:.2f}, until radapter-index build embeds its images"
        )
    if save is not None:
        from radapter_serve.cli.gallery import page

        about = {"index": index, "where": query.where, "hits": len(hits), "release": used}
        about |= {"adapter": point.adapter}
        known = {name: str(value) for name, value in about.items() if value is not None}
        # Show the picture of a query with one image, else the names of all parts.
        images = query.image
        names = [*text, *(Path(file).name for file in images), *query.id]
        is_image = len(names) == len(images) == 1
        alone = without_heic(Path(images[0]).read_bytes()) if is_image else None
        content = page(hits, " + ".join(names), alone, known)
        write_whole(save, lambda file: file.write(content))
    answers: list[Answer] = []
    for hit in hits:
        row: Row = {"score": hit.score, "id": hit.id}
        shown = ", ".join(f"{key}: {value}" for key, value in hit.about.items())
        whole = {**row, "metadata": hit.metadata, "receipt": receipt_of(hits)}
        answers.append((whole, [{**row, "metadata": shown}]))
    report(answers, ("score", "id", "metadata"), server.json)
    if save is not None and not server.json:
        print(save)


def embed_image(
    images: Paths,
    server: OmitArgPrefixes[Server],
    point: OmitArgPrefixes[Point],
    out: Path = Path("image_embeds.npy"),
) -> None:
    """Write embeddings of images: float32 [N, D], unit length.

    Args:
        images: JPEG, PNG or WebP files, and folders of them in the order of their names.
        out: .npy file to write.
    """
    check_output("--out", out, ".npy")
    with server.client() as client:
        _save_embeds(out, client.embed_images(Images(images).paths, **vars(point)), server)


def embed_text(
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT [TEXT ...]")],
    server: OmitArgPrefixes[Server],
    point: OmitArgPrefixes[Point],
    out: Path = Path("text_embeds.npy"),
) -> None:
    """Write embeddings of texts: float32 [N, D], unit length.

    Args:
        texts: texts such as "a photo of a cat."
        out: .npy file to write.
    """
    check_output("--out", out, ".npy")
    if not texts:
        raise RAdapterError('give texts, such as "a photo of a cat."')
    with server.client() as client:
        _save_embeds(out, client.embed_texts(texts, **vars(point)), server)


def _save_embeds(out: Path, embeds: npt.NDArray[np.float32], server: Server) -> None:
    write_whole(out, lambda file: np.save(file, embeds))
    facts = {"file": str(out), "shape": list(embeds.shape)}
    print(to_json(facts) if server.json else f"{out}: float32 {facts['shape']}")


def release(server: OmitArgPrefixes[Server]) -> None:
    """Show the served releases: α, model, label sets; with --json all facts, such as all
    templates.
    """
    with server.client() as client:
        used = client.release()
        served = client.releases()
    templates = used.templates[0] if used.templates else "none"
    if len(used.templates) > 1:
        templates = f"{len(used.templates)}, such as {templates!r}"
    facts = {
        "release": used.version,
        "α": f"{used.alpha:g}, or any from 0 to 1 in a request"
        if used.dynamic_alpha
        else used.alpha,
        "architecture": used.architecture,
        "precision": used.precision,
        "embedding width": used.embed_dim,
        "templates": templates,
        "label sets": ", ".join(sorted(used.label_sets)) or "none",
        "EXIF orientation": "images are turned upright" if used.exif_orientation else "is ignored",
        "adapter": used.facts.get("adapter_digest", "unknown"),
        "exported": used.facts.get("created", "unknown"),
        "served": ", ".join(f"{release.version} (α = {release.alpha:g})" for release in served),
    }
    whole = {"release": used.facts, "served": [release.version for release in served]}
    rows = [{"fact": name, "value": str(value)} for name, value in facts.items()]
    report([(whole, rows)], ("fact", "value"), server.json)


COMMANDS: dict[str, Callable[..., Any]] = {
    "classify": classify,
    "segment": segment,
    "search": search,
    "embed-image": embed_image,
    "embed-text": embed_text,
    "release": release,
}


class Images:
    """The images of a command: files, and all images in folders."""

    def __init__(self, names: Sequence[str]) -> None:
        self.paths: list[str] = []
        self.left_out = False
        self._in_folders: set[str] = set()
        others: Counter[str] = Counter()
        for name in names:
            if not Path(name).is_dir():
                self.paths.append(name)
                continue
            files = list_images(Path(name))
            self.paths += map(str, files.images)
            self._in_folders |= {*map(str, files.images)}
            others.update(files.left_out)
        if others:
            note(f"files that are not JPEG, PNG or WebP are left out: {count_kinds(others)}")
        if not self.paths:
            raise RAdapterError(
                f"no JPEG, PNG or WebP files: {', '.join(names) or 'give files or folders'}"
            )

    def answers(self, ask: Callable[[list[str]], list[T]], size: int) -> Iterator[tuple[str, T]]:
        """Yield each image with its answer; an unreadable one in a folder is left out."""
        batches = [self.paths[start : start + size] for start in range(0, len(self.paths), size)]
        quiet = len(batches) == 1 or not sys.stderr.isatty()
        console = Console(stderr=True)
        for batch in track(batches, "asking", console=console, transient=True, disable=quiet):
            with suppress(InvalidImage):
                yield from zip(batch, ask(batch), strict=True)
                continue
            for path in batch:  # ask for each image, to find the unreadable one
                try:
                    [answer] = ask([path])
                except InvalidImage as error:
                    reason = str(error) if path in str(error) else f"{path}: {error}"
                    if path not in self._in_folders:
                        raise InvalidImage(reason, code=error.code) from error
                    self.left_out = True
                    note(f"left out: {reason}")
                else:
                    yield path, answer

    def pictures(self, flag: str, path: Path | None, *suffixes: str) -> dict[str, Path]:
        """Choose a file for each image's picture: `path` for one, else in the folder `path`."""
        if path is None:
            return {}
        if len(self.paths) == 1 and not self._in_folders:
            check_output(flag, path, *suffixes)
            return {self.paths[0]: path}
        if path.suffix.lower() in suffixes or path.is_file():
            raise RAdapterError(
                f"{flag} {path}: for several images, name a folder for their pictures"
            )
        whole = {name: Path(name).absolute() for name in self.paths}
        top = os.path.commonpath([file.parent for file in whole.values()])
        return {name: path / f"{file.relative_to(top)}.png" for name, file in whole.items()}


def check_output(flag: str, path: Path, *suffixes: str) -> None:
    """Raise an error, before any work, if the file could not be written."""
    if path.suffix.lower() not in suffixes:
        raise RAdapterError(f"{flag} {path} does not end in {' or '.join(suffixes)}")
    if not path.parent.is_dir() or path.is_dir():
        raise RAdapterError(
            f"{flag} {path}: {path.parent} is not a folder, or the file itself is one"
        )


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically."""
    try:
        with staged(path) as part, part.open("wb") as file:
            write(file)
    except OSError as error:
        raise RAdapterError(f"cannot write {path}: {error.strerror or error}") from error


def save_picture(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    write_whole(path, lambda file: picture.save(file, kind, quality=90))


def report(
    answers: Iterable[Answer], columns: Sequence[str], as_json: bool, out: Path | None = None
) -> None:
    """Print the answers, or write them to a .csv file; JSON and CSV are written as answers come."""
    if out is not None:
        check_output("--out", out, ".csv")
        count = 0

        def write(file: BinaryIO) -> None:
            nonlocal count
            text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
            table = csv.DictWriter(text, columns, lineterminator="\n")
            table.writeheader()
            for _, rows in answers:
                count += 1
                table.writerows(rows)
            text.detach()

        write_whole(out, write)
        print(to_json({"file": str(out), "images": count}) if as_json else f"{out}: {count} images")
        return
    if as_json:
        for facts, _ in answers:
            print(to_json(facts), flush=True)
        return
    numbers = {"score", "share"}
    heads = [Column(name, justify="right" if name in numbers else "left") for name in columns]
    table = Table(*heads)
    for _, rows in answers:
        for place, row in enumerate(rows):
            cells = []
            for column in columns:
                value = row[column]
                if column in numbers:
                    value = f"{value * 100:.1f} %" if column == "share" else f"{value:.4f}"
                cell = "" if column == "image" and place else printable(value)
                cells.append(Text(cell, overflow="fold"))
            table.add_row(*cells, end_section=columns[0] == "image" and place + 1 == len(rows))
    if table.rows:
        Console().print(table)
    else:
        print("nothing was found")


def receipt_of(answer: Classification | Segmentation | Hits) -> Row | None:
    """The release, adapter and alpha of an answer, for JSON."""
    return None if answer.receipt is None else asdict(answer.receipt)


def to_json(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False))  # JSON spells only some of them


def note(text: str) -> None:
    print(printable(f"note: {text}"), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    description = (
        "Asks a server that radapter-serve started, or with --model a model in this process."
    )
    with suppress(AttributeError):  # print file names that are not UTF-8 unchanged
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    return run(COMMANDS, argv, prog=PROG, description=description)
