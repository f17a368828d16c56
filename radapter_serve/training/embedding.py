"""Embeddings to train a projection with: made once with the base, and kept in the run's folder; or
those of an index, or of a NumPy file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from radapter_serve.adapter.tuned import towers_of
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import Pixels, TorchEncoder, encode_texts, to_device
from radapter_serve.contract.labels import prompts_of, split_label
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import Labelled
from radapter_serve.data.rows import BrokenImage, tracked
from radapter_serve.encoders.loaded import release_at
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import NOUN_TEMPLATES, common_nouns
from radapter_serve.files import read_arrays, staged
from radapter_serve.process import decoders
from radapter_serve.release.release import FILE, Release
from radapter_serve.sources import LOCAL
from radapter_serve.training.batches import NO_LABEL
from radapter_serve.training.data import Embedded, RunData
from radapter_serve.training.loop import vocabulary
from radapter_serve.training.recipe import Recipe
from radapter_serve.training.setup import Prepared, flatten_projections, write_recipe

ACCURACY = "acc1"
FOLDER = "embeddings"  # in a run's folder
SECONDS = 10.0  # between two parts of embeddings that are written
_IMAGES = 32  # of a batch
_TEXTS = 1024  # that are written together
# Texts with which a release is compared with a base, and the least cosine of the two
_PROBES = ["a photo of a cat", "two red bicycles near a wall", "!?"]
_SAME = 0.999

Floats = NDArray[np.float32]
# Embeds some of the items, and yields their numbers with their vectors, batch by batch.
Embed = Callable[[Sequence[int]], Iterator[tuple[list[int], Floats]]]


@dataclass(frozen=True)
class Vectors:
    """Embeddings of the base, of unit length, and what belongs together.

    An owner is a class with its prompts, or an image with its captions.
    """

    images: Tensor  # [N, D]
    owners: Tensor  # of each image, integer [N, K], padded with NO_LABEL
    texts: Tensor  # of all prompts or captions [T, D]
    texts_of: list[list[int]]  # the texts of each owner that a step draws from
    names: list[list[int]]  # the texts that find each owner: of all names of a class
    words: Tensor  # of the vocabulary [W, D], for which the base's answers are kept
    nouns: Tensor  # with which it is measured how many answers are kept [M, D]
    of_classes: bool

    @property
    def metric(self) -> str:
        """The metric of `judge`."""
        return ACCURACY if self.of_classes else "image_retrieval_recall@1"


def kept(ids: Sequence[str], width: int, embed: Embed, out: Path, facts: Any) -> Floats:
    """Embed items by their ids, [N, D]: each once for the same facts, in this run or in another one
    beside it; NaN for items that `embed` leaves out. What is embedded is written every
    `SECONDS`, so that after an interruption the next run goes on where this one stopped.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = out / FOLDER
    number_of: dict[str, list[int]] = {}
    for number, id in enumerate(ids):
        number_of.setdefault(id, []).append(number)
    rows = np.full((len(ids), width), np.nan, np.float32)
    for path in sorted(out.absolute().parent.glob(f"*/{FOLDER}/{key}-*.npz")):
        # A part that a full disk or a foreign hand has damaged is embedded again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            part = read_arrays(path)
            vectors = part["vectors"]
            for id, vector in zip(part["ids"].tolist(), vectors, strict=True):
                if id in number_of and vector.shape == (width,):
                    rows[number_of[id]] = vector
    known = np.isfinite(rows).all(axis=1)
    missing = [places[0] for places in number_of.values() if not known[places[0]]]

    waiting: dict[str, Floats] = {}
    written = time.monotonic()

    def write() -> None:
        if not waiting:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}-{secrets.token_hex(4)}.npz"
        try:
            with staged(path) as temporary, temporary.open("wb") as file:
                np.savez(file, ids=np.array(list(waiting)), vectors=np.stack([*waiting.values()]))
        except OSError as error:
            raise RAdapterError(f"could not write {path}: {error.strerror or error}") from error
        waiting.clear()

    try:
        for numbers, vectors in embed(missing) if missing else ():
            for number, vector in zip(numbers, vectors, strict=True):
                rows[number_of[ids[number]]] = vector
                waiting[ids[number]] = vector
            if time.monotonic() - written > SECONDS:
                write()
                written = time.monotonic()
    finally:  # Ctrl-C, too
        write()
    return rows


def embed_images(
    data: Labelled | Captioned, base: Base, tower: str, recipe: Recipe, out: Path, *, show: bool
) -> tuple[Floats, list[str]]:
    """Embed the images of a run at unit length, [N, D], as a server sees them, with a tower of this
    digest. Returns one line for each image that can't be read, whose row is NaN.
    """
    rows = data.image_rows
    broken: dict[int, str] = {}
    device = next(base.model.parameters()).device
    preprocess = Preprocess.from_dict(base.preprocess)
    encoder = TorchEncoder(base.model, base.preprocess)
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    facts = {
        "tower": tower,
        "preprocess": base.preprocess,
        "exif_orientation": recipe.exif_orientation,
        "precision": recipe.precision,
    }

    def digest(number: int) -> str:
        try:
            return hashlib.sha256(data.data(rows[number])).hexdigest()
        except BrokenImage as error:
            broken[number] = str(error)
            return f"broken {number}"

    def pixels(number: int) -> Pixels | None:
        try:
            return preprocess(data.image(rows[number]))
        except BrokenImage as error:
            broken[number] = str(error)
            return None

    with ThreadPoolExecutor(decoders(8)) as pool:

        def embed(numbers: Sequence[int]) -> Iterator[tuple[list[int], Floats]]:
            # Decode each batch while the one before it is embedded.
            batches = [numbers[at : at + _IMAGES] for at in range(0, len(numbers), _IMAGES)]
            ahead: list[tuple[int, Future[Pixels | None]]] = []
            for coming in tracked([*batches, []], len(batches) + 1, "embedding", show):
                batch = ahead
                ahead = [(number, pool.submit(pixels, number)) for number in coming]
                decoded = [(number, future.result()) for number, future in batch]
                whole = {number: image for number, image in decoded if image is not None}
                if whole:
                    with bf16:
                        embeds = encoder.images(np.stack(list(whole.values())))
                    yield list(whole), embeds

        ids = list(pool.map(digest, range(len(rows))))
        vectors = kept(ids, int(base.config["embed_dim"]), embed, out, facts)
    lines = [broken[number] for number in sorted(broken)]
    if lines and recipe.on_broken == "refuse":
        raise RAdapterError(f"{lines[0]}; mend it, or leave such images out with --on-broken skip")
    return vectors, lines


def embed_texts(base: Base, tower: str, texts: Sequence[str], recipe: Recipe, out: Path) -> Floats:
    """Embed texts at unit length, [T, D], with a tower of this digest."""
    device = next(base.model.parameters()).device
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    facts = {"tower": tower, "precision": recipe.precision}

    @torch.inference_mode()
    def embed(numbers: Sequence[int]) -> Iterator[tuple[list[int], Floats]]:
        for at in range(0, len(numbers), _TEXTS):
            some = list(numbers[at : at + _TEXTS])
            tokens = base.tokenizer([texts[number] for number in some])
            with bf16:
                embeds = encode_texts(base.model, tokens)
            yield some, embeds.cpu().numpy()

    ids = [hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in texts]
    return kept(ids, int(base.config["embed_dim"]), embed, out, facts)


def embed_run(
    prepared: Prepared,
    opened: RunData,
    out: Path,
    say: Callable[[str], None],
    note: Callable[..., None],
    *,
    show: bool,
) -> tuple[Vectors, Vectors | None, str]:
    """Embed the data of a run, or take its embeddings, and embed its validation data, if any; makes
    the run's folder. Returns the text tower's digest, too.
    """
    base = prepared.base
    recipe = prepared.recipe
    to_device(base.model)
    if recipe.precision == "bf16":
        flatten_projections(base.model)
    towers = {name: tower.base for name, tower in towers_of(base.model, {}).items()}
    of_embeddings = [] if opened.embedded is None else check_embeddings(opened.embedded, base)
    write_recipe(recipe, out)
    note(*opened.notes, *of_embeddings)
    began = time.monotonic()
    parts: list[Vectors] = []
    for data, embedded in ((prepared.data, opened.embedded), (prepared.val, None)):
        if data is None:
            continue
        assert isinstance(data, Labelled | Captioned)  # Recipe.check refuses masks
        if embedded is not None:
            images = embedded.vectors
        else:
            count = len(data.image_rows)
            say(f"embedding {count:,} images and their texts once, kept in {out / FOLDER}")
            tower = towers["image_tower"]
            images, broken = embed_images(data, base, tower, recipe, out, show=show)
            if broken:
                note(f"left out {len(broken)} broken images, such as: {broken[0]}")
        embed = partial(embed_texts, base, towers["text_tower"], recipe=recipe, out=out)
        parts.append(vectors_of(data, images, embed))
    say(f"embeddings are ready after {time.monotonic() - began:.1f} s")
    return parts[0], parts[1] if prepared.val is not None else None, towers["text_tower"]


def vectors_of(
    data: Labelled | Captioned, images: Floats, embed: Callable[[Sequence[str]], Floats]
) -> Vectors:
    """Join the embeddings of images [N, D] with those of their texts, words and nouns. Images that
    can't be read, whose rows are NaN, are left out.
    """
    names: list[str] = []
    if isinstance(data, Labelled):
        lines = [split_label(line) for line in data.classes]
        names = [name for line in lines for name in line]
        trained = [prompts_of(line[:1], data.templates) for line in lines]
        prompts = [prompts_of(line, data.templates) for line in lines]
        owners = data.label_sets()
    else:
        trained = prompts = [list(image.captions) for image in data.images]
        owners = [(number,) for number in range(len(data.images))]
    words = list(vocabulary(tuple(data.classes) if isinstance(data, Labelled) else ()))
    nouns = [
        prompt for noun in common_nouns(names) for prompt in prompts_of([noun], NOUN_TEMPLATES)
    ]
    texts = list(dict.fromkeys([*itertools.chain(*trained, *prompts), *words, *nouns]))
    number_of = {text: number for number, text in enumerate(texts)}
    embeds = torch.from_numpy(embed(texts))

    def numbers(texts: Sequence[str]) -> list[int]:
        return [number_of[text] for text in texts]

    readable = ~np.isnan(images[:, 0])
    padded = pad_sequence(
        [torch.tensor(owners[row]) for row in np.flatnonzero(readable)],
        batch_first=True,
        padding_value=NO_LABEL,
    )
    return Vectors(
        images=torch.from_numpy(images if readable.all() else images[readable]),  # without a copy
        owners=padded,
        texts=embeds,
        texts_of=[numbers(each) for each in trained],
        names=[numbers(each) for each in prompts],
        words=embeds[numbers(words)],
        nouns=embeds[numbers(nouns)],
        of_classes=isinstance(data, Labelled),
    )


def check_embeddings(embedded: Embedded, base: Base) -> list[str]:
    """Compare embeddings that were made elsewhere with a base, as far as possible; returns notes
    for the user.
    """
    source = embedded.source
    width = int(base.config["embed_dim"])
    if embedded.vectors.shape[1] != width:
        raise RAdapterError(
            f"the vectors of {source} have the width {embedded.vectors.shape[1]}, and the"
            f" embeddings of {base.name} have {width}; name the model that made them with --base"
            " NAME:TAG"
        )
    if embedded.index is None:
        return []

    # The image towers must be the same. A base that is an export says what its tower is; any other
    # one may be the model before its fine-tune.
    plan = embedded.index.plan
    made_by = plan.release
    index_tower = made_by.image_tower.digest(made_by.alpha)
    base_tower = made_by.image_tower.base
    folder = Path(base.name.removeprefix(LOCAL))
    if base.name.startswith(LOCAL) and (folder / FILE).is_file():
        export = Release.load(folder)
        base_tower = export.image_tower.digest(export.alpha)
        if base_tower != index_tower:  # the export may itself be the base of the release
            whole = load_base(base.name, base.pretrained).model
            base_tower = towers_of(whole, {})["image_tower"].base

    def of_another_model(what: str) -> RAdapterError:
        return RAdapterError(
            f"{source} was made by another model: release {made_by.version} of"
            f" {made_by.architecture} at alpha {made_by.alpha:g}, whose {what} are not those of"
            f" {base.name}; name the model that was exported, such as --base local-dir:merged, or"
            " build the index again"
        )

    if base_tower != index_tower:
        raise of_another_model("images")

    # So must the text towers.
    try:
        loaded = release_at(plan.origin, made_by.version, made_by.precision)
        if loaded.release.dynamic_alpha:
            loaded = loaded.at(made_by.alpha)
    except RAdapterError as error:
        return [
            f"note: the release that made {source} can't be loaded ({error}), so nothing says that"
            f" its embeddings are of {base.name}"
        ]
    with torch.inference_mode():
        ours = encode_texts(base.model, base.tokenizer(_PROBES)).cpu().numpy()
    cosine = float((loaded.embed_texts(_PROBES) * ours).sum(axis=1).min())
    if not made_by.is_of(loaded.release) or cosine < _SAME:
        raise of_another_model("texts")
    return []
