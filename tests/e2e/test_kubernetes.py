"""The Helm chart, rendered by helm itself, and the example of a sidecar, checked against the schemas of Kubernetes and
prometheus-operator. No cluster runs here: that the objects do what they are for is not tested.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from savings_exporter import cli
from tests.support.paths import ROOT

pytestmark = pytest.mark.needs("kubernetes")

KUBERNETES = ROOT / ".kubernetes"
CHART = ROOT / "deploy" / "helm" / "savings-exporter"
VERSIONS = ("1.29", "1.34")
EVERYTHING = {
    "image": {"repository": "registry.example/savings-exporter", "tag": "0.1.0"},
    "imagePullSecrets": [{"name": "registry"}],
    "persistence": {"size": "10Gi", "storageClass": "fast"},
    "service": {"type": "LoadBalancer", "port": 80},
    "web": {"configSecret": "web", "allowedHosts": ["savings.example"]},
    "networkPolicy": {"from": [{"podSelector": {"matchLabels": {"app": "proxy"}}}]},
    "env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://tempo:4318"}],
    "extraArgs": ["--log.format", "json"],
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "disk", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "llm"},
    "serviceMonitor": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "endpoint": {"scheme": "https", "authorization": {"credentials": {"name": "web", "key": "read-token"}}},
    },
    "prometheusRule": {"enabled": True, "runbookUrl": "https://savings.example/docs/runbook"},
    "dashboards": {"enabled": True},
}
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "monitored": {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboards")},
    "everything": EVERYTHING,
}


def helm(*arguments: str, values: Any = None) -> subprocess.CompletedProcess[str]:
    command = [str(KUBERNETES / "helm" / "helm"), *arguments]
    if values is not None:
        command += ["--values", "-"]
    return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)


def rendered(values: Any) -> list[dict[str, Any]]:
    done = helm("template", "llm", str(CHART), "--namespace", "proxies", "--kube-version", "1.31.0", values=values)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found is not None]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def check_with_operator(objects: list[dict[str, Any]]) -> None:
    program = """
        import * as v1 from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
        for (const each of JSON.parse(process.argv[1])) new v1[each.kind](each).validate();
    """
    command = ["node", "--input-type=module", "--eval", program, "--", json.dumps(objects)]
    done = subprocess.run(command, cwd=KUBERNETES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", VALUES)
def test_helm_accepts_the_chart(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), values=VALUES[name])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VALUES)
def test_schemas_accept_the_objects(name: str, version: str) -> None:
    objects = rendered(VALUES[name])
    operators = [each for each in objects if each["apiVersion"].startswith("monitoring.coreos.com/")]
    check_with_operator(operators)
    for each in objects:
        if each not in operators:
            kubernetes_validate.validate(each, version, strict=True)
    assert len(operators) == (0 if name == "default" else 2)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"replicas": 2}, "additional property replicas is not allowed"),
        ({"persistence": {"size": "much"}}, "size"),
        ({"prometheusRule": {"runbookUrl": "runbook"}}, "runbookUrl"),
        ({"service": {"port": "http"}}, "port"),
    ],
)
def test_wrong_values_are_refused(values: Any, problem: str) -> None:
    done = helm("template", "llm", str(CHART), values=values)
    assert done.returncode != 0
    assert problem.lower() in done.stderr.lower()


def test_pod_is_ready_and_never_restarted_for_its_disk() -> None:
    for values in VALUES.values():
        pod = of_kind(rendered(values), "StatefulSet")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert "livenessProbe" not in container
        probe = container["readinessProbe"]
        if "exec" in probe:
            program, command = probe["exec"]["command"]
            assert program == "savings-exporter"
            assert command in cli.COMMANDS
        else:
            assert probe["httpGet"]["path"] == "/-/ready"


def test_pod_is_confined() -> None:
    pod = of_kind(rendered({}), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 9478
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]


def test_names_of_the_service_are_allowed() -> None:
    """Those with dots, at which other pods and Prometheus reach it."""
    pod = of_kind(rendered({"web": {"allowedHosts": ["savings.example"]}}), "StatefulSet")["spec"]["template"]["spec"]
    env = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    name = "llm-savings-exporter.proxies"
    names = [name, f"{name}.svc", f"{name}.svc.cluster.local", "savings.example"]
    assert env["SAVINGS_EXPORTER_WEB_ALLOWED_HOST"].split() == names


def test_rules_and_dashboards_are_those_of_the_project() -> None:
    objects = rendered(
        {**VALUES["monitored"], "prometheusRule": {"enabled": True, "runbookUrl": "https://r.example/x"}}
    )
    rules = (ROOT / "dashboards" / "prometheus" / "rules").glob("*.yml")
    texts = [path.read_text().replace("http://localhost:9478/docs/runbook", "https://r.example/x") for path in rules]
    expected = [group for text in texts for group in yaml.safe_load(text)["groups"]]
    groups = of_kind(objects, "PrometheusRule")["spec"]["groups"]
    assert sorted(groups, key=lambda group: group["name"]) == sorted(expected, key=lambda group: group["name"])
    links = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert links
    assert all(link.startswith("https://r.example/x#") for link in links)
    maps = {each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "ConfigMap"}
    for name in ("savings", "durability"):
        (text,) = maps[f"llm-savings-exporter-{name}"].values()
        assert json.loads(text) == json.loads((ROOT / "dashboards" / "grafana" / f"{name}.json").read_text())


def test_the_job_is_the_one_of_the_rules() -> None:
    objects = rendered(VALUES["monitored"])
    monitor, service = of_kind(objects, "ServiceMonitor"), of_kind(objects, "Service")
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "savings-exporter"
    labels = service["metadata"]["labels"]
    assert {name: labels[name] for name in monitor["spec"]["selector"]["matchLabels"]} == monitor["spec"]["selector"][
        "matchLabels"
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "sidecar").glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("version", VERSIONS)
def test_schemas_accept_the_sidecar(path: Path, version: str) -> None:
    objects = list(yaml.safe_load_all(path.read_text()))
    for each in objects:
        kubernetes_validate.validate(each, version, strict=True)
    pod = of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    (exporter,) = [each for each in pod["initContainers"] if each["name"] == "savings-exporter"]
    assert exporter["restartPolicy"] == "Always"
    assert "livenessProbe" not in exporter
