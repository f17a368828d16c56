"""The commands of README and of the HTTP API, and README's Python, run as they stand there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.small_release import png
from tests.test_model import by_open_clip

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HTTP_API = ROOT / "docs" / "http-api.md"


# Without the trap a server holds the pipe.
PRELUDE = ["set -eumo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]

# The demo ends with the playground, which a browser opens: here a script that keeps the address,
# and then a real one.
OPENED = f"""
printf '#!/bin/sh\\necho "$1" > opened\\n' > browser && chmod +x browser
BROWSER="$PWD/browser %s" radapter-demo --steps 1 --limit 10 --open &
until [ -s opened ]; do sleep 1; kill -0 $!; done
picture="$(find "$PWD"/demo-output/data/val -name '*.png' -print -quit)"
scene="$(find "$PWD"/demo-output/data/scenes/*/images -name '*.png' -print -quit)"
PYTHONPATH={ROOT} python -m tests.helpers.use_playground "$(cat opened)" "$picture" "$scene"
kill -INT $! && wait $! || [ $? = 130 ]
"""

# The demo's steps, one by one.
STEPS = """
radapter-train --recipe demo-output/runs/classification/recipe.yaml \\
  --steps 30 --seed 1 --out runs/drawings
radapter-export --alpha 0.5 --label-set things=demo-output/data/classes.txt --dense naclip
radapter-index build demo-output/data/test --out indexes/drawings
radapter-serve &
until curl -sf localhost:8000/v2/health/ready || ! kill -0 $!; do sleep 1; done
cp "$(ls demo-output/data/shifts/line/*/*.png | head -n 1)" picture.png
cp demo-output/data/scenes/test-colour/images/000.png scene.png
radapter-query classify picture.png --label-set things
radapter-query search "a drawing of a fish" --index drawings --top-k 12 --save found.html
radapter-query search --image picture.png --index drawings --where "path NOT LIKE 'airplane/%'"
radapter-query segment scene.png --labels home link "magnifying glass" \\
  --short-side 96 --stride 24 --save overlay.png
radapter-query release
"""


def script(page: Path, name: str) -> str:
    """The blocks of code between two marks of a page."""
    section = (
        page.read_text(encoding="utf-8").split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    )
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    return "\n".join(
        block if language == "sh" else f"python - <<'PYTHON'\n{block}PYTHON"
        for language, block in blocks
    )


def test_two_commands_show_it_and_test_it() -> None:
    """The first block of README says them; they are targets, and run as they stand there."""
    first = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    clone, *lines = [line.partition("#")[0].strip() for line in first.splitlines()]
    assert clone.startswith("git clone ")
    assert lines == ["make demo", "make test"]
    heading = "## Your own photos"
    assert README.read_text(encoding="utf-8").index(first) < README.read_text().index(heading)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pipeline = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [
        step for job in workflow["jobs"].values() for step in job["steps"] if "env" not in step
    ]
    for line in lines:
        assert re.search(rf"^{line.removeprefix('make ')}:", makefile, re.MULTILINE)
        assert re.search(rf"^{line}$", pipeline, re.MULTILINE)
        # Nothing is exported before, so they run as for a newcomer.
        assert "export " not in pipeline[: pipeline.index(f"\n{line}\n")]
        assert line in [step.get("run") for step in steps]
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "quickstart.md"):
        assert first in page.read_text(encoding="utf-8"), page


@pytest.mark.triton
def test_the_demo_its_steps_and_the_quick_start(tmp_path: Path) -> None:
    for port in (8000, 8001, 8002):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port}, which the page uses, is taken on this machine")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # The demo's steps, and then the requests of the HTTP API with its picture.
    requests = script(HTTP_API, "by-http").replace("cat.jpg", "picture.png")
    lines = [
        *PRELUDE,
        OPENED,  # a whole demo takes minutes and shows no other way
        "sed -i 's/^batch_size: .*/batch_size: 8/' demo-output/runs/classification/recipe.yaml",
        STEPS,
        requests.replace('["photos"]', '["drawings"]'),
        "kill %1; wait  # until the server is gone",
    ]
    # The README's lines, on some of the demo's drawings and its small base for a few steps.
    base = f"local-dir:{ROOT}/radapter_serve/demo/base --pretrained None"
    few = f"--data photos --architecture {base} --steps 3 --batch-size 8 --workers 0"
    lines += [
        "mkdir -p quick/photos; cp -r demo-output/data/train/[ab]* quick/photos",
        "cp picture.png quick/cat.jpg; cd quick",
        script(README, "quick-start").replace("--data photos", few),
    ]
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, output[-4000:]
    assert "all 60 labels equal to open_clip's" in output
    for name in (
        *(f"demo-output/{name}.png" for name in ("classified", "found", "segmented")),
        *("demo-output/results.json", "found.html", "overlay.png"),
        *("merged/open_clip_model.safetensors", "quick/merged/open_clip_model.safetensors"),
        *("quick/runs/photos/adapter.safetensors", "quick/runs/photos/alpha.json"),
    ):
        assert (tmp_path / name).is_file(), name
    for model in ("classify", "embed_text", "retrieve", "segment"):
        assert f'"model_name":"{model}"' in output
    assert "not opened: " in output or all(
        f"\n{line} " in output for line in ("classified", "found", "segmented")
    )
    assert "Traceback" not in output


def test_the_python_of_the_readme(
    quick: None,
    tiny_clip_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its first lines, on a few images and a small base: the answer is open_clip's own."""
    classes = ["cat", "dog", "house"]
    for number in range(15):
        folder = tmp_path / "photos" / classes[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(number))
    (tmp_path / "cat.jpg").write_bytes(png(99, kind="JPEG"))
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    small = f'data="photos", architecture="{tiny_clip_dir}", pretrained=None, steps=3, workers=0'
    names: dict[str, Any] = {}
    exec(lines.replace('data="photos"', small), names)
    assert (names["run"].folder / "alpha.json").is_file()  # what `evaluate` measured is kept
    assert names["done"].alpha == 0.5  # held-out photos can't show what is lost elsewhere
    texts = [f"a photo of a {name}." for name in classes]
    [scores] = by_open_clip(tmp_path / "merged", [(tmp_path / "cat.jpg").read_bytes()], texts)
    assert capfd.readouterr().out == f"{classes[scores.argmax()]}\n"
