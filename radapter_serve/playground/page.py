"""The page, and the handlers of its events."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio
from PIL import Image

from radapter_client import Client, RAdapterClientError, Receipt
from radapter_serve.contract.errors import redact
from radapter_serve.contract.images import oriented

TITLE = "radapter-serve playground"
MAX_SIDE = 1024  # px of the longer side of a picture to segment; larger ones are reduced
NO_PICTURE = "Drop a picture on the left."
_LABELS = "a cat\na dog\na house\na tree\na car"
_PARTS = "sky\ngrass\na house\na tree\na person"

Handler = Callable[..., Any]


def explained(handler: Handler) -> Handler:
    """Wrap a handler so that the page shows its error."""

    @wraps(handler)
    def explaining(*values: Any) -> Any:
        try:
            return handler(*values)
        except (RAdapterClientError, OSError, Image.DecompressionBombError) as error:
            raise gradio.Error(
                redact(str(error)), print_exception=False, title="No answer"
            ) from None

    return explaining


def build(client: Client) -> gradio.Blocks:
    """Build the page for the server of a client."""
    page = gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600))
    with page:
        facts = gradio.Markdown(f"# {TITLE}")
        with gradio.Row():
            with gradio.Column(scale=2):
                # Pass the file to the server unchanged, without decoding it.
                picture = gradio.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    elem_id="picture",
                )
                alpha = gradio.Slider(
                    0,
                    1,
                    0.5,
                    step=0.01,
                    label="α, from 0 (base) to 1",
                    visible=False,
                    elem_id="alpha",
                )
                adapter = gradio.Textbox(
                    "",
                    label="Adapter beside the release; empty for the release itself",
                    elem_id="adapter",
                )
                strength = gradio.Number(
                    None,
                    label="α of the adapter, from 0 to 1; empty for its own",
                    minimum=0,
                    maximum=1,
                    step=0.05,
                    elem_id="strength",
                )
                point = [adapter, strength]
            with gradio.Column(scale=3):
                with gradio.Tab("Classify"):
                    label_sets = _classify(client, picture, alpha, point)
                with gradio.Tab("Search"):
                    indexes = _search(client, picture, point)
                with gradio.Tab("Segment"):
                    _segment(client, picture, alpha, point)

        def begin() -> tuple[Any, ...]:
            return _first_facts(client)

        page.load(explained(begin), None, [facts, alpha, label_sets, indexes])
    page.queue(default_concurrency_limit=4, max_size=64)
    return page


def _first_facts(client: Client) -> tuple[Any, ...]:
    """What the page shows of the server: the release, its label sets and its indexes."""
    release = client.release()
    sets = ["", *release.label_sets]
    first = next(iter(release.label_sets), "")
    try:
        names = client.indexes()
    except RAdapterClientError:  # Triton lists no indexes: the user types the name
        names = []
    moves = "any α" if release.dynamic_alpha else f"α = {release.alpha:g}"
    name = release.architecture.rpartition("/")[2]
    described = f"release {release.version} · {name} · {release.precision} · {moves}"
    return (
        f"# {TITLE}\n{described}",
        gradio.update(visible=release.dynamic_alpha, value=release.alpha),
        gradio.update(choices=sets, value=first, visible=len(sets) > 1),
        gradio.update(choices=names, value=names[0] if names else ""),
    )


def _classify(client: Client, picture: Any, alpha: Any, point: list[Any]) -> Any:
    labels = gradio.Textbox(_LABELS, label="Labels, one a line", lines=5, elem_id="labels")
    sets = gradio.Dropdown(
        [""], label="A label set of the release, instead of the labels above", visible=False
    )
    button = gradio.Button("Classify", variant="primary")
    scores = gradio.Label(label="Scores", num_top_classes=10, elem_id="scores")
    took = gradio.Markdown(elem_id="scores-took")

    def classify(
        file: str | None,
        text: str,
        label_set: str,
        at: float,
        name: str = "",
        strength: float | None = None,
    ) -> tuple[Any, str]:
        if file is None:
            return None, NO_PICTURE
        release = client.release()
        start = time.perf_counter()
        answer = client.classify(
            Path(file),
            None if label_set else lines(text),
            label_set=label_set or None,
            adapter=name or None,
            alpha=_alpha(release.dynamic_alpha, at, name, strength),
            top_k=10,
        )
        scores = dict(zip(answer.labels, answer.scores, strict=True))
        return scores, _took(start, answer.release, answer.receipt)

    labels.input(lambda: "", None, sets)  # typing labels deselects the label set
    gradio.on(
        [button.click, picture.change, sets.input, alpha.input, *(each.submit for each in point)],
        explained(classify),
        [picture, labels, sets, alpha, *point],
        [scores, took],
        trigger_mode="always_last",  # while the slider moves, only the last position is asked for
    )
    return sets


def _search(client: Client, picture: Any, point: list[Any]) -> Any:
    text = gradio.Textbox(label="Text", placeholder="a red bicycle", elem_id="query")
    with gradio.Row():
        by = gradio.Radio(["text", "picture", "both"], value="text", label="Search by")
        index = gradio.Dropdown([""], label="Index", allow_custom_value=True, elem_id="index")
        count = gradio.Slider(1, 60, 12, step=1, label="How many")
        least = gradio.Slider(
            -1, 1, -1, step=0.01, label="Pictures with a lower score are left out", elem_id="least"
        )
    button = gradio.Button("Search", variant="primary")
    gallery = gradio.Gallery(label="Found", columns=4, elem_id="found")
    took = gradio.Markdown(elem_id="found-took")

    def search(
        file: str | None,
        text: str,
        by: str,
        index: str | None,
        count: int,
        least: float,
        name: str = "",
        strength: float | None = None,
    ) -> tuple[Any, str]:
        if by != "text" and file is None:
            return None, NO_PICTURE
        start = time.perf_counter()
        hits = client.search(
            None if by == "picture" else text,
            image=None if by == "text" or file is None else Path(file),
            index=index or "",
            top_k=int(count),
            min_score=None if least == -1 else least,
            thumbnails=True,
            adapter=name or None,
            alpha=strength if name else None,
        )
        shown = [
            (Image.open(io.BytesIO(hit.thumbnail)), f"{hit.score:.3f} {hit.id}")
            for hit in hits
            if hit.thumbnail
        ]
        return shown, f"{_took(start, receipt=hits.receipt)}, {len(hits)} found"

    gradio.on(
        [button.click, text.submit],
        explained(search),
        [picture, text, by, index, count, least, *point],
        [gallery, took],
    )
    return index


def _segment(client: Client, picture: Any, alpha: Any, point: list[Any]) -> None:
    labels = gradio.Textbox(_PARTS, label="Labels, one a line", lines=5, elem_id="parts")
    threshold = gradio.Slider(0, 1, 0, step=0.01, label="Pixels with a lower score are background")
    button = gradio.Button("Segment", variant="primary")
    drawn = gradio.Image(
        label=f"Segments, at most {MAX_SIDE} pixels wide and high", elem_id="segments"
    )
    took = gradio.Markdown(elem_id="segments-took")

    def segment(
        file: str | None,
        text: str,
        least: float,
        at: float,
        name: str = "",
        strength: float | None = None,
    ) -> tuple[Any, str]:
        if file is None:
            return None, NO_PICTURE
        release = client.release()
        image = oriented(Image.open(file))
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        start = time.perf_counter()
        answer = client.segment(
            image,
            lines(text),
            threshold=least or None,
            adapter=name or None,
            alpha=_alpha(release.dynamic_alpha, at, name, strength),
        )
        return answer.overlay(image), _took(start, answer.release, answer.receipt)

    button.click(explained(segment), [picture, labels, threshold, alpha, *point], [drawn, took])


def lines(text: str | None) -> list[str]:
    """Split a text into labels, one a line."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _alpha(dynamic_alpha: bool, at: float, name: str, strength: float | None) -> float | None:
    """The α to ask for: of the adapter if one is named, else of the slider where it is shown."""
    if name:
        return strength
    return at if dynamic_alpha else None


def _took(start: float, release: int | None = None, receipt: Receipt | None = None) -> str:
    parts = [f"{1000 * (time.perf_counter() - start):.0f} ms"]
    if release is not None:
        parts.append(f"release {release}")
    if receipt is not None and receipt.adapter is not None:
        parts.append(f"{receipt.adapter} at α = {receipt.alpha:g}")
    return " · ".join(parts)
