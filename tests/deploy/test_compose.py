"""The compose files: valid, in agreement with the images, and closed but for the gateway."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from tests.deploy.files import DEPLOY, command, document, instructions

builtin_schemas = pytest.importorskip(
    "check_jsonschema.builtin_schemas", reason="pip install -e '.[integrations]'"
)
pytestmark = pytest.mark.integration

BASE = document(DEPLOY / "compose.yaml")
SERVICES: dict[str, Any] = BASE["services"]
PUBLISHED = re.compile(r"(?P<address>[^:]+|\$\{\w+:-[^}]+\}):(?P<outside>\d+):(?P<inside>\d+)")


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_it_is_valid_by_the_compose_specification(name: str) -> None:
    schema = builtin_schemas.get_builtin_schema("vendor.compose-spec")
    jsonschema.validate(document(DEPLOY / name), schema)


def test_only_the_gateway_can_be_reached_from_other_machines() -> None:
    for name, service in SERVICES.items():
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["cap_drop"] == ["ALL"]
        for port in service.get("ports", []):
            published = PUBLISHED.fullmatch(port)
            assert published
            default = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", published["address"])
            assert default == "127.0.0.1"
            assert name == "gateway" or published["address"] == default
    assert BASE["networks"]["inside"]["internal"] is True
    for name in ("server", "prometheus"):
        assert "ports" not in SERVICES[name]
        assert SERVICES[name]["networks"] == ["inside"]


def test_the_server_finds_its_folders_and_cannot_change_them() -> None:
    server = SERVICES["server"]
    words = command("server")
    folders = {mount["target"] for mount in server["volumes"]}
    assert folders == {words[1], words[words.index("--indexes") + 1]}
    assert server["read_only"] and all(mount["read_only"] for mount in server["volumes"])
    # Docker mounts a tmpfs noexec, and Triton's Python backend is started from there.
    assert "exec" in server["tmpfs"][0].removeprefix("/tmp:").split(",")


def test_the_gateway_finds_its_keys_and_all_find_the_ports_of_the_images() -> None:
    words = command("gateway")
    (secret,) = SERVICES["gateway"]["secrets"]
    assert secret["target"] == words[words.index("--api-keys") + 1]
    published = PUBLISHED.fullmatch(SERVICES["gateway"]["ports"][0])
    assert published
    asked = [words[words.index("--server") + 1], f"gateway:{published['inside']}"]
    for job in document(DEPLOY / "prometheus.yaml")["scrape_configs"]:
        asked += job["static_configs"][0]["targets"]
    for address in asked:
        service, port = address.split(":")
        assert port in instructions(service, "EXPOSE")[0].split()
