"""The graphs of the newest release, to be filled with other weights: a release without torch's exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from radapter_export.graph import Graph
from radapter_serve.adapter import Adapter, fold
from radapter_serve.errors import RAdapterError
from radapter_serve.inputs.labels import LabelSet
from radapter_serve.release.facts import find_release, read_release
from radapter_serve.release.repository import encoders_of

_CLOSE = 64  # roundings of float32, of a tensor's largest value: another machine folds in another order


class Newest:
    """The newest release of a repository, as the pattern of the next one.

    Args:
        repository: the model repository.

    Raises:
        RAdapterError: there is none.

    Attributes:
        facts: its `release.json`.
        dial: whether α is an input of its encoders.
        dense: how they embed patches, or "none".
        precision: of its encoders.
        runtime: by which they are served; radapter-build-engine changes it after an export.
    """

    def __init__(self, repository: str | Path) -> None:
        self._folder, self._repository = find_release(repository), Path(repository)
        self.facts = read_release(self._folder)
        self.dial = bool(self.facts.get("dynamic_alpha"))
        self.dense = str((self.facts.get("dense") or {}).get("way", "none"))
        self.precision = str(self.facts["precision"])
        self.runtime = next((encoder.runtime for encoder in encoders_of(self._repository)), "onnxruntime")

    def check(self, adapter: Adapter, dense: str | None, precision: str | None, dial: bool) -> None:
        """Refuse what only a new export can change.

        Args:
            adapter: of the next release.
            dense: the way that was asked for, or "none"; None for the release's own.
            precision: that was asked for; None for the release's own.
            dial: whether α shall be an input.

        Raises:
            RAdapterError: says what the release has.
        """
        if self.facts["base_digest"] != adapter.metadata.base_digest:
            raise self._refuse(f"is of another base or of other adapted layers ({self.facts['base_digest']})")
        if self.precision == "int8":
            raise self._refuse("is in int8, whose scales belong to its weights")
        for name, wanted, has in (("dense", dense, self.dense), ("precision", precision, self.precision)):
            if wanted not in (None, has):
                raise self._refuse(f"has {name} {has}, which an update keeps")
        if dial != self.dial:
            has = "takes any alpha: an update of it takes --alpha dynamic" if self.dial else "has its alpha folded in"
            raise self._refuse(has)

    def label_sets(self) -> dict[str, list[str]]:
        """The labels, with their synonyms, of its label sets by name.

        Raises:
            RAdapterError: it is too old to say.
        """
        found = {}
        for path in sorted((self._folder / "label_sets").glob("*.npz")):
            label_set = LabelSet.load(path)
            if not label_set.lines:
                raise RAdapterError(
                    f"{path} does not hold the synonyms of its labels; export without --update, with "
                    f"--label-set {path.stem}=FILE"
                )
            found[path.stem] = list(label_set.lines)
        return found

    def graphs(self, base: Mapping[str, Tensor], adapter: Adapter) -> list[Graph]:
        """Its graphs without the weights that have a name in a state dict or an adapter file.

        They come out only where each of these weights stands under its own name, in its own shape, with the values that
        this release must have: so what is put in its place later is in the right place.

        Args:
            base: state dict of the base.
            adapter: of the next release. Where it is another one than this release's, the values of adapted tensors
                can't be known; what is compared with torch in the end, shows them.

        Raises:
            RAdapterError: names the first weight that differs.
        """
        same = self.facts["adapter_digest"] == adapter.digest
        adapted = {f"{key}.{kind}" for key in adapter.keys for kind in ("weight", "bias")} & set(base)
        if self.dial:
            weights, changing = {**base, **adapter.tensors}, set(adapter.tensors)
        else:
            weights, changing = fold(base, adapter, self.facts["alpha"]) if same else dict(base), adapted
        unknown = set() if same else changing
        graphs, seen = [], set()
        for name in ("image_encoder", *(["patch_encoder"] if self.dense != "none" else []), "text_encoder"):
            path = self._repository / name / str(self.facts["version"]) / "model.onnx"
            try:
                model = ir.load(path)
            except Exception as error:  # of protobuf, of the file system, of onnx_ir
                raise RAdapterError(f"cannot read {path}: {error}; export without --update") from error
            for key, value in model.graph.initializers.items():
                if key in weights:
                    self._check(name, key, value, weights[key], compare=key not in unknown)
                    value.const_value = None
                    seen.add(key)
            graphs.append(Graph(name, model, {}))
        missing = sorted(changing - seen)
        if missing:
            raise self._refuse(f"has no initializer {missing[0]}")
        return graphs

    def _check(self, graph: str, key: str, value: ir.Value, weight: Tensor, *, compare: bool) -> None:
        assert value.const_value is not None and value.dtype is not None
        found = value.const_value
        if tuple(found.shape) != tuple(weight.shape):
            raise self._refuse(f"has {key} of shape {tuple(found.shape)} in {graph}, not {tuple(weight.shape)}")
        dtype = tensor_adapters.to_torch_dtype(value.dtype)
        if not compare:
            return
        wanted = weight.detach().to(dtype).float()
        # By way of float32, which holds every value of the narrower formats, and which numpy and torch both know.
        error = (torch.from_numpy(found.numpy().astype("float32")) - wanted).abs()
        # In 16 bits such a difference may turn the last bit, of numbers too small for the format's exponents, too.
        last = torch.finfo(dtype).eps * wanted.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        if not bool((error <= _CLOSE * torch.finfo(torch.float32).eps * wanted.abs().max() + 2 * last).all()):
            raise self._refuse(
                f"has other values in {key} of {graph} than this base and adapter at alpha {self._alpha}"
            )

    @property
    def _alpha(self) -> str:
        return "dynamic" if self.dial else f"{self.facts['alpha']:g}"

    def _refuse(self, reason: str) -> RAdapterError:
        return RAdapterError(f"release {self.facts['version']} {reason}; for another, export without --update")
