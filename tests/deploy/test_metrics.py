"""Every metric that the board or the autoscaler asks for is there, and so is every label."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.deploy.files import RULES, document, expressions, metrics, rendered

pytest.importorskip("helm_python", reason="pip install -e '.[integrations]'")
promql_parser = pytest.importorskip("promql_parser", reason="pip install -e '.[integrations]'")
pytestmark = pytest.mark.integration

Labels = dict[str, set[str]]


def names_and_labels(text: str) -> Labels:
    """The labels of each metric in what Prometheus reads."""
    labels_by_metric: Labels = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        labels_by_metric.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return labels_by_metric


def asked_labels() -> Iterator[tuple[str, str]]:
    """Metric and label of every selector and grouping of the board."""
    for _, text in expressions():
        for by, name, selector in re.findall(
            r"(?:sum|max) by \(([\w, ]+)\) \((?:rate\()?(\w+)(?:\{([^}]*)\})?", text
        ):
            yield from ((name, label.strip()) for label in by.split(","))
            yield from ((name, label) for label in re.findall(r"(\w+)(?:=~?|!=)", selector))


def check_asked(prefix: str, there: Labels, added: Sequence[str] = ()) -> None:
    """Fail where the board or the autoscaler asks for a metric or a label that is not there."""
    asked = {name for name in metrics() if name.startswith(prefix)}
    assert asked and asked <= set(there)
    for name, label in asked_labels():
        assert name not in there or label in {*there[name], *added}, (name, label)


def test_metrics_of_the_gateway() -> None:
    from radapter_serve.gateway.access import ConcurrencyLimit, MemoryBudget
    from radapter_serve.gateway.middleware import Metrics
    from radapter_serve.gateway.upstream import Entry

    gateway = Metrics(ConcurrencyLimit(1, 1), MemoryBudget(1, 1))
    gateway.count(Entry("1", key="ann", task="classify"), 0.1)
    gateway.count_images("ann", 1)
    check_asked("radapter_", names_and_labels(gateway.text().decode()))


def test_prometheus_reads_every_question() -> None:
    for title, text in expressions():
        if title != "prometheus-adapter":  # whose questions are templates
            assert promql_parser.parse(text.replace("$__rate_interval", "5m")), title


def test_alerts_name_codes_that_there_are() -> None:
    from radapter_serve.gateway.upstream import CODES

    for group in document(RULES)["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"] and rule["annotations"]["action"]
            named = re.findall(r'code=~?"([\w|]+)"', rule["expr"])
            assert {code for codes in named for code in codes.split("|")} <= CODES


@pytest.mark.triton
def test_metrics_and_probes_of_a_server(tmp_path: Path) -> None:
    import tritonclient.grpc

    from tests.helpers.asking import connect, tensors, tritonserver
    from tests.helpers.small_release import write_release

    write_release(tmp_path / "models", 3, seed=1)
    with tritonserver(tmp_path / "models") as server, connect(server) as client:
        client.infer("embed_text", tensors(text=[["a cat"]]))
        with pytest.raises(tritonclient.grpc.InferenceServerException):
            client.infer("classify", tensors(image=[["no image"]], labels=[["a cat"]]))
        text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
        pod = rendered({})["Deployment", "server"]["spec"]["template"]["spec"]
        for name, probe in pod["containers"][0].items():
            if name.endswith("Probe"):
                path = server.http_url + probe["httpGet"]["path"]
                assert urllib.request.urlopen(path, timeout=10).status == 200
    # Prometheus itself adds these three labels.
    check_asked("nv_", names_and_labels(text), ("instance", "namespace", "pod"))
    # The board tells releases apart by this label.
    answered = re.findall(
        r'nv_inference_request_success\{model="embed_text",version="(\d+)"\} (\d+)', text
    )
    assert [version for version, count in answered if int(count)] == ["3"]
