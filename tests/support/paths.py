"""Paths in a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
HADOLINT = Path(sys.executable).with_name("hadolint")
HEADROOM_PYTHON = ROOT / ".venv-headroom" / "bin" / "python"
LITELLM_PYTHON = ROOT / ".venv-litellm" / "bin" / "python"
SCHEMATHESIS = ROOT / ".venv-schemathesis" / "bin" / "schemathesis"
UNSTABLE = ROOT / ".unstable" / "usr"
"""The programs of Debian unstable (make unstable)."""
