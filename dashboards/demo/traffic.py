"""Posts made-up savings to an exporter for ever, as a proxy would: python traffic.py http://exporter:9478."""

from __future__ import annotations

import http.client
import sys
import time
import urllib.error
import urllib.request
import uuid

import msgspec

from savings_exporter import SavingsRecord
from savings_exporter.service.demo import made_up_savings

_RETRY_SECONDS = 1.0

# The exporter is close by: whatever proxy the environment names is not on the way to it.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(exporter: str, record: SavingsRecord) -> None:
    """Send one saving until there is an answer. By its key it counts once, also when only the answer got lost.

    Raises:
        urllib.error.HTTPError: the exporter refuses the saving, and would do so again.
    """
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(uuid.uuid4())}
    request = urllib.request.Request(f"{exporter}/v1/savings", msgspec.json.encode(record), headers)
    while True:
        try:
            with _OPENER.open(request, timeout=30) as answer:
                answer.read()
                return
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise
            print(f"trying again: {error}", file=sys.stderr, flush=True)
        time.sleep(_RETRY_SECONDS)


def main() -> None:
    """Post one saving after the other, with a pause before each."""
    exporter = sys.argv[1]
    for pause, record in made_up_savings():
        time.sleep(pause)
        post(exporter, record)


if __name__ == "__main__":
    main()
