"""The facts of a release that decide the inputs of its encoders. They are apart from the code that
prepares inputs, whose libraries take long to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Clean = Literal["lower", "whitespace", "canonicalize"]  # how texts are cleaned


@dataclass(frozen=True)
class PreprocessFacts:
    """How a release prepares images, with the names and values of open_clip's configurations."""

    size: int  # of both sides in pixels
    mode: str
    interpolation: str | None
    resize_mode: Literal["shortest", "squash", "longest"] | None
    fill_color: int | None
    mean: list[float]  # in [0, 1]; these two are in the encoder's graph
    std: list[float]
    exif_orientation: bool


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """How a release reads its `tokenizer.json`."""

    kind: Literal["clip", "hf"]  # open_clip's `SimpleTokenizer` or `HFTokenizer`
    start: int  # tokens; -1 for none
    end: int
    pad: int
    clean: Clean
    strip: int | None = None  # token that open_clip's strip_sep_token replaces with 0
    digest: str  # of the file
    context_length: int
    dynamic_length: bool  # of a causal tower, which never looks ahead
