"""Shared parts of all rivals: a run's base and data, a system with its loss, the training loop, and
the method, whose trained system is kept in a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image, encode_text, encode_texts, zero_shot_classifier
from radapter_serve.contract.labels import split_label
from radapter_serve.data.rows import LabelledImages
from radapter_serve.data.runs import held_out_digest
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, staged
from radapter_serve.training import Recipe
from radapter_serve.training.batches import Examples, endless
from radapter_serve.training.data import Data, open_run
from radapter_serve.training.loss import mpm_nce
from radapter_serve.training.setup import augmentation


class Run:
    """The base, the data and the recipe of a method; `folder` keeps trained systems. `fields` of
    `Recipe` apply to every method, and override the `settings` of the method's paper.
    """

    def __init__(
        self, fields: Mapping[str, Any], folder: Path, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.fields = dict(fields)
        self.folder = folder
        # Leave out defaults of Recipe, so that a new default changes no digest.
        self.asked = {**(settings or {}), **fields}
        self.recipe = Recipe(**self.asked)
        self.recipe.check()
        if self.recipe.precision == "fp16":
            raise RAdapterError("rivals are trained with precision no or bf16")

    def of(self, settings: Mapping[str, Any]) -> Run:
        """Make a run of the same data for another method's settings, with a fresh base; the batch
        size is at most the number of images.
        """
        most = min(settings.get("batch_size", 0), self.size)
        run = Run(self.fields, self.folder, {**settings, "batch_size": most} if most else settings)
        run.ground = self.ground
        run.size = self.size
        return run

    @cached_property
    def base(self) -> Base:
        """The base, for one system, which changes it; loading it seeds torch."""
        base = load_base(self.recipe.architecture, self.recipe.pretrained)
        torch.manual_seed(self.recipe.seed)
        return base

    @cached_property
    def data(self) -> Data:
        """The training data."""
        return open_run(self.recipe, images=False).ready(self.recipe, self.base)[0]

    @cached_property
    def size(self) -> int:
        """Number of images, the same for all methods."""
        return len(self.data.rows)

    @cached_property
    def ground(self) -> str:
        """Digest of the base's weights and the images' names, the same for all methods."""
        weights = self.base.model.state_dict()
        images = json.dumps([held_out_digest(self.data), self.size]).encode()
        return digest_of(images, *(weights[name].numpy().tobytes() for name in sorted(weights)))

    def digest(self, *facts: object) -> str:
        """Compute a digest of 16 letters from facts, the recipe's fields, the base and images."""
        # `ground` covers the weights of the base.
        without = ("workers", "threads", "architecture", "pretrained")
        asked = {
            name: moved(str(value) if isinstance(value, Path) else value)
            for name, value in self.asked.items()
            if name not in without
        }
        text = json.dumps([*map(repr, facts), asked, self.ground], sort_keys=True)
        return digest_of(text.encode()).removeprefix("sha256:")[:16]


def moved(value: Any) -> Any:
    """Replace an absolute path in a setting by the file's digest or the folder's name."""
    reader, colon, place = str(value).rpartition(":")
    if not Path(place).is_absolute():
        return value
    path = Path(place)
    return f"{reader}{colon}{digest_of(path.read_bytes()) if path.is_file() else path.name}"


# Holds pixels [B, 3, S, S] and labels [B] on the system's device, and at least B texts.
Batch = Mapping[str, Any]
Loss = Literal["classes", "infonce"]


class System(nn.Module):
    """A plain CLIP with all parameters frozen; `scale` is 1/τ.

    Subclasses add parameters and modules, and unfreeze those that learn.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model: Any = base.model
        self.tokenizer = base.tokenizer
        self.model.requires_grad_(False)
        self.scale = float(base.model.state_dict()["logit_scale"].exp())

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def factor(self) -> float:
        """Factor of the scores in the softmax over classes."""
        return self.scale

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not learn from batches")

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step, from 1 to `steps`; does nothing by default."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed images [B, 3, S, S] as float32 [B, D]."""
        return encode_image(self.model, pixels)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as float32 [N, D] of unit length."""
        return encode_texts(self.model, self.tokenizer(list(texts)))

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed classes, with synonyms after commas, as float32 [C, D]; a class's score is the
        product with the image's embedding.
        """
        return zero_shot_classifier(self.model, self.tokenizer, classes, templates)

    def clip(self) -> dict[str, Tensor] | None:
        """Return the weights of an equivalent CLIP of the base's architecture, or None."""
        added = [name for name in self.state_dict() if not name.startswith("model.")]
        return None if added else self.model.state_dict()

    def learning(self) -> list[nn.Parameter]:
        """List the parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def labelled_images(run: Run) -> LabelledImages:
    """Return the data of a run; raises an error if it has no labels."""
    if not isinstance(run.data, LabelledImages):
        raise RAdapterError("this rival learns from images with labels (task: classification)")
    return run.data


class Tuned(System):
    """A frozen CLIP with a few more parameters, in `extra` or elsewhere.

    The loss `classes` is the cross-entropy over the cosines between an image and one prompt of each
    class; `infonce` contrasts an image with the prompts of its batch, of which only its own is a
    positive. Prompts use `template`, or else the first template of the data.
    """

    def __init__(self, run: Run, loss: Loss = "classes", template: str | None = None) -> None:
        super().__init__(run.base)
        self.loss = loss
        self.extra = nn.ModuleList()  # in training mode, for dropout, only within `forward`
        self.template = template or ""
        if loss == "classes" or isinstance(run.data, LabelledImages):  # captions have no classes
            data = labelled_images(run)
            self.template = template or data.templates[0]
            self.register_buffer("prompts", self.tokens(data.classes), persistent=False)
        self.prompts: Tensor

    def tokens(self, classes: Iterable[str]) -> Tensor:
        """Tokenize prompts with the first names of classes: int64 [C, L]."""
        return self.tokenizer(
            [self.template.replace("{}", split_label(names)[0]) for names in classes]
        )

    def forward(self, batch: Batch) -> Tensor:
        self.extra.train()
        if self.loss == "infonce":
            texts = encode_text(self.model, self.tokenizer(batch["texts"]).to(self.device))
            pairs = torch.arange(len(texts), device=self.device)
            images = self.embed_images(batch["pixels"])
            loss = mpm_nce(images, texts, pairs, logit_scale=self.scale, delta=0.0)
        else:
            loss = F.cross_entropy(self.scores(batch["pixels"]), batch["labels"])
        self.extra.eval()
        return loss

    def scores(self, pixels: Tensor) -> Tensor:
        """Compute logits of the run's classes, float32 [B, C]."""
        return self.scale * self.embed_images(pixels) @ encode_text(self.model, self.prompts).T


@dataclass(frozen=True)
class Cost:
    """Cost of training: the number of parameters that learned, the seconds of all steps with the
    reading of images, and the peak memory in bytes, of the GPU if there is one, else of the
    process.
    """

    parameters: int = 0
    seconds: float = 0.0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.seconds + other.seconds,
            max(self.memory, other.memory),
        )


@dataclass
class Learned:
    """A trained system in eval mode, and the tensors that training changed, before and after."""

    system: System
    cost: Cost
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def at(self, alpha: float) -> System:
        """Set the system's weights to `(1−α)·start + α·end`."""
        state = self.system.state_dict()
        for name, end in self.end.items():
            state[name].copy_(torch.lerp(self.start[name].float(), end.float(), alpha))
        return self.system


class Meter:
    """Measures seconds since its construction, and peak memory."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def cost(self, parameters: int) -> Cost:
        """Return the cost so far, with the number of parameters that learn."""
        gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if gpu else peak_memory()
        return Cost(parameters, time.perf_counter() - self._started, memory)


def peak_memory() -> int:
    """Peak memory of this process in bytes.

    On Linux this is VmHWM, as `ru_maxrss` starts with the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fit(system: System, optimizer: Optimizer, run: Run) -> Learned:
    """Train a system by the run's recipe. The learning rate of each group of the optimizer is the
    schedule's, times the group's `share` if it has one.
    """
    recipe = run.recipe
    count = len(run.data.rows)
    if count < recipe.batch_size:
        raise RAdapterError(
            f"batch_size is {recipe.batch_size} but the data holds {count} images; lower it"
        )
    plan = recipe.resolved(count)
    meter = Meter()
    device = meter.device
    examples = Examples(
        run.data, augmentation(run.base, recipe), recipe.seed, refuse=recipe.on_broken == "refuse"
    )
    source = endless(examples, plan.part, workers=recipe.workers)
    system.to(device).eval()  # CLIP's towers have no dropout
    learning = system.learning()
    for step in track(range(plan.steps), "learning", console=Console(stderr=True), transient=True):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step) * group.get("share", 1.0)
        for _ in range(recipe.accumulate):
            _, batch = next(source)
            for name in ("pixels", "labels"):
                batch[name] = batch[name].to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = system(batch) / recipe.accumulate
            loss.backward()
            if not math.isfinite(loss.item()):
                raise RAdapterError(
                    f"the loss is {loss.item()} at step {step}; lower the learning rate"
                )
        if recipe.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(learning, recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        system.after_step(step + 1, plan.steps)
    return Learned(system, meter.cost(sum(parameter.numel() for parameter in learning)))


def paper(**values: Any) -> Any:
    """Default of `settings`: fields of `Recipe` by the method's paper or its code."""
    return field(default_factory=lambda: values)


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables.

    `settings` are fields of `Recipe`; `alpha` is the position of the weights on the line from start
    to end, and None is the end. Subclasses add the other hyper-parameters of their paper.
    """

    settings: Mapping[str, Any] = paper()
    alpha: float | None = None

    def start(self, run: Run) -> System:
        """Build the system on the run's base, with the parameters that learn unfrozen."""
        raise NotImplementedError

    def optimizer(self, system: System, run: Run) -> Optimizer:
        """Build the optimizer of the parameters that learn."""
        recipe = run.recipe
        return AdamW(system.learning(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    def learn(self, run: Run) -> Learned:
        """Train a system; `run` has this method's settings."""
        system = self.start(run)
        return fit(system, self.optimizer(system, run), run)


def at_rate(method: Method, factor: float) -> Method:
    """Multiply a method's learning rate, if it has one, by a factor."""
    rate = method.settings.get("learning_rate")
    return method if rate is None or factor == 1 else with_rate(method, rate * factor)


def with_rate(method: Method, rate: float) -> Method:
    """Replace a method's learning rate."""
    return dataclasses.replace(method, settings={**method.settings, "learning_rate": rate})


def learned(method: Method, run: Run) -> Learned:
    """Train a method on the data of a run, or load the system that the run's folder keeps."""
    path = kept(method, run)
    run = run.of(method.settings)
    if path.exists():
        with safe_open(path, "pt") as file:
            end = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            result = Learned(method.start(run).eval(), Cost(**json.loads(file.metadata()["cost"])))
        start = result.system.state_dict()
        result.start = {name: start[name].clone() for name in end}
        result.end = end
        result.at(1.0)
        return result
    start = method.start(run).state_dict()
    result = method.learn(run.of(method.settings))
    end = {name: value.detach().cpu().clone() for name, value in result.system.state_dict().items()}
    changed = [name for name, value in end.items() if not torch.equal(value, start[name])]
    result.start = {name: start[name] for name in changed}
    result.end = {name: end[name] for name in changed}
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        tensors = {name: value.contiguous() for name, value in result.end.items()}
        save_file(tensors, temporary, {"cost": json.dumps(dataclasses.asdict(result.cost))})
    return result


def kept(method: Method, run: Run) -> Path:
    """Path of the file that keeps the trained system, for any α."""
    digest = run.of(method.settings).digest(dataclasses.replace(method, alpha=None))
    return run.folder / f"{type(method).__name__}-{run.recipe.seed}-{digest}.safetensors"
