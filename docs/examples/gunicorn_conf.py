"""For gunicorn: close the tracker when a worker ends, so that the document is saved."""

import sys
from typing import Any


def worker_exit(_server: Any, _worker: Any) -> None:
    for name in ("flask_app", "django_app"):
        if name in sys.modules:
            sys.modules[name].tracker.close()
