"""Prompt templates by name or from a file, for training, evaluation and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip

from radapter_serve.contract.labels import read_templates


def templates_of(source: str | Path | Sequence[str]) -> list[str]:
    """Read prompt templates, in which `{}` is the class.

    `source` is `openai` for OpenAI's 80 ImageNet templates, `vild` for ViLD's 63, `ovseg` for the
    14 of OVSeg, `simple` for one; a file with one template a line, one template, or a list of them.
    """
    if source == "openai":
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return read_templates(source)
