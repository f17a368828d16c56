"""Loading of a pretrained CLIP: an open_clip architecture with its weights, or a folder, local or
on a hub.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
from open_clip import CLIP
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from radapter_serve.clip.towers import pool_type, text_tower
from radapter_serve.clip.transformers import NAFLEX, read
from radapter_serve.errors import RAdapterError, cause, quiet, reason, short
from radapter_serve.files import check_model_file
from radapter_serve.sources import (
    HUB,
    LOCAL,
    from_hub_or_cache,
    is_absence,
    no_weights,
    split_revision,
    unreachable,
)

# The other functions of `init` call one of these.
_DRAWS = (Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_)
_OF_A_MODEL = ["*.json", "*.safetensors", "*.txt", "*.model"]  # files to fetch from a hub
# Tokenizer fields of open_clip's own configurations. open_clip passes other fields to
# `transformers`.
_TOKENIZER_FIELDS = (
    *("clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask"),
)
_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation")
# Fields that make `transformers` import code, read another file instead, or fetch a kernel.
_CODE_FIELDS = (
    *("auto_map", "trust_remote_code", "configuration_files", "custom_generate"),
    *("quantization_config", "use_kernels"),
)
_TIMM_NAME = re.compile(r"[\w.]+")
_MAX_CONFIG = 4 * 2**20  # bytes of a configuration
# Far above every model; open_clip makes what a configuration says before it reads the weights.
_MOST = {
    "layers": 1000,
    "num_hidden_layers": 1000,
    "context_length": 10_000,
    "width": 10_000,
    "hidden_size": 10_000,
    "embed_dim": 10_000,
    "image_size": 2048,
}


@dataclass(frozen=True)
class Base:
    """A pretrained CLIP in eval mode, fp32, on the CPU, with open_clip's `model_cfg` and
    `preprocess_cfg`; `name` and `pretrained` are those of `load_base`.
    """

    name: str
    pretrained: str | None
    model: nn.Module
    config: dict[str, Any]
    preprocess: dict[str, Any]
    tokenizer: Callable[[list[str]], Tensor]

    def __post_init__(self) -> None:
        """Refuse weights that are not finite, and a preprocessing that open_clip would only fail
        with at the first image.
        """
        for name, weight in self.model.state_dict().items():
            if not weight.isfinite().all():
                raise RAdapterError(
                    f"{self.name} is damaged: its weight {name} holds values that are not finite;"
                    " fetch or save it again"
                )
        mean, std = (self.preprocess.get(field) for field in ("mean", "std"))
        for field, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
            numbers = values if isinstance(values, list | tuple) else []
            good = [isinstance(v, int | float) and least < v < math.inf for v in numbers]
            if good != [True] * 3:
                above = " above 0" if field == "std" else ""
                raise RAdapterError(
                    f"{self.name}: {field} of its preprocess_cfg is {short(values)}; allowed: three"
                    f" numbers{above}"
                )

    @property
    def image_size(self) -> int:
        """Side of the model's input images in pixels; an error if they are not square."""
        size = self.preprocess["size"]
        sides = {int(side) for side in size} if isinstance(size, (tuple, list)) else {int(size)}
        if len(sides) > 1:
            raise RAdapterError(
                f"{self.name} takes images of {size}; only square ones can be exported"
            )
        return sides.pop()


def split_name(name: str, pretrained: str | None = None) -> tuple[str, str | None]:
    """Split `ViT-B-32:openai` into the arguments of `load_base`; refuses weights named twice."""
    if name.startswith((LOCAL, HUB)):
        return name, None
    model, _, tag = name.partition(":")
    if tag and pretrained:
        raise RAdapterError(f"the weights of {model} are named twice: {tag} and {pretrained}")
    return model, tag or pretrained


def load_base(name: str, pretrained: str | None = None, *, images: bool = True) -> Base:
    """Load a CLIP with its weights, never with random ones, and without running foreign code: an
    open_clip architecture with a tag or a checkpoint's path, or `local-dir:PATH` or `hf-hub:NAME`,
    a folder in the form of open_clip or of `transformers`. Without `images` the model has no image
    tower, and of a safetensors file in the form of open_clip its weights are not read.
    """
    quick_gelu = False
    source = name
    if (folder := _folder(name)) is not None:
        check_folder(folder)
        is_theirs = (folder / "config.json").is_file()
        if is_theirs and not (folder / "open_clip_config.json").is_file():
            try:
                with quiet():
                    clip, config, read_tokens = read(folder)
            except Exception as error:  # the library raises many kinds of errors
                raise RAdapterError(
                    f"could not load {name} in the form of transformers: {reason(error)}"
                ) from error
            preprocess = dict(clip.visual.preprocess_cfg)  # type: ignore[arg-type,union-attr]
            if not images:
                clip.visual = nn.Identity()
            return Base(name, None, clip.eval(), config, preprocess, read_tokens)
        pretrained = None
        source = f"{LOCAL}{folder}"
        config = _local_config(folder)
    else:
        config = {} if os.sep in name or ":" in name else open_clip.get_model_config(name)
        if not config and Path(name).is_dir():
            raise RAdapterError(f"{name} is a folder; name it {LOCAL}{name}")
        if os.sep in name:
            raise RAdapterError(
                f"there is no folder {name}; allowed: local-dir:PATH, hf-hub:NAME, or a name of"
                " open_clip such as ViT-B-32"
            )
        if not config:
            if "naflex" in name.lower():
                raise RAdapterError(f"{name} is {NAFLEX}")
            names = open_clip.list_models()
            stem = name.split("-")[0].lower()
            similar = [other for other in names if other.lower().startswith(stem)] or names
            raise RAdapterError(
                f"unknown model {name!r}; allowed: local-dir:PATH, hf-hub:NAME, or one of"
                f" {', '.join(similar[:20])}"
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not pretrained or not (pretrained in tags or Path(pretrained).is_file()):
            raise RAdapterError(
                f"no weights for {name}: pretrained is {pretrained!r}; allowed: the path of a"
                f" checkpoint, or one of {', '.join(tags) or 'no tags for this model'}"
            )
        if Path(pretrained).is_file():
            quick_gelu = _quick_gelu(name, config, Path(pretrained))
        # If a tag's activation differs from the architecture's, open_clip only warns, but the
        # outputs would change.
        quick_gelu |= bool(
            (open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu", False)
        )
    if "naflex" in str(_table(config, "vision_cfg").get("timm_model_name")):
        raise RAdapterError(f"{name} is {NAFLEX}")
    try:
        with quiet(), _source(name, pretrained):
            if pretrained and Path(pretrained).is_file():
                check_model_file(Path(pretrained))
            with _NoRandomWeights(), contextlib.nullcontext() if images else _no_image_weights():
                model = open_clip.create_model(
                    source, pretrained, force_quick_gelu=quick_gelu, require_pretrained=True
                )
            tokenizer = open_clip.get_tokenizer(source)
    except RAdapterError:
        raise
    except Exception as error:  # open_clip, the hub and torch raise many kinds of errors
        raise RAdapterError(
            f"could not load {name} (pretrained {pretrained}): {reason(error)}"
        ) from error
    # Each tower must pool to one embedding. A text tower with an appended class token (CoCa) does.
    text = text_tower(model)
    pools = {"image": getattr(model.visual, "pool_type", "")}
    if getattr(text, "cls_emb", None) is None and isinstance(text, CLIP | TextTransformer):
        pools["text"] = pool_type(text)
    for tower, pool in pools.items():
        if pool == "none":
            raise RAdapterError(
                f"{name} can't be used: its {tower} tower does not pool (pool_type none)"
            )
    config = copy.deepcopy(config)
    config["quick_gelu"] = any(isinstance(module, QuickGELU) for module in model.modules())
    preprocess = dict(model.visual.preprocess_cfg)
    if not images:
        model.visual = nn.Identity()
    return Base(name, pretrained, model.eval(), config, preprocess, tokenizer)


class _NoRandomWeights(TorchFunctionMode):
    """Skips random initialization while a model is made, as all weights come from a file."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        values = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else values["tensor"]
        return func(*args, **values)


@contextlib.contextmanager
def _no_image_weights() -> Iterator[None]:
    """Leave the weights of the image tower of a model that is made as they are: each is loaded from
    itself, and neither its memory nor its place in the file is touched.
    """

    def load_itself(tower: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        state.update({f"{prefix}{name}": p for name, p in tower.named_parameters()})

    def registered(_: nn.Module, name: str, module: nn.Module) -> None:
        if name == "visual":
            module.register_load_state_dict_pre_hook(load_itself)  # type: ignore[no-untyped-call]

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def _folder(name: str) -> Path | None:
    """The folder of a model, fetched if it is on the hub; None for an architecture."""
    if name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL))
    if not name.startswith(HUB):
        return None
    from huggingface_hub import snapshot_download

    hub, revision = split_revision(name)
    get = partial(snapshot_download, hub, revision=revision, ignore_patterns=["*/*"])
    try:
        with _source(name, None):
            folder = Path(get(allow_patterns=_OF_A_MODEL))
            if not any(folder.glob("*.safetensors")):
                get(allow_patterns=[*_OF_A_MODEL, "*.bin"])
        return folder
    except RAdapterError:
        raise
    except Exception as error:  # the hub and the network raise many kinds of errors
        raise RAdapterError(
            f"could not get {name} from the Hugging Face hub: {reason(error)}"
        ) from error


@contextlib.contextmanager
def _source(name: str, pretrained: str | None) -> Iterator[None]:
    """Load from the cache if the hub can't be reached; the error says how to bring the weights."""
    local = name.startswith(LOCAL) or (pretrained is not None and Path(pretrained).is_file())
    if local or not unreachable():
        yield
        return
    try:
        with from_hub_or_cache():
            yield
    except Exception as error:
        if not is_absence(error):
            raise
        if name.startswith(HUB):
            repository, _ = split_revision(name)
        else:
            tag = open_clip.get_pretrained_cfg(name, pretrained or "") or {}
            repository = str(tag.get("hf_hub", "")).rstrip("/")
        if not repository:
            raise
        raise no_weights(name, pretrained, repository) from error


def _local_config(folder: Path) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    try:
        check_model_file(path)
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        if not isinstance(config, dict):
            raise TypeError("model_cfg is no table")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RAdapterError(
            f"{folder} is not a model folder: {path.name} is missing or broken ({error}), and it"
            " holds no config.json of transformers"
        ) from error
    return config


def _quick_gelu(name: str, config: dict[str, Any], checkpoint: Path) -> bool:
    """True if a checkpoint was trained with QuickGELU, according to its configuration or its
    name.
    """
    if (checkpoint.parent / "open_clip_config.json").is_file():
        quick = bool(_local_config(checkpoint.parent).get("quick_gelu", False))
    else:
        openai = "openai" in checkpoint.name.lower() or any(
            part.endswith(".openai") for part in checkpoint.parts
        )
        if (
            not openai
            and not config.get("quick_gelu")
            and f"{name}-quickgelu" in open_clip.list_models()
        ):
            print(
                f"note: {checkpoint} does not say which activation it was trained with; {name} has"
                f" GELU. For weights of OpenAI name the architecture {name}-quickgelu",
                file=sys.stderr,
            )
        return openai
    if config.get("quick_gelu") and not quick:
        raise RAdapterError(
            f"{name} computes with QuickGELU but {checkpoint} was trained with GELU, as the"
            " open_clip_config.json beside it says; name the architecture"
            f" {name.removesuffix('-quickgelu')}"
        )
    return quick


def check_folder(folder: Path) -> None:
    """Refuse a model's folder that could run code, naming the field, or that holds a file which may
    be read without an end.
    """
    _check_files(folder)
    path = folder / "open_clip_config.json"
    config = _read(path) if path.is_file() else None
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        return  # not a configuration of open_clip; reading it raises the error
    image, text, multimodal = (
        _table(model, name) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")
    )
    for field in _table(text, "tokenizer_kwargs"):
        if field not in _TOKENIZER_FIELDS:
            allowed = f"allowed are {', '.join(_TOKENIZER_FIELDS)}"
            raise _refused(path, f"tokenizer_kwargs.{field}", allowed)
    name = image.get("timm_model_name")
    if name is not None and not _TIMM_NAME.fullmatch(str(name)):
        allowed = "allowed is the name of one of timm's models"
        raise _refused(path, f"timm_model_name {short(name)}", allowed)
    for tower in (text, multimodal):
        if tower.get("hf_model_name"):
            _check_files(_folder_of_config(str(tower["hf_model_name"])))


def _check_files(folder: Path) -> None:
    """Check the sizes of a folder's files, and the fields, at any depth, of all configurations that
    `transformers` may read.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_dir():
            try:
                check_model_file(path)
            except (OSError, ValueError) as error:
                raise RAdapterError(
                    f"could not load {path}: {cause(error)}; take it out of the model's folder, or"
                    " fetch the model again"
                ) from error
    if (folder / "adapter_config.json").exists():
        raise RAdapterError(
            f"{folder} holds adapter_config.json, an adapter of peft: export it with --lora, or"
            " merge it into the weights and delete it"
        )
    for path in sorted(folder.glob("*config*.json")):
        waiting = [_read(path)]
        while waiting:
            part = waiting.pop()
            if isinstance(part, list):
                waiting += part
            for field, value in part.items() if isinstance(part, dict) else ():
                waiting.append(value)
                if field in _CODE_FIELDS:
                    raise _refused(path, field, "a base may not bring code")
                if field in _ATTENTION and "/" in json.dumps(value):
                    raise _refused(path, f"{field} {short(value)}", "a base may not bring code")
                if isinstance(value, int) and value > _MOST.get(field, value):
                    raise RAdapterError(
                        f"{path} says that {field} is {value}; allowed: at most {_MOST[field]}"
                    )


def _folder_of_config(name: str) -> Path:
    """The folder with a text tower's configuration, fetched from the hub unless it is local."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the hub and the network raise many kinds of errors
        where = f"the text tower {short(name)} from the Hugging Face hub"
        raise RAdapterError(f"could not get {where}: {reason(error)}") from error


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise RAdapterError(f"{path} has more than {_MAX_CONFIG} bytes; no configuration has")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RAdapterError(f"could not load {path}: it is not JSON ({reason(error)})") from error


def _table(of: dict[str, Any], name: str) -> dict[str, Any]:
    table = of.get(name)
    return table if isinstance(table, dict) else {}


def _refused(path: Path, what: str, allowed: str) -> RAdapterError:
    return RAdapterError(f"{path} has {what}, with which a library may run foreign code; {allowed}")
