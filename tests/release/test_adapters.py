"""Adapters beside a release: added, replaced, removed, damaged."""

import json
import os
import weakref
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract.embeddings import Cache
from radapter_serve.contract.errors import TaskError
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, map_array
from radapter_serve.release import adapters as adapters_module
from radapter_serve.release.adapters import (
    FOLDER,
    LIST,
    AdapterFacts,
    AdaptersBeside,
    add,
    read_list,
    remove_adapter,
    unknown_name,
)

WIDTH = 6
TOWER = "sha256:" + "a" * 64


def put(repository, name, seed=0, rank=None, tower=TOWER, **options):
    """Add an adapter with random matrices, which are returned."""
    random = np.random.default_rng(seed)
    shapes = [(WIDTH, WIDTH)] if rank is None else [(WIDTH, rank), (rank, WIDTH)]
    factors: Any = tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)
    facts = AdapterFacts(text_tower=tower, width=WIDTH, alpha=0.5, rank=rank)
    add(repository, name, facts, factors, **options)
    return factors


def units(count, seed=9):
    vectors = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_an_adapter_maps_embeddings_as_its_matrix_says(tmp_path, rank, mapped):
    factors = put(tmp_path, "anna", rank=rank)
    matrix = factors[0] if rank is None else factors[0] @ factors[1]
    embeds = units(5)
    adapter = AdaptersBeside(tmp_path, TOWER, mapped=mapped).get("anna")
    expected = embeds @ (np.eye(WIDTH) + 0.3 * matrix.T.astype(np.float64))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(adapter.map(embeds, 0.3), expected, atol=1e-6)
    np.testing.assert_allclose(adapter.map(embeds, 0.0), embeds, atol=1e-6)
    assert {isinstance(factor.base, np.memmap) for factor in adapter.factors} == {mapped}


def test_what_is_added_replaced_and_removed_is_seen_by_the_next_request(tmp_path):
    adapters = AdaptersBeside(tmp_path, TOWER)
    with pytest.raises(TaskError, match="unknown_adapter"):
        adapters.get("anna")
    [first] = put(tmp_path, "anna", seed=1)
    kept = adapters.get("anna")
    np.testing.assert_array_equal(kept.factors[0], first)

    with pytest.raises(RAdapterError, match="--replace"):
        put(tmp_path, "anna", seed=2)
    np.testing.assert_array_equal(adapters.get("anna").factors[0], first)
    [second] = put(tmp_path, "anna", seed=2, replace=True)
    np.testing.assert_array_equal(adapters.get("anna").factors[0], second)
    assert adapters.get("anna").digest != kept.digest

    remove_adapter(tmp_path, "anna")
    with pytest.raises(TaskError, match="unknown_adapter"):
        adapters.get("anna")
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [LIST]
    np.testing.assert_array_equal(kept.factors[0], first)  # a running request keeps its adapter


def test_a_replaced_adapter_leaves_the_memory(tmp_path):
    put(tmp_path, "anna", seed=1)
    adapters = AdaptersBeside(tmp_path, TOWER)
    before = weakref.ref(adapters.get("anna"))
    put(tmp_path, "anna", seed=2, replace=True)
    adapters.get("anna")
    assert before() is None


def test_an_adapter_of_a_release_that_is_no_longer_served_leaves_the_memory(tmp_path):
    put(tmp_path, "anna")
    before = weakref.ref(AdaptersBeside(tmp_path, TOWER).get("anna"))
    AdaptersBeside(tmp_path, TOWER).get("anna")
    assert before() is None


def test_the_adapters_of_all_releases_take_a_quarter_of_the_memory(tmp_path, monkeypatch):
    """One too many makes room: the least recently asked is read again, and answers as before."""
    factors = {name: put(tmp_path, name, seed=seed) for seed, name in enumerate("abcd")}
    size = sum(factor.nbytes for factor in factors["a"])
    bounded = Cache(3.5 * size)
    monkeypatch.setattr(adapters_module, "_loaded", lambda: bounded)
    checked = []
    releases = [
        AdaptersBeside(tmp_path, TOWER, lambda adapter: checked.append(adapter.name)) for _ in "12"
    ]

    def ask(names, release):
        kept = [releases[release].get(name) for name in names]
        for name, adapter in zip(names, kept, strict=True):
            np.testing.assert_array_equal(adapter.factors[0], factors[name][0])
        return [weakref.ref(adapter) for adapter in kept]

    references = ask("abc", 0) + ask("d", 1)
    assert [reference() is not None for reference in references] == [False, True, True, True]
    assert checked == ["a", "b", "c", "d"]
    ask("bc", 0)
    assert len(checked) == 4
    ask("ac", 0)
    assert checked[4:] == ["a"]  # in the place of the other release's
    assert references[3]() is None


def test_an_adapter_whose_facts_name_another_tower_than_the_list_is_refused(tmp_path):
    other = "sha256:" + "b" * 64
    put(tmp_path, "anna", tower=other)
    path = tmp_path / FOLDER / LIST
    path.write_text(path.read_text().replace(other, TOWER))
    with pytest.raises(TaskError, match="is damaged: its files are not those of the list"):
        AdaptersBeside(tmp_path, TOWER).get("anna")


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path):
    for name in ("anna", "hanna", "bob"):
        put(tmp_path, name)
    with pytest.raises(TaskError, match="no adapter 'ana' here; the nearest are: anna, hanna$"):
        AdaptersBeside(tmp_path, TOWER).get("ana")
    with pytest.raises(RAdapterError, match="nearest are: anna"):
        remove_adapter(tmp_path, "ann")


def test_of_many_names_only_some_are_compared(monkeypatch):
    compared = []

    def matches(name, names, *_):
        compared.append(len(names))
        return names[:1]

    monkeypatch.setattr("difflib.get_close_matches", matches)
    names = [f"shop-{number:06}" for number in range(10_000)]
    assert "the nearest are: shop-00" in unknown_name("shop-005000x", names)
    assert compared == [64]


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/b", "", "a\0b", ".a", "x" * 201, "radapter-2", "a:b"]
)
def test_a_name_that_is_no_name_is_never_a_path(tmp_path, name):
    with pytest.raises(RAdapterError, match="can't be the name of an adapter"):
        put(tmp_path, name)
    assert not (tmp_path / FOLDER).exists()
    with pytest.raises(TaskError, match="unknown_adapter"):
        AdaptersBeside(tmp_path, TOWER).get(name)


def test_a_damaged_adapter_is_named_and_the_others_serve(tmp_path, capsys):
    put(tmp_path, "anna")
    put(tmp_path, "bob", seed=1)
    matrix = tmp_path / FOLDER / read_list(tmp_path)["anna"].folder / "matrix.npy"
    data = bytearray(matrix.read_bytes())
    data[-1] ^= 1
    matrix.write_bytes(data)
    adapters = AdaptersBeside(tmp_path, TOWER)
    for _ in range(2):
        with pytest.raises(
            TaskError, match="'anna' is damaged: matrix.npy differs.*--replace"
        ) as e:
            adapters.get("anna")
        assert e.value.code == "adapter_failed"
        assert str(tmp_path) not in str(e.value)
    assert capsys.readouterr().err.count("damaged") == 1  # the files are read once
    adapters.get("bob")
    put(tmp_path, "anna", replace=True)
    adapters.get("anna")


def test_a_matrix_that_is_written_in_place_is_not_answered_with(tmp_path):
    """Where it is mapped, its digest would be told for other values without a look at its file."""
    [factor] = put(tmp_path, "anna")
    adapters = AdaptersBeside(tmp_path, TOWER, mapped=True)
    before = adapters.get("anna")
    matrix = tmp_path / FOLDER / read_list(tmp_path)["anna"].folder / "matrix.npy"
    whole = matrix.read_bytes()
    for data in (whole[:-4] + b"abcd", whole[:200], b""):
        matrix.write_bytes(data)
        with pytest.raises(TaskError, match="'anna' is damaged: matrix.npy differs"):
            adapters.get("anna")
    matrix.write_bytes(whole)  # a backup is copied back
    after = adapters.get("anna")
    assert after.digest == before.digest
    np.testing.assert_array_equal(after.factors[0], factor)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_file_that_is_cut_or_overwritten_changes_no_answer_of_one_process(tmp_path, rank):
    """A request holds its adapter: a mapped matrix that is cut would end the process (SIGBUS)."""
    factors = put(tmp_path, "anna", rank=rank)
    adapters = AdaptersBeside(tmp_path, TOWER)
    kept = adapters.get("anna")
    for path in (tmp_path / FOLDER / read_list(tmp_path)["anna"].folder).glob("*.npy"):
        path.write_bytes(b"x" * path.stat().st_size)
        os.truncate(path, 0)
    for adapter in (kept, adapters.get("anna")):
        for held, factor in zip(adapter.factors, factors, strict=True):
            np.testing.assert_array_equal(held, factor)
    with pytest.raises(TaskError, match="'anna' is damaged"):
        AdaptersBeside(tmp_path, TOWER).get("anna")


def test_a_damaged_adapter_serves_again_once_its_file_is_whole(tmp_path):
    put(tmp_path, "anna")
    adapters = AdaptersBeside(tmp_path, TOWER)
    matrix = tmp_path / FOLDER / read_list(tmp_path)["anna"].folder / "matrix.npy"
    whole = matrix.read_bytes()
    matrix.write_bytes(whole[:100])
    with pytest.raises(TaskError, match="'anna' is damaged"):
        adapters.get("anna")
    matrix.write_bytes(whole)
    adapters.get("anna")


def test_an_adapter_that_is_removed_and_added_again_while_it_is_read_is_served(
    tmp_path, monkeypatch
):
    put(tmp_path, "anna")
    expected = AdaptersBeside(tmp_path, TOWER).get("anna").digest
    adapters = AdaptersBeside(tmp_path, TOWER, mapped=True)
    reads = []

    def interrupted(path):
        reads.append(path)
        if len(reads) == 1:
            remove_adapter(tmp_path, "anna")
            put(tmp_path, "bob", seed=1)
            put(tmp_path, "anna")
            raise FileNotFoundError(2, "No such file or directory")
        return map_array(path)

    monkeypatch.setattr(adapters_module, "map_array", interrupted)
    assert adapters.get("anna").digest == expected


def test_a_pickle_in_place_of_a_matrix_is_not_loaded(tmp_path):
    put(tmp_path, "anna")
    path = tmp_path / FOLDER / LIST
    entries = json.loads(path.read_text())
    matrix = tmp_path / FOLDER / entries["anna"]["folder"] / "matrix.npy"
    np.save(matrix, np.array([print], object), allow_pickle=True)
    entries["anna"]["sums"]["matrix.npy"] = digest_of(matrix)
    path.write_text(json.dumps(entries))
    with pytest.raises(TaskError, match="is damaged"):
        AdaptersBeside(tmp_path, TOWER).get("anna")


def test_a_broken_list_changes_nothing(tmp_path, capsys):
    put(tmp_path, "anna")
    adapters = AdaptersBeside(tmp_path, TOWER)
    adapters.get("anna")
    for text in ("{", '{"anna": 1}', '{"../x": {}}', "[]"):
        (tmp_path / FOLDER / LIST).write_text(text)
        adapters.get("anna")
        assert "could not read" in capsys.readouterr().err
    (tmp_path / FOLDER / LIST).unlink()
    os.mkfifo(tmp_path / FOLDER / LIST)  # reading it would block
    adapters.get("anna")
    assert "not a regular file" in capsys.readouterr().err


def test_an_adapter_of_another_text_tower_is_not_served(tmp_path):
    put(tmp_path, "anna", tower="sha256:" + "b" * 64)
    assert not AdaptersBeside(tmp_path, TOWER).entries()
    with pytest.raises(TaskError, match="unknown_adapter"):
        AdaptersBeside(tmp_path, TOWER).get("anna")


def test_a_check_that_fails_refuses_the_adapter_alone(tmp_path):
    def check(adapter):
        if adapter.name == "anna":
            raise RAdapterError("the adapter 'anna' differs from torch")

    put(tmp_path, "anna")
    put(tmp_path, "bob")
    adapters = AdaptersBeside(tmp_path, TOWER, check)
    with pytest.raises(TaskError, match="differs from torch"):
        adapters.get("anna")
    adapters.get("bob")
