"""The works: each defines what is recorded, the peer and the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.measuring import Result, Setup
from benchmarks.works.bounds import after_a_million, device_bytes, memory
from benchmarks.works.cpu import cpu_one_thread, cpu_threads
from benchmarks.works.documents import importing, opening, saving, scrape
from benchmarks.works.rates import RATES, bare_latency, headroom_rates
from benchmarks.works.service import (
    service_batches,
    service_latency,
    service_rate,
    service_scraped,
    service_starlette,
)
from benchmarks.works.startup import start_record, start_version
from benchmarks.works.tracing import tracing_all, tracing_sampled

WORKS: Mapping[str, Callable[[Setup], Result]] = {
    **RATES,
    "one-thread-headroom": headroom_rates,
    "latency": bare_latency,
    "tracing-sampled": tracing_sampled,
    "tracing-all": tracing_all,
    "cpu-one-thread": cpu_one_thread,
    "cpu-threads": cpu_threads,
    "saving": saving,
    "opening": opening,
    "importing": importing,
    "scrape": scrape,
    "device-bytes": device_bytes,
    "after-a-million": after_a_million,
    "memory": memory,
    "service": service_rate,
    "service-p99": service_latency,
    "service-starlette": service_starlette,
    "service-batches": service_batches,
    "service-scraped": service_scraped,
    "start-version": start_version,
    "start-record": start_record,
}
"""Each work by the name that the command takes."""
