"""What an installer gets: the files in the wheel and the sdist, the metadata, the command."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a wheel and an sdist of this checkout."""
    target = tmp_path_factory.mktemp("dist")
    build = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )
    assert build.returncode == 0, build.stderr
    return target


@pytest.fixture
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "savings_exporter"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    assert modules | {"savings_exporter/py.typed"} <= set(wheel.namelist())


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"savings_exporter", next(top for top in tops if top.endswith(".dist-info"))}


def test_installed_package_writes_the_same_assets(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """A wheel, unpacked where no checkout is."""
    wheel.extractall(tmp_path / "site")
    places = {"installed": tmp_path / "site", "checkout": ROOT}
    for name, place in places.items():
        command = [sys.executable, "-m", "savings_exporter", "assets", "--output", str(tmp_path / name)]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(place)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    installed, checkout = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "installed", tmp_path / "checkout")
    )
    assert installed == checkout
    names = {path.as_posix() for path in installed}
    assert {"docs/runbook.md", "grafana/savings.json", "prometheus/rules/alerts.yml"} <= names
    assert "deploy/systemd/savings-exporter.service" in names


def test_wheel_holds_the_license(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_supported_pythons(metadata: Message) -> None:
    assert metadata["Requires-Python"] == ">=3.10"
    classifiers = metadata.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(classifiers)


def test_no_development_tools_required(metadata: Message) -> None:
    required = " ".join(metadata.get_all("Requires-Dist", []))
    assert "prometheus-client" in required
    assert not [tool for tool in ("pytest", "mypy", "ruff", "hatchling", "headroom") if tool in required]


def test_sdist_is_enough_to_build_and_test(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    needed = {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "tests/conftest.py",
        "benchmarks/__main__.py",
    }
    assert needed | {"savings_exporter/py.typed", "tests/unit/test_packaging.py"} <= names
    assert not [name for name in names if name.startswith(".venv") or "__pycache__" in name]


def test_command_and_its_version(metadata: Message) -> None:
    command = Path(sysconfig.get_path("scripts")) / "savings-exporter"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert metadata["Version"] in done.stdout.split()


def test_import_without_web_server() -> None:
    """A proxy that embeds the tracker does not pay for the service."""
    heavy = {"uvicorn", "starlette", "click"}
    code = f"import sys, savings_exporter; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.stdout.strip() == "[]", done.stderr
