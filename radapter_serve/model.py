"""`Model`: a CLIP model in this process, with the methods of the client."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radapter_client import Client
from radapter_serve.encoders.precision import Precision
from radapter_serve.engine.engine import Engine
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.release.release import FILE, Release
from radapter_serve.release.repository import releases_of, split_repository
from radapter_serve.sources import ADAPTER, HUB

if TYPE_CHECKING:
    from radapter_serve.encoders.loaded import LoadedRelease

_FORMS = (
    "a model repository, a run or an adapter file, a folder with a checkpoint of open_clip or"
    " transformers, hf-hub:NAME, or an open_clip name with pretrained="
)


class Model(Client):
    """A model in this process, with the methods, arguments, results and errors of `Client`.

    Args:
        source: a model repository (`DIR@N` for release N), which needs no torch; or, in torch, the
            folder of a run, an adapter file, a merged checkpoint or another folder with a model of
            open_clip or transformers, or an open_clip name such as `ViT-B-32`, with its weights as
            `ViT-B-32:openai` or by `pretrained`. `hf-hub:ORGANISATION/NAME`, or with `@REVISION`,
            is a release that `radapter-export --push` sent to the hub, without torch; or another
            model on the hub, in torch.
        pretrained: weights of an open_clip name: a tag such as `openai`, or a checkpoint's path.
        base: where a run's base is, if not where it was in training; `NAME:TAG` names its weights.
        alpha: α of a run's adapter, in [0, 1]; None for its own.
        dense: method of dense embeddings for `segment`, naclip or maskclip, of a model in torch;
            None for the method that its run was trained for.
        device: "cpu", "cuda" or "cuda:N"; None for the CPU, or in torch for a GPU if there is one.
        indexes: folder of the indexes that `search` searches.
        threads: number of threads that compute a batch; None for one a core.
        timeout: seconds that one request may take.
        batch_size: most images or texts in a batch.
        precision: of computing an fp32 release: bf16 takes OpenVINO, if the processor has bf16
            and cosines with torch stay within 2e-4; auto takes what encodes fastest, and prints it
            on stderr; None is as exported.
        progress: show a bar on stderr while a call takes several batches.

    Raises:
        RAdapterError: no such model, or a broken one. Methods raise what those of `Client` raise.

    Example:
        ```python
        model = Model("model_repository")
        print(model.classify("cat.jpg", ["a cat", "a dog"]).top)
        ```
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        pretrained: str | None = None,
        *,
        base: str | None = None,
        alpha: float | None = None,
        dense: str | None = None,
        device: str | None = None,
        indexes: str | Path = "indexes",
        threads: int | None = None,
        timeout: float = 600.0,
        batch_size: int = 16,
        precision: Precision | None = None,
        progress: bool = False,
    ) -> None:
        name = os.fspath(source)
        place = name
        options: dict[str, Any] = {
            "pretrained": pretrained,
            "base": base,
            "alpha": alpha,
            "dense": dense,
        }
        if name.startswith(HUB) and all(value is None for value in options.values()):
            from radapter_export.hub import download_release

            place = str(download_release(name) or name)
        folder, number = split_repository(place)
        if releases_of(Path(folder)) or number:
            for what, value in options.items():
                if value is not None:
                    raise RAdapterError(
                        f"{what} is {value!r}, but {name} is a model repository, whose releases"
                        " have theirs; leave it out, or export another release"
                    )
            check_installed("onnxruntime", "server")
            engine = Engine.open(
                place,
                indexes=indexes,
                device=_number(device),
                threads=threads,
                precision=precision,
                say=lambda line: print(line, file=sys.stderr),
            )
        else:
            loaded = _in_torch(name, Path(indexes), device, precision, **options)
            engine = Engine([loaded])
        self._source = name
        super().__init__(
            transport=engine,
            timeout=timeout,
            batch_size=batch_size,
            # While one batch runs, the images of the next one are read.
            concurrency=2,
            progress=progress,
        )

    def __repr__(self) -> str:
        return f"Model({self._source!r})"


def _in_torch(
    name: str,
    indexes: Path,
    device: str | None,
    precision: Precision | None,
    *,
    pretrained: str | None,
    base: str | None,
    alpha: float | None,
    dense: str | None,
) -> LoadedRelease:
    """Load a run, an adapter file, a folder with a model, or a model of open_clip or the hub."""
    if precision is not None:
        raise RAdapterError(
            f"precision is {precision!r}, but {name} is no release of radapter-export; leave it out"
        )
    path = Path(name)
    is_folder = path.is_dir()
    is_run = path.suffix == ".safetensors" or (path / ADAPTER).is_file()
    if path.is_file() and not is_run:
        raise RAdapterError(f"{name} is not a model; allowed: {_FORMS}")
    if is_folder and not is_run and not any(path.glob("*config.json")):
        raise RAdapterError(f"there is no model in {name}; allowed: {_FORMS}")
    # Most names of open_clip have a hyphen, and all need weights.
    is_file_name = os.sep in name or not (pretrained or "-" in name)
    if not path.exists() and is_file_name and ":" not in name:
        raise RAdapterError(f"there is no {name}; allowed: {_FORMS}")
    if base is not None and not is_run:
        raise RAdapterError(f"base is {base!r}, but {name} is not a run; leave it out")
    check_installed("torch", "export")
    from radapter_serve.adapter import load_adapter
    from radapter_serve.adapter.in_torch import load_in_torch
    from radapter_serve.adapter.tuned import load_base_of
    from radapter_serve.clip.base import load_base, split_name

    adapter = load_adapter(path) if is_run else None
    exported = None
    if adapter is not None:
        clip = load_base_of(adapter, base, pretrained)
    elif is_folder:
        clip = load_base(f"local-dir:{name}", pretrained)
        exported = Release.load(path) if (path / FILE).is_file() else None
    else:
        clip = load_base(*split_name(name, pretrained))
    return load_in_torch(
        clip,
        adapter,
        exported=exported,
        alpha=alpha,
        dense=dense,
        device=device,
        indexes=indexes,
    )


def _number(device: str | None) -> int | None:
    """Number of the GPU for ONNX Runtime; None for the CPU."""
    kind, _, number = (device or "cpu").partition(":")
    if kind == "cpu" and not number:
        return None
    if kind == "cuda" and (number.isdecimal() or not number):
        return int(number or 0)
    raise RAdapterError(f"device is {device!r}; allowed: cpu, cuda or cuda:N")
