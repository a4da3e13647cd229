"""What a server itself reports while it is under load, through its Prometheus metrics."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import requests
from prometheus_client.parser import text_string_to_metric_families

from pytest_kld.engines.served.kind import headers

_SECONDS_BETWEEN_READINGS = 0.5
_TIMEOUT_SECONDS = 2.0


class Gauges:
    """Readings of some gauges, summed over their labels."""

    def __init__(self, names: Sequence[str]) -> None:
        """Start without readings."""
        self._readings: dict[str, list[float]] = {name: [] for name in names}

    def read(self, text: str) -> None:
        """Add a reading of each gauge from the text of a server's metrics; values of 0 mean that it was idle.

        Raises:
            ValueError: the text has another format.

        """
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in self._readings:
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        for name, value in found.items():
            if 0 < value < math.inf:
                self._readings[name].append(value)

    def medians(self) -> Mapping[str, float]:
        """Return the median of each gauge that was ever above 0."""
        return {name: median(values) for name, values in self._readings.items() if values}


@contextmanager
def watched(url: str, api_key: str | None, names: Sequence[str]) -> Iterator[Gauges]:
    """Read a server's gauges at intervals while the context lasts. A server without metrics gives no readings."""
    gauges, over = Gauges(names), threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_READINGS):
            try:
                answer = requests.get(f"{url}/metrics", headers=headers(api_key), timeout=_TIMEOUT_SECONDS)
                if answer.status_code != requests.codes.ok:
                    return  # metrics are off
                gauges.read(answer.text)
            except (requests.RequestException, ValueError):  # the load run itself reports a server that is gone
                continue

    thread = threading.Thread(target=watch, name="kld-gauges", daemon=True)
    thread.start()
    try:
        yield gauges
    finally:
        over.set()
        thread.join()
