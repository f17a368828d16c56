"""Adapters on a model in memory: find their sites, attach, drop, scale and remove them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from radapter_serve.adapter.file import Adapter, Metadata, check_base
from radapter_serve.contract.errors import check_alpha
from radapter_serve.errors import RAdapterError

Form = Literal["weight", "activation"]


@dataclass(frozen=True)
class Site:
    """One adapted layer.

    Attributes:
        key: the layer's name in the state dict; the fold changes `key.weight` and `key.bias`.
        layer: the linear layer.
        output: the module whose output the adapter takes: the layer, or the whole attention, as
            `nn.MultiheadAttention` never calls its `out_proj` as a module.
    """

    key: str
    layer: nn.Linear
    output: nn.Module


@dataclass(frozen=True)
class _Place:
    """An adapted layer inside a block, by module names: the layer, the module whose output is the
    layer's, and a norm that may follow.
    """

    layer: str
    output: str = ""  # by default the layer
    # By default no norm: after one, the adapter would not be the last linear map, as in the paper.
    norm: str = ""


_NATIVE = (_Place("attn.out_proj", output="attn", norm="ln_attn"), _Place("mlp.c_proj"))
_TIMM = (_Place("attn.proj"), _Place("mlp.fc2"))
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


def find_sites(model: nn.Module, *, text: bool = True, partial: bool = False) -> list[Site]:
    """Find the adapted layers of a CLIP, image tower first; each can be folded exactly.

    Args:
        model: an open_clip model.
        text: look in the text tower too.
        partial: leave out layers that cannot be adapted, rather than refuse the model.

    Raises:
        RAdapterError: a tower has no known sites, or a norm is between a site and its residual;
            if `partial`, no site is left.
    """
    sites, _ = _search(model, text, partial)
    return sites


def _search(model: nn.Module, text: bool, partial: bool) -> tuple[list[Site], list[str]]:
    """The adapted layers, and a reason for each that is left out; an error unless `partial`."""
    sites: list[Site] = []
    reasons: list[str] = []
    for tower, holders in list(TOWERS.items())[: 1 + text]:
        count = len(sites) + len(reasons)
        for name, block in model.named_modules():
            if name.split(".")[0] not in holders:
                continue
            for place in PLACES.get(f"{type(block).__module__}.{type(block).__qualname__}", ()):
                modules = dict(block.named_modules())
                key = f"{name}.{place.layer}"
                layer = modules.get(place.layer)
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
    if reasons and not (partial and sites):
        advice = "" if partial or not sites else "; --partial (partial=True) adapts all but that"
        raise RAdapterError(f"{reasons[0]}; nothing was changed{advice}")
    return sites, reasons


class LinearAdapter(nn.Module):
    """One adapter, F = W_adp transposed: full [d, d], or up [d, r] times down
    [r, d]; at first 0.
    """

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
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
        """Weight form, a parametrization: `W + α·F·W` for a weight, `b + α·F·b` for a bias."""
        if self.alpha == 0:
            return value
        change = self.full @ value if self.rank is None else self.up @ (self.down @ value)
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
        self.adapters = [LinearAdapter(site.layer.out_features, rank) for site in self.sites]
        self.layers = nn.ModuleList(self.adapters)  # registers their parameters
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        for site, layer in zip(self.sites, self.adapters, strict=True):
            layer.to(site.layer.weight.device)
            if form == "activation":
                self.hooks.append(site.output.register_forward_hook(layer.hook))
            else:
                for name in _tensors_of(site.layer):
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
        if self.form == "weight":
            for site in self.sites:
                for name in _tensors_of(site.layer):
                    parametrize.remove_parametrizations(site.layer, name, leave_parametrized=False)

    def summary(self, model: nn.Module) -> str:
        """One line with the trained share of a model's parameters, and the layers left out."""
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
    form: Form = "activation",
    drop: float = 0.0,
    text: bool = True,
    partial: bool = False,
) -> Adapters:
    """Freeze a CLIP and put an adapter after attention and feed-forward of every block of both
    towers.

    Args:
        model: an open_clip model; changed in place. `Adapters.remove` takes the adapters off again.
        rank: None for full rank, else 1 or more: `F = up·down` (few-shot).
        form: apply the adapters to activations or to weights. Both give the same outputs and
            gradients: `activation` costs time for each token, `weight` for each step
            (`training.choose_form` chooses the faster form).
        drop: probability p in [0, 1) of adapter dropping (Eq. 7); takes effect with
            `Adapters.sample_drop`.
        text: False leaves the text tower as it is.
        partial: leave out a tower without known blocks (such as a convolutional tower) and layers
            with a norm between them and their residual, rather than refuse the model.

    Raises:
        RAdapterError: the model cannot be adapted, has adapters already, or an argument is out of
            range; the model is then unchanged.
    """
    if rank is not None and rank < 1:
        raise RAdapterError(f"rank is {rank}; allowed: 1 or more, or null for full rank")
    if not 0 <= drop < 1:
        raise RAdapterError(f"drop is {drop}; allowed: 0 <= drop < 1")
    sites, left_out = _search(model, text, partial)
    return _attach(model, sites, rank, form, drop, left_out)


def _attach(
    model: nn.Module,
    sites: list[Site],
    rank: int | None,
    form: Form,
    drop: float = 0.0,
    left_out: Sequence[str] = (),
) -> Adapters:
    width = min(site.layer.out_features for site in sites)
    if rank is not None and rank >= width:
        raise RAdapterError(
            f"rank is {rank}; allowed: less than the width {width}, or null for full rank"
        )
    for site in sites:
        owners = [getattr(hook, "__self__", None) for hook in site.output._forward_hooks.values()]
        if any(isinstance(owner, LinearAdapter) for owner in owners) or parametrize.is_parametrized(
            site.layer
        ):
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
    sites = [site for site in find_sites(model, partial=True) if site.key in keys]
    if unknown := sorted(keys - {site.key for site in sites}):
        raise RAdapterError(f"the adapter file is damaged: adapters do not fit {unknown[0]}")
    adapters = _attach(model, sites, adapter.metadata.rank, form)
    adapters.load_tensors(adapter.tensors)
    adapters.alpha = alpha
    return adapters


def _tensors_of(layer: nn.Linear) -> list[str]:
    return ["weight"] if layer.bias is None else ["weight", "bias"]
