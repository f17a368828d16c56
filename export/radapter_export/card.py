"""The model card of a release: one template, and the values that it is filled with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from huggingface_hub import EvalResult, ModelCardData

from radapter_export.hub import TRANSFORMERS
from radapter_serve.adapter import Metadata
from radapter_serve.evaluation.alpha_choice import CurvePoint, kept_at
from radapter_serve.evaluation.rows import what_is_kept
from radapter_serve.release.release import Release
from radapter_serve.sources import HUB

CARD = """\
---
{head}
---

# {title}

A CLIP whose base is {base}{weights} (`{digest}`). {kind} {terms}

Embeddings have {width} numbers, and images {side} x {side} pixels. Prompts were made by: {prompts}.

## Load it

{load}
{training}{curve}## Figures

{figures}"""
TRAINING = """\
## How it was trained

{table}
"""
CURVE = """\
## How much of the fine-tuning to keep

On validation data, in per cent, for each α from 0 (the base) to 1 (all of it):

{table}
{kept}"""
LOAD_OPEN_CLIP = """\
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("{open_clip}")
tokenizer = open_clip.get_tokenizer("{open_clip}")
```
"""
LOAD_TRANSFORMERS = """\
```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({transformers})
processor = AutoProcessor.from_pretrained({transformers})
```
"""
ASK = """\
```python
from radapter_serve import Model

model = Model("{place}")
print(model.classify("photo.jpg", ["a cat", "a dog"]).top)
```
"""
# Licences of open_clip's weights, by the beginning of their tags
_LICENCES = {"openai": "mit", "laion": "mit", "datacomp": "mit", "webli": "apache-2.0"}
_TASK = "zero-shot-image-classification"
_RECIPE = (
    *("task", "adapt", "rank", "drop", "momentum", "delta", "epsilon", "positives"),
    *("batch_size", "epochs", "steps", "learning_rate", "precision"),
)


def card_of(
    release: Release,
    metadata: Metadata,
    curve: Sequence[CurvePoint],
    library: str,
    hub: str | None = None,
    *,
    transformers: bool = False,
) -> str:
    """Write the text of a release's model card, for a folder or for a repository on the `hub`. The
    card has no path of this machine.
    """
    base = _named(release.architecture)
    title = f"{base}, fine-tuned, α = {release.alpha:g}"
    tag = metadata.pretrained or ""
    licence = next((name for start, name in _LICENCES.items() if tag.startswith(start)), None)

    # Introduction
    terms = "The licence of the base holds for these weights too; its publisher says which it is."
    if licence:
        terms = f"The base's licence is {licence}."
    kind = (
        "It was fine-tuned with R-Adapter (Kim et al., ECCV 2024): linear adapters that are folded"
        f" into the weights with re-scaling α = {release.alpha:g}."
    )
    if release.made_of is not None:
        tuned = {"lora": "a LoRA"}.get(release.made_of.kind, f"a {release.made_of.kind}")
        kind = f"It is the base and {tuned} of it, mixed at α = {release.alpha:g}."
    prompts = ", ".join(f"`{template}`" for template in release.templates[:3])
    if len(release.templates) > 3:
        prompts += " and more"

    return CARD.format(
        head=_head(release, title, licence, library),
        title=title,
        base=base,
        weights=f" with the weights {_named(tag)}" if tag else "",
        digest=release.base_digest,
        kind=kind,
        terms=terms,
        width=release.embed_dim,
        side=release.preprocess.size,
        prompts=prompts,
        load=_load(library, hub, transformers=transformers),
        training=_training(metadata),
        curve=_curve(curve, release.alpha),
        figures=_figures(release),
    )


def _head(release: Release, title: str, licence: str | None, library: str) -> str:
    """The card's head in YAML, which the hub reads."""
    results = None
    if release.accuracy is not None:
        dataset = _named(release.accuracy.dataset)
        result = EvalResult(
            task_type=_TASK,
            dataset_type=re.sub(r"\W+", "-", dataset).strip("-").lower() or "data",
            dataset_name=dataset,
            metric_type=release.accuracy.metric,
            metric_value=round(release.accuracy.release, 2),
        )
        results = [result]
    is_on_hub = release.architecture.startswith(HUB)
    head = ModelCardData(
        license=licence,
        library_name=library,
        pipeline_tag=_TASK,
        tags=["clip", "r-adapter", "zero-shot"],
        base_model=release.architecture.removeprefix(HUB) if is_on_hub else None,
        model_name=title if results else None,
        eval_results=results,
    )
    return head.to_yaml()


def _load(library: str, hub: str | None, *, transformers: bool) -> str:
    """Code that loads the model, from its folder or from the hub."""
    if hub is None:
        code = LOAD_TRANSFORMERS if library == TRANSFORMERS else LOAD_OPEN_CLIP
        return f"FOLDER is the folder of this card.\n\n{code}\n{ASK}".format(
            open_clip="local-dir:FOLDER", transformers='"FOLDER"', place="FOLDER"
        )
    place = f"{HUB}{hub}"
    blocks = [LOAD_OPEN_CLIP, ASK, *([LOAD_TRANSFORMERS] if transformers else [])]
    form = f'"{hub}", subfolder="{TRANSFORMERS}"'
    code = "\n".join(blocks).format(open_clip=place, transformers=form, place=place)
    return f"{code}\nServed over HTTP: `radapter-serve {place}`.\n"


def _training(metadata: Metadata) -> str:
    """The section about the run; empty if there was none."""
    recipe = metadata.recipe
    if not recipe:
        return ""
    settings: list[tuple[str, object]] = [
        ("data", _named(str(recipe.get("data") or "unknown"))),
        *((name, recipe[name]) for name in _RECIPE if recipe.get(name) is not None),
    ]
    if metadata.held_out:
        settings.append(("held-out images", metadata.held_out))
    if metadata.classes:
        settings.append(("classes", len(metadata.classes)))
    return TRAINING.format(table=_table(("setting", "value"), settings))


def _curve(curve: Sequence[CurvePoint], chosen: float) -> str:
    """The section with the figures at each α; empty if none were measured."""
    if not curve:
        return ""
    names = list(curve[0].metrics)
    has_kept = any(point.kept is not None for point in curve)
    rows = []
    for point in curve:
        alpha = f"{point.alpha:g}"
        cells = [f"**{alpha}**" if point.alpha == chosen else alpha]
        if has_kept:
            cells.append("" if point.kept is None else f"{100 * point.kept:.1f}")
        cells += [f"{100 * point.metrics[name]:.1f}" for name in names]
        rows.append(cells)
    columns = ["α", *(["kept of the base"] if has_kept else []), *map(_named, names)]
    share = kept_at(curve, chosen)
    sentence = ""
    if share is not None:
        sentence = what_is_kept(chosen, share)
        sentence = f"{sentence[0].upper()}{sentence[1:]}\n\n"
    return CURVE.format(table=_table(columns, rows), kept=sentence)


def _figures(release: Release) -> str:
    """The table of the release's accuracy, calibration, agreement and tools."""
    figures: list[tuple[str, object]] = []
    if (accuracy := release.accuracy) is not None:
        where = f"{accuracy.n} images of {_named(accuracy.dataset)}"
        figures.append((f"{accuracy.metric}, {where}", f"{accuracy.release:.2f} %"))
    if (confidence := release.confidence) is not None:
        before = f"{confidence.ece_before:.3f}"
        figures.append(("calibration error as the model scores", before))
        if confidence.ece_after is not None:
            figures.append(("the same, calibrated", f"{confidence.ece_after:.3f}"))
    measured = {} if release.agreement is None else release.agreement.encoders
    for encoder, agreement in measured.items():
        what = f"largest difference of `{encoder}` from torch"
        figures.append((what, f"{agreement.max_error:.1e}"))
    figures.append(("precision of the served encoders", release.precision))
    figures += [(f"made with {name}", version) for name, version in release.tools.items()]
    return _table(("figure", "value"), figures)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _named(source: str) -> str:
    """Name of a model or data set without the folders of its path."""
    kind, colon, place = source.partition(":")
    if source.startswith(HUB) or not ("/" in source or "\\" in source or colon):
        return source
    return PurePath((place if colon else source).replace("\\", "/")).name or kind
