"""Adapters on a model in memory: find their sites, attach, drop, scale and remove them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from radapter_serve.adapter.file import PROJECTIONS, Adapter, Metadata, check_base
from radapter_serve.contract.errors import check_alpha
from radapter_serve.errors import RAdapterError
from radapter_serve.sources import Adapt

Form = Literal["weight", "activation"]


@dataclass(frozen=True)
class Site:
    """One adapted layer.

    Attributes:
        key: the layer's name in the state dict; the fold changes `key.weight` and `key.bias`, or
            `key` itself.
        layer: the linear layer, or the module that has the projection as a parameter.
        output: the module whose output the adapter takes: the layer, or the whole attention, as
            `nn.MultiheadAttention` never calls its `out_proj` as a module.
        parameter: name of a projection [in, out] in `layer`; empty for a linear layer.
    """

    key: str
    layer: nn.Module
    output: nn.Module
    parameter: str = ""

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors in `layer` that the fold changes."""
        if self.parameter:
            return [self.parameter]
        return ["weight"] if self.layer.bias is None else ["weight", "bias"]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]."""
        tensor: Tensor = getattr(self.layer, self.parameter or "weight")
        return tensor.T if self.parameter else tensor


@dataclass(frozen=True)
class _Place:
    """An adapted layer inside a block, by module names: the layer, its name in some of these
    blocks, the module whose output is the layer's, and a norm that may follow.
    """

    layer: str
    instead: str = ""
    output: str = ""  # by default the layer
    # By default no norm: after one, the adapter would not be the last linear map, as in the paper.
    norm: str = ""


_NATIVE = (_Place("attn.out_proj", output="attn", norm="ln_attn"), _Place("mlp.c_proj"))
_TIMM = (_Place("attn.proj"), _Place("mlp.fc2", instead="mlp.w2"))  # w2 is ViTamin's
_TIMM_POST_NORM = (_Place("attn.proj", norm="norm1"), _Place("mlp.fc2", norm="norm2"))
_BERT = (_Place("attention.output.dense"), _Place("output.dense"))
#: Places by the class of a block, whose code determines the order of its modules; other blocks have
#: no known places.
PLACES: dict[str, tuple[_Place, ...]] = {
    "open_clip.transformer.ResidualAttentionBlock": _NATIVE,
    "open_clip.transformer.CustomResidualAttentionBlock": _NATIVE,
    "timm.models.vision_transformer.Block": _TIMM,
    "timm.models.vision_transformer.ResPostBlock": _TIMM_POST_NORM,
    "timm.models.eva.EvaBlock": _TIMM,
    "timm.models.eva.EvaBlockPostNorm": _TIMM_POST_NORM,
    "transformers.models.bert.modeling_bert.BertLayer": _BERT,
    "transformers.models.roberta.modeling_roberta.RobertaLayer": _BERT,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "transformers.models.mt5.modeling_mt5.MT5LayerSelfAttention": (_Place("SelfAttention.o"),),
    "transformers.models.mt5.modeling_mt5.MT5LayerFF": (_Place("DenseReluDense.wo"),),
    "transformers.models.m2m_100.modeling_m2m_100.M2M100EncoderLayer": (
        _Place("self_attn.out_proj"),
        _Place("fc2"),
    ),
}
#: Attributes that hold each tower's blocks; open_clip's plain CLIP has no text module.
TOWERS = {"image": ("visual",), "text": ("text", "transformer")}
#: The towers and the projections that each place of adapters has.
OF_PLACES: dict[Adapt, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "towers": (("image", "text"), ()),
    "image-tower": (("image",), ()),
    "text-projection": ((), ("text",)),
    "image-projection": ((), ("image",)),
    "projections": ((), ("image", "text")),
}


def find_sites(model: nn.Module, *, adapt: Adapt = "towers", partial: bool = False) -> list[Site]:
    """Find the adapted layers of a CLIP, image tower first; each can be folded exactly.

    Args:
        model: an open_clip model.
        adapt: the place of the adapters: after attention and feed-forward of each block
            (`towers`, `image-tower`), or after the last linear layer of a tower
            (`text-projection`, `image-projection`, `projections`).
        partial: leave out layers that cannot be adapted, rather than refuse the model.

    Raises:
        RAdapterError: a tower has no known sites, a norm is between a site and its residual, or the
            last layer of a tower is not linear; if `partial`, no site is left.
    """
    sites, _ = _search(model, adapt, partial)
    return sites


def _search(model: nn.Module, adapt: Adapt, partial: bool) -> tuple[list[Site], list[str]]:
    """The adapted layers, and a reason for each that is left out; an error unless `partial`."""
    if adapt not in OF_PLACES:
        raise RAdapterError(f"adapt is {adapt!r}; allowed: {', '.join(OF_PLACES)}")
    towers, projections = OF_PLACES[adapt]
    sites, reasons = _in_towers(model, towers)
    last, others = _projections(model, projections)
    sites += last
    reasons += others
    if reasons and not (partial and sites):
        several = sites and adapt in ("towers", "image-tower", "projections")
        advice = "; --partial (partial=True) adapts all but that" if several and not partial else ""
        raise RAdapterError(f"{reasons[0]}; nothing was changed{advice}")
    return sites, reasons


def _projections(model: nn.Module, towers: Sequence[str]) -> tuple[list[Site], list[str]]:
    """The last linear layers of some towers, and the reason for each that a tower lacks."""
    sites: list[Site] = []
    reasons: list[str] = []
    modules = dict(model.named_modules())
    for tower in towers:
        count = len(sites)
        for key in PROJECTIONS[tower]:
            holder, _, name = key.rpartition(".")
            owner = modules.get(holder)
            if isinstance(layer := modules.get(key), nn.Linear):
                sites.append(Site(key, layer, layer))
            elif isinstance(getattr(owner, name, None), Tensor) and owner is not None:
                sites.append(Site(key, owner, owner, parameter=name))
        if len(sites) == count:
            module = getattr(model, TOWERS[tower][0], model)
            reasons.append(
                f"the {tower} tower of {type(model).__name__} ({type(module).__name__}) has no"
                f" linear last layer for an adapter: no {' or '.join(PROJECTIONS[tower])}"
            )
    return sites, reasons


def _in_towers(model: nn.Module, towers: Sequence[str]) -> tuple[list[Site], list[str]]:
    """The adapted layers in the blocks of some towers, and a reason for each that is left out."""
    sites: list[Site] = []
    reasons: list[str] = []
    for tower in towers:
        holders = TOWERS[tower]
        count = len(sites) + len(reasons)
        for name, block in model.named_modules():
            if name.split(".")[0] not in holders:
                continue
            for place in PLACES.get(f"{type(block).__module__}.{type(block).__qualname__}", ()):
                modules = dict(block.named_modules())
                is_other = place.instead and place.instead in modules
                inner = place.instead if is_other else place.layer
                key = f"{name}.{inner}"
                layer = modules.get(inner)
                norm = modules.get(place.norm) if place.norm else None
                if not isinstance(layer, nn.Linear):
                    kind = "missing" if layer is None else type(layer).__name__
                    reasons.append(f"{key} must be a linear layer but is {kind}")
                elif norm is not None and not isinstance(norm, nn.Identity):
                    reasons.append(
                        f"{name}.{place.norm} ({type(norm).__name__}) lies between {key} and the"
                        " residual that it is added to"
                    )
                else:
                    sites.append(Site(key, layer, modules[place.output] if place.output else layer))
        if len(sites) + len(reasons) == count:
            holder = next((getattr(model, name) for name in holders if hasattr(model, name)), None)
            reasons.append(
                f"the {tower} tower of {type(model).__name__} ({type(holder).__name__}) has no"
                " blocks of a kind that adapters fit: those of open_clip's and timm's vision"
                " transformers, BERT, RoBERTa, mT5 and M2M"
            )
    return sites, reasons


class LinearAdapter(nn.Module):
    """One adapter, F = W_adp transposed: full [d, d], or up [d, r] times down
    [r, d]; at first 0.
    """

    def __init__(self, width: int, rank: int | None, of_projection: bool = False) -> None:
        super().__init__()
        self.rank = rank
        self.of_projection = of_projection  # a parameter [in, out], unlike a layer's weight
        if rank is None:
            self.full = nn.Parameter(torch.zeros(width, width))
        else:
            self.up = nn.Parameter(torch.zeros(width, rank))
            self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, width)))
        self.alpha = 1.0
        self.gate = 1.0  # γ/(1−p) of Eq. 7; 1 outside training

    def change(self, x: Tensor) -> Tensor:
        """The adapter's change of activations [..., d]: `X·W_adp`."""
        linear = nn.functional.linear
        if self.rank is None:
            return linear(x, self.full)
        return linear(linear(x, self.down), self.up)

    def forward(self, value: Tensor) -> Tensor:
        """Weight form, a parametrization: `W + α·F·W` for a weight, `b + α·F·b` for a bias, `P +
        α·P·Fᵀ` for a projection.
        """
        if self.alpha == 0:
            return value
        if self.of_projection:
            change = self.change(value)
        elif self.rank is None:
            change = self.full @ value
        else:
            change = self.up @ (self.down @ value)
        return value + self.alpha * self.gate * change

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Activation form, a forward hook: `X + α·X·W_adp`, for attention in its first output."""
        if self.alpha == 0:
            return output
        x = output[0] if isinstance(output, tuple) else output
        x = x + self.alpha * self.gate * self.change(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x


class Adapters(nn.Module):
    """All adapters of one model, as a module whose parameters are trained."""

    def __init__(
        self,
        sites: Iterable[Site],
        rank: int | None,
        form: Form,
        drop: float,
        left_out: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.sites = list(sites)
        self.left_out = left_out
        self.form = form
        self.drop = drop
        self.adapters = [
            LinearAdapter(len(site.weight), rank, of_projection=bool(site.parameter))
            for site in self.sites
        ]
        self.layers = nn.ModuleList(self.adapters)  # registers their parameters
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        for site, layer in zip(self.sites, self.adapters, strict=True):
            layer.to(site.weight.device)
            # No module returns the output of a parameter, so a projection has the weight form.
            if form == "activation" and not site.parameter:
                self.hooks.append(site.output.register_forward_hook(layer.hook))
            else:
                for name in site.tensors:
                    # unsafe: the check at registration would call forward on the whole weight
                    parametrize.register_parametrization(site.layer, name, layer, unsafe=True)

    @property
    def alpha(self) -> float:
        """The re-scaling α of Eq. 9, in [0, 1]: 0 is the base, 1 is what was learned."""
        return float(self.adapters[0].alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        for adapter in self.adapters:
            adapter.alpha = value

    def sample_drop(self) -> None:
        """Adapter dropping (Eq. 7): draw γ ~ Bernoulli(1−p) for each adapter, scaled by 1/(1−p).

        Processes that call `torch.manual_seed` with the same seed before it draw the same.
        """
        self.train()
        for adapter in self.adapters:
            kept = torch.rand(()).item() >= self.drop
            adapter.gate = kept / (1 - self.drop)

    def stop_drop(self) -> None:
        """Switch every adapter on, unscaled, as at test time."""
        self.eval()
        for adapter in self.adapters:
            adapter.gate = 1.0

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters (not copies) by their names in an adapter file."""
        return {
            site.key if name == "full" else f"{site.key}.{name}": parameter
            for site, adapter in zip(self.sites, self.adapters, strict=True)
            for name, parameter in adapter.named_parameters()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, named as in an adapter file, into the adapters."""
        for name, parameter in self.named_tensors().items():
            parameter.copy_(tensors[name])

    def adapter(self, metadata: Metadata) -> Adapter:
        """A copy of the present values, to save or to fold."""
        tensors = {
            name: value.detach().float().cpu().clone()
            for name, value in self.named_tensors().items()
        }
        return Adapter(tensors, metadata)

    def remove(self) -> None:
        """Take the adapters off; the model equals its base again, bit for bit."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for site in self.sites:
            for name in site.tensors:
                if parametrize.is_parametrized(site.layer, name):
                    parametrize.remove_parametrizations(site.layer, name, leave_parametrized=False)

    def summary(self, model: nn.Module) -> str:
        """One line with the trained fraction of a model's parameters, and the layers left out."""
        trained = sum(p.numel() for p in self.parameters())
        base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        share = 100 * trained / base
        line = f"trainable: {trained:,} parameters, {share:.2f} % of the base's {base:,}"
        if self.left_out:
            line += f"; left out: {self.left_out[0]}"
        if len(self.left_out) > 1:
            line += f", and {len(self.left_out) - 1} more"
        return line


def attach(
    model: nn.Module,
    rank: int | None = None,
    *,
    adapt: Adapt = "towers",
    form: Form = "activation",
    drop: float = 0.0,
    partial: bool = False,
) -> Adapters:
    """Freeze a CLIP and put an adapter after attention and feed-forward of every block of both
    towers, or after the layers of another place.

    Args:
        model: an open_clip model; changed in place. `Adapters.remove` takes the adapters off again.
        rank: None for full rank, else 1 or more: `F = up·down` (few-shot).
        adapt: the place of the adapters, as in `find_sites`.
        form: apply the adapters to activations or to weights. Both give the same outputs and
            gradients: `activation` costs time for each token, `weight` for each step
            (`training.choose_form` chooses the faster form). A projection that is a parameter
            rather than a layer always has the weight form.
        drop: probability p in [0, 1) of adapter dropping (Eq. 7); takes effect with
            `Adapters.sample_drop`.
        partial: leave out a tower without known blocks (such as a convolutional tower), layers
            with a norm between them and their residual, and a last layer that is not linear,
            rather than refuse the model.

    Raises:
        RAdapterError: the model cannot be adapted, has adapters already, or an argument is out of
            range; the model is then unchanged.
    """
    if rank is not None and rank < 1:
        raise RAdapterError(f"rank is {rank}; allowed: 1 or more, or null for full rank")
    if not 0 <= drop < 1:
        raise RAdapterError(f"drop is {drop}; allowed: 0 <= drop < 1")
    sites, left_out = _search(model, adapt, partial)
    return _attach(model, sites, rank, form, drop, left_out)


def _attach(
    model: nn.Module,
    sites: list[Site],
    rank: int | None,
    form: Form,
    drop: float = 0.0,
    left_out: Sequence[str] = (),
) -> Adapters:
    width = min(len(site.weight) for site in sites)
    if rank is not None and rank >= width:
        raise RAdapterError(
            f"rank is {rank}; allowed: less than the width {width}, or null for full rank"
        )
    for site in sites:
        owners = [getattr(hook, "__self__", None) for hook in site.output._forward_hooks.values()]
        hooked = any(isinstance(owner, LinearAdapter) for owner in owners)
        if hooked or any(parametrize.is_parametrized(site.layer, name) for name in site.tensors):
            raise RAdapterError(
                f"{site.key} has an adapter already; call remove() on the first adapters"
            )
    model.requires_grad_(False)
    return Adapters(sites, rank, form, drop, left_out)


def attach_adapter(
    model: nn.Module, adapter: Adapter, alpha: float, *, form: Form = "activation"
) -> Adapters:
    """Attach a saved adapter at a fixed α, not folded: the reference for the agreement of an
    export.

    Exactly the layers of the file are adapted, whether or not it was trained with `partial`.

    Args:
        model: the base that the adapter was trained on, in fp32; changed in place.
        adapter: from `load_adapter`.
        alpha: re-scaling in [0, 1].

    Raises:
        RAdapterError: the adapter belongs to another base.
    """
    check_alpha(alpha)
    check_base(model.state_dict(), adapter)
    keys = set(adapter.keys)
    sites = [
        site
        for site in _in_towers(model, tuple(TOWERS))[0] + _projections(model, tuple(TOWERS))[0]
        if site.key in keys
    ]
    if unknown := sorted(keys - {site.key for site in sites}):
        raise RAdapterError(f"the adapter file is damaged: adapters do not fit {unknown[0]}")
    adapters = _attach(model, sites, adapter.metadata.rank, form)
    adapters.load_tensors(adapter.tensors)
    adapters.alpha = alpha
    return adapters
