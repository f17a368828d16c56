"""Recipes: every choice of a training run, under the same names in YAML, as flags and in Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from radapter_serve.data.source import (
    INDEX,
    Count,
    For,
    Number,
    PartShare,
    Positive,
    Real,
    RunSource,
    Share,
    read_fields,
    users,
    with_reader,
)
from radapter_serve.errors import RAdapterError, short
from radapter_serve.files import read_yaml, shipped
from radapter_serve.sources import ADAPTER, HUB, LOCAL, RECIPE, Adapt

# The paper's values, which are the limits where warm-up and momentum follow the run's length.
LONGEST_WARMUP = 500
LONGEST_MOMENTUM = 0.999
LEAST_KEPT = 0.9  # least weight of the learned values in the average at the end of a run


# Groups of a recipe's fields in the help: title, description and fields.
GROUPS: dict[str, tuple[str, str]] = {
    "model": ("What is trained.", "architecture pretrained"),
    "data": (
        "What it trains with, and what it is validated on.",
        " ".join(field.name for field in dataclasses.fields(RunSource)) + " embeddings rows",
    ),
    "adapter": (
        "The adapters (Eq. 7 to 9).",
        "adapt rank partial form drop momentum bias_correction alpha",
    ),
    "loss": (
        "The loss, MPM-NCE or its pairwise sigmoid, and what keeps the base's embeddings.",
        "delta epsilon positives negative_classes preserve preserve_words",
    ),
    "optimizer": (
        "How it learns, and for how long.",
        "batch_size accumulate epochs steps learning_rate min_learning_rate weight_decay"
        " warmup_steps grad_clip",
    ),
    "augmentation": ("What the towers see of an image.", "crop_scale flip"),
    "run": (
        "How the command runs.",
        "precision workers threads validate_every save_every tracker out resume",
    ),
}
# Other names of fields, which recipes, flags and keywords may use.
ALIASES = {
    "label_smoothing": "epsilon",
    "margin": "delta",
    "ema_decay": "momentum",
    "adapter_dropout": "drop",
}


@dataclass(frozen=True)
class Recipe(RunSource):
    """Every choice of a training run, which writes OUT/adapter.safetensors; a base that is scored
    with sigmoids (SigLIP) takes the pairwise sigmoid loss.

    Attributes:
        architecture: open_clip model such as ViT-B-32; or local-dir:PATH or hf-hub:NAME, a model of
            open_clip's or a CLIP of transformers. --base NAME:TAG sets this and pretrained.
        pretrained: open_clip tag such as openai, or the path of a checkpoint; none for local-dir:
            and hf-hub:.
        rank: rank of the adapters; none is full rank.
        adapt: place of the adapters. towers, or only image-tower: after attention and feed-forward
            of each block, trained with the images. text-projection, image-projection, or
            projections for both: after the last linear layer, trained with embeddings, which takes
            seconds.
        partial: adapt only the layers that fold exactly, instead of refusing the model; for a CLIP
            with a convolutional image tower, these are in the text tower.
        form: apply adapters to activations or to weights; auto picks the faster. The result is the
            same.
        drop: probability p of adapter dropping (Eq. 7); also called adapter_dropout.
        momentum: m of the adapters' moving average (Eq. 8); none follows the run's length,
            1-5/steps and at most 0.999. Also called ema_decay.
        bias_correction: correct the average for its start at zero; for runs of fewer than about
            5/(1-m) steps.
        alpha: α (re-scaling, Eq. 9) that validation uses and that the adapter file recommends, from
            0 to 1.
        delta: margin δ on wrong pairs, in cosine; also called margin.
        epsilon: label smoothing ε; also called label_smoothing.
        positives: several counts all pairs of one class or image as right, as MPM-NCE does; single
            counts only the pair itself, which with delta 0 is InfoNCE, the loss of CLIP.
        negative_classes: number of classes, drawn for each step from those that a batch lacks,
            whose prompts become negatives of all its images. Each is one more text in a step, or in
            each part of an accumulated step. 0 is the paper's.
        preserve: weight of the mean of 1 - cosine between an image's embedding and the base's; 0
            turns it off, as in the paper. With it each step also embeds its images with the base.
        preserve_words: weight of the Kullback-Leibler divergence of an image's probabilities of 64
            of ImageNet's class names, drawn for each step, from the base's probabilities; 0 turns
            it off, as in the paper.
        batch_size: images of a step over all processes and accumulated parts; all images, if there
            are fewer.
        accumulate: parts of a step's batch, computed one after another; the loss contrasts images
            within a part only.
        epochs: passes over the data; steps, if given, sets the length instead.
        steps: optimizer steps; none follows epochs.
        learning_rate: peak learning rate of AdamW.
        min_learning_rate: learning rate at the end of the cosine schedule.
        weight_decay: weight decay of AdamW.
        warmup_steps: steps of linear warm-up; none takes a fifth of the run, and 500 at most.
        grad_clip: largest gradient norm; none does not clip.
        crop_scale: smallest fraction of the image's area that a random crop keeps, from 0 to 1.
        flip: flip images left to right half of the time.
        embeddings: NumPy file with an embedding of each image, float [N, D], for an adapter on a
            projection; no image is read.
        rows: table (.parquet, .csv, .json) with a row for each of the embeddings, instead of data:
            the column of images has their names.
        precision: no, fp16 or bf16 mixed precision; auto takes bf16 if a GPU, AMX or AVX512_BF16
            computes with it, else no. On a CPU with AMX, bf16 takes about 0.4 of the time; no GPU
            was measured.
        workers: processes that read images, for each training process.
        threads: compute threads of each training process; none uses one per core. Fewer are faster
            if other programs share the cores.
        validate_every: steps between validations; none validates at the end only.
        save_every: steps between checkpoints, from which --resume continues; with none, only Ctrl-C
            and SIGTERM save one.
        tracker: tensorboard, none, or another tracker that accelerate knows (wandb, mlflow, ...).
        out: folder of the run; none makes runs/NAME-TIME.
        resume: continue from the checkpoint in out; --resume RUN needs no other flag, as the run's
            folder has its recipe.
    """

    architecture: str = "ViT-B-32"
    pretrained: str | None = None
    adapt: Adapt = "towers"
    rank: Count | None = None
    partial: bool = False
    form: Literal["auto", "activation", "weight"] = "auto"
    drop: PartShare = 0.2
    momentum: PartShare | None = None
    bias_correction: bool = False
    alpha: Share = 0.5
    delta: Real = 0.05
    epsilon: PartShare = 0.02
    positives: Literal["several", "single"] = "several"
    negative_classes: Annotated[Number, For("classification", "segmentation")] = 0
    preserve: Annotated[Real, Field(ge=0)] = 0.0
    preserve_words: Annotated[Real, Field(ge=0)] = 0.0
    batch_size: Annotated[Count, Field(ge=2)] = 512
    accumulate: Count = 1
    epochs: Count = 10
    steps: Count | None = None
    learning_rate: Positive = 5e-4
    min_learning_rate: Annotated[Real, Field(ge=0)] = 1e-6
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    warmup_steps: Number | None = None
    grad_clip: Positive | None = 1.0
    crop_scale: Annotated[Share, Field(gt=0)] = 0.9
    flip: bool = False
    embeddings: Path | None = None
    rows: Path | None = None
    precision: Literal["auto", "no", "fp16", "bf16"] = "no"
    workers: Number = 2
    threads: Count | None = None
    validate_every: Count | None = None
    save_every: Count | None = 500
    tracker: str = "tensorboard"
    out: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "val_data"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, with_reader(value))
        if isinstance(self.rows, str | Path) and not self.data:
            suffix = Path(self.rows).suffix.removeprefix(".")
            reader = suffix if suffix in ("csv", "json") else "parquet"
            object.__setattr__(self, "data", f"{reader}:{self.rows}")

    @property
    def of_projections(self) -> bool:
        """True if the adapters are on projections, which are trained with embeddings."""
        return self.adapt not in ("towers", "image-tower")

    @property
    def has_embeddings(self) -> bool:
        """True if the images are embedded already."""
        return self.embeddings is not None or self.data.startswith(f"{INDEX}:")

    def check(self) -> None:
        """Refuse values of the wrong type or out of range, and values that do not go together."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        read_fields(Recipe, values, "the recipe")
        if self.batch_size % self.accumulate:
            raise RAdapterError(
                f"accumulate is {self.accumulate}; allowed: divisors of batch_size"
                f" {self.batch_size}"
            )
        if self.min_learning_rate > self.learning_rate:
            raise RAdapterError(
                f"min_learning_rate is {self.min_learning_rate}; allowed: 0 to learning_rate"
                f" {self.learning_rate}"
            )
        self._check_place()
        if self.val_fraction and self.val_data:
            raise RAdapterError(
                f"val_fraction is {self.val_fraction} but val_data names validation data; leave one"
                " of them out"
            )
        if self.resume and self.out is None:
            raise RAdapterError("--resume needs --out, the folder of the run to continue")
        if not self.data:
            raise RAdapterError("no training data; name it with --data, for example --data photos")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            tasks = users(Recipe).get(field.name, (self.task,))
            if self.task not in tasks and value != field.default:
                raise RAdapterError(
                    f"{field.name} is {value}, which task {self.task} does not use; leave it out "
                    f"(it is for {' and '.join(tasks)})"
                )

    def _check_place(self) -> None:
        """Refuse fields that adapters on projections have not, or that they alone have."""
        if (self.embeddings is None) != (self.rows is None):
            raise RAdapterError(
                "embeddings and rows belong together: --embeddings vectors.npy --rows table.parquet"
            )
        refused: dict[str, Any] = {}
        if self.of_projections:
            for name, value in (
                ("accumulate", 1),
                ("negative_classes", 0),
                ("positives", "several"),
            ):
                if getattr(self, name) != value:
                    refused[name] = f"adapt {self.adapt} has in each step all classes at once"
            if self.task == "segmentation":
                refused["task"] = f"adapt {self.adapt} is trained with whole images"
            if self.precision == "fp16":
                refused["precision"] = f"adapt {self.adapt} embeds with auto, no or bf16"
            if self.rows is not None and self.data.partition(":")[2] != str(self.rows):
                refused["data"] = f"--rows {self.rows} names the data already; leave --data out"
            held_out = [name for name in ("val_data", "val_fraction") if getattr(self, name)]
            for name in held_out if self.has_embeddings else ():
                refused[name] = "embeddings are judged with cross-validation"
        else:
            only_projections = "it is for adapters on a projection: --adapt text-projection"
            if self.embeddings is not None:
                refused["embeddings"] = only_projections
            elif self.has_embeddings:
                refused["data"] = only_projections
        for name, why in refused.items():
            raise RAdapterError(f"{name} is {getattr(self, name)}; {why}")

    def resolved(self, images: int | None, processes: int = 1) -> Plan:
        """Make a plan for the number of images (or captions) of an epoch, None for as many as a
        batch needs, and for the number of processes that share a batch.
        """
        notes = []
        if self.of_projections and processes > 1:
            raise RAdapterError(
                f"adapt {self.adapt} trains in one process; start radapter-train without a launcher"
            )
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise RAdapterError(
                f"batch_size {self.batch_size} is not a multiple of {parts} parts (processes ×"
                " accumulate)"
            )
        least = max(2, parts)
        batch_size = self.batch_size
        if images is not None:
            batch_size = min(batch_size, images // parts * parts)
        if batch_size < least:
            raise RAdapterError(
                f"the data holds {images} images to train with; a batch needs {least} at least, so"
                " add images, or lower --val-fraction or --accumulate"
            )
        if batch_size < self.batch_size:
            notes.append(
                f"note: a batch is {batch_size} images, all that the data has; the recipe's"
                f" batch_size is {self.batch_size}"
            )
        steps = self.steps or self.epochs * ((images or batch_size) // batch_size)
        warmup = min(LONGEST_WARMUP, steps // 5) if self.warmup_steps is None else self.warmup_steps
        if warmup >= steps:
            raise RAdapterError(
                f"warmup_steps is {warmup} but the run has {steps} steps; lower it, or let it"
                " follow the length of the run with --warmup-steps none"
            )
        following = min(LONGEST_MOMENTUM, max(0.0, 1 - 5 / steps))  # keeps 99 %
        momentum = following if self.momentum is None else self.momentum
        kept = 1 - momentum**steps
        if kept < LEAST_KEPT and not self.bias_correction:
            notes.append(
                f"warning: momentum {momentum:g} keeps {kept:.1%} of what a run of {steps} steps"
                f" learns; --momentum none keeps 99 % (here it is {following:.4g})"
            )
        recipe = dataclasses.replace(self, batch_size=batch_size)
        return Plan(recipe, batch_size // parts, steps, warmup, momentum, tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and the adapter file, without out and resume, which belong to one
        run.
        """
        values = dataclasses.asdict(self)
        del values["out"], values["resume"]
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


@dataclass(frozen=True)
class Plan:
    """A recipe, with the values that follow from the number of images and of processes."""

    recipe: Recipe  # with a batch that the data can fill
    part: int  # images of each process in each accumulated part
    steps: int
    warmup_steps: int
    momentum: float
    notes: tuple[str, ...]  # advice for the user, one line each

    def learning_rate(self, step: int) -> float:
        """The rate of a step (from 0): linear warm-up, then a cosine down to the least rate."""
        high = self.recipe.learning_rate
        low = self.recipe.min_learning_rate
        if step < self.warmup_steps:
            return high * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, repr=False)
class Run(PathLike[str]):
    """A finished run, which can be passed as the folder of a run.

    Attributes:
        folder: folder with `adapter.safetensors`, `recipe.yaml`, `metrics.jsonl`, `checkpoint.pt`
            and the tracker's files.
        recipe: recipe of the training, with a batch that the data can fill.
        metrics: metrics of the last validation, as fractions, by name and α, such as
            `acc1@alpha=0.5`; empty without validation data.
        notes: notes for the user, one line each: about images that were left out, and about an
            average that keeps little.
    """

    folder: Path
    recipe: Recipe
    metrics: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}: {value:.4g}" for name, value in self.metrics.items())
        return f"Run({str(self.folder)!r}, {{{metrics}}})"

    @property
    def adapter(self) -> Path:
        """The adapter file."""
        return self.folder / ADAPTER

    def __fspath__(self) -> str:
        return str(self.folder)


def ready_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return shipped("recipes")


def load_recipe(source: str | Path) -> Recipe:
    """Read a recipe from YAML; missing fields have their defaults.

    Args:
        source: a file with a mapping of `Recipe`'s fields, or the name of a recipe that comes with
            the package.

    Raises:
        RAdapterError: no such file, an unknown field, or a value of the wrong type or out of range.
    """
    ready = ready_recipes()
    path = ready.get(str(source), Path(source))
    if not path.exists():
        raise RAdapterError(
            f"there is no recipe {source}; allowed: a file, or one of {', '.join(ready)}"
        )
    return recipe_of(read_yaml(path, "the recipe"), f"the recipe {path}")


def recipe_from(
    source: str | Path | Recipe | None = None,
    resume: str | PathLike[str] | bool = False,
    **fields: Any,
) -> Recipe:
    """A recipe with some fields changed: by default that of the run to resume, else `small` or that
    of the task.
    """
    if resume:
        fields["resume"] = True
    if resume and not isinstance(resume, bool):
        fields["out"] = Path(resume)
        if source is None:
            source = Path(resume) / RECIPE
            if not source.is_file():
                raise RAdapterError(f"no run to resume in {resume}: it has no {RECIPE}")
    if source is None:
        task = fields.get("task", "classification")
        source = load_recipe(task if task in ready_recipes() else "small")
        if "architecture" in fields:  # its weights have other names
            source = dataclasses.replace(source, pretrained=None)
        if "val_data" in fields:  # instead of a fraction of the training images
            source = dataclasses.replace(source, val_fraction=0.0)
    if isinstance(source, str | Path):
        source = load_recipe(source)
    if not isinstance(source, Recipe):
        raise RAdapterError(
            f"the recipe is {short(source)}; allowed: a name, a file, or a Recipe of fields"
        )
    values = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    return recipe_of({**values, **by_names(fields)}, "the recipe") if fields else source


def by_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of `Recipe`'s fields, from these, their aliases, and `base`, NAME:TAG."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        pairs = {ALIASES.get(name, name): value}
        if name == "base":
            model, _, tag = str(value).partition(":")
            pairs = {"architecture": model, "pretrained": tag or None}
            if str(value).startswith((LOCAL, HUB)):
                pairs = {"architecture": str(value), "pretrained": None}
        if twice := named.keys() & pairs:
            raise RAdapterError(f"{min(twice)} is set twice, the second time by {name}")
        named |= pairs
    return named


def recipe_of(values: Any, what: str) -> Recipe:
    """Make a recipe from a mapping of its fields, or None; `what` names it in messages."""
    if not isinstance(values, dict | None):
        raise RAdapterError(f"{what} must be a mapping of field: value")
    values = by_names(values or {})
    if values.get("precision") is False:
        values["precision"] = "no"  # YAML reads no as false
    return read_fields(Recipe, values, what)
