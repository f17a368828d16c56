"""The Kubernetes objects: valid by Kubernetes' own schemas, and in agreement with each other and with the images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.files import DEPLOY, command, document, documents, instructions

FOLDER = DEPLOY / "kubernetes"
BESIDE = {"prometheus-adapter.yaml", "prometheus-scrape.yaml"}
Objects = dict[tuple[str, str], Any]
KEYED = {"containers": "name", "env": "name", "ports": "containerPort", "volumes": "name", "volumeMounts": "mountPath"}


def merged(object_: Any, patch: Any, key: str = "") -> Any:
    """A strategic merge, as far as the patches here need it."""
    if isinstance(object_, dict) and isinstance(patch, dict):
        return {**object_, **{name: merged(object_.get(name), value, name) for name, value in patch.items()}}
    if isinstance(object_, list) and key in KEYED:
        by = {one[KEYED[key]]: one for one in object_}
        assert {one[KEYED[key]] for one in patch} <= set(by), f"the patch adds to {key}"
        for one in patch:
            by[one[KEYED[key]]] = merged(by[one[KEYED[key]]], one)
        return [*by.values()]
    return patch


def built(folder: Path) -> Objects:
    """The objects of a kustomization."""
    kustomization = document(folder / "kustomization.yaml")
    objects: Objects = {}
    for name in kustomization["resources"]:
        path = folder / name
        found = (
            built(path) if path.is_dir() else {(one["kind"], one["metadata"]["name"]): one for one in documents(path)}
        )
        assert not objects.keys() & found.keys()
        objects |= copy.deepcopy(found)
    for patch in kustomization.get("patches", []):
        for one in documents(folder / patch["path"]):
            key = one["kind"], one["metadata"]["name"]
            objects[key] = merged(objects[key], one)
    return objects


@pytest.fixture(params=["base", "gpu"])
def objects(request: pytest.FixtureRequest) -> Objects:
    return built(FOLDER / request.param)


def pods(objects: Objects) -> Iterator[tuple[str, Any]]:
    """The pods that Deployments make, by the names of these."""
    for (kind, name), one in objects.items():
        if kind == "Deployment":
            yield name, one["spec"]["template"]


def selected(objects: Objects, labels: dict[str, str]) -> list[str]:
    """The Deployments whose pods have these labels."""
    return [name for name, pod in pods(objects) if labels.items() <= pod["metadata"]["labels"].items()]


def ports(objects: Objects, deployment: str) -> dict[str, int]:
    """The ports of a Deployment's containers by their names."""
    containers = dict(pods(objects))[deployment]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for one in containers for port in one["ports"]}


def test_every_object_is_valid(objects: Objects) -> None:
    for one in objects.values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    broken = copy.deepcopy(objects["Deployment", "server"])
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_the_kustomizations_name_every_file_and_no_other() -> None:
    for folder in ("base", "gpu"):
        kustomization = document(FOLDER / folder / "kustomization.yaml")
        named = {*kustomization["resources"], *(one["path"] for one in kustomization.get("patches", []))}
        there = {path.name for path in (FOLDER / folder).iterdir()} - {"kustomization.yaml"}
        assert {name for name in named if not name.startswith("../")} == there
        assert all((FOLDER / folder / name).exists() for name in named)
        assert kustomization["namespace"] == built(FOLDER / "base")["Namespace", "radapter"]["metadata"]["name"]
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == BESIDE


def test_selectors_find_their_pods(objects: Objects) -> None:
    for (kind, name), one in objects.items():
        spec = one.get("spec", {})
        if kind in ("Deployment", "PodDisruptionBudget"):
            assert selected(objects, spec["selector"]["matchLabels"]) == [name]
        if kind == "Deployment":
            (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
            assert spread["labelSelector"] == spec["selector"]
        if kind == "Service":
            assert selected(objects, spec["selector"]) == [name]
            assert {port["targetPort"] for port in spec["ports"]} <= set(ports(objects, name))
        if kind == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            assert (target["kind"], target["name"]) in objects
            assert "replicas" not in objects["Deployment", target["name"]]["spec"], "two would decide how many"


def test_probes_and_ports_are_those_of_the_images(objects: Objects) -> None:
    for name, pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        exposed = {int(port) for port in instructions(name, "EXPOSE")[0].split()}
        assert set(ports(objects, name).values()) == exposed
        assert container["image"] == f"radapter-{name}"
        for kind in ("readinessProbe", "livenessProbe"):
            asked = container[kind]["httpGet"]
            assert asked["port"] in ports(objects, name)
            assert asked["path"].endswith("/ready" if kind == "readinessProbe" else "/live")
    images = document(FOLDER / "base" / "kustomization.yaml")["images"]
    assert {one["name"] for one in images} == {pod["spec"]["containers"][0]["image"] for _, pod in pods(objects)}


def test_volumes_lie_where_the_commands_look(objects: Objects) -> None:
    mounts = {
        name: {mount["mountPath"]: mount for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        for name, pod in pods(objects)
    }
    for name, pod in pods(objects):
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert volumes == {mount["name"] for mount in mounts[name].values()}
        assert "/tmp" in mounts[name]
    serve = command("server")
    for folder in (serve[1], serve[serve.index("--indexes") + 1]):
        assert mounts["server"][folder]["readOnly"] is True
        assert mounts["server"][folder]["subPath"] == Path(folder).name
    claim = dict(pods(objects))["server"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert ("PersistentVolumeClaim", claim) in objects
    keys = Path(command("gateway")[-1])
    assert mounts["gateway"][str(keys.parent)]["readOnly"] is True
    memory = {one["name"]: one for one in dict(pods(objects))["server"]["spec"]["volumes"]}["shared-memory"]
    assert mounts["server"]["/dev/shm"]["name"] == "shared-memory"
    assert memory["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_the_gateway_finds_the_server(objects: Objects) -> None:
    words = command("gateway")
    name, port = words[words.index("--server") + 1].split(":")
    service = objects["Service", name]["spec"]
    assert int(port) in {one["port"] for one in service["ports"]}
    # A gateway keeps its connections, so it must see the pods themselves to spread its requests.
    assert service["clusterIP"] == "None"


def allowed(policy: Any, direction: str, peer: str) -> set[tuple[str, int]]:
    """The ports that a policy opens, one way, to pods with the label `app: peer`; to all where no peer is named."""
    side = "from" if direction == "ingress" else "to"
    found = set()
    for rule in policy["spec"].get(direction, []):
        peers = [one.get("podSelector", {}).get("matchLabels") for one in rule.get(side, [])]
        if side not in rule or {"app": peer} in peers:
            found |= {(port["protocol"], port["port"]) for port in rule["ports"]}
    return found


def test_only_the_gateway_reaches_the_server(objects: Objects) -> None:
    policies = {name: one for (kind, name), one in objects.items() if kind == "NetworkPolicy"}
    assert policies.pop("closed")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert set(policies) == {"server", "gateway"}
    for name, policy in policies.items():
        assert selected(objects, policy["spec"]["podSelector"]["matchLabels"]) == [name]
    grpc = {("TCP", ports(objects, "server")["grpc"])}
    assert allowed(policies["server"], "ingress", "gateway") == grpc
    assert allowed(policies["server"], "ingress", "anybody") == set()
    assert allowed(policies["gateway"], "egress", "server") == grpc
    assert allowed(policies["gateway"], "ingress", "anybody") == {("TCP", ports(objects, "gateway")["http"])}
    (prometheus,) = [one for one in policies["server"]["spec"]["ingress"] if "namespaceSelector" in one["from"][0]]
    assert [one["port"] for one in prometheus["ports"]] == [ports(objects, "server")["metrics"]]
    assert "egress" not in policies["server"]["spec"]


def test_pods_may_do_little(objects: Objects) -> None:
    for _, pod in pods(objects):
        spec = pod["spec"]
        (container,) = spec["containers"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }


def test_an_update_leaves_no_gap(objects: Objects) -> None:
    for name, pod in pods(objects):
        spec = objects["Deployment", name]["spec"]
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "10"]
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 60
    assert objects["HorizontalPodAutoscaler", "server"]["spec"]["minReplicas"] == 2


def test_the_autoscaler_goes_by_a_metric_that_the_adapter_makes(objects: Objects) -> None:
    (metric,) = objects["HorizontalPodAutoscaler", "server"]["spec"]["metrics"]
    (rule,) = document(FOLDER / "prometheus-adapter.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["resources"]["overrides"] == {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
    for job in document(FOLDER / "prometheus-scrape.yaml")["scrape_configs"]:
        assert {"namespace", "pod"} <= {one.get("target_label") for one in job["relabel_configs"]}
        app, _, port = job["relabel_configs"][0]["regex"].partition(";")
        assert port in ports(objects, app)


def test_the_overlay_asks_for_a_gpu() -> None:
    limits = [
        built(FOLDER / name)["Deployment", "server"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        for name in ("base", "gpu")
    ]
    assert [one.get("nvidia.com/gpu") for one in limits] == [None, 1]
