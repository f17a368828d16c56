"""How many processes a server has, and whether /dev/shm holds them; no server needed."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.cli.serve import main
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import without_queue_policy
from radapter_serve.server.instances import (
    SharedMemory,
    check_shared_memory,
    counts,
    with_instances,
)
from radapter_serve.server.models import ModelEntry, parsed

TASKS = ("classify", "embed_image", "embed_text", "retrieve", "segment")
MIB = 2**20


def test_counts():
    assert counts(()) == {}
    assert counts(["3"]) == dict.fromkeys(TASKS, 3)
    assert counts(["segment=4", "2"]) == {**dict.fromkeys(TASKS, 2), "segment": 4}
    assert counts(["segment=4"]) == {"segment": 4}


@pytest.mark.parametrize(
    "bad", ["0", "65", "-1", "two", "segment=", "segment=0", "nothing=2", "text_encoder=2"]
)
def test_bad_counts(bad, repository, capsys):
    with pytest.raises(RAdapterError, match=f"--instances {bad}: "):
        counts([bad])
    if bad == "0":
        assert main([str(repository), "--instances", "0"]) == 2
        assert (
            "--instances 0: allowed are 1 to 64, for all tasks (2) or for one (segment=2)"
            in capsys.readouterr().err
        )


def test_only_the_tasks_that_are_named_change():
    models = {
        "classify": ModelEntry((1, 2), "instance_group { count: 1 kind: KIND_CPU }"),
        "image_encoder": ModelEntry((2,), "instance_group { count: 1 }"),
    }
    changed = with_instances(models, {"classify": 3})
    group = text_format.Parse(
        changed["classify"].config, model_config_pb2.ModelConfig()
    ).instance_group[0]
    assert (group.count, group.kind) == (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert changed["classify"].versions == (1, 2)
    assert changed["image_encoder"] == models["image_encoder"]


def memory(size: int, free: int) -> SharedMemory:
    """A /dev/shm of so many MiB."""
    return SharedMemory(size * MIB, free * MIB)


def test_shared_memory_too_small_to_start_is_refused_with_what_to_set():
    pixels = "input { data_type: TYPE_UINT8 dims: [ 224, 224, 3 ] } instance_group { count: 1 }"
    models = {
        "classify": ModelEntry((1, 2), 'backend: "python" instance_group { count: 4 }'),
        "image_encoder": ModelEntry((2,), f'backend: "onnxruntime" max_batch_size: 64 {pixels}'),
    }
    in_python = ["python", "onnxruntime"]
    message = r"has 17 MiB free, and 9 model processes need 18 MiB; .*--shm-size=128m"
    with pytest.raises(RAdapterError, match=message):
        check_shared_memory(models, in_python, memory(64, 17))
    warning = check_shared_memory(models, in_python, memory(64, 18))
    # 9 x (2 MiB + 64 x 224 x 224 x 3 bytes)
    assert warning is not None
    assert "/dev/shm has 64 MiB; many full batches at once need 100 MiB" in warning
    assert check_shared_memory(models, in_python, memory(128, 128)) is None
    assert check_shared_memory(models, in_python, None) is None
    with pytest.raises(RAdapterError, match="8 model processes"):  # a backend in C++ has none
        check_shared_memory(models, ["python"], memory(64, 15))


def test_no_queue_is_limited_by_triton_which_then_overlooks_it():
    from radapter_export.repository import sources

    for template in sources().glob("*/config.template.pbtxt"):
        config = text_format.Parse(template.read_text(), model_config_pb2.ModelConfig())
        assert not config.dynamic_batching.HasField("default_queue_policy"), template
        assert config.HasField("dynamic_batching") == bool(config.max_batch_size), template


@pytest.mark.parametrize(("rows", "batching"), [(8, "dynamic_batching { }"), (0, "")])
def test_a_release_that_limits_the_queue_is_served_without_the_limit(rows, batching):
    head = f'name: "x" max_batch_size: {rows} '
    policy = (
        "default_queue_policy { max_queue_size: 128 allow_timeout_override: true }"
        " priority_levels: 2"
    )
    config = parsed(f"{head} dynamic_batching {{ {policy} }}")
    without_queue_policy(config)
    assert config == parsed(head + batching)
