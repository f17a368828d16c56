"""Releases on the Hugging Face hub: model cards, pushing, and taking a release from there. Only
data is taken: the models' configs and code are those of this installation.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from radapter_export.repository import LABELLED, TOKENIZED, Repository
from radapter_serve.errors import RAdapterError, check_installed, quiet, reason
from radapter_serve.files import digest_of, disk_errors
from radapter_serve.release.agreement import SAMPLES
from radapter_serve.release.integrity import SUMS, differences, load_sums, shown, written_sums
from radapter_serve.release.release import FILE, Release
from radapter_serve.release.repository import ENCODERS, MODELS, PATCH_ENCODER, TENSORRT, releases_of
from radapter_serve.sources import (
    CARD,
    HUB,
    from_hub_or_cache,
    how_to_bring,
    is_absence,
    refused,
    split_revision,
    unreachable,
)

if TYPE_CHECKING:
    from radapter_export.settings import ExportSettings
    from radapter_serve.adapter import Metadata

# Folders of a repository on the hub
RELEASE = "release"
TRANSFORMERS = "transformers"
BUILT = "radapter"  # in the cache, next to `snapshots`, where no file of the hub is written
TOKENIZER = "tokenizer.json"
LABEL_SETS = "label_sets"
_GRAPH = ("model.onnx", "model.onnx.data", SAMPLES)
_ALLOWED = re.compile(
    rf"(?:{'|'.join(ENCODERS)})/(?:{'|'.join(map(re.escape, _GRAPH))})"
    rf"|{FILE}|{TOKENIZER}|{LABEL_SETS}/[^/]+\.npz"
)
_MAX = 2**31 - 1  # largest number that Triton takes
# Licences of open_clip's weights, by the beginning of their tags
_LICENCES = {"openai": "mit", "laion": "mit", "datacomp": "mit", "webli": "apache-2.0"}
_OF_RULE = ("alpha", "score", "behind", "plus_minus")  # columns of a curve that the choice uses
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
    """Write the text of a release's model card, for a folder or for a repository on the `hub`. The
    card has no path of this machine.
    """
    # Imported here: a server takes releases without these dependencies of an export.
    from huggingface_hub import EvalResult, ModelCardData

    from radapter_serve.evaluation.rows import KEPT

    base = _named(release.architecture)
    title = f"{base}, fine-tuned, α = {release.alpha:g}"
    tag = metadata.pretrained or ""
    licence = next((name for start, name in _LICENCES.items() if tag.startswith(start)), None)

    # Head in YAML, which the hub reads
    results = None
    if release.accuracy is not None:
        dataset = _named(release.accuracy["dataset"])
        result = EvalResult(
            task_type=_TASK,
            dataset_type=re.sub(r"\W+", "-", dataset).strip("-").lower() or "data",
            dataset_name=dataset,
            metric_type=release.accuracy["metric"],
            metric_value=round(float(release.accuracy["release"]), 2),
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

    # Introduction
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

    # Code that loads the model
    blocks = [_LOAD[library], _ASK]
    folder = "FOLDER is the folder of this card.\n\n"
    served = ""
    if hub is not None:
        if transformers:
            form = f'"{hub}", subfolder="{TRANSFORMERS}"'
            blocks.append(_LOAD[TRANSFORMERS].replace('"FOLDER"', form))
        where = f"{HUB}{hub}"
        blocks = [
            block.replace("local-dir:FOLDER", where).replace("FOLDER", where) for block in blocks
        ]
        folder = ""
        served = f"\nServed over HTTP: `radapter-serve {where}`.\n"
    code = "\n".join(f"```python\n{block}\n```\n" for block in blocks)
    parts.append(f"## Load it\n\n{folder}{code}{served}")

    # Training
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

    # Figures at each α
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

    # Figures of the release
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
    """Name of a model or data set without the folders of its path."""
    kind, colon, place = source.partition(":")
    if source.startswith(HUB) or not ("/" in source or "\\" in source or colon):
        return source
    return PurePath((place if colon else source).replace("\\", "/")).name or kind


def prepare_push(name: str, alphas: int, runtime: str) -> str:
    """Check, before the export, that a release may be pushed, and create a missing repository,
    which is private; returns its full name.
    """
    from huggingface_hub import HfApi

    if alphas > 1:
        raise RAdapterError(
            f"--push {name} sends one release, and --alpha names {alphas}; export and push each"
            " by itself"
        )
    if runtime == TENSORRT:
        raise RAdapterError(
            f"--push {name} sends graphs, and an engine of TensorRT is for one kind of GPU; leave"
            " out --format and --runtime, and run radapter-build-engine where it is served"
        )
    try:
        repository = HfApi().create_repo(name.removeprefix(HUB), private=True, exist_ok=True)
    except Exception as error:  # the hub and the network raise many kinds of errors
        raise RAdapterError(
            f"could not push to {name}: {refused(error)} (nothing was exported)"
        ) from error
    return repository.repo_id


def push(name: str, release: Release, settings: ExportSettings, card: str) -> str:
    """Push a release in one commit, replacing an earlier one; returns its name and commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    # Collect the data of the release, each file once, and its digests.
    version = str(release.version)
    task = settings.model_repository / MODELS[-1] / version
    data = {FILE: task / FILE, TOKENIZER: task / TOKENIZER}
    data |= {f"{LABEL_SETS}/{path.name}": path for path in (task / LABEL_SETS).glob("*.npz")}
    for encoder in ENCODERS:
        for file in _GRAPH:
            path = settings.model_repository / encoder / version / file
            if path.is_file():
                data[f"{encoder}/{file}"] = path
    sums = {file: digest_of(path) for file, path in data.items()}
    files: dict[str, Path | bytes] = {f"{RELEASE}/{file}": path for file, path in data.items()}
    files[f"{RELEASE}/{SUMS}"] = written_sums(sums)

    # Add the merged weights, the form of transformers, and the card.
    files |= {path.name: path for path in settings.merged.iterdir()}
    if settings.transformers is not None:
        files |= {
            f"{TRANSFORMERS}/{path.name}": path
            for path in settings.transformers.iterdir()
            if path.name not in (CARD, FILE)
        }
    files[CARD] = card.encode()

    api = HfApi()
    try:
        changes: list[CommitOperationAdd | CommitOperationDelete] = []
        for file in api.list_repo_files(name):
            if file.startswith((f"{RELEASE}/", f"{TRANSFORMERS}/")) and file not in files:
                changes.append(CommitOperationDelete(file))
        changes += [CommitOperationAdd(file, content) for file, content in sorted(files.items())]
        message = f"{release.architecture} at alpha {release.alpha:g}, by radapter-export"
        commit = api.create_commit(name, changes, commit_message=message)
    except Exception as error:  # the hub and the network raise many kinds of errors
        raise RAdapterError(
            f"could not push to {name}: {refused(error)} (nothing of it was sent, and the export is"
            f" complete in {settings.model_repository} and {settings.merged})"
        ) from error
    return f"{HUB}{name}@{commit.oid}"


def take(name: str) -> Path | None:
    """Download a release from the hub, and build a model repository of its files in the cache; None
    if there is no release.
    """
    check_installed("huggingface_hub", "server")
    from huggingface_hub import constants, snapshot_download

    repository, revision = split_revision(name)
    pattern = f"{RELEASE}/*"
    try:
        # The library warns of a repository with another kind of model, which is allowed here.
        with quiet(), from_hub_or_cache():
            snapshot = snapshot_download(repository, revision=revision, allow_patterns=[pattern])
    except Exception as error:  # the hub and the network raise many kinds of errors
        if unreachable() and is_absence(error):
            raise RAdapterError(
                f"{name} is not on this machine, and the Hugging Face hub can't be reached"
                f" ({unreachable()}); {how_to_bring(repository, folder=RELEASE)}"
            ) from error
        raise RAdapterError(
            f"could not get {name} from {constants.ENDPOINT}: {refused(error)}"
        ) from error
    folder = Path(snapshot)
    data = folder / RELEASE
    if not (data / FILE).is_file():
        return None
    built = folder.parents[1] / BUILT
    target = built / folder.name  # named after the commit
    if releases_of(target):  # built before; the caller verifies its files on opening
        return target

    # Verify the files by their digests.
    sums = load_sums(data / SUMS)
    files = {path.relative_to(data).as_posix(): path for path in data.rglob("*") if path.is_file()}
    del files[SUMS]
    problems = differences(files, sums)
    graphs = [f"{model}/{_GRAPH[0]}" for model in ENCODERS if model != PATCH_ENCODER]
    for file in {TOKENIZER, *graphs} - files.keys():
        problems[file] = "is missing"
    for file in {*sums, *files}:
        if not _ALLOWED.fullmatch(file):
            problems[file] = "is not a part of a release"
    if problems:
        raise RAdapterError(
            f"{name} is not as it was pushed: {shown(problems)}; fetch it again with: hf download"
            f' {repository} --include "{pattern}" --force-download, or push it again with'
            " radapter-export"
        )

    # Build a model repository of the files, with this installation's configs and code.
    release = Release.load(data)
    version = release.version
    models = [model for model in MODELS if model != PATCH_ENCODER or release.dense]
    with disk_errors(built, f"{name} is built there; set HF_HOME to another folder"):
        built.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built, prefix=".") as scratch:
            place = Path(scratch, "repository")
            try:
                for number in (version, release.max_batch_size):
                    if not (isinstance(number, int) and 0 < number <= _MAX):
                        raise ValueError(f"{number!r:.40} is not a version or a batch size")
                for facts in release.label_sets.values():
                    facts.keys()
                with Repository(place, models) as unfinished:
                    for model in models:
                        _link(data, sums, model, unfinished.staged(model, version))
                    unfinished.add_code(version)
                    unfinished.add_configs([release])
                    unfinished.add_sums(version)
                    unfinished.commit([version])
            except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
                raise RAdapterError(
                    f"the {FILE} of {name} is broken: {reason(error)}; push it again with"
                    " radapter-export"
                ) from error
            try:
                place.rename(target)
            except OSError:
                if not releases_of(target):  # otherwise another process built it meanwhile
                    raise
    return target


def _link(data: Path, sums: Mapping[str, str], model: str, folder: Path) -> None:
    """Link a model's files into its folder; runtimes may refuse the cache's symbolic links."""
    folder.mkdir()
    for file in sums:
        parent, _, name = file.rpartition("/")
        if parent == model:
            target = folder / name
        elif model not in ENCODERS and (
            file == FILE
            or (file == TOKENIZER and model in TOKENIZED)
            or (parent == LABEL_SETS and model in LABELLED)
        ):
            target = folder / file
        else:
            continue
        target.parent.mkdir(exist_ok=True)
        try:
            os.link((data / file).resolve(), target)
        except OSError:  # a disk without hard links
            shutil.copyfile(data / file, target)
