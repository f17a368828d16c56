"""The facts of a release, as stored in `release.json` and the models' configs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from radapter_serve.contract.errors import TaskError, request_alpha
from radapter_serve.contract.facts import PreprocessFacts, TokenizerFacts
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import digest_of, write_text
from radapter_serve.release.agreement import (
    LEAST_COSINE,
    TOLERANCES,
    Agreement,
    Agreements,
    Tolerance,
)

# Task models of a release in the order of writing; the last one marks a complete release.
TASKS = ("embed_image", "embed_text", "retrieve", "segment", "classify")
FORMAT = 1
FILE = "release.json"
# Fields of a release and of the facts in it that are left out of the file if they are None.
_OPTIONAL = (
    *("made_of", "quantization", "accuracy", "confidence"),
    *("images", "texts", "digest", "examples", "prompts"),
    *("image_encoder", "patch_encoder", "text_encoder"),
)

# Largest distance from torch of an fp32 release that a server computes in bf16.
IN_BF16 = Tolerance(TOLERANCES["bf16"].max_error, 1 - 2e-4)
# Advice for a release without calibrated scores.
HOW_TO_CALIBRATE = "export one with radapter-export --validation DATA"
# Reason for a softmax without a best temperature.
WHY_NO_TEMPERATURE = "every image was right, or scores are no higher for right answers"
# Share of the images that the calibrated `min_score` of a search keeps.
MIN_SCORE_SHARE = 0.95


@dataclass(frozen=True)
class Confidence:
    """Calibration on validation data, at the release's α.

    `sigmoid(scale·cosine + bias)` is the probability that a label is right, independent of the
    other labels. The softmax over all labels takes logits divided by `temperature`, which is None
    for models with a sigmoid loss and for `WHY_NO_TEMPERATURE`. `ece_before` and `ece_after` are
    the calibration errors of the best label's score, in [0, 1], before and after calibration;
    `label_ece` is the error over all pairs of an image and a label. Each half of the images is
    scored with the fit on the other half. At least `MIN_SCORE_SHARE` of the images have a cosine of
    `min_score` with their own label; `false_answers` is the fraction of labels that reach it with
    an image of another label. `dataset` has `n` images and `classes` labels.
    """

    scale: float
    bias: float
    dataset: str
    n: int
    classes: int
    ece_before: float
    label_ece: float
    temperature: float | None = None
    ece_after: float | None = None
    min_score: float | None = None
    false_answers: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """A metric in per cent, with torch and attached adapters, and with a release's encoders."""

    dataset: str
    n: int  # number of images
    metric: str  # such as `acc1`
    torch: float
    release: float
    drop: float  # points lost; negative if the release is better


@dataclass(frozen=True)
class Dense:
    """How `patch_encoder` embeds patches."""

    method: str
    grid: int  # patches on a side


@dataclass(frozen=True)
class Tower:
    """The weights of one tower, as digests: wherever its base lies, a tower has the same facts."""

    base: str  # of its modules and of all its tensors, before the change
    change: str | None  # of what α scales in it; None if it is the base's at any α

    def digest(self, alpha: float) -> str:
        """`sha256:` of the tower's weights at an α; that of the base if they are the base's."""
        if self.change is None or not alpha:
            return self.base
        return digest_of(json.dumps([self.base, self.change, float(alpha)]).encode())


@dataclass(frozen=True)
class Share:
    """An adapter of an average."""

    digest: str
    weight: float


@dataclass(frozen=True)
class MadeOf:
    """Weights that were tuned elsewhere."""

    kind: str  # `checkpoint` or `lora`
    name: str
    base: str | None  # as for --base; None if the checkpoint is a model by itself
    digest: str


@dataclass(frozen=True)
class Quantization:
    """How int8 finds its ranges: `dynamic` in each batch, or `static` on inputs for calibration."""

    kind: str
    images: int | None = None  # number of inputs
    texts: int | None = None
    digest: str | None = None  # of all inputs


@dataclass(frozen=True)
class LabelSetFacts:
    """A label set that an export has embedded."""

    labels: int
    templates: list[str]
    digest: str  # of its file
    examples: int | None = None  # number of images that move the embeddings
    prompts: str | None = None  # digest of the stored embeddings of its prompts


@dataclass(frozen=True)
class Release:
    """The facts of one release."""

    version: int  # number in the model repository, the same for all models
    alpha: float  # the folded α, or the default if requests may give another
    architecture: str  # of the base: an open_clip name, `local-dir:PATH` or `hf-hub:NAME`
    base_digest: str  # of the base's adapted tensors
    adapter_digest: str  # of the adapter, or of the tuned weights if `made_of` is set
    image_tower: Tower
    text_tower: Tower
    preprocess: PreprocessFacts
    tokenizer: TokenizerFacts
    embed_dim: int
    logit_scale: float  # factor on the cosines
    templates: list[str]
    agreement: Agreements | None  # None of a model in torch, which is {} in the file
    logit_bias: float | None = None  # of a sigmoid loss
    dynamic_alpha: bool = False  # True if α is an input of the encoders
    adapters: list[Share] = field(default_factory=list)
    made_of: MadeOf | None = None
    precision: str = "fp32"
    quantization: Quantization | None = None  # of int8
    runtime: str = "onnxruntime"
    dense: Dense | None = None
    crop: MaskCrop = MaskCrop()  # noqa: RUF009
    label_sets: dict[str, LabelSetFacts] = field(default_factory=dict)
    max_batch_size: int = 64
    tools: dict[str, str] = field(default_factory=dict)  # versions of the libraries of the export
    created: str = ""  # in UTC, ISO 8601
    accuracy: Accuracy | None = None  # on validation data
    confidence: Confidence | None = None
    format: int = FORMAT

    @property
    def image_digest(self) -> str:
        """`sha256:` of the facts that decide an image's embedding at this α."""
        tower = self.image_tower
        facts: dict[str, Any] = {
            "base": tower.base,
            "embed_dim": self.embed_dim,
            "precision": self.precision,
            "quantization": self.quantization,
            "preprocess": self.preprocess,
        }
        # At α 0 a tower is the base's.
        if tower.change is not None and self.alpha:
            facts |= {"change": tower.change, "alpha": float(self.alpha)}
            # In int8, a graph with α as an input rounds the base and the change separately.
            if self.quantization and self.dynamic_alpha:
                facts["dynamic_alpha"] = True
        return digest_of(json.dumps(facts, sort_keys=True, default=_plain).encode())

    @property
    def bounds(self) -> Tolerance:
        """Largest distance of the encoders from torch, as at the export."""
        if self.agreement is None:
            raise RAdapterError(
                "the release does not say its agreement with torch; export it again with"
                " radapter-export"
            )
        least = max(self.agreement.min_cosine, LEAST_COSINE)
        return Tolerance(self.agreement.tolerance, least)

    @property
    def method(self) -> str | None:
        """The dense method of `patch_encoder`; None without one."""
        return None if self.dense is None else self.dense.method

    @property
    def image_distance(self) -> float | None:
        """The largest 1 - cosine of the image encoder with torch in fp32; None if nobody has
        measured it.
        """
        measured = None if self.agreement is None else self.agreement.image_encoder
        if measured is None:
            return 0.0 if self.precision == "fp32" else None
        return max(0.0, 1 - measured.min_cosine)

    def computed_in(
        self,
        precision: str | None,
        runtime: str | None = None,
        agreement: Mapping[str, Agreement] | None = None,
    ) -> Release:
        """This release as a server computes it, with the bounds of the precision and the agreement
        that the server has measured; for None as it was exported.
        """
        facts: dict[str, Any] = dict(agreement or {})
        if precision not in (None, self.precision):
            facts |= {"tolerance": IN_BF16.max_error, "min_cosine": IN_BF16.min_cosine}
        agreements = self.agreement and dataclasses.replace(self.agreement, **facts)
        return dataclasses.replace(
            self,
            precision=precision or self.precision,
            runtime=runtime or self.runtime,
            agreement=agreements,
        )

    def at(self, alpha: float) -> Release:
        """This release at another α; raises an error for an α that it does not take."""
        try:
            request_alpha(alpha, self.alpha, dynamic=self.dynamic_alpha)
        except TaskError as error:
            raise RAdapterError(error.message) from None
        return dataclasses.replace(self, alpha=float(alpha))

    def to_dict(self) -> dict[str, Any]:
        """The values of its JSON."""
        values: dict[str, Any] = json.loads(json.dumps(_plain(self)))
        if self.tokenizer.kind == "clip":  # it strips no token; the other kind says null
            del values["tokenizer"]["strip"]
        values["agreement"] = values["agreement"] or {}
        return values

    @property
    def sets_by_example(self) -> dict[str, LabelSetFacts]:
        """Facts of the label sets that have example images, by name."""
        return {name: facts for name, facts in self.label_sets.items() if facts.examples}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Release:
        """Build a release from the result of `to_dict`. Unknown names are ignored, so that older
        software can read newer releases.
        """
        values = dict(facts)
        # A release of version 1.0.0 has no towers: its adapter counts as a change of both.
        if {"base_digest", "adapter_digest"} <= facts.keys():
            tower = {"base": facts["base_digest"], "change": facts["adapter_digest"] or None}
            values = {"image_tower": tower, "text_tower": tower, **facts}
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - {*_OPTIONAL, *values}):
            raise RAdapterError(
                f"the release does not say its {', '.join(missing)}; export it again with"
                " radapter-export"
            )
        if facts["agreement"] == {}:
            values["agreement"] = None
        dense = facts["dense"]
        if isinstance(dense, Mapping) and "way" in dense:  # the method, in version 1.0.0
            values["dense"] = {"method": dense["way"], **dense}
        try:
            release: Release = _typed(cls, values, "release")
        except (TypeError, ValueError) as error:
            raise RAdapterError(
                f"the release has other facts than an export writes: {reason(error)}; export it"
                " again with radapter-export"
            ) from None
        return release

    def save(self, folder: Path) -> None:
        """Write `release.json` into a folder atomically."""
        write_text(folder / FILE, json.dumps(self.to_dict(), indent=2))

    @classmethod
    def load(cls, folder: Path) -> Release:
        """Read `release.json` from a folder."""
        path = folder / FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError("it holds no names of facts")
        except (OSError, ValueError, RecursionError) as error:
            raise RAdapterError(f"could not read {path}: {error}") from error
        return cls.from_dict(facts)


def _plain(facts: Any) -> dict[str, Any]:
    """A dataclass as values of JSON."""

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: each for name, each in pairs if each is not None or name not in _OPTIONAL}

    return asdict(facts, dict_factory=named)


_kinds = functools.cache(get_type_hints)  # which takes longer than the check of a release


def _typed(kind: Any, value: Any, name: str) -> Any:
    """Check a value of JSON against a type, and build the dataclasses in it; fields whose default
    is None may be missing. pydantic does this elsewhere, but a base installation lacks it.
    """
    arguments = get_args(kind)
    kind = get_origin(kind) or kind
    if kind in (Union, UnionType):  # of a type and None
        return None if value is None else _typed(arguments[0], value, name)
    is_facts = dataclasses.is_dataclass(kind)
    if is_facts and isinstance(value, Mapping):
        fields = dataclasses.fields(kind)
        required = [each.name for each in fields if each.default is not None]
        if lacking := [key for key in required if key not in value]:
            raise ValueError(f"{name} lacks {', '.join(lacking)}")
        kinds = _kinds(kind)
        known = [each.name for each in fields if each.name in value]
        return kind(**{key: _typed(kinds[key], value[key], f"{name}.{key}") for key in known})
    if kind is dict and isinstance(value, Mapping):
        return {key: _typed(arguments[1], each, f"{name}.{key}") for key, each in value.items()}
    if kind is list and isinstance(value, list):
        return [_typed(arguments[0], each, name) for each in value]
    if kind is tuple and isinstance(value, list) and len(value) == len(arguments):
        pairs = zip(arguments, value, strict=True)
        return tuple(_typed(part, each, name) for part, each in pairs)
    if kind is Literal:
        if value not in arguments:
            raise ValueError(f"{name} is {value!r:.80}; allowed are {', '.join(arguments)}")
        return value
    allowed = (int, float) if kind is float else kind
    if isinstance(value, allowed) and isinstance(value, bool) == (kind is bool):
        return value
    raise TypeError(f"{name} is {value!r:.80}")


def release_parameters(releases: Iterable[Release]) -> dict[str, str]:
    """Parameters of a model's config that hold its releases as JSON, the newest also unnumbered."""
    parameters: dict[str, str] = {}
    for release in sorted(releases, key=lambda release: release.version):
        text = json.dumps(release.to_dict())
        parameters[f"release.{release.version}"] = text
        parameters["release"] = text
    return parameters
