"""Build the image with buildah, from a base made by debootstrap in the place of Docker's image of Python.

The base has Debian's Python, not the version that the Dockerfile names. All that is built lies below one directory.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.compose import dockerfile
from tests.support.paths import ROOT

IMAGE = "savings-exporter"

BUILD_SECONDS = 900
"""How long a step of the build may take. It is a limit, not an expected duration."""

# When the first process of a PID namespace ends, the kernel ends the others, and a mount namespace takes its mounts
# along. So nothing is left of a step that fails or is interrupted.
_ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

_PIP_SETTINGS = ("index-url", "proxy", "trusted-host")


class BuiltImage:
    """The image of this checkout: its configuration, and a container's root file system."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for base in {stage.split()[0] for stage in dockerfile("FROM")}:
            self._make_base(base)
        # Only Docker's format stores a healthcheck.
        build = ("build", "--isolation", "chroot", "--pull-never", "--format", "docker", "--tag", IMAGE, str(ROOT))
        self._buildah(*build)
        inspected = json.loads(self._buildah("inspect", "--type", "image", IMAGE))
        self.config: dict[str, Any] = inspected["Docker"]["config"]
        self.root = Path(self._buildah("mount", self._buildah("from", "--pull-never", IMAGE)))

    def _make_base(self, name: str) -> None:
        suite = name.rpartition("-")[2]
        container = self._buildah("from", "scratch")
        root = Path(self._buildah("mount", container))
        _run("debootstrap", "--variant=minbase", "--include=python3-venv", suite, str(root), *_mirror(suite))
        (root / "usr/bin/python").symlink_to("python3")
        for package in (root / "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
        _set_up_pip(root)
        self._buildah("commit", "--disable-compression", "--rm", container, name)

    def _buildah(self, *arguments: str) -> str:
        """Run buildah with a storage of its own. Return its output."""
        storage = ("--root", str(self._directory / "storage"), "--runroot", str(self._directory / "run"))
        return _run("buildah", "--storage-driver", "vfs", *storage, *arguments)


def _run(*command: str) -> str:
    """Run a step of the build. Return its output without the newline at the end."""
    done = subprocess.run([*_ISOLATED, *command], capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout.rstrip("\n")


def _mirror(suite: str) -> list[str]:
    """The mirror from which this machine installs this suite's packages; debootstrap's usual one if it has none."""
    wanted = ("Created-By: Packages", f"Codename: {suite}", "Component: main")
    asked = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", *wanted], capture_output=True, text=True, check=True
    )
    return asked.stdout.split()[:1]


def _set_up_pip(root: Path) -> None:
    """Give pip in the base this machine's package index, proxy and certificates."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    # The environment comes last, and has precedence.
    settings = {name: ast.literal_eval(value) for name, value in re.findall(r"^[\w:]+\.([\w-]+)=(.*)$", asked, re.M)}
    lines = ["[global]", *(f"{name} = {settings[name]}" for name in _PIP_SETTINGS if name in settings)]
    if certificates := settings.get("cert") or os.environ.get("SSL_CERT_FILE"):
        shutil.copy(certificates, root / "etc/pip-certificates.pem")
        lines.append("cert = /etc/pip-certificates.pem")
    (root / "etc/pip.conf").write_text("\n".join([*lines, ""]))
