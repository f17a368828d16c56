"""Common nouns, to ask a model for something else than the classes of a data set: what fine-tuning
has changed of what the base says about the same images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

STEP = 3  # every third of ImageNet's 1,000 names: 333 nouns
TEMPLATES = ("a photo of a {}.",)
_WORD = re.compile(r"[^\W_]+")


def nouns_beside(names: Iterable[str]) -> list[str]:
    """The nouns that have nothing to do with these classes.

    They are every third of the names that CLIP has for ImageNet's classes, from the first. One
    that equals a class, has it among its words or is among its words is left out; upper and lower
    case make no difference.

    Args:
        names: of the classes, synonyms by themselves.
    """
    import open_clip  # torch takes seconds to load

    classes = [_words(name) for name in names]
    nouns = {name: _words(name) for name in open_clip.IMAGENET_CLASSNAMES[::STEP]}
    return [
        name
        for name, noun in nouns.items()
        if not any(noun in of or of in noun for of in classes if of.strip())
    ]


def _words(name: str) -> str:
    """Words with a space before and after each, so that one is found as a whole alone."""
    words = _WORD.findall(name.casefold())
    return f" {' '.join(words)} "
