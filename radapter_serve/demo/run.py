"""The demo: from drawings to a served model for three tasks, each step by the same functions as the
commands.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from radapter_client import Client
from radapter_export import ExportSettings, export_release
from radapter_serve.contract.alpha import check_alpha
from radapter_serve.demo.ask import ask_classify, ask_search, ask_segment
from radapter_serve.demo.compare import OURS, RIVAL, compare
from radapter_serve.demo.data import FINE_TUNED, STYLES, DemoData, prepare
from radapter_serve.demo.full import fine_tune
from radapter_serve.demo.learn import (
    Lesson,
    Sets,
    draw_curve,
    evaluate,
    lessons,
    recipe_of,
    table,
    with_mean,
)
from radapter_serve.demo.scenes import prepare_scenes
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.model import Model
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.installation import find_tritonserver
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.training import train

LABEL_SET = "things"
INDEX = "scenes"


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    alpha: float | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Fine-tune on one style of drawing for each task, evaluate on others, export, serve, ask, and
    check all.

    Args:
        out: folder for everything that the demo makes; what an earlier demo made there is replaced.
        seed: of the fine-tunings.
        steps: optimizer steps of each; the recipes' if None.
        alpha: re-scaling of the exported releases, in [0, 1]; the recipes' if None.
        limit: images of each data set at most that are evaluated; all if None.

    Returns:
        What `results.json` in `out` holds.

    Raises:
        RAdapterError: something is missing, or served and local answers differ.
    """
    check_alpha(0.0 if alpha is None else alpha)
    console = Console()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"seed": seed}

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    def chapter(text: str) -> None:
        say(f"\n[bold]{text}[/]  [dim]{time.perf_counter() - started:.0f} s[/]")

    chapter(
        "1. Draw the images: drawings by many hands, and scenes of them with masks and captions"
    )
    data = prepare(out / "data")
    scenes = prepare_scenes(out / "data" / "scenes")

    for number, lesson in enumerate(lessons(data, scenes), 2):
        task = lesson.task
        repository = out / "repositories" / lesson.task
        chapter(
            f"{number}. {task.capitalize()}: fine-tune on drawings {STYLES[FINE_TUNED]}, evaluate"
            " on unseen ones"
        )
        run, facts = _learn(
            lesson, data, out, console, seed=seed, steps=steps, alpha=alpha, limit=limit
        )
        results[task] = facts

        say(f"fold at α = {facts['alpha']:g}, export, check against torch")
        merged = _export(run, facts["alpha"], repository, out / "merged" / task, data, say)
        if task == "retrieval":
            index = out / "indexes" / INDEX
            summary = build(f"csv:{scenes.gallery}", index, load_release(repository))
            say(f"{index}: an index of {summary.count} test scenes")

        with asked(repository, out / "indexes", say) as client:
            if task == "classification":
                picture = out / "classified.png"
                say(ask_classify(client, merged, data, LABEL_SET, picture, seed))
            elif task == "retrieval":
                picture = out / "found.png"
                say(ask_search(client, merged, scenes, INDEX, picture, seed))
            else:
                picture = out / "segmented.png"
                say(ask_segment(client, merged, data, scenes, picture, seed))
        say(f"the picture: {picture}")

    results["seconds"] = round(time.perf_counter() - started, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    chapter("Done. To continue by hand:")
    say(f"  cd {out} && radapter-serve repositories/retrieval")
    return results


@contextlib.contextmanager
def asked(repository: Path, indexes: Path, say: Callable[[str], None]) -> Iterator[Client]:
    """A client of a tritonserver of its own; where there is no Triton, a model in this process.

    Args:
        repository: to be served.
        indexes: folder of the indexes.
        say: called with a line of what is done.
    """
    try:
        find_tritonserver()
    except RAdapterError:
        say("ask in this process, for Triton is not installed")
        with Model(repository, indexes=indexes) as model:
            yield model
        return
    say("serve with tritonserver, and ask through the client")
    server = TritonServer(ServerConfig(repository, Endpoints.on_free_ports(), indexes=indexes))
    with server, Client(server.grpc_url) as client:
        yield client
    say("the server has stopped")


def _learn(
    lesson: Lesson,
    data: DemoData,
    out: Path,
    console: Console,
    *,
    seed: int,
    steps: int | None,
    alpha: float | None,
    limit: int | None,
) -> tuple[Path, dict[str, Any]]:
    """Fine-tune for one task, evaluate, print and draw; returns the run's folder and the task's
    part of the results.
    """
    shutil.rmtree(
        out / "runs" / lesson.task, ignore_errors=True
    )  # the demo's own, from an earlier call
    recipe = recipe_of(lesson, out, seed=seed, steps=steps)
    run = train(recipe, progress=True).folder
    alpha = recipe.alpha if alpha is None else alpha
    facts: dict[str, Any] = {"alpha": alpha, "metrics": lesson.metrics}
    beside: dict[str, Sets] = {}
    if lesson.task == "classification":
        picture = out / "alpha.png"
        rival = fine_tune(recipe_of(lesson, out, seed=seed, steps=steps, name="full"))
        compared = compare(run, rival, data, alpha, limit)
        console.print(compared.table())
        sets = compared.sets(OURS)
        beside = {f"{RIVAL}, full fine-tuning at α = 1": compared.sets(RIVAL)}
        facts |= {"systems": compared.facts(), RIVAL: with_mean(compared.sets(RIVAL))}
    else:
        picture = out / f"alpha-{lesson.task}.png"
        sets = evaluate(lesson, run, alpha, limit)
    console.print(table(lesson, sets, alpha))
    draw_curve(lesson, sets, picture, beside)
    console.print(f"the curve: {picture}", highlight=False, soft_wrap=True)
    return run, {**facts, "sets": with_mean(sets)}


def _export(
    run: Path,
    alpha: float,
    repository: Path,
    merged: Path,
    data: DemoData,
    say: Callable[[str], None],
) -> Path:
    """Export a release into a repository of its own; returns the folder of its merged
    checkpoint.
    """
    shutil.rmtree(repository, ignore_errors=True)  # the demo's own, from an earlier call
    settings = ExportSettings(
        model_repository=repository,
        merged=merged,
        label_sets={LABEL_SET: data.classes},
        templates=data.templates,
    )
    (release,) = export_release(
        run, [alpha], settings, progress=lambda line: say(f"[dim]{line}[/]")
    )
    errors = {graph.name: graph.agreement.max_error for graph in release.graphs}
    say(
        "max error against torch: "
        + ", ".join(f"{graph} {error:.1e}" for graph, error in errors.items())
    )
    return release.merged
