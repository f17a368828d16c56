"""`radapter-demo`: fine-tune, export, serve and query a small CLIP offline."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from radapter_serve.cli import run
from radapter_serve.demo import DemoSettings
from radapter_serve.errors import check_installed


def demo(
    settings: tyro.conf.OmitArgPrefixes[DemoSettings] = DemoSettings(),  # noqa: B008  # frozen
    full: bool = False,
    open: bool = False,
) -> None:
    """Fine-tune, evaluate, export, serve and query a small CLIP on real drawings, offline, in
    about a minute on two CPU cores.

    One adapter, and one release that labels drawings, searches and segments.

    Args:
        settings: settings of the demo's models and folders.
        full: train an adapter for each of three tasks, and evaluate them over alpha on all styles;
            ten minutes or more.
        open: end with the playground, opened in a browser, until Ctrl-C; also needs the extra
            `playground`.
    """
    if open:
        check_installed("gradio", "demo,playground")
    # Print this before importing torch, which takes seconds.
    if full:
        print("The whole demo takes ten minutes or more on two CPU cores.", flush=True)
        from radapter_serve.demo.full import run_full as run_demo
    else:
        print(
            "The demo takes about a minute on two CPU cores. (--full, which takes ten or more,"
            " trains for each task, and evaluates on all styles.)",
            flush=True,
        )
        from radapter_serve.demo.run import run_demo

    run_demo(settings)
    if open:
        from radapter_serve.demo.run import play

        play(settings.out)


def main(argv: Sequence[str] | None = None) -> int:
    return run(demo, argv, prog="radapter-demo")
