"""Sources of models, as far as they can be checked without torch: runs, checkpoints tuned
elsewhere, the Hugging Face hub.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from radapter_serve.errors import RAdapterError, reason, short

# The files of a run's folder.
CLASSES = "classes"  # the label set of a run's own classes
ADAPTER = "adapter.safetensors"
RECIPE = "recipe.yaml"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
RUNS = Path("runs")

# Where the adapters of a run are: after attention and feed-forward of each block of both towers or
# of the image tower, or after the last linear layer of a tower or of both.
Adapt = Literal["towers", "image-tower", "text-projection", "image-projection", "projections"]

# Prefixes of model names.
LOCAL = "local-dir:"
HUB = "hf-hub:"
CARD = "README.md"  # the model card in a model's folder
TIMEOUT_SECONDS = 5
_HUB_ERRORS = {
    401: "the hub does not know who asks, or has no such repository (401); look at the name, and"
    " log in with: hf auth login",
    403: "the hub does not allow that (403); log in with a token that may: hf auth login",
    404: "the hub has nothing of that name (404); look at it, and at the revision",
}
# Repositories of the recipes' bases, by model and tag: known before open_clip, which takes seconds
# to import.
REPOSITORIES = {
    ("ViT-B-32", "datacomp_xl_s13b_b90k"): "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    ("ViT-B-16", "openai"): "timm/vit_base_patch16_clip_224.openai",
    ("ViT-L-14", "openai"): "timm/vit_large_patch14_clip_224.openai",
    ("ViT-B-32-SigLIP2-256", "webli"): "timm/ViT-B-32-SigLIP2-256",
}
_FILES_OF_FOLDERS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_ALLOWED = (
    "allowed: a .pt or .safetensors file, a model's folder, hf-hub:NAME, or NAME:TAG such as"
    " ViT-B-32:openai"
)


def newest_run() -> Path:
    """Find the newest adapter file in ./runs; raises an `RAdapterError` if there is none."""
    adapters = sorted(RUNS.glob(f"*/{ADAPTER}"), key=lambda path: path.stat().st_mtime)
    if not adapters:
        raise RAdapterError(
            f"no run with an adapter in {RUNS.absolute()}; train one with radapter-train, or give"
            " --adapter FILE"
        )
    return adapters[-1]


def model_name(checkpoint: str) -> str | None:
    """Name with which `load_base` loads a whole checkpoint; None for a file of weights."""
    path = Path(checkpoint)
    if path.is_dir():
        return f"{LOCAL}{path}"
    if path.is_file():
        whole = path.name in _FILES_OF_FOLDERS and (path.parent / "open_clip_config.json").is_file()
        return f"{LOCAL}{path.parent}" if whole else None
    if checkpoint.startswith((LOCAL, HUB)) or ":" in checkpoint:
        return checkpoint
    raise RAdapterError(f"there is no checkpoint {short(checkpoint)}; {_ALLOWED}")


def check_base_is_named(checkpoint: str, base: str | None, alphas: Iterable[float] = ()) -> None:
    """Refuse a checkpoint that needs a base and has none: weights alone, or an α below 1."""
    if model_name(checkpoint) is None and base is None:
        raise RAdapterError(
            f"{checkpoint} holds only weights; name what was tuned with --base, such as --base"
            " ViT-B-32:openai"
        )
    for alpha in alphas:
        if 0 <= alpha < 1 and ":" not in (base or ""):
            raise needs_base(alpha, Path(checkpoint).name)


def needs_base(alpha: float, name: str) -> RAdapterError:
    """Error for an α below 1 of a checkpoint without its base."""
    return RAdapterError(
        f"alpha is {alpha:g}, which needs the weights that {name} was tuned from; give them with"
        " --base, such as --base ViT-B-32:openai, or take alpha 1"
    )


@functools.cache
def unreachable() -> str:
    """Reason why the hub cannot be reached, "" if it can; checked once in a process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # the exceptions depend on the version of the HTTP library
        return reason(error)
    return ""


@contextmanager
def from_hub_or_cache() -> Iterator[None]:
    """Load only from the cache within the block, without retries, if the hub is unreachable."""
    if not unreachable():
        yield
        return
    from huggingface_hub import constants

    modules = [(constants, "HF_HUB_OFFLINE")]
    if "datasets" in sys.modules:  # has its own copy of the setting
        modules.append((sys.modules["datasets"].config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in modules]
    for module, name in modules:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(modules, before, strict=True):
            setattr(module, name, value)


def check_weights(name: str, pretrained: str | None) -> None:
    """Refuse a base whose weights are neither cached nor within reach, as far as its repository is
    known without open_clip.
    """
    if name.startswith(HUB):
        repository, _ = split_revision(name)
    else:
        repository = REPOSITORIES.get((name, pretrained or ""), "")
    if not repository:
        return
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots")
    cached = any(folder.glob("*/*.safetensors")) or any(folder.glob("*/*.bin"))
    if not cached and unreachable():
        raise no_weights(name, pretrained, repository)


def no_weights(name: str, pretrained: str | None, repository: str) -> RAdapterError:
    """Error for a base whose weights can't be had; says how to bring them."""
    return RAdapterError(
        f"the weights of {name}{f' ({pretrained})' if pretrained else ''} are not on this machine,"
        f" and the Hugging Face hub can't be reached ({unreachable()});"
        f" {how_to_bring(repository)}; or fetch them with `hf download {repository} --local-dir"
        f" clip`, copy the folder here, and give it with --base {LOCAL}clip"
    )


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `NAME` or `NAME@REVISION`, with or without `hf-hub:`, into repository and revision."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    return repository, revision or None


def refused(error: BaseException) -> str:
    """Explain an error of the hub's library, and what to do about it."""
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        return "that is not a name of a repository; write ORGANISATION/NAME"
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return _HUB_ERRORS.get(status, f"the hub answers {status}; try again later")
    if why := unreachable():
        return f"the hub can't be reached ({why}); try again with a connection"
    return reason(error)


def is_absence(error: BaseException | None) -> bool:
    """True if the file is not cached and cannot be downloaded."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = LocalEntryNotFoundError | OfflineModeIsEnabled
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def how_to_bring(repository: str, kind: str = "model", folder: str | None = None) -> str:
    """Advice for a machine without a connection; `kind` is model or dataset."""
    from huggingface_hub import constants

    flag = "" if kind == "model" else " --repo-type dataset"
    if folder is not None:
        flag += f' --include "{folder}/*"'
    return (
        f"on a machine with a connection run `hf download {repository}{flag}`, and copy"
        f" {kind}s--{repository.replace('/', '--')} from its cache into {constants.HF_HUB_CACHE}"
        " here"
    )
