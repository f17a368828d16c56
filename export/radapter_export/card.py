"""A model card: what a release is, for who finds it on a hub or in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from huggingface_hub import EvalResult, ModelCardData

from radapter_serve.adapter import Metadata
from radapter_serve.evaluation.results import KEPT
from radapter_serve.hub import HUB
from radapter_serve.release.release import Release

LIBRARIES = ("open_clip", "transformers")
# Licences of weights that open_clip brings, by how their tags begin.
_LICENCES = {"openai": "mit", "laion": "mit", "datacomp": "mit", "webli": "apache-2.0"}
_OF_RULE = ("alpha", "score", "behind", "plus_minus")  # of a curve, what chose
_TASK = "zero-shot-image-classification"
_LOAD = {
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "transformers": """\
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")""",
}
_RECIPE = (
    *("task", "rank", "drop", "momentum", "delta", "epsilon", "positives"),
    *("batch_size", "epochs", "steps", "learning_rate", "precision"),
)


def card_of(
    release: Release,
    metadata: Metadata,
    curve: Sequence[Mapping[str, float]],
    library: str,
    hub: str | None = None,
    *,
    transformers: bool = False,
) -> str:
    """The text of a model card, with the head that hubs read.

    No path of the machine that made the release is in it: of a file or folder only its name.

    Args:
        release: whose card it is.
        metadata: of what was trained.
        curve: of each α what validation data said, in per cent, as of `Choice`; empty where none
            was chosen.
        library: that opens the weights beside the card, one of `LIBRARIES`.
        hub: name of the repository on the hub that the card is for; None for a folder.
        transformers: whether that repository has the form of transformers, too.
    """
    parts = [
        f"---\n{_head(release, metadata, library)}\n---\n",
        f"# {_title(release)}\n",
        _what(release, metadata),
        _load(library, hub, transformers=transformers),
        _how(metadata),
        _alphas(release, curve),
        _figures(release),
    ]
    return "\n".join(part for part in parts if part)


def _load(library: str, hub: str | None, *, transformers: bool) -> str:
    where = "FOLDER is the folder of this card.\n\n" if hub is None else ""
    text = (
        f"## Load it\n\n{where}```python\n{_LOAD[library]}\n```\n\n```python\n"
        'from radapter_serve import Model\n\nmodel = Model("FOLDER")\n'
        'print(model.classify("photo.jpg", ["a cat", "a dog"]).top)\n```\n'
    )
    if hub is None:
        return text
    text = text.replace("local-dir:FOLDER", f"{HUB}{hub}").replace("FOLDER", f"{HUB}{hub}")
    if transformers:
        own = _LOAD["transformers"].replace('"FOLDER"', f'"{hub}", subfolder="transformers"')
        text += f"\n```python\n{own}\n```\n"
    return f"{text}\nServed over HTTP: `radapter-serve {HUB}{hub}`.\n"


def _head(release: Release, metadata: Metadata, library: str) -> str:
    base = release.architecture
    accuracy = release.accuracy
    results = None
    if accuracy is not None:
        dataset = _named(accuracy["dataset"])
        results = [
            EvalResult(
                task_type=_TASK,
                dataset_type=re.sub(r"\W+", "-", dataset).strip("-").lower() or "data",
                dataset_name=dataset,
                metric_type=accuracy["metric"],
                metric_value=round(float(accuracy["release"]), 2),
            )
        ]
    data = ModelCardData(
        license=_licence(metadata.pretrained),
        library_name=library,
        pipeline_tag=_TASK,
        tags=["clip", "r-adapter", "zero-shot"],
        base_model=base.removeprefix(HUB) if base.startswith(HUB) else None,
        model_name=_title(release) if results else None,
        eval_results=results,
    )
    return data.to_yaml()


def _title(release: Release) -> str:
    return f"{_named(release.architecture)}, fine-tuned, α = {release.alpha:g}"


def _what(release: Release, metadata: Metadata) -> str:
    base = _named(release.architecture)
    if metadata.pretrained:
        base += f" with the weights {_named(metadata.pretrained)}"
    licence = _licence(metadata.pretrained)
    terms = (
        f"The base's licence is {licence}."
        if licence
        else "The licence of the base holds for these weights too; its publisher says which it is."
    )
    if release.made_of is None:
        made = (
            "It was fine-tuned by R-Adapter (Kim et al., ECCV 2024): linear adapters that are"
            f" folded into the weights with re-scaling α = {release.alpha:g}."
        )
    else:
        kind = {"lora": "a LoRA"}.get(release.made_of["kind"], f"a {release.made_of['kind']}")
        made = f"It is the base and {kind} of it, mixed at α = {release.alpha:g}."
    shape = f"Embeddings have {release.embed_dim} numbers, and images {release.preprocess['size']}"
    return (
        f"A CLIP whose base is {base} (`{release.base_digest}`). {made} {terms}\n\n{shape} x"
        f" {release.preprocess['size']} pixels. Prompts were made by:"
        f" {', '.join(f'`{template}`' for template in release.templates[:3])}"
        f"{' and more' if len(release.templates) > 3 else ''}.\n"
    )


def _how(metadata: Metadata) -> str:
    recipe = metadata.recipe
    if not recipe:
        return ""
    rows = [(name, recipe[name]) for name in _RECIPE if recipe.get(name) is not None]
    rows.insert(0, ("data", _named(str(recipe.get("data") or "unknown"))))
    if metadata.held_out:
        rows.append(("held-out images", metadata.held_out))
    if metadata.classes:
        rows.append(("classes", len(metadata.classes)))
    return "## How it was trained\n\n" + _table(("setting", "value"), rows)


def _alphas(release: Release, curve: Sequence[Mapping[str, float]]) -> str:
    if not curve:
        return ""
    names = [name for name in curve[0] if name not in _OF_RULE]
    head = ("α", *("kept of the base" if name == KEPT else _named(name) for name in names))
    rows = []
    for point in curve:
        values = [f"{point[name]:.1f}" for name in names]
        here = point["alpha"] == release.alpha
        alpha = f"**{point['alpha']:g}**" if here else f"{point['alpha']:g}"
        rows.append((alpha, *values))
    return (
        "## How much of the fine-tuning to keep\n\nOn validation data, in per cent, for each α from"
        " 0 (the base) to 1 (all of it):\n\n" + _table(head, rows)
    )


def _figures(release: Release) -> str:
    rows: list[tuple[str, object]] = []
    if (accuracy := release.accuracy) is not None:
        where = f"{accuracy['n']} images of {_named(accuracy['dataset'])}"
        rows.append((f"{accuracy['metric']}, {where}", f"{accuracy['release']:.2f} %"))
    if (confidence := release.confidence) is not None:
        rows.append(("calibration error as the model scores", f"{confidence['ece_before']:.3f}"))
        if confidence.get("ece_after") is not None:
            rows.append(("the same, calibrated", f"{confidence['ece_after']:.3f}"))
    for encoder, found in release.agreement.items():
        if isinstance(found, Mapping) and "max_error" in found:
            rows.append(
                (f"largest difference of `{encoder}` from torch", f"{found['max_error']:.1e}")
            )
    rows.append(("precision of the served encoders", release.precision))
    rows += [(f"made with {name}", version) for name, version in release.tools.items()]
    return "## Figures\n\n" + _table(("figure", "value"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _licence(pretrained: str | None) -> str | None:
    tag = pretrained or ""
    return next((name for start, name in _LICENCES.items() if tag.startswith(start)), None)


def _named(source: str) -> str:
    """A model or data set without the folders that it lies in."""
    kind, colon, place = source.partition(":")
    if source.startswith(HUB) or not ("/" in source or "\\" in source or colon):
        return source
    return PurePath((place if colon else source).replace("\\", "/")).name or kind
