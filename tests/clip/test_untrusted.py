"""A base that an adapter file names is read, and nothing in it is run: each hostile folder would
write a file.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from radapter_serve.adapter import save_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.data.rows import open_rows
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.models import from_adapter
from tests.helpers.small_models import make_base, random_adapter

Change = Callable[[Path, str], None]


class Code:
    """Pickled, it runs a line of Python when it is loaded."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.line,)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def edit_text(folder: Path, **fields: Any) -> None:
    path = folder / "open_clip_config.json"
    edit(path, lambda found: found["model_cfg"]["text_cfg"].update(fields))


def field(file: str, **fields: Any) -> Change:
    """Adds fields to a file."""

    def change(folder: Path, line: str) -> None:
        edit(folder / file, lambda found: found.update(fields))

    return change


def module_of(folder: Path, line: str) -> str:
    (folder / "evil.py").write_text(f"{line}\nclass Evil: pass\n", encoding="utf-8")
    return "evil.Evil"


def trusted_tokenizer(folder: Path, line: str) -> None:
    mapped_tokenizer(folder, line)
    edit_text(folder, tokenizer_kwargs={"trust_remote_code": True})


def mapped_tokenizer(folder: Path, line: str) -> None:
    name = module_of(folder, line)
    tokenizer = folder / "tokenizer_config.json"
    edit(tokenizer, lambda found: found.pop("tokenizer_class", None))
    edit(tokenizer, lambda found: found.update(auto_map={"AutoTokenizer": [name, name]}))


def mapped_config(folder: Path, line: str) -> None:
    auto_map = {"AutoConfig": module_of(folder, line)}
    edit(folder / "config.json", lambda found: found.update(model_type="own", auto_map=auto_map))


def mapped_text_tower(folder: Path, line: str) -> None:
    mapped_config(folder / "text", line)


def other_keyword(folder: Path, line: str) -> None:
    edit_text(folder, tokenizer_kwargs={"tokenizer_file": "/etc/passwd"})


def timm_of_a_folder(folder: Path, line: str) -> None:
    image = {"timm_model_name": f"local-dir:{folder}"}
    path = folder / "open_clip_config.json"
    edit(path, lambda found: found["model_cfg"]["vision_cfg"].update(image))


def not_json(folder: Path, line: str) -> None:
    (folder / "tokenizer_config.json").write_text("[" * 100_000, encoding="utf-8")


def no_table(folder: Path, line: str) -> None:
    (folder / "open_clip_config.json").write_text("[5]", encoding="utf-8")


def pickled_weights(folder: Path, line: str) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"logit_scale": Code(line)}, folder / "open_clip_pytorch_model.bin")


def old_pickled_weights(folder: Path, line: str) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Code(line)))


HOSTILE: dict[str, tuple[Change, str]] = {
    "trusted tokenizer": (trusted_tokenizer, "open_clip_config.json has trust_remote_code"),
    "mapped tokenizer": (mapped_tokenizer, "tokenizer_config.json has auto_map"),
    "mapped config": (mapped_config, "config.json has auto_map"),
    "config of a version": (
        field("config.json", configuration_files=["config.4.0.json"]),
        "config.json has configuration_files",
    ),
    "mapped text tower": (mapped_text_tower, "text/config.json has auto_map"),
    "kernel of the hub": (
        field("text/config.json", attn_implementation="someone/kernel"),
        "text/config.json has attn_implementation someone/kernel",
    ),
    "adapter of peft": (
        field("adapter_config.json", megatron_core="evil"),
        "holds adapter_config.json, an adapter of peft",
    ),
    "other keyword": (other_keyword, "has tokenizer_kwargs.tokenizer_file.*allowed are clean"),
    "timm of a folder": (timm_of_a_folder, "has timm_model_name local-dir:"),
    "not JSON": (not_json, "tokenizer_config.json: it is no JSON"),
    "no table": (no_table, "open_clip_config.json is missing or broken"),
    "pickled weights": (pickled_weights, "could not load"),
    "old pickled weights": (old_pickled_weights, "could not load"),
}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roberta")
    make_base("roberta", folder / "base")
    return folder / "base"


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_folder_that_would_run_code_is_refused(
    roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, message = HOSTILE[kind]
    monkeypatch.setattr("builtins.input", lambda _: "y")  # to a library that asks whether it may
    base = tmp_path / "base"
    mark = tmp_path / "mark"
    shutil.copytree(roberta, base)
    edit_text(base, hf_model_name=str(base / "text"))
    change(base, f"open({str(mark)!r}, 'w').close()")
    with pytest.raises(RAdapterError, match=message) as caught:
        load_base(f"local-dir:{base}")
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_an_adapter_that_names_such_a_base_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    mark = tmp_path / "mark"
    name = make_base("siglip", base)
    save_adapter(random_adapter(name), tmp_path / "adapter.safetensors")
    trusted_tokenizer(base, f"open({str(mark)!r}, 'w').close()")
    with pytest.raises(RAdapterError, match="has trust_remote_code"):
        from_adapter(tmp_path / "adapter.safetensors")
    assert not mark.exists()


@pytest.mark.parametrize(
    "place", ["csv:reference://a.csv::file:///t.json", "csv:zip://a.csv::t.zip", "pandas"]
)
def test_data_that_would_run_code_is_refused(place: str) -> None:
    with pytest.raises(RAdapterError, match="may run foreign code"):
        open_rows(place, {})
