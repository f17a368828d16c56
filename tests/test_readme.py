"""The commands of the walk-through and of the README, run as they stand there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, WALK_THROUGH = ROOT / "README.md", ROOT / "docs" / "walk-through.md"


def walk_through() -> str:
    """The shell script of the page: python blocks become `python -`."""
    text = WALK_THROUGH.read_text(encoding="utf-8")
    section = text.split("<!-- walk-through -->")[1].split("<!-- /walk-through -->")[0]
    # without the trap a failing line would leave the server, which holds the pipe
    script = ["set -eumo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for language, block in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL):
        script.append(block if language == "sh" else f"python - <<'PYTHON'\n{block}PYTHON")
    return "\n".join(script)


@pytest.mark.triton
def test_the_way_through_by_hand(tmp_path: Path) -> None:
    for port in (8000, 8001, 8002):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port}, which the page uses, is taken on this machine")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = "set -e; radapter-demo --steps 5\n" + walk_through()  # a whole demo takes minutes and shows no other way
    process = subprocess.Popen(
        ["bash", "-c", script],
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
    assert "60 of 60 labels equal" in output and "60 of 60 searches equal" in output and "pixels equal" in output
    for name in ("alpha.png", "classified.png", "found.png", "segmented.png", "results.json"):
        assert (tmp_path / "demo-output" / name).is_file()
    for name in ("found.html", "overlay.png", "merged/open_clip_model.safetensors"):
        assert (tmp_path / name).is_file()
    for model in ("classify", "embed_text", "retrieve", "segment"):
        assert f'"model_name":"{model}"' in output
    assert "Traceback" not in output


def test_commands_of_the_walk_through_exist() -> None:
    commands = set(re.findall(r"^(?:\.venv/bin/)?(radapter-[a-z]+)", walk_through(), re.MULTILINE))
    assert {"radapter-train", "radapter-export", "radapter-index", "radapter-serve", "radapter-query"} <= commands
    for command in commands:
        assert (Path(sys.executable).parent / command).is_file()
