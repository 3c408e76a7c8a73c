"""What a scoring run tells Prometheus: finished rows go in, counters of the cluster's metrics agents come out."""

from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.metrics import Counter

from darnet.publishing.rows import SECONDS, STAGES


class ScanCounters:
    """Scans by status, their bytes, and seconds by stage; Ray's agents serve them with the prefix `ray_`."""

    def __init__(self) -> None:
        self._scans = Counter("darnet_scans", "Scans that have a row, by status.", tag_keys=("status",))
        self._bytes = Counter("darnet_bytes", "Bytes of the files these scans were read from.")
        self._seconds = Counter(
            "darnet_stage_seconds", "Seconds by stage; fetching may run beside others.", tag_keys=("stage",)
        )

    def note(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count these rows."""
        for row in rows:
            self._scans.inc(1, {"status": row["status"]})
            _add(self._bytes, row["num_bytes"], {})
            for stage, column in zip(STAGES, SECONDS, strict=True):
                _add(self._seconds, row[column], {"stage": stage})


def _add(counter: Counter, amount: float | None, tags: dict[str, str]) -> None:
    if amount:  # a counter refuses to grow by nothing
        counter.inc(amount, tags)
