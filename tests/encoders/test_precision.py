"""The precision of serving: the fastest that agrees with torch, and only where it is allowed."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Client
from radapter_serve import Model
from radapter_serve.encoders import precision as module
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.precision import Choice, choose
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.in_process import EngineServer
from radapter_serve.gateway.rechecks import Rechecks
from radapter_serve.gateway.triton import Triton
from radapter_serve.release.agreement import Agreement
from radapter_serve.release.config import encoders_of, parsed
from radapter_serve.release.release import IN_BF16, Release
from radapter_serve.release.repository import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.models import configure_encoders
from tests.helpers.asking import tritonserver
from tests.helpers.small_release import needs_bf16, write_release

BF16 = ("openvino", "bf16")
FP32 = ("openvino", "fp32")
OWN = ("onnxruntime", "fp32")


@pytest.fixture
def amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this processor one with AMX."""
    facts = tmp_path / "cpuinfo"
    facts.write_text("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n")
    monkeypatch.setattr(module, "CPU_FACTS", facts)
    return facts


def test_auto_takes_the_fastest_that_agrees(
    repository: Path, amx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: dict[tuple[str, str], Choice] = {}
    times: dict[tuple[str | None, str | None], float] = {}

    def tried(_: Path, releases: Any, runtime: str, precision: str, *options: Any) -> Choice:
        if (runtime, precision) not in trials:
            raise RAdapterError("it differs from torch")
        return trials[runtime, precision]

    monkeypatch.setattr(module, "try_encoders", tried)
    monkeypatch.setattr(
        module, "quickest", lambda _, choice: times[choice.runtime, choice.precision]
    )

    def chosen(runtime: str | None = None, **seconds: float) -> Choice:
        trials.clear()
        for way in (OWN, FP32, BF16):
            if "_".join(way) in seconds:
                agreements = {1: {"image_encoder": Agreement(1e-3, 1 - 5e-5)}}
                trials[way] = Choice(*way, "", {}, agreements)
                times[way] = seconds["_".join(way)]
        return choose(repository, [1, 2], runtime, "auto", 2)

    fast = chosen(onnxruntime_fp32=3.6, openvino_fp32=3, openvino_bf16=1)
    assert (fast.runtime, fast.precision) == BF16
    assert fast.note == (
        "precision bf16 with openvino: images 3.6 times as fast as fp32 with onnxruntime, 1 -"
        " cosine at most 5e-05"
    )
    slow = chosen(onnxruntime_fp32=1, openvino_fp32=2, openvino_bf16=2)
    assert (slow.runtime, slow.precision) == ("onnxruntime", None)
    wrong = chosen(onnxruntime_fp32=3, openvino_fp32=2)
    assert (wrong.runtime, wrong.precision) == ("openvino", None)
    assert "fp32 with openvino: images 1.5 times" in wrong.note
    assert "it differs from torch" in wrong.note
    assert chosen("onnxruntime").runtime == "onnxruntime"  # nothing is tried
    amx.write_text("flags : fpu avx512f\n")
    assert chosen().precision is None


def test_nothing_is_rounded_unless_asked_for(repository: Path, amx: Path) -> None:
    choice = choose(repository, [1], None, None, 2)
    assert (choice.runtime, choice.precision) == (None, None)
    assert "this processor has AMX: --precision auto" in choice.note
    assert not any(sign in choice.note for sign in ("times as fast", "%"))  # nothing was measured
    assert not choose(repository, [1], None, None, 2, on_gpu=True).note
    assert not choose(repository, [1], None, "fp32", 2).note

    amx.write_text("flags : fpu avx512f\n")
    assert not choose(repository, [1], None, None, 2).note


def test_what_cannot_be_computed_in_bf16_is_refused(
    repository: Path, amx: Path, tmp_path: Path
) -> None:
    with pytest.raises(RAdapterError, match="with OpenVINO on the CPU, and not with onnxruntime"):
        choose(repository, [1], "onnxruntime", "bf16", 2)
    with pytest.raises(RAdapterError, match="not with a GPU"):
        choose(repository, [1], None, "bf16", 2, on_gpu=True)
    with pytest.raises(RAdapterError, match="allowed for it are fp32, bf16, auto"):
        choose(repository, [1], None, "fp8", 2)
    facts = Release.load(repository / "classify" / "1")
    folder = tmp_path / "classify" / "1"
    folder.mkdir(parents=True)
    replace(facts, precision="int8").save(folder)
    for asked in ("fp32", "bf16"):
        with pytest.raises(RAdapterError, match="exported in int8; allowed for it are int8, auto"):
            choose(tmp_path, [1], None, asked, 2)
    replace(facts, precision="bf16").save(folder)
    assert choose(tmp_path, [1], None, "bf16", 2) == Choice(None, "bf16")
    amx.write_text("flags : fpu avx512f\n")
    with pytest.raises(RAdapterError, match="this processor has no bf16"):
        choose(repository, [1], None, "bf16", 2)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_auto_leaves_a_release_that_was_exported_in_another_precision(
    repository: Path, amx: Path, tmp_path: Path, precision: str
) -> None:
    facts = Release.load(repository / "classify" / "1")
    for version, exported in ((1, "fp32"), (2, precision)):
        folder = tmp_path / "classify" / str(version)
        folder.mkdir(parents=True)
        replace(facts, version=version, precision=exported).save(folder)
    for versions in ([2], [1, 2]):
        choice = choose(tmp_path, versions, "onnxruntime", "auto", 2)
        note = f"precision as exported: release 2 is in {precision} already"
        assert choice == Choice("onnxruntime", None, note)


@needs_bf16
def test_a_small_release_is_computed_in_bf16(exported_tiny_clip: Path) -> None:
    models = exported_tiny_clip / "model_repository"
    texts = ["a cat", "a dog in the snow"]
    with Model(models, threads=1) as exact, Model(models, precision="bf16", threads=1) as rounded:
        a = exact.embed_texts(texts)
        b = rounded.embed_texts(texts)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert 1e-8 < (1 - cosines).max() < 2e-4  # rounded, and within the bound


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Every encoder that is loaded: its name, release, runtime and precision."""
    loads: list[tuple[str, ...]] = []
    load = EncoderGraph.__init__

    def counted(graph: EncoderGraph, path: Path, runtime: str, **how: Any) -> None:
        loads.append((path.parent.parent.name, path.parent.name, runtime, how["precision"]))
        load(graph, path, runtime, **how)

    monkeypatch.setattr(EncoderGraph, "__init__", counted)
    return loads


@pytest.mark.parametrize("runtime", [None, "openvino", "auto"])
def test_an_engine_loads_each_encoder_once(
    exported_tiny_clip: Path, loads: list[tuple[str, ...]], runtime: Any
) -> None:
    pytest.importorskip("openvino")
    models = exported_tiny_clip / "model_repository"
    exported = Release.load(models / "classify" / "1").agreement
    with EngineServer(ServerConfig(models, runtime=runtime, threads=1)) as server:
        used = "onnxruntime" if runtime is None else "openvino"
        assert {facts.runtime for facts in server.facts.values()} == {used}
        expected = [
            (name, str(number), used, "fp32")
            for number in server.served.releases
            for name in ("image_encoder", "text_encoder")
        ]
        assert loads == expected
        assert server.facts[server.served.releases[0]].agreement == exported


@needs_bf16
def test_each_encoder_is_loaded_once_and_the_fastest_are_kept(
    exported_tiny_clip: Path, loads: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = exported_tiny_clip / "model_repository"
    times = iter([3.0, 1.0])
    monkeypatch.setattr(module, "quickest", lambda *_: next(times))
    config = ServerConfig(models, precision="auto", threads=1)
    with EngineServer(config) as server:
        assert "images 3.0 times as fast as fp32 with onnxruntime" in server.note
        count = len(server.served.releases)
        assert len(loads) == len(set(loads)) == 4 * count  # two encoders in two ways

        # What is served says how it is computed, and what was measured.
        facts = server.engine.releases("classify")[-1]
        assert (facts.precision, facts.runtime) == ("bf16", "openvino")
        assert 0 < (facts.image_distance or 0) < 2e-4
        assert facts.bounds == IN_BF16
        assert server.facts[facts.version] == facts


@needs_bf16
@pytest.mark.parametrize("first", [1, 2])
def test_auto_chooses_for_each_precision_of_an_export_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    for version, precision in ((1, "fp32"), (2, "int8"), (3, "fp32")):
        write_release(tmp_path, version, seed=version, dense=False, precision=precision)
    Served((first,)).save(tmp_path)
    times = iter([3.0, 1.0])
    monkeypatch.setattr(module, "quickest", lambda *_: next(times))  # once, for the first in fp32
    with EngineServer(ServerConfig(tmp_path, precision="auto", threads=1)) as server:
        for version in (first, 3 - first, 3, 2):
            how = ("onnxruntime", "int8") if version == 2 else BF16
            if server.served.releases != (version,):
                server.load([version])
            [facts] = server.engine.releases("classify")
            assert (facts.runtime, facts.precision) == how
            assert server.facts == {version: facts}


@pytest.mark.parametrize("exported", ["onnxruntime", "openvino"])
def test_triton_gets_the_hint(exported_tiny_clip: Path, exported: str) -> None:
    models = exported_tiny_clip / "model_repository"
    [encoder] = [candidate for candidate in encoders_of(models) if candidate.name == "text_encoder"]
    if exported == "openvino":
        encoder.config.CopyFrom(parsed(encoder.configured("openvino", 1)))
    config = parsed(encoder.computed_in("bf16").configured("openvino", 1))
    assert config.parameters["HINT_BF16"].string_value == "YES"
    assert "HINT_BF16" not in parsed(encoder.configured("openvino", 1)).parameters


@needs_bf16
def test_the_configs_of_encoders_ask_for_bf16(exported_tiny_clip: Path) -> None:
    models = exported_tiny_clip / "model_repository"
    choice = Choice("openvino", "bf16")
    assert "HINT_BF16" in configure_encoders(models, [2], choice, 1)["image_encoder"]


@pytest.mark.triton
@needs_bf16
def test_triton_computes_in_bf16_says_so_and_is_asked_again(
    exported_tiny_clip: Path, tmp_path: Path
) -> None:
    models = exported_tiny_clip / "model_repository"
    texts = ["a cat", "a dog in the snow"]
    with Model(models, threads=1, precision="bf16") as model:
        expected = model.embed_texts(texts)
    settings = {"precision": "bf16", "threads": 1, "instances": ("1",), "indexes": tmp_path}
    with tritonserver(models, **settings) as server, Client(server.grpc_url) as client:
        release = client.release()
        assert (release.precision, release.facts["runtime"]) == ("bf16", "openvino")
        assert server.facts[release.version].to_dict() == release.facts
        np.testing.assert_allclose(client.embed_texts(texts), expected, atol=1e-3)
        counts: Counter[tuple[str, str]] = Counter()

        async def recheck() -> None:
            upstream = Triton(server.grpc_url.removeprefix("grpc://"))
            rechecks = Rechecks(upstream, models, 1.0, lambda *each: counts.update([each]))
            for _ in range(4):
                await rechecks.step()
            assert rechecks.trouble is None
            await upstream.close()

        asyncio.run(recheck())
    count = 4 // 2
    assert counts == {("image_encoder", "ok"): count, ("text_encoder", "ok"): count}
