"""The description of the routes: it is valid, complete, and what the service does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.model.record import MAX_TOKENS
from tests.support.paths import ROOT, SCHEMATHESIS
from tests.support.service import Service, running

CONFIG = ROOT / "tests" / "service" / "schemathesis.toml"
SECONDS = 120


def described(service: Service) -> dict[str, Any]:
    status, text = service.get("/openapi.json")
    assert status == 200
    found: dict[str, Any] = json.loads(text)
    return found


def test_valid_and_complete(store_path: Path) -> None:
    with running("serve", "--store", str(store_path), "--web.telemetry-path", "/m") as service:
        found = described(service)
    assert found["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(found).validate()
    general = {"/", "/m", "/-/healthy", "/-/ready", "/docs/", "/docs/{name}", "/openapi.json"}
    assert set(found["paths"]) == general | {"/v1/history", "/v1/metrics", "/v1/savings"}
    assert set(found["paths"]["/v1/savings"]) == {"get", "post"}


def test_record_is_that_of_python(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        schema = described(service)["components"]["schemas"]["SavingsRecord"]
    assert list(schema["properties"]) == list(SavingsRecord.__struct_fields__)
    assert schema["properties"]["tokens_saved"]["maximum"] == MAX_TOKENS
    assert schema["required"] == ["model", "tokens_saved"]
    assert schema["additionalProperties"] is False
    assert all(each["description"] for each in schema["properties"].values())


def test_watch_describes_no_post(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    with running("watch", str(store_path)) as service:
        paths = described(service)["paths"]
    assert set(paths["/v1/savings"]) == {"get"}
    assert "/v1/metrics" not in paths


def test_needs_no_token(tmp_path: Path, store_path: Path) -> None:
    token, config = tmp_path / "token", tmp_path / "web.yml"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    config.write_text(f"authorization:\n  read_credentials_file: {token}\n")
    config.chmod(0o600)
    with running("serve", "--store", str(store_path), "--web.config.file", str(config)) as service:
        assert service.get("/v1/savings")[0] == 401
        assert described(service)["paths"]


@pytest.mark.needs("schemathesis")
def test_service_does_what_is_described(tmp_path: Path, store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        done = subprocess.run(
            [
                *(SCHEMATHESIS, "--config-file", CONFIG, "run", f"{service.url}/openapi.json", "--no-color"),
                *("--seed", "1", "--max-examples", "50", "--generation-database", "none"),
                *("--phases", "examples,coverage,fuzzing"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "10 selected / 10 total" in done.stdout
        status, _, log = service.stop()
    assert (status, "Traceback" in log) == (0, False)
