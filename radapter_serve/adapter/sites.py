"""Where adapters sit: after attention and after the feed-forward layer of every block of both
towers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from radapter_serve.errors import RAdapterError


@dataclass(frozen=True)
class Site:
    """One adapted layer.

    Attributes:
        key: the layer's name in the state dict; `key.weight` and `key.bias` are what the fold
            changes.
        layer: the linear layer itself.
        output: the module whose output the adapter sees. `nn.MultiheadAttention` never calls its
            `out_proj` as a module, so there it is the attention as a whole.
    """

    key: str
    layer: nn.Linear
    output: nn.Module


@dataclass(frozen=True)
class _Place:
    """An adapted layer inside a block, by names: itself, the module whose output is its own, a norm
    that may come next.

    Whatever is linear may stand between a layer and the residual that it is added to: an adapter
    directly behind its layer folds exactly, and the LayerScale (`ls_1`, `gamma_1`) that comes after
    it sees the same. A norm may not: the adapter would no longer be the last linear map before the
    residual, as in the paper. A norm of the sum (BERT) may.
    """

    layer: str
    output: str = ""  # the layer itself
    norm: str = ""  # none


_NATIVE = (_Place("attn.out_proj", output="attn", norm="ln_attn"), _Place("mlp.c_proj"))
_TIMM = (_Place("attn.proj"), _Place("mlp.fc2"))
_TIMM_POST_NORM = (_Place("attn.proj", norm="norm1"), _Place("mlp.fc2", norm="norm2"))
_BERT = (_Place("attention.output.dense"), _Place("output.dense"))

# : Blocks by their class, whose code says what comes after what; blocks of any other class have no
# known places.
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

#: What holds each tower's blocks; open_clip's plain CLIP holds its text tower's parts itself.
TOWERS = {"image": ("visual",), "text": ("text", "transformer")}


def find_sites(model: nn.Module, *, text: bool = True, partial: bool = False) -> list[Site]:
    """Find the adapted layers of a CLIP, image tower first; each can be folded exactly.

    Args:
        model: an open_clip model.
        text: look in the text tower too.
        partial: leave out what cannot be adapted, as `left_out` says, rather than refuse.

    Raises:
        RAdapterError: a tower has no known sites, or a norm stands between a site and its residual;
            if `partial`, no site is left.
    """
    sites, reasons = _search(model, text)
    if reasons and not (partial and sites):
        advice = "" if partial or not sites else "; --partial (partial=True) adapts all but that"
        raise RAdapterError(f"{reasons[0]}; nothing was changed{advice}")
    return sites


def left_out(model: nn.Module, *, text: bool = True) -> list[str]:
    """What `find_sites` leaves out if it is `partial`, each with the reason."""
    return _search(model, text)[1]


def _search(model: nn.Module, text: bool) -> tuple[list[Site], list[str]]:
    sites: list[Site] = []
    reasons: list[str] = []
    for tower, holders in list(TOWERS.items())[: 1 + text]:
        count = len(sites) + len(reasons)
        for name, block in model.named_modules():
            if name.split(".")[0] in holders:
                _search_block(name, block, sites, reasons)
        if len(sites) + len(reasons) == count:
            holder = next((getattr(model, name) for name in holders if hasattr(model, name)), None)
            reasons.append(
                f"the {tower} tower of {type(model).__name__} ({type(holder).__name__}) has no"
                " blocks of a kind that adapters fit: those of open_clip's and timm's vision"
                " transformers, BERT, RoBERTa, mT5 and M2M"
            )
    return sites, reasons


def _search_block(name: str, block: nn.Module, sites: list[Site], reasons: list[str]) -> None:
    for place in PLACES.get(f"{type(block).__module__}.{type(block).__qualname__}", ()):
        modules = dict(block.named_modules())
        key = f"{name}.{place.layer}"
        layer = modules.get(place.layer)
        norm = modules.get(place.norm) if place.norm else None
        if not isinstance(layer, nn.Linear):
            found = "missing" if layer is None else type(layer).__name__
            reasons.append(f"{key} must be a linear layer but is {found}")
        elif norm is not None and not isinstance(norm, nn.Identity):
            kind = type(norm).__name__
            reasons.append(
                f"{name}.{place.norm} ({kind}) stands between {key} and the residual that it is"
                " added to"
            )
        else:
            sites.append(Site(key, layer, modules[place.output] if place.output else layer))
