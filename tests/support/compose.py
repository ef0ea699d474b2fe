"""What the compose file and the Dockerfile say, and its mounts laid out without containers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DASHBOARDS = ROOT / "dashboards"


def dockerfile(instruction: str) -> list[str]:
    """What follows an instruction, each time that it is given."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{instruction}\s+(.*)$", text, flags=re.MULTILINE)


def healthcheck() -> list[str]:
    """The image's healthcheck, as a command."""
    command: list[str] = json.loads(dockerfile("HEALTHCHECK")[-1].partition("CMD")[2])
    return command


def mounts(service: str) -> list[list[str]]:
    """Source and target of a service's mounts, and ``ro`` where it must not write."""
    return [mount.split(":") for mount in SERVICES[service].get("volumes", [])]


def laid_out(service: str, root: Path) -> list[str]:
    """Lay a service's mounts out below a directory as they are in its container; its command, with paths in there."""
    for source, target, *_ in mounts(service):
        place = root / target.lstrip("/")
        if source.startswith("."):
            shutil.copytree(ROOT / source, place)
        else:
            place.mkdir(parents=True)
    command = [*SERVICES[service].get("entrypoint", []), *SERVICES[service]["command"]]
    return [re.sub(r"^(--?[\w.-]+=)?/", rf"\g<1>{root}/", argument) for argument in command]


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replace patterns in a file, each of which must be there."""
    text = path.read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{path} has no {pattern}"
    path.write_text(text)
