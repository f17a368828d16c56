"""Prompt templates by name or from a file, for training, evaluation and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip

from radapter_serve.contract.labels import read_templates


def templates_of(source: str | Path | Sequence[str]) -> list[str]:
    """Prompt templates.

    Args:
        source: `openai` for OpenAI's 80 ImageNet templates, `vild` for ViLD's 63, `ovseg` for the
            14 that OVSeg takes, `simple` for one; a file with one template a line, one template, or
            a list of them; `{}` is the class.

    Raises:
        RAdapterError: no such file, or a template without `{}`.
    """
    if source == "openai":
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return read_templates(source)
