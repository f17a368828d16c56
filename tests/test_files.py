"""Files that appear whole or not at all, readable by whom the umask says."""

from __future__ import annotations

import ast
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, map_array, read_arrays, staged, staged_folder


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_mode_follows_the_umask_whoever_writes(umask: int, tmp_path: Path) -> None:
    with staged(tmp_path / "weights.safetensors") as path:
        save_file({"a": np.eye(2)}, path)
    with staged(tmp_path / "text") as path:
        path.write_text("text", encoding="utf-8")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_the_digest_of_files_is_that_of_their_bytes_in_a_row(tmp_path: Path) -> None:
    contents = [os.urandom((1 << 20) + 3), b"more"]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert digest_of(*paths) == f"sha256:{hashlib.sha256(b''.join(contents)).hexdigest()}"


def write(folder: Path, content: str) -> None:
    with staged_folder(folder, "a test") as temporary:
        (temporary / content).touch()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_takes_the_place_of_another_or_of_none(
    exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes one step where the disk can, as this one: there is a folder before every step."""
    if not exchanged:
        monkeypatch.setattr("radapter_serve.files.exchange", lambda *_: False)
    folder = tmp_path / "new \u00e9"
    write(folder, "first")
    there: list[bool] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        there.append(folder.exists())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    for content in ("second", "third"):
        (tmp_path / ".new \u00e9.old").mkdir()  # as a killed call leaves it
        write(folder, content)
        assert names(folder) == {content}
        assert list(tmp_path.iterdir()) == [folder]
    assert there == ([True] * 2 if exchanged else [True, True, True, False] * 2)


def test_a_link_to_a_folder_is_replaced_and_its_target_is_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    for content in ("first", "second"):
        write(tmp_path / "folder", content)
        assert names(tmp_path / "folder") == {content}
        assert names(tmp_path) == {"elsewhere", "folder"}


def test_a_failure_leaves_the_old_file_or_folder_and_no_new_parents(tmp_path: Path) -> None:
    write(tmp_path / "folder", "old")
    with pytest.raises(ValueError, match="half"), staged(tmp_path / "folder" / "old") as path:
        path.write_text("new", encoding="utf-8")
        raise ValueError("half-written")
    assert (tmp_path / "folder" / "old").read_text(encoding="utf-8") == ""
    for folder in (tmp_path / "folder", tmp_path / "a" / "b" / "c"):
        with pytest.raises(ValueError, match="half"), staged_folder(folder, "a test") as temporary:
            (temporary / "new").touch()
            raise ValueError("half-written")
    assert names(tmp_path) == {"folder"} and names(tmp_path / "folder") == {"old"}


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with (
        pytest.raises(RAdapterError, match="is a file"),
        staged_folder(tmp_path / "file", "a test"),
    ):
        pass
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_killed_swap_is_undone(tmp_path: Path) -> None:
    """Killed after the old folder went away, and before the new one took its place."""
    write(tmp_path / "folder", "old")
    (tmp_path / "folder").rename(tmp_path / ".folder.old")
    (tmp_path / ".folder.new").mkdir()
    (tmp_path / ".folder.new" / "half").touch()
    with staged_folder(tmp_path / "folder", "a test") as temporary:
        assert names(tmp_path / "folder") == {"old"} and names(temporary) == set()
        (temporary / "new").touch()
    assert names(tmp_path) == {"folder"} and names(tmp_path / "folder") == {"new"}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "folder", "radapter-x") as first:
        with (
            pytest.raises(RAdapterError, match="another radapter-x is writing .*/folder; wait"),
            staged_folder(tmp_path / "folder", "radapter-x"),
        ):
            pass
        write(tmp_path / "other", "new")
        (first / "new").touch()
    assert names(tmp_path) == {"folder", "other"} and names(tmp_path / "folder") == {"new"}


def test_arrays_are_what_numpy_reads(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "one.npy", array)
    np.savez(tmp_path / "two.npz", a=array, b=np.array(["x", "y"]))
    np.testing.assert_array_equal(map_array(tmp_path / "one.npy"), array)
    arrays = read_arrays(tmp_path / "two.npz")
    assert list(arrays) == ["a", "b"] and arrays["b"].tolist() == ["x", "y"]
    np.testing.assert_array_equal(arrays["a"], array)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x08\x00{'a':[[[", b"x" * 99]
)
def test_a_broken_array_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    for read in (map_array, read_arrays):
        with pytest.raises(ValueError, match="."):
            read(tmp_path / "file")


def test_arrays_that_unpack_to_far_more_than_their_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros(10_000, np.uint8)
    np.savez_compressed(tmp_path / "small.npz", a=zeros)
    np.savez(tmp_path / "plain.npz", a=zeros)
    assert list(read_arrays(tmp_path / "small.npz")) == ["a"]
    monkeypatch.setattr("radapter_serve.files._MAX_UNPACKED", 9_999)
    with pytest.raises(ValueError, match="unpacks to 10128; allowed: at most 9999"):
        read_arrays(tmp_path / "small.npz")
    assert list(read_arrays(tmp_path / "plain.npz")) == ["a"]


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    objects = np.array([{}, None], dtype=object)
    np.save(tmp_path / "one.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=objects)
    with pytest.raises(ValueError, match="object"):
        map_array(tmp_path / "one.npy")
    with pytest.raises(ValueError, match="pickle"):
        read_arrays(tmp_path / "two.npz")


def test_headers_are_parsed_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 counts the parser's depth for all threads together."""
    np.save(tmp_path / "one.npy", np.eye(2))
    np.savez(tmp_path / "two.npz", a=np.eye(2))
    parsing = threading.Semaphore(1)
    parse = ast.parse
    alone = []

    def watched(*args: Any, **keywords: Any) -> Any:
        is_alone = parsing.acquire(blocking=False)
        alone.append(is_alone)
        time.sleep(0.01)
        if is_alone:
            parsing.release()
        return parse(*args, **keywords)

    monkeypatch.setattr(ast, "parse", watched)
    with ThreadPoolExecutor(4) as pool:
        for future in [
            pool.submit(read, tmp_path / name)
            for _ in range(4)
            for read, name in ((map_array, "one.npy"), (read_arrays, "two.npz"))
        ]:
            future.result()
    assert len(alone) == 8 and all(alone)
