"""The page itself, by Gradio."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gradio
from starlette.applications import Starlette

from radapter_serve.gateway.playground.ask import Ask
from radapter_serve.gateway.playground.door import PATH, Kinds

with contextlib.suppress(ImportError):  # Gradio would load them with the first event, and all other requests would wait
    import matplotlib.backends.backend_agg
    import matplotlib.pyplot  # noqa: F401

_CALL: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(ask: Ask, most: int) -> gradio.Blocks:
    """The page.

    Args:
        ask: its handlers.
        most: bytes of a picture.
    """
    page = gradio.Blocks(title="radapter-serve playground", analytics_enabled=False, fill_width=True)
    with page:
        gradio.HTML('<h1 class="title">radapter-serve playground</h1>')
        facts = gradio.HTML("")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                picture = gradio.HTML(
                    "",
                    html_template=_text("picture.html"),
                    css_template=_text("picture.css"),
                    js_on_load=_text("picture.js"),
                    elem_id="picture",
                    most=most,
                    note="",
                )
                alpha = gradio.Slider(
                    0, 1, 0.5, step=0.01, label="α, from 0 (base) to 1", visible=False, elem_id="alpha"
                )
                why = gradio.HTML("")
            with gradio.Column(scale=3, min_width=420):
                with gradio.Tab("Classify"):
                    sets = _classify(ask, picture, alpha)
                with gradio.Tab("Search"):
                    names = _search(ask, picture)
                with gradio.Tab("Segment"):
                    _segment(ask, picture, alpha)
        page.load(ask.begin, None, [facts, alpha, why, sets, names], **_CALL)
    return page


def _classify(ask: Ask, picture: Any, alpha: Any) -> Any:
    labels = gradio.Textbox(
        "a cat\na dog\na house\na tree\na car", label="Labels, one a line", lines=5, max_lines=12, elem_id="labels"
    )
    sets = gradio.Dropdown([""], label="Or a label set of the release", visible=False, allow_custom_value=True)
    button = gradio.Button("Classify", variant="primary")
    scores, took = gradio.HTML("", elem_id="scores"), gradio.HTML("", elem_id="scores-took")
    given = [picture, labels, sets, alpha]
    asked = [button.click, picture.change, sets.input, alpha.input]
    # While α moves, the last position counts.
    gradio.on(asked, ask.classify, given, [scores, took], trigger_mode="always_last", **_CALL)
    return sets


def _search(ask: Ask, picture: Any) -> Any:
    text = gradio.Textbox(label="Text", placeholder="a red bicycle", max_lines=1, elem_id="query")
    with gradio.Row():
        index = gradio.Dropdown([""], label="Index", allow_custom_value=True, elem_id="index")
        count = gradio.Slider(1, 60, 12, step=1, label="How many")
    with gradio.Row():
        by_text = gradio.Button("Search by text", variant="primary")
        by_picture = gradio.Button("Search by the picture")
    found, took = gradio.HTML("", elem_id="found"), gradio.HTML("", elem_id="found-took")
    gradio.on([by_text.click, text.submit], ask.search_text, [text, index, count], [found, took], **_CALL)
    by_picture.click(ask.search_picture, [picture, index, count], [found, took], **_CALL)
    return index


def _segment(ask: Ask, picture: Any, alpha: Any) -> None:
    labels = gradio.Textbox(
        "sky\ngrass\na house\na tree\na person", label="Labels, one a line", lines=5, max_lines=12, elem_id="parts"
    )
    threshold = gradio.Slider(0, 1, 0, step=0.01, label="Less sure than this is background; 0: nothing is")
    side = gradio.Slider(0, 2048, 0, step=16, label="Shorter side that is looked at, px; 0: as the server does")
    button = gradio.Button("Segment", variant="primary")
    drawn, took = gradio.HTML("", elem_id="segments"), gradio.HTML("", elem_id="segments-took")
    button.click(ask.segment, [picture, labels, threshold, side, alpha], [drawn, took], **_CALL)


def mount(page: gradio.Blocks, most: int) -> Starlette:
    """The page as an app that answers below `PATH`."""
    app = Starlette()
    fonts = ["system-ui", "sans-serif"]  # of the visitor's machine: none is fetched
    gradio.mount_gradio_app(
        app,  # type: ignore[arg-type]  # it needs no more than Starlette
        page,
        PATH,
        root_path=PATH,
        allowed_paths=[],
        max_file_size=most,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        theme=gradio.themes.Default(primary_hue="indigo", font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_text("page.css"),
    )
    return app


def kinds(page: gradio.Blocks) -> Kinds:
    """The kinds of values of each event, as `Door` takes them."""
    return {number: [_range(block) for block in event.inputs] for number, event in page.fns.items()}


def _range(block: Any) -> tuple[float, float] | None:
    return (block.minimum, block.maximum) if isinstance(block, gradio.Slider) else None


def _text(file: str) -> str:
    return (Path(__file__).parent / file).read_text(encoding="utf-8")
