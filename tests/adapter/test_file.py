"""The adapter file: what it holds, what is refused, and the average of several."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from radapter_serve.adapter import (
    Adapter,
    Metadata,
    attach_adapter,
    average_adapters,
    base_digest,
    fold,
    load_adapter,
    save_adapter,
)
from radapter_serve.clip.base import load_base
from radapter_serve.errors import RAdapterError

FIELDS = [field.name for field in dataclasses.fields(Metadata)]
HEADER: dict[str, Any] = {
    "architecture": "ViT-B-32",
    "base_digest": "sha256:0",
    "rank": None,
    "format_version": 1,
}
# What may be where a field should be; the last two are more than Python's json reads.
TEXTS = [
    *("", "x", "{", "null", "true", "-1", "0.5", "NaN", "1e999", '""', '"\\ud800"', "[]", "[[1]]"),
    *("{}", '{"data": 1, "classes": [null], "": {"": []}}', "9" * 5000, "[" * 100_000),
]
EYE = torch.eye(2)
DTYPES = [
    *("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL"),
    *("F8_E4M3", "F8_E8M0", "F4", "C64", "F33"),
]
WIDTHS = {"a.out_proj": 6, "b.c_proj": 8}
BASE = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(number))
    for number, (key, width) in enumerate(WIDTHS.items())
    for name, shape in ((f"{key}.weight", (width, 5)), (f"{key}.bias", (width,)))
}


def test_digests_are_those_of_the_specification() -> None:
    """Files in the field hold them, so they may never change."""
    weight = [[1.0, -2.5, 0.0], [3.25, 1e-8, -1.0]]
    bias = [0.5, -0.125]
    expected = hashlib.sha256()
    expected.update(b"a.out_proj.bias(2,)" + struct.pack("<2f", *bias))
    expected.update(b"a.out_proj.weight(2, 3)" + struct.pack("<6f", *weight[0], *weight[1]))
    state = {
        "a.out_proj.weight": torch.tensor(weight),
        "a.out_proj.bias": torch.tensor(bias, dtype=torch.bfloat16),
        "b.other": torch.ones(1),
    }
    digest = base_digest(state, ["a.out_proj"])
    assert digest == f"sha256:{expected.hexdigest()}"
    assert digest == "sha256:4dc07b71232baf0cf1fa0d162c403de4d1d309bad4eb55fded9f7c55463aa9a9"
    adapter = Adapter({"layer": torch.eye(2)}, Metadata("x", "sha256:0"))
    values = b"layer(2, 2)" + struct.pack("<4f", 1, 0, 0, 1)
    assert adapter.digest == f"sha256:{hashlib.sha256(values).hexdigest()}"


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    header = {name: json.dumps(value) for name, value in {**HEADER, **fields}.items()}
    save_file({"layer": torch.eye(4)} if tensors is None else tensors, path, metadata=header)
    return path


def refused(path: Path) -> str:
    with pytest.raises(RAdapterError) as error:
        load_adapter(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha", "0.5", "its 'alpha' is '0.5': "),
        ("templates", ["a photo"], "its 'templates.0' is 'a photo': "),
        ("recipe", {"dense": 5}, "its 'recipe.dense' is 5: "),
        ("rank", 0, "its 'rank' is 0: "),
        ("classes", "cat", "its 'classes' is 'cat': "),
        ("format_version", "1", "its 'format_version' is '1': "),
        ("format_version", 2, "it has format version 2, and this radapter-serve reads up to 1; "),
    ],
)
def test_metadata_of_wrong_types_or_ranges_is_one_line(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    assert message in refused(write(tmp_path / "adapter.safetensors", **{field: value}))
    if field != "format_version":
        metadata = Metadata(**{**HEADER, field: value})
        with pytest.raises(RAdapterError, match="its '"):
            save_adapter(Adapter({"layer": torch.eye(4)}, metadata), tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


def test_a_missing_field_is_refused_and_an_unknown_one_ignored(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tensors = {"layer": torch.eye(4)}
    header = {name: json.dumps(value) for name, value in HEADER.items()}
    for fields in (None, {key: header[key] for key in header if key != "architecture"}):
        save_file(tensors, path, metadata=fields)
        assert "architecture" in refused(path)
    write(path, format="pt", recipe={"classes": None, "x": [1]})
    assert load_adapter(path).metadata.recipe == {"classes": None, "x": [1]}
    save_file(tensors, path, metadata={**header, "alpha": "half"})
    assert "its alpha is not JSON" in refused(path)


@pytest.mark.parametrize(
    ("tensors", "rank", "message"),
    [
        ({"a": EYE * math.nan}, None, "tensor 'a' holds values that are not finite"),
        ({"a": EYE.half()}, None, "tensor 'a' is torch.float16 (2, 2), should be torch.float32"),
        ({"a": torch.ones(2, 3)}, None, "(2, 3), should be torch.float32 (2, 2)"),
        ({"a": EYE, "a.up": torch.ones(2, 1)}, None, "tensor 'a.up' is torch.float32 (2, 1), shou"),
        ({"a.up": torch.ones(2, 1)}, 1, "tensor 'a.down' is missing, should be torch.float32"),
        ({"a": torch.ones(())}, None, "tensor 'a' is torch.float32 (), should be"),
        ({}, None, "it has no tensors"),
    ],
)
def test_tensors_that_the_specification_does_not_allow(
    tmp_path: Path, tensors: dict[str, torch.Tensor], rank: int | None, message: str
) -> None:
    assert message in refused(write(tmp_path / "adapter.safetensors", tensors, rank=rank))
    with pytest.raises(RAdapterError, match=re.escape(message)):
        save_adapter(Adapter(tensors, Metadata("x", "y", rank=rank)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_values_that_are_not_finite_are_neither_attached_nor_folded(tiny_clip_dir: str) -> None:
    model = load_base(tiny_clip_dir).model
    key = "visual.transformer.resblocks.0.mlp.c_proj"
    matrix = torch.full((64, 64), math.nan)
    adapter = Adapter({key: matrix}, Metadata("x", base_digest(model.state_dict(), [key])))
    for use in (
        lambda: attach_adapter(model, adapter, 0.0),
        lambda: fold(model.state_dict(), adapter, 0.0),
    ):
        with pytest.raises(RAdapterError, match=f"'{key}' holds values that are not finite"):
            use()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "adapter.safetensors"


def loads_or_is_refused_in_one_line(path: Path) -> None:
    try:
        assert isinstance(load_adapter(path), Adapter)
    except RAdapterError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


@given(content=st.binary(max_size=300))
def test_any_bytes(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    loads_or_is_refused_in_one_line(place)


@pytest.mark.parametrize("name", [*FIELDS, "other"])
def test_any_json_and_text_in_the_metadata(place: Path, name: str) -> None:
    header = {field: json.dumps(value) for field, value in HEADER.items()}
    for text in TEXTS:
        save_file({"layer": torch.eye(4)}, place, metadata={**header, name: text})
        loads_or_is_refused_in_one_line(place)


def test_any_type_of_tensor(place: Path) -> None:
    metadata = {name: json.dumps(value) for name, value in HEADER.items()}
    for dtype in DTYPES:
        for size in (2, 4, 8, 16, 32, 64):
            entry = {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, size]}
            header = json.dumps({"__metadata__": metadata, "layer": entry}).encode()
            place.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
            loads_or_is_refused_in_one_line(place)


def make(seed: int, rank: int | None, **metadata: object) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for key, width in WIDTHS.items():
        if rank is None:
            shapes[key] = (width, width)
        else:
            shapes |= {f"{key}.up": (width, rank), f"{key}.down": (rank, width)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    digest = base_digest(BASE, WIDTHS)
    return Adapter(tensors, Metadata("x", digest, rank=rank, **metadata))  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=4),
    parts=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    alpha=st.floats(0, 1),
)
def test_the_fold_of_the_average_is_the_average_of_the_folds(
    ranks: list[int | None], parts: list[int], alpha: float
) -> None:
    adapters = [make(seed, rank) for seed, rank in enumerate(ranks)]
    parts = parts[: len(adapters)]
    weights = [part / sum(parts) for part in parts] if sum(parts) else None
    average = average_adapters(adapters, weights)
    folded = fold(BASE, average, alpha)
    folds = [fold(BASE, adapter, alpha) for adapter in adapters]
    shares = weights or [1 / len(adapters)] * len(adapters)
    for name, base in BASE.items():
        expected = sum(
            share * each[name].double() for share, each in zip(shares, folds, strict=True)
        )
        np.testing.assert_allclose(
            folded[name], expected, atol=1e-4 * (1 + float(base.abs().max()))
        )
    assert average.metadata.rank == (ranks[0] if len(ranks) == 1 else None)


def test_a_soup_says_what_was_held_out_where_all_held_out_the_same() -> None:
    recipe = {"seed": 1, "val_fraction": 0.2}
    first = make(0, None, held_out="sha256:1", recipe=recipe)
    same = make(1, None, held_out="sha256:1", recipe={**recipe, "seed": 2})
    other = make(2, None, held_out="sha256:2", recipe=recipe)
    soup = average_adapters([first, same]).metadata
    assert (soup.held_out, soup.recipe) == ("sha256:1", recipe)
    soup = average_adapters([first, same, other]).metadata
    assert (soup.held_out, soup.recipe) == (None, {"seed": 1})


def test_adapters_that_have_no_average() -> None:
    first = make(0, None)
    other = dataclasses.replace(first.metadata, base_digest="sha256:0123", architecture="ViT-B-16")
    fewer = Adapter(
        {"a.out_proj": first.tensors["a.out_proj"]}, dataclasses.replace(other, architecture="x")
    )
    two = [first, make(1, 2)]
    cases: list[tuple[list[Adapter], list[float] | None, str]] = [
        ([], None, "no adapters"),
        (two, [0.5, 0.6], "weights are 0.5 0.6; allowed: .* sum is 1"),
        (two, [float("nan"), 1], "weights are nan 1"),
        (two, [1], "1 weights for 2 adapters"),
        (
            [first, first, Adapter(first.tensors, other)],
            None,
            f"{first.metadata.base_digest}.*adapter 3 on sha256:0123 .ViT-B-16",
        ),
        ([first, fewer], None, "adapter 1 adapts b.c_proj and adapter 2 does not.*--adapt"),
    ]
    for adapters, weights, message in cases:
        with pytest.raises(RAdapterError, match=message):
            average_adapters(adapters, weights)
    average_adapters(two, [0.3333333, 0.6666666])  # rounded, as people write them


def test_a_missing_adapter_names_the_command_that_makes_it(tmp_path: Path) -> None:
    def ends(path: Path, command: str) -> None:
        with pytest.raises(RAdapterError, match=re.escape(command) + "$"):
            load_adapter(path)

    run = tmp_path / "my run"
    ends(run, f"make one with radapter-train --out '{run}'")
    run.mkdir()
    ends(run / "adapter.safetensors", f"make one with radapter-train --out '{run}'")
    (run / "checkpoint.pt").touch()
    ends(run, f"finish the run with radapter-train --resume '{run}'")
