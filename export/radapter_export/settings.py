"""Settings of an export, the same for Python and for the flags of `radapter-export`; this module
imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from radapter_serve.errors import RAdapterError
from radapter_serve.files import checker
from radapter_serve.release.agreement import TOLERANCES, Tolerance

try:
    from pydantic import Field, ValidationError
except ModuleNotFoundError:  # when the command runs, `checker` reports this in one line

    def Field(**limits: Any) -> Any:  # type: ignore[no-redef]
        return None

    ValidationError = ValueError  # type: ignore[assignment,misc]

OWN = "own"  # name of the run's validation data
# Names instead of an α
AUTO = "auto"
BEST = "best"
DYNAMIC = "dynamic"


@dataclass(frozen=True)
class ExportSettings:
    """Settings of the releases.

    Args:
        checkpoint: a model that was tuned elsewhere, instead of an adapter: a .pt or .safetensors
            file, a model's folder, hf-hub:NAME or NAME:TAG. Alpha 1 is the checkpoint as it is,
            less is on the line from --base to it (WiSE-FT).
        lora: folder of a LoRA of peft for a CLIPModel, instead of an adapter; alpha scales its
            change of the weights.
        weights: weight of each adapter in their average; the sum is 1; equal if not given.
        base: the base that was tuned: an open_clip model with its weights, such as ViT-B-32:openai
            or ViT-B-32:PATH, local-dir:PATH or hf-hub:NAME; by default the base that the adapter or
            the LoRA names.
        model_repository: folder that radapter-serve serves; releases are added to it, and it is
            created if missing.
        merged: folder for the merged checkpoint, replaced if it holds one; with several alphas, for
            a folder of each.
        transformers: folder for the merged weights as the library transformers opens them, with
            processor and tokenizer, replaced if it holds such a model; with several alphas, for a
            folder of each. Not written if not given.
        immich: folder for the merged weights in the layout that immich loads, to replace one of
            its models; the folder is replaced if it holds such a model; with several alphas, for a
            folder of each. Not written if not given.
        label_sets: files of classes by the name of their label set, whose embeddings become part of
            the release: text, a class a line, or YAML, in which classes may have images. The run's
            own classes become the label set `classes`, unless a file of that name is given.
        templates: a file of prompt templates, a built-in set, or one template; the run's own if
            not given.
        dense: method of patch embeddings, for segmentation: naclip or maskclip; none leaves
            patch_encoder out; the run's own if not given.
        precision: precision of the encoders' weights and matrix products. int8 finds its ranges
            as it runs, for CPUs; with --calibration they are fixed, which TensorRT supports, too.
        calibration: a folder of about a hundred typical images for int8.
        validation: data as for radapter-train --val-data, on which the encoders are compared with
            torch in the task's own metric, and scores are calibrated; own for the run's own, which
            is also taken if this is not given and the precision is not fp32; none skips both.
        max_drop: points of that metric, in per cent, that the encoders may lose.
        runtime: runtime of the encoders in the server; they are checked with it.
        tolerance: largest difference from torch allowed in a component of the unit-length
            embeddings; the precision's own if not given: 1e-4 in fp32. The bound on the cosine
            widens with the square of the tolerance, down to 0.9.
        max_batch_size: images or texts in one batch of the server.
        push: ORGANISATION/NAME of a repository on the Hugging Face hub, to which the release, the
            merged weights, those for transformers if asked for, and the card are sent; it is
            created, private, if missing. Model("hf-hub:NAME") and radapter-serve hf-hub:NAME take
            it from there.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    checkpoint: Annotated[str | Path | None, tyro.conf.arg(metavar="FILE|FOLDER|NAME")] = None
    lora: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    weights: Annotated[tuple[float, ...], tyro.conf.arg(metavar="W [W ...]")] = ()
    base: str | None = None
    model_repository: Path = Path("model_repository")
    merged: Path = Path("merged")
    transformers: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    immich: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    label_sets: tyro.conf.Suppress[Mapping[str, Path]] = field(default_factory=dict)
    templates: str | Path | None = None
    dense: Annotated[str | None, tyro.conf.arg(metavar="METHOD")] = None
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    calibration: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    validation: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    max_drop: Annotated[float, Field(ge=0, le=100)] = 0.5
    runtime: Literal["onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    tolerance: Annotated[float, Field(gt=0, le=1)] | None = None
    max_batch_size: Annotated[int, Field(ge=1)] = 64
    push: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None

    def __post_init__(self) -> None:
        named = {"--merged": self.merged}
        for flag, form in (("--transformers", self.transformers), ("--immich", self.immich)):
            if form is None:
                continue
            place = form.absolute()
            for other, folder in named.items():
                taken = folder.absolute()
                if taken == place or taken in place.parents or place in taken.parents:
                    raise RAdapterError(
                        f"{other} {taken} and {flag} {place} are one folder, or one is inside the"
                        " other; give each another folder"
                    )
            named[flag] = form
        if self.calibration is not None and self.precision != "int8":
            raise RAdapterError(
                f"--calibration needs --precision int8, and the precision is {self.precision}"
            )

    @property
    def bounds(self) -> Tolerance:
        """Largest allowed distance of the encoders from torch."""
        return TOLERANCES[self.precision].widened(self.tolerance)


def checked(values: Mapping[str, Any]) -> ExportSettings:
    """Check names, types and ranges of settings."""
    try:
        return checker(ExportSettings).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise RAdapterError(
            f"{first['loc'][0]} is {first['input']!r:.80}: {first['msg']}"
        ) from None
