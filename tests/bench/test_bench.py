"""The command radapter-bench: against a real server, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radapter_serve.cli.bench import main
from tests.helpers.fake_server import FakeServer, write_repository


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "0"], "--seconds is 0; allowed is what is above 0"),
        (["--rate", "5", "nan"], "--rate is nan"),
        (["--concurrency", "1", "-2"], "--concurrency is -2"),
        (["--warmup", "inf"], "--warmup is inf; allowed are 0 and more seconds"),
        (["--image", "nowhere.jpg"], "--image nowhere.jpg: No such file or directory"),
        (["--image", __file__], "it is no image that can be read"),
        (["--tasks", "classify", "sing"], "--tasks names 'sing'; allowed are classify, embed_image"),
        (["--tasks", "retrieve"], "--tasks retrieve needs --index NAME"),
        (["--url", "localhost:8001"], "not a server's URL"),
        (["--url", "grpc://127.0.0.1:9"], "grpc://127.0.0.1:9: "),
    ],
)
def test_refusals_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""


@pytest.mark.triton
def test_a_running_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    tasks = ["classify", "embed_image", "embed_text"]
    with FakeServer(write_repository(tmp_path / "repository")) as server:
        short = ["--seconds", "0.4", "--warmup", "0.1", "--out", str(out)]
        urls = ["--url", *server.urls.values()]
        assert main([*urls, "--tasks", *tasks, "--concurrency", "1", "3", *short]) == 0
        closed = json.loads((out / "bench.json").read_text())
        assert main([*urls[:2], "--tasks", "embed_text", "--rate", "20", *short]) == 0
        opened = json.loads((out / "bench.json").read_text())
    found = {(row["task"], row["url"].partition(":")[0], row["load"]) for row in closed["rows"]}
    loads = "1 caller", "3 callers"
    assert found == {(task, protocol, load) for task in tasks for protocol in ("grpc", "http") for load in loads}
    for row in closed["rows"]:
        assert row["requests"] > 0
        assert row["errors"] == {}
        mean = sum(row["stages"].values())
        assert 0 < mean < 1e3 * row["latency"]["p99"]
    assert closed["release"]["version"] == 2
    assert [row["load"] for row in opened["rows"]] == ["20/s"]
    assert (out / "bench.png").stat().st_size > 1000
    assert "where the time goes" in capsys.readouterr().out
