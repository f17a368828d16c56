"""Recipes: every choice of a training run, in YAML, as flags and in Python under the same names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from radapter_serve.errors import RAdapterError

USED_BY = {  # of the fields that not every task has a use for
    "image_column": ("classification", "retrieval"),
    "label_column": ("classification",),
    "caption_column": ("retrieval",),
    "captions_per_image": ("retrieval",),
    "classes": ("classification", "segmentation"),
    "shots": ("classification",),
    "class_split": ("classification",),
    "streaming": ("classification", "retrieval"),
    "mask_min_area": ("segmentation",),
}


@dataclass
class Recipe:
    """Train R-Adapter on a CLIP; writes OUT/adapter.safetensors.

    Attributes:
        task: what is trained for: classification (images with labels), retrieval (images with captions) or
            segmentation (images with masks).
        architecture: open_clip model such as ViT-B-32, or local-dir:PATH.
        pretrained: open_clip tag such as openai, or the path of a checkpoint; none for local-dir:.
        data: training data: imagefolder:DIR, csv:FILE, parquet:FILE, webdataset:FILE, json:FILE or the name of a data
            set on the Hugging Face hub; @SPLIT at the end names a split, train by default. For segmentation masks:DIR
            (DIR/images/* and the label maps DIR/masks/*.png) or coco:FILE.json (panoptic or instance annotations).
        val_data: validation data, the same forms; none skips validation.
        image_column: column of the images (paths, bytes or images).
        label_column: column of the labels (class names or numbers).
        caption_column: column of the captions, one text or a list of texts; rows of the same image belong together.
        captions_per_image: captions of an image that a batch holds together, each a positive of the image; 1 takes rows
            as they come, where captions of one image meet by chance.
        images: folder of the images, for data that names them relative to elsewhere.
        classes: file with one class a line, synonyms after commas, in the order of the labels; none takes the names
            that the data set gives. For segmentation the first line is id 0; or JSON or YAML that maps id to name.
        templates: file with one prompt template a line ({} is the class), `openai` for the 80 of OpenAI, or `simple`.
        shots: images of each class to train with, drawn by the seed (a class with fewer gives all); none takes all.
        class_split: base or novel, the first or second half of the classes, for training and validation; all takes all.
        streaming: read the data set as a stream, without a copy on disk.
        exif_orientation: turn images as their EXIF says, so that photos stand upright; false leaves the pixels as the
            file has them, as open_clip does. An export of this adapter does the same.
        on_broken: what a broken or missing image does: skip takes the next image and counts, refuse stops the run.
        rank: rank of the adapters; none is full rank.
        adapt_text: whether the text tower has adapters too.
        partial: adapt only what can be folded exactly, where else the model is refused: of a CLIP with a convolutional
            image tower the text tower.
        form: where adapters compute, auto picks the faster for this batch and model; the result is the same.
        drop: probability p of adapter dropping (Eq. 7).
        momentum: m of the adapters' moving average (Eq. 8).
        bias_correction: correct the average for its start at zero; for runs of fewer than about 5/(1-m) steps.
        alpha: re-scaling α (Eq. 9) that validation uses and that the adapter file recommends, from 0 to 1.
        delta: margin δ of MPM-NCE, in cosine.
        epsilon: label smoothing ε of MPM-NCE.
        batch_size: images a step over all processes and accumulated parts.
        accumulate: parts that a step's batch is cut into, one after another; each part is its own contrast.
        epochs: passes over the data; steps, where given, ends the run earlier or later.
        steps: optimizer steps; none follows epochs. A stream needs it.
        learning_rate: peak learning rate of AdamW.
        min_learning_rate: where the cosine ends.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up.
        grad_clip: largest gradient norm; none does not clip.
        crop_scale: smallest share of the image's area that a random crop keeps, from 0 to 1.
        flip: flip images left to right half of the time.
        mask_padding: border around the box of a segment on each side, as a share of its longer side; all of it is
            filled, as everything outside the segment is, so more of it only makes the segment smaller.
        mask_square: keep the aspect ratio of a segment, its box made square; false squashes the box, as OVSeg does.
        mask_min_area: pixels below which a segment is not trained with or validated on. In pixels and not as a share of
            the image, because they are what a crop has to show: 1024, COCO's limit of small objects, is 32 x 32.
        dense: how patches become embeddings where this adapter is exported for dense prediction; none exports none.
        precision: no, fp16 or bf16 mixed precision.
        workers: processes that read images, for each training process.
        seed: seeds order, augmentation, prompts, adapter dropping and the start.
        validate_every: steps between validations; none validates at the end only.
        save_every: steps between checkpoints, which --resume goes on from; none writes none.
        tracker: tensorboard, none, or another tracker that accelerate knows (wandb, mlflow, ...).
        out: folder of the run; none makes runs/NAME-TIME.
        resume: go on from the checkpoint in out.
    """

    task: Literal["classification", "retrieval", "segmentation"] = "classification"
    architecture: str = "ViT-B-32"
    pretrained: str | None = None
    data: str = ""
    val_data: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    caption_column: str = "caption"
    captions_per_image: int = 1
    images: Path | None = None
    classes: Path | None = None
    templates: str = "simple"
    shots: int | None = None
    class_split: Literal["all", "base", "novel"] = "all"
    streaming: bool = False
    exif_orientation: bool = True
    on_broken: Literal["skip", "refuse"] = "refuse"
    rank: int | None = None
    adapt_text: bool = True
    partial: bool = False
    form: Literal["auto", "activation", "weight"] = "auto"
    drop: float = 0.2
    momentum: float = 0.999
    bias_correction: bool = False
    alpha: float = 0.5
    delta: float = 0.05
    epsilon: float = 0.02
    batch_size: int = 512
    accumulate: int = 1
    epochs: int = 10
    steps: int | None = None
    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: int = 500
    grad_clip: float | None = 1.0
    crop_scale: float = 0.9
    flip: bool = False
    mask_padding: float = 0.0
    mask_square: bool = True
    mask_min_area: int = 1024
    dense: Literal["none", "maskclip", "sclip", "clearclip", "naclip"] = "none"
    precision: Literal["no", "fp16", "bf16"] = "no"
    workers: int = 2
    seed: int = 0
    validate_every: int | None = None
    save_every: int | None = 500
    tracker: str = "tensorboard"
    out: Path | None = None
    resume: bool = False

    def check(self) -> None:
        """Refuse values that are out of range, each with what is allowed."""
        allowed = {
            "drop": (0 <= self.drop < 1, "0 <= drop < 1"),
            "momentum": (0 <= self.momentum < 1, "0 <= momentum < 1"),
            "alpha": (0 <= self.alpha <= 1, "0 <= alpha <= 1"),
            "epsilon": (0 <= self.epsilon < 1, "0 <= epsilon < 1"),
            "crop_scale": (0 < self.crop_scale <= 1, "0 < crop_scale <= 1"),
            "mask_padding": (0 <= self.mask_padding <= 1, "0 to 1"),
            "mask_min_area": (self.mask_min_area >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 2, "2 or more: the loss contrasts the pairs of a batch"),
            "accumulate": (
                self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
                f"a divisor of batch_size {self.batch_size}",
            ),
            "captions_per_image": (self.captions_per_image >= 1, "1 or more"),
            "shots": (self.shots is None or self.shots >= 1, "1 or more, or none for all"),
            "steps": (self.steps is None or self.steps >= 1, "1 or more"),
            "epochs": (self.epochs >= 1, "1 or more"),
            "learning_rate": (self.learning_rate > 0, "more than 0"),
            "min_learning_rate": (0 <= self.min_learning_rate <= self.learning_rate, "0 to learning_rate"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "grad_clip": (self.grad_clip is None or self.grad_clip > 0, "more than 0, or none"),
            "workers": (self.workers >= 0, "0 or more"),
            "seed": (0 <= self.seed < 2**31, "0 to 2147483647"),
            "validate_every": (self.validate_every is None or self.validate_every >= 1, "1 or more, or none"),
            "save_every": (self.save_every is None or self.save_every >= 1, "1 or more, or none"),
        }
        for name, (fine, rule) in allowed.items():
            if not fine:
                raise RAdapterError(f"{name} is {getattr(self, name)}; allowed: {rule}")
        if self.resume and self.out is None:
            raise RAdapterError("--resume needs --out, the folder of the run to go on with")
        if not self.data:
            raise RAdapterError("no training data; name it with --data, for example --data imagefolder:photos")
        for field in dataclasses.fields(self):
            value, tasks = getattr(self, field.name), USED_BY.get(field.name, (self.task,))
            if self.task not in tasks and value != field.default:
                raise RAdapterError(
                    f"{field.name} is {value}, which task {self.task} has no use for; leave it out "
                    f"(it is for {' and '.join(tasks)})"
                )
        if self.streaming and (self.shots or self.class_split != "all"):
            raise RAdapterError("shots and class_split need all labels at once; leave --streaming out")
        if self.streaming and self.steps is None:
            raise RAdapterError("a stream has no length; say how long to train with --steps")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and the adapter file hold them, without what belongs to one run: out and resume."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}
        return {k: v for k, v in values.items() if k not in ("out", "resume")}


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from YAML; a field that is not named keeps its default.

    Args:
        path: a mapping of `Recipe`'s fields.

    Raises:
        RAdapterError: no such file, a field that does not exist, or a value of the wrong kind.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise RAdapterError(f"could not read the recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise RAdapterError(f"the recipe {path} must be a mapping of field: value")
    fields = [field.name for field in dataclasses.fields(Recipe)]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise RAdapterError(f"the recipe {path} has unknown fields {', '.join(unknown)}; allowed: {', '.join(fields)}")
    if values.get("precision") is False:
        values["precision"] = "no"  # which YAML reads as false
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors())
        raise RAdapterError(f"the recipe {path} won't do: {wrong}") from None
