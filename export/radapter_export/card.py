"""Model cards: README.md with the head that hubs read, beside the weights of a release."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from huggingface_hub import EvalResult, ModelCardData

from radapter_serve.adapter import Metadata
from radapter_serve.evaluation.rows import KEPT
from radapter_serve.release.release import Release
from radapter_serve.sources import HUB

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
_ASK = """\
from radapter_serve import Model

model = Model("FOLDER")
print(model.classify("photo.jpg", ["a cat", "a dog"]).top)"""
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
    """The text of a release's model card, for a folder or for a repository of the `hub`.

    `metadata` is the adapter's, `curve` the figures of `Choice`, `library` opens the weights beside
    the card, and `transformers` says that the repository has that form too. No path of the machine
    is in it: of a file or folder only its name.
    """
    base = _named(release.architecture)
    title = f"{base}, fine-tuned, α = {release.alpha:g}"
    tag = metadata.pretrained or ""
    licence = next((name for start, name in _LICENCES.items() if tag.startswith(start)), None)

    # The head that hubs read.
    results = None
    if release.accuracy is not None:
        dataset = _named(release.accuracy["dataset"])
        results = [
            EvalResult(
                task_type=_TASK,
                dataset_type=re.sub(r"\W+", "-", dataset).strip("-").lower() or "data",
                dataset_name=dataset,
                metric_type=release.accuracy["metric"],
                metric_value=round(float(release.accuracy["release"]), 2),
            )
        ]
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

    # What it is.
    weights = f" with the weights {_named(tag)}" if tag else ""
    terms = "The licence of the base holds for these weights too; its publisher says which it is."
    if licence:
        terms = f"The base's licence is {licence}."
    kind = (
        "It was fine-tuned by R-Adapter (Kim et al., ECCV 2024): linear adapters that are folded"
        f" into the weights with re-scaling α = {release.alpha:g}."
    )
    if release.made_of is not None:
        tuned = {"lora": "a LoRA"}.get(release.made_of["kind"], f"a {release.made_of['kind']}")
        kind = f"It is the base and {tuned} of it, mixed at α = {release.alpha:g}."
    side = release.preprocess["size"]
    prompts = ", ".join(f"`{template}`" for template in release.templates[:3])
    more = " and more" if len(release.templates) > 3 else ""
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# {title}\n",
        f"A CLIP whose base is {base}{weights} (`{release.base_digest}`). {kind} {terms}\n\n"
        f"Embeddings have {release.embed_dim} numbers, and images {side} x {side} pixels. Prompts"
        f" were made by: {prompts}{more}.\n",
    ]

    # How to load it.
    blocks = [_LOAD[library], _ASK]
    if transformers and hub is not None:
        blocks.append(
            _LOAD["transformers"].replace('"FOLDER"', f'"{hub}", subfolder="transformers"')
        )
    code = "\n".join(f"```python\n{block}\n```\n" for block in blocks)
    if hub is None:
        parts.append(f"## Load it\n\nFOLDER is the folder of this card.\n\n{code}")
    else:
        code = code.replace("local-dir:FOLDER", f"{HUB}{hub}").replace("FOLDER", f"{HUB}{hub}")
        parts.append(f"## Load it\n\n{code}\nServed over HTTP: `radapter-serve {HUB}{hub}`.\n")

    # How it was trained.
    recipe = metadata.recipe
    if recipe:
        settings: list[tuple[str, object]] = [
            ("data", _named(str(recipe.get("data") or "unknown"))),
            *((name, recipe[name]) for name in _RECIPE if recipe.get(name) is not None),
        ]
        if metadata.held_out:
            settings.append(("held-out images", metadata.held_out))
        if metadata.classes:
            settings.append(("classes", len(metadata.classes)))
        parts.append("## How it was trained\n\n" + _table(("setting", "value"), settings))

    # The figures of each α.
    if curve:
        names = [name for name in curve[0] if name not in _OF_RULE]
        columns = ["kept of the base" if name == KEPT else _named(name) for name in names]
        rows = []
        for point in curve:
            alpha = f"{point['alpha']:g}"
            if point["alpha"] == release.alpha:
                alpha = f"**{alpha}**"
            rows.append((alpha, *(f"{point[name]:.1f}" for name in names)))
        parts.append(
            "## How much of the fine-tuning to keep\n\nOn validation data, in per cent, for each α"
            f" from 0 (the base) to 1 (all of it):\n\n{_table(('α', *columns), rows)}"
        )

    # The figures of the release.
    figures: list[tuple[str, object]] = []
    if (accuracy := release.accuracy) is not None:
        where = f"{accuracy['n']} images of {_named(accuracy['dataset'])}"
        figures.append((f"{accuracy['metric']}, {where}", f"{accuracy['release']:.2f} %"))
    if (confidence := release.confidence) is not None:
        before = f"{confidence['ece_before']:.3f}"
        figures.append(("calibration error as the model scores", before))
        if confidence.get("ece_after") is not None:
            figures.append(("the same, calibrated", f"{confidence['ece_after']:.3f}"))
    for encoder, agreement in release.agreement.items():
        if isinstance(agreement, Mapping) and "max_error" in agreement:
            what = f"largest difference of `{encoder}` from torch"
            figures.append((what, f"{agreement['max_error']:.1e}"))
    figures.append(("precision of the served encoders", release.precision))
    figures += [(f"made with {name}", version) for name, version in release.tools.items()]
    parts.append("## Figures\n\n" + _table(("figure", "value"), figures))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _named(source: str) -> str:
    """A model or data set without the folders that it lies in."""
    kind, colon, place = source.partition(":")
    if source.startswith(HUB) or not ("/" in source or "\\" in source or colon):
        return source
    return PurePath((place if colon else source).replace("\\", "/")).name or kind
