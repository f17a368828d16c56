"""The Kubernetes objects of the Helm chart: valid by Kubernetes' own schemas, and in agreement with
each other and with the images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.process import OTLP_ENDPOINTS
from tests.deploy.files import CHART, DEPLOY, command, document, instructions, rendered

helm_errors = pytest.importorskip("helm_python.errors", reason="pip install -e '.[integrations]'")
kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="pip install -e '.[integrations]'"
)
pytestmark = pytest.mark.integration

FOLDER = DEPLOY / "kubernetes"
LITTLE = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
INSTANCE = {"app.kubernetes.io/instance": "radapter"}
WITHOUT_TRITON: dict[str, Any] = {
    "engine": "process",
    "server": {"cpu": "4", "cpuPercent": 60, "args": ["--runtime", "openvino"]},
    "traces": {"endpoint": "https://collector.monitoring:443"},
}
Objects = dict[tuple[str, str], Any]
VALUES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a GPU": {
        "server": {"gpus": 1, "cpu": "4", "memory": "16Gi", "args": ["--runtime", "onnxruntime"]},
        "gateway": {"replicas": 3, "apiKeysSecret": "keys"},
        "storage": {"existingClaim": "shared"},
        "images": {"server": "registry.example/serve", "tag": "v1.0.0"},
        "traces": {"endpoint": "http://collector.seen:4318/v1", "namespace": "seen"},
    },
}


@pytest.fixture(scope="module", params=[*VALUES, "without Triton"])
def objects(request: pytest.FixtureRequest) -> Objects:
    return rendered(VALUES.get(request.param, WITHOUT_TRITON))


@pytest.fixture(scope="module")
def of_triton() -> Objects:
    return rendered(VALUES["a GPU"])


def pods(objects: Objects) -> Iterator[tuple[str, Any]]:
    """The pods that Deployments make, by the names of these."""
    for (kind, name), manifest in objects.items():
        if kind == "Deployment":
            yield name, manifest["spec"]["template"]


def ports(objects: Objects, deployment: str) -> dict[str, int]:
    """The ports of a Deployment's containers by their names."""
    containers = dict(pods(objects))[deployment]["spec"]["containers"]
    return {
        port["name"]: port["containerPort"]
        for container in containers
        for port in container["ports"]
    }


def test_every_object_is_valid(objects: Objects) -> None:
    # Names that YAML reads as something else stay names.
    odd = {"gateway": {"apiKeysSecret": "1e3"}, "storage": {"className": "true"}}
    for manifest in [*objects.values(), *rendered({**odd, "prometheusNamespace": "123"}).values()]:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_selectors_find_their_pods_which_may_do_little(objects: Objects) -> None:
    labels = {name: pod["metadata"]["labels"].items() for name, pod in pods(objects)}
    for (kind, name), manifest in objects.items():
        selector = manifest.get("spec", {}).get(
            "podSelector" if kind == "NetworkPolicy" else "selector"
        )
        if not selector:
            continue
        wanted = selector if kind == "Service" else selector["matchLabels"]
        # A pod of the same namespace that belongs to something else is none of the chart's.
        assert wanted.items() >= INSTANCE.items()
        chosen = {pod for pod, its in labels.items() if wanted.items() <= its}
        assert chosen == (set(labels) if name in ("closed", "traces") else {name})
    for _, pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"].items() >= LITTLE.items()
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }


def test_ports_and_folders_are_those_of_the_images(objects: Objects) -> None:
    mounts = {}
    for name, pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        exposed = {int(port) for port in instructions(name, "EXPOSE")[0].split()}
        assert set(ports(objects, name).values()) == exposed
        assert {port["targetPort"] for port in objects["Service", name]["spec"]["ports"]} <= set(
            ports(objects, name)
        )
        for kind in ("readinessProbe", "livenessProbe"):
            assert container[kind]["httpGet"]["port"] in ports(objects, name)
        mounts[name] = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        words = command(name)
        if words[0] == "radapter-serve":
            for folder in (words[1], words[words.index("--indexes") + 1]):
                assert mounts[name][folder]["readOnly"] is True
        if "--api-keys" in words:
            keys = Path(words[words.index("--api-keys") + 1])
            assert mounts[name][str(keys.parent)]["readOnly"] is True
    assert set(mounts) in ({"server", "gateway"}, {"engine"})
    assert "/dev/shm" in mounts.get("server", ["/dev/shm"])


def allowed(policy: Any, direction: str, peer: str) -> set[tuple[str, int]]:
    """The ports that a policy opens, one way, to the chart's pods with the label `app: peer`; to
    all where no peer is named.
    """
    side = "from" if direction == "ingress" else "to"
    allowed = set()
    for rule in policy["spec"].get(direction, []):
        peers = [peer.get("podSelector", {}).get("matchLabels") for peer in rule.get(side, [])]
        if side not in rule or {"app": peer, **INSTANCE} in peers:
            allowed |= {(port["protocol"], port["port"]) for port in rule["ports"]}
    return allowed


def test_only_the_gateway_reaches_the_server(of_triton: Objects) -> None:
    words = command("gateway")
    name, port = words[words.index("--server") + 1].split(":")
    service = of_triton["Service", name]["spec"]
    assert int(port) in {entry["port"] for entry in service["ports"]}
    # A gateway keeps its connections, so it must see the pods themselves to spread its requests.
    assert service["clusterIP"] == "None"
    policies = {
        name: policy for (kind, name), policy in of_triton.items() if kind == "NetworkPolicy"
    }
    assert policies["closed"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert set(policies) - {"traces"} == {"closed", "server", "gateway"}
    grpc = {("TCP", ports(of_triton, "server")["grpc"])}
    http = {("TCP", ports(of_triton, "gateway")["http"])}
    assert allowed(policies["server"], "ingress", "gateway") == grpc
    assert allowed(policies["server"], "ingress", "anybody") == set()
    assert allowed(policies["gateway"], "egress", "server") == grpc
    assert allowed(policies["gateway"], "ingress", "anybody") == http
    assert "egress" not in policies["server"]["spec"]


def test_without_triton_one_deployment_answers_everybody() -> None:
    objects = rendered(WITHOUT_TRITON)
    assert not [name for _, name in objects if name in ("server", "gateway")]
    (container,) = objects["Deployment", "engine"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "radapter-engine:latest"
    assert container["args"] == [*command("engine"), "--runtime", "openvino"]
    policy = objects["NetworkPolicy", "engine"]
    assert allowed(policy, "ingress", "anybody") == {("TCP", ports(objects, "engine")["http"])}
    assert "egress" not in policy["spec"] and ("NetworkPolicy", "closed") in objects


@pytest.mark.parametrize(
    ("values", "endpoint", "namespace", "port"),
    [
        (VALUES["a GPU"], "http://collector.seen:4318/v1", "seen", 4318),
        (WITHOUT_TRITON, "https://collector.monitoring:443", "monitoring", 443),
    ],
)
def test_traces_reach_their_collector(
    values: dict[str, Any], endpoint: str, namespace: str, port: int
) -> None:
    objects = rendered(values)
    for _, pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        assert container["env"] == [{"name": OTLP_ENDPOINTS[0], "value": endpoint}]
    collector, names = objects["NetworkPolicy", "traces"]["spec"]["egress"]
    wanted = {"kubernetes.io/metadata.name": namespace}
    assert collector["to"] == [{"namespaceSelector": {"matchLabels": wanted}}]
    assert collector["ports"] == [{"protocol": "TCP", "port": port}]
    assert {rule["port"] for rule in names["ports"]} == {53}
    assert ("NetworkPolicy", "traces") not in rendered({})  # pods call nobody


def test_metrics_are_scraped_and_scale_the_server(of_triton: Objects) -> None:
    jobs = document(FOLDER / "prometheus-scrape.yaml")["scrape_configs"]
    kept = [job["relabel_configs"][0]["regex"] for job in jobs]
    for name, pod in pods(of_triton):
        targets = [f"{name};{port['name']}" for port in pod["spec"]["containers"][0]["ports"]]
        assert sum(bool(re.fullmatch(regex, target)) for regex in kept for target in targets) == 1
    (rule,) = document(FOLDER / "prometheus-adapter.yaml")["rules"]["custom"]
    (metric,) = of_triton["HorizontalPodAutoscaler", "server"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "replicas" not in of_triton["Deployment", "server"]["spec"], "two would decide how many"


def test_values_reach_what_they_name(of_triton: Objects) -> None:
    spec = of_triton["Deployment", "server"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"] == "registry.example/serve:v1.0.0"
    assert container["args"] == [*command("server"), "--runtime", "onnxruntime"]
    resources = {"cpu": "4", "memory": "16Gi"}
    limits = {**resources, "nvidia.com/gpu": 1}
    assert container["resources"] == {"requests": resources, "limits": limits}
    claims = [volume.get("persistentVolumeClaim") for volume in spec["volumes"]]
    assert {"claimName": "shared"} in claims
    assert not [name for kind, name in of_triton if kind == "PersistentVolumeClaim"]
    gateway = of_triton["Deployment", "gateway"]["spec"]
    assert gateway["replicas"] == 3
    volumes = gateway["template"]["spec"]["volumes"]
    assert [volume["secret"]["secretName"] for volume in volumes if "secret" in volume] == ["keys"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sever": {}}, "'sever' not allowed"),
        ({"engine": "process", "server": {"gpus": 1}}, "/server/gpus"),
        ({"traces": {"endpoint": "http://a:1\nb: c"}}, "/traces/endpoint"),
        ({"storage": {"existingClaim": "a}, b: {"}}, "/storage/existingClaim"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_errors.HelmError, match=message):
        rendered(values)


def test_every_value_is_used() -> None:
    templates = "".join(path.read_text("utf-8") for path in (CHART / "templates").iterdir())
    for name, value in document(CHART / "values.yaml").items():
        for inner in value if isinstance(value, dict) else [""]:
            assert f".Values.{name}.{inner}".rstrip(".") in templates
