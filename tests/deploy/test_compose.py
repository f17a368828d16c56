"""The compose files: of the right shape, in agreement with the images, and closed but for the gateway."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.deploy.files import DEPLOY, command, document, healthcheck, instructions, stages

# Of the compose specification, what these files may use.
TOP = {"name", "services", "networks", "volumes", "secrets"}
SERVICE = {
    *("build", "cap_drop", "command", "depends_on", "deploy", "environment", "image", "init", "networks", "ports"),
    *("read_only", "restart", "secrets", "security_opt", "shm_size", "stop_grace_period", "tmpfs", "volumes"),
}
BASE = document(DEPLOY / "compose.yaml")
SERVICES: dict[str, Any] = BASE["services"]
PUBLISHED = re.compile(r"(?P<address>[^:]+|\$\{\w+:-[^}]+\}):(?P<outside>\d+):(?P<inside>\d+)")


def default(text: str) -> str:
    """A value with its variables at their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_shape(name: str) -> None:
    whole = document(DEPLOY / name)
    assert set(whole) <= TOP
    for service in whole["services"].values():
        assert set(service) <= SERVICE
    assert set(whole["services"]) <= set(SERVICES)


def test_all_that_is_named_is_there_and_used() -> None:
    for kind in ("networks", "volumes", "secrets"):
        named: set[str] = set()
        for service in SERVICES.values():
            for one in service.get(kind, []):
                if kind == "volumes" and one["type"] == "bind":
                    continue
                named.add(one if isinstance(one, str) else one["source"])
        assert named == set(BASE[kind])
    for service in SERVICES.values():
        assert set(service.get("depends_on", [])) <= set(SERVICES)
        for mount in service.get("volumes", []):
            source = default(mount["source"])
            if mount["type"] == "bind" and source.startswith("./"):
                assert (DEPLOY / source).exists()
                assert mount["read_only"] is True
        if "build" in service:
            assert service["build"]["target"] in stages()
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_only_the_gateway_can_be_reached_from_other_machines() -> None:
    assert "ports" not in SERVICES["server"] and "ports" not in SERVICES["prometheus"]
    for name, service in SERVICES.items():
        assert "no-new-privileges:true" in service["security_opt"] and service["cap_drop"] == ["ALL"]
        for port in service.get("ports", []):
            found = PUBLISHED.fullmatch(port)
            assert found and default(found["address"]) == "127.0.0.1"
            assert name == "gateway" or found["address"] == "127.0.0.1"
    assert BASE["networks"]["inside"]["internal"] is True
    assert SERVICES["server"]["networks"] == SERVICES["prometheus"]["networks"] == ["inside"]


def test_the_server_finds_its_folders_and_cannot_change_them() -> None:
    server, words = SERVICES["server"], command("server")
    folders = {mount["target"] for mount in server["volumes"]}
    assert folders == {words[1], words[words.index("--indexes") + 1]}
    assert all(mount["read_only"] for mount in server["volumes"]) and server["read_only"] is True
    assert server["shm_size"] == "1gb"
    # Docker mounts a tmpfs noexec, and Triton's Python backend is started from there.
    assert [mount.partition(":")[0] for mount in server["tmpfs"]] == ["/tmp"]
    assert "exec" in server["tmpfs"][0].partition(":")[2].split(",")


def test_the_gateway_finds_the_server_its_keys_and_its_port() -> None:
    words = command("gateway")
    host, port = words[words.index("--server") + 1].split(":")
    assert host in SERVICES and port in instructions(host, "EXPOSE")[0].split()
    (secret,) = SERVICES["gateway"]["secrets"]
    assert secret["target"] == words[words.index("--api-keys") + 1]
    found = PUBLISHED.fullmatch(SERVICES["gateway"]["ports"][0])
    assert found and [found["inside"]] == instructions("gateway", "EXPOSE")
    assert f":{found['inside']}/" in healthcheck("gateway")


def test_prometheus_reads_both_and_grafana_reads_prometheus() -> None:
    jobs = document(DEPLOY / "prometheus.yaml")["scrape_configs"]
    for job in jobs:
        ((target,),) = [one["targets"] for one in job["static_configs"]]
        service, port = target.split(":")
        assert job["job_name"] == service and port in instructions(service, "EXPOSE")[0].split()
        assert set(SERVICES[service]["networks"]) & set(SERVICES["prometheus"]["networks"])
    assert {job["job_name"] for job in jobs} == {"server", "gateway"}
    (key,) = SERVICES["prometheus"]["secrets"]
    assert jobs[1]["authorization"]["credentials_file"] == f"/run/secrets/{key}"
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = document(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["uid"] == "prometheus"
    (provider,) = document(provisioning / "dashboards" / "boards.yaml")["providers"]
    assert provider["options"]["path"] in {mount["target"] for mount in SERVICES["grafana"]["volumes"]}


def test_the_override_asks_for_a_gpu() -> None:
    override = document(DEPLOY / "compose.gpu.yaml")["services"]
    (device,) = override["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert set(override) == {"server"}
