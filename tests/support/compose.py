"""Read the compose file and the Dockerfile, and recreate the mounts without containers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT


def compose_file(name: str = "docker-compose.yml", **variables: str) -> dict[str, Any]:
    """A compose file's content. Variables that are not given have their defaults."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda found: variables.get(found[1], found[2]), text)
    content: dict[str, Any] = yaml.safe_load(text)
    return content


COMPOSE = compose_file()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DASHBOARDS = ROOT / "dashboards"


def dockerfile(instruction: str) -> list[str]:
    """The arguments of an instruction, once for each time that it occurs."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{instruction}\s+(.*)$", text, flags=re.MULTILINE)


def healthcheck() -> list[str]:
    """The image's healthcheck, as a command."""
    command: list[str] = json.loads(dockerfile("HEALTHCHECK")[-1].partition("CMD")[2])
    return command


def mounts(service: str) -> list[list[str]]:
    """Source and target of a service's mounts, and the options of mounts of the host's files."""
    return [mount.split(":") for mount in SERVICES[service].get("volumes", [])]


def laid_out(service: str, root: Path) -> list[str]:
    """Recreate a service's mounts below a directory. Return the service's command, with paths in that directory."""
    for source, target, *_ in mounts(service):
        place = root / target.lstrip("/")
        if source.startswith("."):
            shutil.copytree(ROOT / source, place)
        else:
            place.mkdir(parents=True)
    command = [*SERVICES[service].get("entrypoint", []), *SERVICES[service]["command"]]
    return [re.sub(r"^(--?[\w.-]+=)?/(?=\w)", rf"\g<1>{root}/", argument) for argument in command]


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replace patterns in a file. Each pattern must occur."""
    text = path.read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{path} has no {pattern}"
    path.write_text(text)
