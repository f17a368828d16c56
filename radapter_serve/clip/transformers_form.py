"""The form of a base in `transformers`, if it has one."""

from __future__ import annotations

from radapter_serve.clip import form_clip, form_siglip
from radapter_serve.clip.base import Base
from radapter_serve.clip.form import Form
from radapter_serve.errors import RAdapterError


def form_of(base: Base) -> Form:
    """The `CLIPModel` or `SiglipModel` that computes what a base computes.

    Raises:
        RAdapterError: neither of them can; says why.
    """
    model = base.model
    tokenizer = base.tokenizer
    siglip = form_siglip.is_siglip(model)
    why = form_siglip.lacks(model, tokenizer) if siglip else form_clip.lacks(model, tokenizer)
    if why := why or _preprocess_lacks(base):
        name = "SiglipModel" if siglip else "CLIPModel"
        raise RAdapterError(
            f"{base.name} has no form in transformers: {why}, which {name} can't compute"
        )
    return form_siglip.form(model, tokenizer) if siglip else form_clip.form(model, tokenizer)


def _preprocess_lacks(base: Base) -> str:
    mode = base.preprocess["resize_mode"]
    return "" if mode in ("shortest", "squash") else f"its images are resized by the mode {mode}"
