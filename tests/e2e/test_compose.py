"""Check the compose file and its mounts with the programs that read them, started with the commands in the file.

Neither Docker nor Grafana nor Tempo is run here. Of what is meant for those, the tests see that it is well formed, and
that names, ports and paths agree with each other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.compose import COMPOSE, DASHBOARDS, SERVICES, dockerfile, edit, healthcheck, laid_out, mounts
from tests.support.pack import alertmanager, exporter, fetched, listening, started
from tests.support.paths import DATA, ROOT, UNSTABLE
from tests.support.service import free_port, run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually

PINNED = re.compile(r"[a-z]+(/[a-z]+)?:v?\d+\.\d+\.\d+(-[a-z-]+)?")


# The compose file


def test_it_is_a_compose_file() -> None:
    schema = json.loads((DATA / "compose-spec/compose-spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    assert COMPOSE["name"] == "savings-exporter"


@pytest.mark.needs("unstable")
@pytest.mark.parametrize("profile", [(), ("--profile", "demo")], ids=["usual", "demo"])
def test_docker_compose_accepts_it(profile: tuple[str, ...]) -> None:
    command = [str(UNSTABLE / "bin" / "docker-compose"), *profile, "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.needs("unstable")
def test_docker_compose_takes_the_settings_of_a_host(tmp_path: Path) -> None:
    """Those of the environment, and the file that adds credentials, which needs a directory."""
    files = ["--file", "docker-compose.yml", "--file", "deploy/compose/secure.yml"]
    command = [str(UNSTABLE / "bin" / "docker-compose"), *files, "config", "--format", "json"]
    env = {**os.environ, "SAVINGS_EXPORTER_ADDRESS": "10.0.0.1", "PROMETHEUS_URL": "https://prometheus.example/"}
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert refused.returncode != 0
    assert "name the directory with web.yml" in refused.stderr
    env["SAVINGS_EXPORTER_WEB"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=True)
    services = json.loads(done.stdout)["services"]
    assert services["exporter"]["ports"][0]["host_ip"] == "10.0.0.1"
    assert services["exporter"]["environment"]["SAVINGS_EXPORTER_WEB_CONFIG_FILE"] == "/etc/savings-exporter/web.yml"
    assert "--web.external-url=https://prometheus.example/" in services["prometheus"]["command"]
    mounted = {
        name: [mount["target"] for mount in service.get("volumes", []) if mount["source"] == str(tmp_path)]
        for name, service in services.items()
    }
    assert {name: targets for name, targets in mounted.items() if targets} == {"exporter": ["/etc/savings-exporter"]}


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_takes_of_its_host_is_limited(name: str) -> None:
    """Memory, and the log."""
    service = SERVICES[name]
    assert service["mem_limit"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert [
        options for source, _, *options in mounts(name) if source.startswith((".", "/")) and options != ["ro,z"]
    ] == []


def test_proxies_in_other_containers_reach_the_exporter() -> None:
    assert COMPOSE["networks"]["savings"]["name"] in SERVICES["exporter"]["networks"]


@pytest.mark.needs("unstable")
def test_assets_of_a_user_take_the_place_of_the_dashboards(tmp_path: Path) -> None:
    """All that a service would find in the checkout, it finds in what the command writes."""
    written = run_cli("assets", "--output", str(tmp_path))
    assert written.returncode == 0, written.stderr
    command = [str(UNSTABLE / "bin" / "docker-compose"), "config", "--format", "json"]
    variable = {"SAVINGS_EXPORTER_ASSETS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variable}, capture_output=True, text=True, check=True)
    services = json.loads(done.stdout)["services"]
    for name in ("prometheus", "alertmanager", "grafana"):
        for (source, target, *_), mounted in zip(mounts(name), services[name]["volumes"], strict=True):
            assert mounted["target"] == target
            if source.startswith("."):
                assert mounted["source"].startswith(str(tmp_path))
                needed = {path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*.*ml")}
                needed |= {path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*.json")}
                assert needed
                assert [path for path in needed if not Path(mounted["source"], path).is_file()] == []


def test_every_image_is_pinned_to_a_full_version() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    images += [stage.split()[0] for stage in dockerfile("FROM")]
    assert [image for image in images if not PINNED.fullmatch(image)] == []
    assert {service["build"] for service in SERVICES.values() if "build" in service} == {"."}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_little_harm(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert not {"privileged", "network_mode", "pid", "cap_add", "env_file"} & service.keys()
    assert [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_mounts_is_in_the_checkout_and_read_only_or_a_volume(name: str) -> None:
    for source, _, *mode in mounts(name):
        if source.startswith("."):
            assert (ROOT / source).is_dir(), source
            assert mode == ["ro,z"], source
        else:
            assert source in COMPOSE["volumes"], source


def test_no_volume_is_left_over() -> None:
    mounted = {source for name in SERVICES for source, *_ in mounts(name) if not source.startswith(".")}
    assert mounted == set(COMPOSE["volumes"])


# The image


def test_the_image_is_built_from_what_its_context_holds(tmp_path: Path) -> None:
    """Without the network only the package is built, which is what needs the checkout's files."""
    context = (ROOT / ".dockerignore").read_text().splitlines()
    copies = [line.split()[:-1] for line in dockerfile("COPY") if "--from" not in line]
    assert "*" in context
    for source in [source for sources in copies for source in sources]:
        assert f"!{source}" in context, source
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "savings_exporter").rglob("*.py")}
    assert modules <= set(zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist())


def test_nobody_is_root_and_the_volume_is_the_users() -> None:
    user = dockerfile("USER")[-1]
    assert {SERVICES[name]["user"] for name in SERVICES if "build" in SERVICES[name]} == {user}
    uid, gid = user.split(":")
    made = " ".join(dockerfile("RUN"))
    assert f"--gid {gid} savings" in made
    assert f"--uid {uid} --gid {gid}" in made
    assert "--owner savings --group savings" in made
    assert json.loads(dockerfile("VOLUME")[-1]) == [target for _, target in mounts("exporter")] == ["/data"]


def test_the_image_serves_a_store_in_the_volume(tmp_path: Path) -> None:
    saving = {"model": "claude-sonnet-4-5", "tokens_saved": 4096}
    with exporter(tmp_path, free_port()) as url:
        assert json.loads(fetched(f"{url}/v1/savings", saving))["durable"] is True
    assert (tmp_path / "proxy_savings.json").is_file()
    with exporter(tmp_path, free_port()) as url:
        assert json.loads(fetched(f"{url}/v1/savings"))["lifetime"]["tokens_saved"] == 4096


def test_the_healthcheck_is_one() -> None:
    """tests/service/test_ready.py shows what it tells apart."""
    assert SERVICES["exporter"]["healthcheck"]["test"] == ["CMD", *healthcheck()]
    assert healthcheck() == ["savings-exporter", "ready"]


# Prometheus and Alertmanager


@pytest.mark.needs("prometheus")
def test_promtool_accepts_the_configuration_and_every_rule() -> None:
    rules = sorted((DASHBOARDS / "prometheus/rules").glob("*.yml"))
    checked = subprocess.run(
        ["promtool", "check", "config", DASHBOARDS / "prometheus/prometheus.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert rules
    assert f"{len(rules)} rule files found" in checked.stdout


@pytest.mark.needs("prometheus", "alertmanager")
def test_prometheus_scrapes_the_exporter_loads_the_rules_and_knows_the_alertmanager(
    tmp_path: Path, programs: str
) -> None:
    ours, theirs, port = free_port(), free_port(), free_port()
    command = ["prometheus", *laid_out("prometheus", tmp_path / "prometheus")]
    edit(
        tmp_path / "prometheus/etc/prometheus/prometheus.yml",
        ("exporter:9478", f"127.0.0.1:{ours}"),
        ("alertmanager:9093", f"127.0.0.1:{theirs}"),
        ("localhost:9090", f"127.0.0.1:{port}"),
        (r"_interval: 15s", "_interval: 1s"),
    )
    url, log = f"http://127.0.0.1:{port}", tmp_path / "prometheus/log"

    def api(path: str) -> Any:
        return json.loads(fetched(f"{url}/api/v1/{path}"))["data"]

    def value(query: str) -> float | None:
        result = api(f"query?{urllib.parse.urlencode({'query': query})}")["result"]
        return float(result[0]["value"][1]) if result else None

    # No program listens there. A trace becomes an exemplar even if it cannot be delivered.
    spans = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with (
        alertmanager(tmp_path / "alertmanager", theirs),
        exporter(tmp_path, ours, **spans) as exporter_url,
        refused_before(exporter_url),
        started([*command, f"--web.listen-address=127.0.0.1:{port}"], log, f"{url}/-/ready"),
    ):
        eventually(lambda: value('count(up{job=~"savings-exporter|prometheus"} == 1)') == 2, "both targets to be up")
        fetched(f"{exporter_url}/v1/savings", {"model": "claude-sonnet-4-5", "tokens_saved": 4096})
        eventually(lambda: value("sum(savings_tokens_saved_total)") == 4096, "the saving")
        # A newer Prometheus takes the time of creation for a sample of 0: it sees what was refused before its start.
        refused = 'savings_http_requests_total{method="POST",code="422"}'
        eventually(lambda: value(f"count_over_time({refused}[1m]) > 2"), "some scrapes")
        assert value(refused) == 3
        assert value(f"increase({refused}[1m])") or programs == "installed"
        files = {group["file"] for group in api("rules")["groups"]}
        assert {Path(file).name for file in files} == {
            path.name for path in (DASHBOARDS / "prometheus/rules").glob("*.yml")
        }
        eventually(lambda: api("alertmanagers")["activeAlertmanagers"], "the Alertmanager to be found")
        links = {
            rule["annotations"]["runbook_url"]
            for group in api("rules")["groups"]
            for rule in group["rules"]
            if "annotations" in rule
        }
        page = fetched(f"{exporter_url}/docs/runbook").decode()
        assert {link.partition("#")[0] for link in links} == {
            f"http://localhost:{SERVICES['exporter']['ports'][0].rpartition(':')[2]}/docs/runbook"
        }
        assert [link for link in links if f'<h2 id="{link.partition("#")[2]}">' not in page] == []
        asked = {"query": "savings_save_duration_seconds_bucket", "start": "0", "end": "9999999999"}
        exemplars = eventually(
            lambda: api(f"query_exemplars?{urllib.parse.urlencode(asked)}"), "an exemplar of the save"
        )
        assert set(exemplars[0]["exemplars"][0]["labels"]) >= {
            destination["name"]
            for destination in data_sources()["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
        }


@pytest.mark.needs("prometheus", "alertmanager")
@pytest.mark.parametrize("service", ["prometheus", "alertmanager"])
def test_a_proxy_can_serve_it_under_a_path(tmp_path: Path, service: str) -> None:
    """Grafana and Prometheus go on to reach it without the path."""
    program = shutil.which(service) or "prometheus-alertmanager"
    url = f"http://127.0.0.1:{free_port()}"
    own = f"http://localhost:{SERVICES[service]['ports'][0].rpartition(':')[2]}/"
    command = [word.replace(own, "https://example.org/path/") for word in laid_out(service, tmp_path)]
    assert "--web.external-url=https://example.org/path/" in command
    with started([program, *command, f"--web.listen-address={url[7:]}"], tmp_path / "log", f"{url}/-/ready"):
        assert fetched(f"{url}/metrics")


@contextmanager
def refused_before(exporter_url: str) -> Iterator[None]:
    """Three savings are refused before the block."""
    for _ in range(3):
        with pytest.raises(urllib.error.HTTPError, match="422"):
            fetched(f"{exporter_url}/v1/savings", {})
    yield


@pytest.mark.needs("alertmanager")
@pytest.mark.parametrize(("severity", "receiver"), [("critical", "pager"), ("warning", "team"), ("info", "info")])
def test_amtool_accepts_the_configuration_and_routes_by_severity(severity: str, receiver: str) -> None:
    config = DASHBOARDS / "alertmanager/alertmanager.yml"
    checked = subprocess.run(["amtool", "check-config", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    routed = subprocess.run(
        ["amtool", "config", "routes", "test", f"--config.file={config}", f"severity={severity}"],
        capture_output=True,
        text=True,
    )
    assert routed.stdout.split() == [receiver], routed.stderr


def alert(name: str, severity: str, instance: str | None = None, **fields: str) -> dict[str, Any]:
    labels = {"alertname": name, "severity": severity, "job": "savings-exporter"}
    return {"labels": {**labels, **({"instance": instance} if instance else {})}, **fields}


@pytest.mark.needs("alertmanager")
def test_who_is_paged_hears_it_once_and_when_it_is_over(tmp_path: Path) -> None:
    heard: list[tuple[str, str, str]] = []

    def take(handler: BaseHTTPRequestHandler, body: bytes) -> int:
        message = json.loads(body)
        heard.extend((handler.path, message["status"], one["labels"]["alertname"]) for one in message["alerts"])
        return 200

    with listening(take) as webhooks:
        receivers = ("pager", "team-chat", "dead-mans-switch")
        changes = [(rf"http://replace-with-your-{who}.invalid/", f"{webhooks}/{who}") for who in receivers]
        changes += [(r"group_(wait|interval): \w+", r"group_\1: 100ms")]
        with alertmanager(tmp_path, free_port(), *changes) as url:
            alerts = f"{url}/api/v2/alerts"
            fetched(alerts, [alert("FsyncFails", "critical", "a:1")])
            eventually(lambda: ("/pager", "firing", "FsyncFails") in heard, "the page")
            fetched(alerts, [alert("SavesFail", "warning", "a:1"), alert("Degraded", "warning", "b:1")])
            fetched(alerts, [alert("Note", "info", "b:1"), alert("SavingsRecovered", "warning", "a:1")])
            eventually(lambda: ("/team-chat", "firing", "Degraded") in heard, "the message about another exporter")
            eventually(lambda: ("/team-chat", "firing", "SavingsRecovered") in heard, "the message about damage")
            shown = {one["labels"]["alertname"]: one for one in json.loads(fetched(alerts))}
            assert {name: one["status"]["state"] for name, one in shown.items()} == {
                "FsyncFails": "active",
                "SavesFail": "suppressed",
                "Degraded": "active",
                "Note": "active",
                "SavingsRecovered": "active",
            }
            assert shown["Note"]["receivers"] == [{"name": "info"}]
            assert {(path, name) for path, _, name in heard} == {
                ("/pager", "FsyncFails"),
                ("/team-chat", "Degraded"),
                ("/team-chat", "SavingsRecovered"),
            }
            fetched(alerts, [alert("FsyncFails", "critical", "a:1", endsAt="2000-01-01T00:00:00Z")])
            eventually(lambda: ("/pager", "resolved", "FsyncFails") in heard, "the end of it")
            eventually(lambda: ("/team-chat", "firing", "SavesFail") in heard, "what goes on without it")


@pytest.mark.needs("alertmanager")
def test_one_dead_disk_makes_one_page(tmp_path: Path) -> None:
    """Also with labels of a cluster: what a failed sync explains is not sent, and pages of one exporter go together."""
    sent: list[tuple[str, set[tuple[str, str]]]] = []

    def take(handler: BaseHTTPRequestHandler, body: bytes) -> int:
        alerts = json.loads(body)["alerts"]
        sent.append((handler.path, {(one["labels"]["alertname"], one["labels"].get("pod", "")) for one in alerts}))
        return 200

    def dead(pod: str) -> list[dict[str, Any]]:
        pages = (
            "SavingsJournalFsyncFailing",
            "SavingsDirectoryFsyncFailing",
            "SavingsStoreUnhealthy",
            "SavingsSavesStale",
        )
        alerts = [alert(name, "critical", "a:1") for name in pages]
        alerts += [alert("SavingsCommitsFailing", "warning", "a:1"), alert("SavingsRequestsRefused", "warning", "a:1")]
        return [{"labels": {**one["labels"], "namespace": "llm", "pod": pod}} for one in alerts]

    with listening(take) as webhooks:
        receivers = ("pager", "team-chat", "dead-mans-switch")
        changes = [(rf"http://replace-with-your-{who}.invalid/", f"{webhooks}/{who}") for who in receivers]
        changes += [(r"group_wait: \w+", r"group_wait: 1s"), (r"group_interval: \w+", r"group_interval: 1s")]
        with alertmanager(tmp_path, free_port(), *changes) as url:
            fetched(f"{url}/api/v2/alerts", [*dead("p"), alert("Watchdog", "none")])
            eventually(lambda: len(sent) >= 3, "a page, a warning and the watchdog")
            shown = json.loads(fetched(f"{url}/api/v2/alerts"))
    by_path = dict(sent)
    assert by_path == {
        "/pager": {("SavingsJournalFsyncFailing", "p"), ("SavingsDirectoryFsyncFailing", "p")},
        "/team-chat": {("SavingsRequestsRefused", "p")},
        "/dead-mans-switch": {("Watchdog", "")},
    }
    assert len([path for path, _ in sent if path == "/pager"]) == 1
    suppressed = {one["labels"]["alertname"] for one in shown if one["status"]["state"] == "suppressed"}
    assert suppressed == {"SavingsStoreUnhealthy", "SavingsSavesStale", "SavingsCommitsFailing"}


# Grafana and Tempo


def data_sources() -> dict[str, dict[str, Any]]:
    provisioned = yaml.safe_load((DASHBOARDS / "grafana/provisioning/datasources/datasources.yml").read_text())
    return {source["uid"]: source for source in provisioned["datasources"]}


def test_grafana_asks_services_that_are_there_at_the_ports_where_they_listen() -> None:
    tempo = yaml.safe_load((DASHBOARDS / "tempo/tempo.yaml").read_text())
    assert {uid: source["url"] for uid, source in data_sources().items()} == {
        "prometheus": f"http://prometheus:{SERVICES['prometheus']['ports'][0].rpartition(':')[2]}",
        "tempo": f"http://tempo:{tempo['server']['http_listen_port']}",
    }
    assert {uid: source["type"] for uid, source in data_sources().items()} == {uid: uid for uid in data_sources()}
    destinations = data_sources()["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert [destination["datasourceUid"] for destination in destinations] == ["tempo"]


def test_grafana_finds_its_dashboards() -> None:
    providers = yaml.safe_load((DASHBOARDS / "grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    places = {target: ROOT / source for source, target, *_ in mounts("grafana")}
    for provider in providers:
        assert list(places[provider["options"]["path"]].glob("*.json"))
    directory, _, name = home.rpartition("/")
    assert json.loads((places[directory] / name).read_text())["uid"]


def test_tempo_takes_spans_where_the_exporter_sends_them_and_keeps_them_in_its_volume() -> None:
    tempo = yaml.safe_load((DASHBOARDS / "tempo/tempo.yaml").read_text())
    http_receiver = tempo["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert SERVICES["exporter"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == http_receiver.replace(
        "0.0.0.0", "http://tempo"
    )
    storage = tempo["storage"]["trace"]
    writable = [target for _, target, *mode in mounts("tempo") if not mode]
    assert {str(Path(storage[part]["path"]).parent) for part in ("wal", "local")} == set(writable)
    config = next(target for source, target, *_ in mounts("tempo") if source.startswith("."))
    assert SERVICES["tempo"]["command"] == [f"-config.file={config}/tempo.yaml"]


# The demo's traffic


@contextmanager
def traffic(root: Path, exporter_url: str) -> Iterator[None]:
    """The script of the profile ``demo``, posting to an address."""
    service = SERVICES["exporter"]
    inside = f"http://exporter:{service['ports'][0].rpartition(':')[2]}"
    command = [word.replace(inside, exporter_url) for word in laid_out("traffic", root)]
    assert command[0] == "python"
    assert exporter_url in command
    with (root / "log").open("wb") as log, subprocess.Popen([sys.executable, *command[1:]], stderr=log) as process:
        try:
            yield
        finally:
            process.terminate()


def test_the_demo_starts_only_when_it_is_asked_for_and_the_exporter_answers() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["traffic"]
    assert SERVICES["traffic"]["depends_on"] == {"exporter": {"condition": "service_healthy"}}


def test_the_demos_traffic_reaches_the_exporter_also_when_that_comes_late(tmp_path: Path, store_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with traffic(tmp_path, f"http://{address}"):
        eventually(lambda: "trying again" in (tmp_path / "log").read_text(), "the first attempt to fail")
        with running("serve", "--store", str(store_path), address=address) as service:

            def requests() -> float:
                metrics = service.metrics()
                return sum(value for name, value in metrics.items() if name.startswith("savings_requests_total"))

            eventually(lambda: requests() >= 3, "three savings")


def test_the_demos_traffic_repeats_a_saving_that_got_no_answer_under_the_same_key(tmp_path: Path) -> None:
    """The exporter counts such a repeat once."""
    posts: list[tuple[str, bytes]] = []
    statuses = [503, None]

    def take(handler: BaseHTTPRequestHandler, body: bytes) -> int | None:
        posts.append((handler.headers["Idempotency-Key"], body))
        return statuses.pop(0) if statuses else 200

    with listening(take) as url, traffic(tmp_path, url):
        eventually(lambda: len(posts) >= 4, "a saving after the repeated one")
    assert posts[0] == posts[1] == posts[2]
    assert posts[3][0] != posts[2][0]
