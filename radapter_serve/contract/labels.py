"""Labels: names, files, synonyms, prompt templates and limits; mean embeddings over the prompts of
a label; and probabilities of labels from cosines.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import NO_LABELS, TaskError, invalid
from radapter_serve.errors import RAdapterError

# Limits of a request, checked before prompts are built. An exported label set may have more.
MAX_PROMPTS = 20_000
MAX_CHARACTERS = 10_000_000  # of all prompts together
MAX_TEXT_LENGTH = 10_000
MAX_LABEL_LENGTH = 1_000  # of a label with its synonyms, and of a template
MAX_PLACES = 4  # for a label in a template
_COMMA = re.compile(r"(?<!\\),")
# Of a name in UTF-8. File systems allow 255, and temporary files have longer names.
MAX_NAME_BYTES = 200
RULE = (
    "allowed are letters, digits and other signs of any script, but no / and no . or - or blank at"
    " the start"
)
_JOINERS = "\u200c\u200d"  # invisible, but needed by some scripts and emoji
SAME = 0.9999  # cosine above which two labels have equal scores for any image, up to rounding
_BLOCK = 1024  # rows of cosines in memory at once
_EACH = ("a", "the")
# The 63 templates of ViLD (Gu et al., ICLR 2022) as in its released code, but with "a" where the
# code chooses "a" or "an".
VILD = [
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "itap of a {}.",  # "I took a picture of"
    "itap of my {}.",
    "itap of the {}.",
    *(f"This is a photo of {word} {{}} in the scene." for word in ("a", "the", "one")),
    *(f"This is a photo of {word} {{}}." for word in ("a", "my", "the", "one", "many")),
    *(f"This is a {kind} photo of {word} {{}}." for kind in ("good", "bad") for word in _EACH),
    *(
        f"This is a photo of {word} {kind} {{}}."
        for kind in ("nice", "cool", "weird", "small", "large", "clean", "dirty")
        for word in _EACH
    ),
    *(f"This is a {kind} photo of {word} {{}}." for kind in ("bright", "dark") for word in _EACH),
    *(f"This is a photo of {word} hard to see {{}}." for word in _EACH),
    *(
        f"This is a {kind} photo of {word} {{}}."
        for kind in (
            *("low resolution", "cropped", "close-up"),
            *("jpeg corrupted", "blurry", "pixelated"),
        )
        for word in _EACH
    ),
    *(f"This is a black and white photo of {word} {{}}." for word in ("the", "a")),
    *(
        f"This is {word} {kind} {{}}."
        for kind in ("plastic", "toy", "plushie", "cartoon")
        for word in _EACH
    ),
    *(f"This is {word} embroidered {{}}." for word in ("an", "the")),
    *(f"This is a painting of {word} {{}}." for word in ("the", "a")),
]
# The 14 templates of OVSeg (Liang et al., CVPR 2023), called `vild` in its code; not all end in a
# full stop.
OVSEG = [
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
]
BUILT_IN_TEMPLATES = {"simple": ["a photo of a {}."], "vild": VILD, "ovseg": OVSEG}


def read_label_file(path: str | Path) -> list[str]:
    """Read a UTF-8 file with one class a line, synonyms after commas, and `#` comments."""
    seen: dict[str, int] = {}
    labels = []
    for number, line in _lines(path):
        names = split_label(line)
        if not names:
            raise RAdapterError(f"{path}, line {number}: {line!r} names no class")
        if names[0] in seen:
            raise RAdapterError(
                f"{path}, line {number}: the class {names[0]!r} is already on line {seen[names[0]]}"
            )
        seen[names[0]] = number
        labels.append(join_label(names))
    if not labels:
        raise RAdapterError(f"{path} names no class; write one class a line")
    return labels


def read_templates(source: str | Path | Sequence[str]) -> list[str]:
    """Read prompt templates from a list, the name of a built-in set, one template, or a file."""
    if isinstance(source, (str, Path)):
        text = str(source)
        if text in BUILT_IN_TEMPLATES:
            return list(BUILT_IN_TEMPLATES[text])
        if "{}" in text:
            return [text]
        names = ", ".join(["openai", *BUILT_IN_TEMPLATES])  # open_clip has those of openai
        templates = [line for _, line in _lines(source, f"or one of the built-in sets: {names}")]
    else:
        templates = list(source)
    if not templates:
        raise RAdapterError(
            f"{source}: no template; write one a line, such as 'a photo of a {{}}.'"
        )
    try:
        check_templates(templates)
    except TaskError as error:
        raise RAdapterError(error.message) from None
    return templates


def split_label(label: str) -> list[str]:
    r"""The names in "cat, kitty": the one to show, then synonyms; "\," is a comma in a name."""
    names = [name.replace(r"\,", ",").strip() for name in _COMMA.split(label)]
    return list(dict.fromkeys(name for name in names if name))


def join_label(names: Iterable[str]) -> str:
    """Join names to one label; the inverse of `split_label`."""
    return ", ".join(name.replace(",", r"\,") for name in names)


def merge_same_names(classes: Iterable[str]) -> list[str]:
    """Make a label of each class; classes of one name are one label, as they score the same."""
    lines: dict[str, str] = {}
    for line in classes:
        lines.setdefault((split_label(line) or [""])[0], line)
    return list(lines.values())


def prompts_of(names: Iterable[str], templates: Sequence[str]) -> list[str]:
    """The prompts of a label: each of its names in each template."""
    return [template.replace("{}", name) for name in names for template in templates]


def means_of(
    prompts: Sequence[Sequence[str]], texts: Sequence[str], embeds: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Mean over the prompts of each label, at unit length, from the texts' embeddings, [N, D]."""
    rows = {text: row for row, text in enumerate(texts)}
    means = np.stack([embeds[[rows[text] for text in each]].mean(axis=0) for each in prompts])
    lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return np.asarray(means / lengths, np.float32)


def check_names(labels: Sequence[str], *, distinct: bool = True) -> None:
    """Raise a `TaskError` for an empty or too long label and, if labels have to be `distinct`, for
    a name of two labels. The classes of a data set may share names.
    """
    if not labels:
        raise TaskError(NO_LABELS, "no labels; give at least one")
    for number, label in enumerate(labels, 1):
        check_length(label, MAX_LABEL_LENGTH, "label")
        if not split_label(label):
            raise invalid(f"label {number} of {len(labels)} is empty ({label!r})")
    if distinct and (shared := shared_name(labels)):
        raise invalid(shared)


def shared_name(labels: Sequence[str]) -> str | None:
    """Say which name two labels share, as a person reads names: case, the number of blanks and the
    form of characters (an é may be one or two) make no other name; None if no name is shared.
    """
    first: dict[str, tuple[int, list[str]]] = {}  # number and names of the first label with a name
    for number, label in enumerate(labels, 1):
        names = split_label(label)
        for name in names:
            other, others = first.setdefault(_plain(name), (number, names))
            if other == number:
                continue
            if name == names[0] and _plain(name) == _plain(others[0]):
                return f"label {number}, {name!r}, is the same as label {other}, {others[0]!r}"
            return (
                f"label {number}, {names[0]!r}, has the name {name!r} in common with label {other},"
                f" {others[0]!r}; leave it out of one of them"
            )
    return None


def _plain(name: str) -> str:
    if not name.isascii():
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(name.casefold().split())


def check_templates(templates: Sequence[str]) -> None:
    """Refuse an empty list, or a template that is too long or has no good place for the label."""
    if not templates:
        raise invalid(
            "no templates; give at least one, such as 'a photo of a {}.', or leave them out"
        )
    for template in templates:
        check_length(template, MAX_LABEL_LENGTH, "template")
        if not 1 <= template.count("{}") <= MAX_PLACES:
            many = f"more than {MAX_PLACES}" if "{}" in template else "no"
            raise invalid(
                f"the template {template[:80]!r} has {many} {{}} where the label goes; such as 'a"
                " photo of a {}.'"
            )


def check_length(text: str, limit: int = MAX_TEXT_LENGTH, what: str = "text") -> None:
    """Raise a `TaskError` for a text that is too long; `what` names it in the error."""
    if len(text) > limit:
        raise invalid(
            f"a {what} of {len(text)} characters ({text[:30]!r}...); at most {limit} are allowed"
        )


def check_prompts(
    lists: Iterable[tuple[Sequence[str], Sequence[str]]],
    advice: str = "export them as a label set: radapter-export --label-set NAME=FILE",
) -> None:
    """Refuse labels and templates of a request that make too many or too long prompts."""
    prompts = characters = 0
    for labels, templates in lists:
        check_templates(templates)
        for label in labels:
            check_length(label, MAX_LABEL_LENGTH, "label")
        names = sum(label.count(",") + 1 for label in labels)
        length = sum(map(len, labels))
        prompts += names * len(templates)
        characters += sum(
            names * len(template) + length * template.count("{}") for template in templates
        )
    for number, limit, what in (
        (prompts, MAX_PROMPTS, "prompts"),
        (characters, MAX_CHARACTERS, "characters"),
    ):
        if number > limit:
            raise invalid(
                f"{number} {what} in all prompts (names x templates) of one request; at most"
                f" {limit} are allowed, so {advice}"
            )


def _lines(path: str | Path, alternative: str = "") -> Iterable[tuple[int, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RAdapterError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        hint = f"; give a file {alternative}" if alternative else ""
        raise RAdapterError(f"cannot read {path}: {error.strerror}{hint}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if (line := line.strip()) and not line.startswith("#"):
            yield number, line


def is_name(text: str) -> bool:
    """True for a printable name of up to 200 bytes that is safe as a part of a path."""
    shown = "".join(sign for sign in text if sign not in _JOINERS)
    return (
        shown.isprintable()
        and shown == shown.strip()
        and "/" not in text
        and text[:1] not in ("", ".", "-", *_JOINERS)
        and len(text.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES
    )


def spellings(name: str) -> list[str]:
    """A name and its other Unicode forms: an é is one character, or an e with an accent."""
    return list(
        dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])
    )


def known_as(name: str, names: Container[str]) -> str | None:
    """The Unicode form of a name that is in `names`; None if no form is."""
    return next((spelling for spelling in spellings(name) if spelling in names), None)


def class_probabilities(
    cosines: NDArray[np.float32], logit_scale: float, logit_bias: float | None = None
) -> NDArray[np.float32]:
    """Probability of each label, float32 [..., C], from cosines: a softmax, or, with the bias of a
    model trained with a sigmoid loss (SigLIP), a sigmoid for each label alone.
    """
    logits = np.asarray(cosines, np.float32) * np.float32(logit_scale)
    if logit_bias is not None:
        return np.asarray(
            1 / (1 + np.exp(-np.clip(logits + np.float32(logit_bias), -80, 80))), np.float32
        )
    logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(-1, keepdims=True)
    return logits


def best_class(
    cosines: NDArray[np.float32], logit_scale: float, logit_bias: float | None = None
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Best label and its probability, [n] each, from cosines [C, n], which are overwritten."""
    greatest = cosines.max(0)
    winners = cosines == greatest
    best = np.empty(len(greatest), np.intp)
    # From the last label to the first, so that the first of equal labels wins. Few labels win at
    # all in neighbouring places.
    for label in np.flatnonzero(winners.any(1))[::-1]:
        np.copyto(best, label, where=winners[label])
    if logit_bias is not None:
        return best, class_probabilities(greatest, logit_scale, logit_bias)
    cosines -= greatest
    cosines *= np.float32(logit_scale)
    np.exp(cosines, out=cosines)
    return best, 1 / cosines.sum(0)


def indistinguishable(
    labels: Sequence[str], embeddings: NDArray[np.float32]
) -> list[tuple[str, str]]:
    """Pairs of labels with the same scores: an earlier label, and a later one."""
    pairs = []
    for start in range(0, len(labels), _BLOCK):
        alike = embeddings[start : start + _BLOCK] @ embeddings.T > SAME
        for row, first in enumerate(alike.argmax(1), start):
            if first < row and alike[row - start, first]:
                pairs.append((labels[first], labels[row]))
    return pairs
