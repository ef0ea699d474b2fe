"""Send generated savings to an exporter until stopped, as a proxy would: python traffic.py http://exporter:9478."""

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

# The exporter is on the local network, so HTTP proxies from the environment are not used.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(exporter: str, record: SavingsRecord) -> None:
    """Send one saving until the exporter answers. Because of its key it counts once, even if only the answer was lost.

    Raises:
        urllib.error.HTTPError: the exporter refuses the saving permanently.
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
    """Send one saving after another, with a pause before each."""
    exporter = sys.argv[1]
    for pause, record in made_up_savings():
        time.sleep(pause)
        post(exporter, record)


if __name__ == "__main__":
    main()
