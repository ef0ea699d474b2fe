"""The linters of the Dockerfile, of YAML and of shell scripts have no complaints.

Prometheus's, Alertmanager's and compose files are checked by their own programs in tests/e2e.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import HADOLINT, ROOT


def complaints(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr + (f"status {done.returncode}" if done.returncode else "")


def test_yamllint() -> None:
    assert complaints(sys.executable, "-m", "yamllint", "--strict", ".") == ""


@pytest.mark.needs("hadolint")
def test_hadolint() -> None:
    assert complaints(HADOLINT, "Dockerfile") == ""


@pytest.mark.needs("shellcheck")
def test_shellcheck() -> None:
    scripts = [
        path for path in sorted((ROOT / ".ci").iterdir()) if path.read_bytes().startswith(b"#!/usr/bin/env bash")
    ]
    assert {script.name for script in scripts} >= {"run", "unstable-programs"}
    assert complaints("shellcheck", *scripts) == ""
