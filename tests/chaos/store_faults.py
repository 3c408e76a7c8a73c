"""What an S3 server and the way to it do wrong while a night is scored; each ends with the table whole."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from darnet.results import read_rows
from tests.chaos.night import ChaosError, Night, collect_facts, list_runs, upload
from tests.ct_fixtures import make_chest, write_chest
from tests.fault_proxy import Fault, Policy, Request, Weather, fair_weather

SEED = 2026
HEADER_BYTES = 1024
OUTAGE_S = 30.0
STORM = {
    **{Fault("SlowDown"): 0.20, Fault("InternalError"): 0.05, Fault("reset"): 0.03, Fault("slow", 0.5): 0.03},
    **{Fault("truncated"): 0.03, Fault("flipped"): 0.03},
}


def weather(night: Night) -> str:
    """20% SlowDown, 5% 500, resets, slow, cut and flipped answers; what is ERR is scored in the next night."""
    night.site.proxy.done.clear()
    night.site.proxy.policy = Weather(SEED, STORM)
    first = night.run(0, 4)
    done = dict(night.site.proxy.done)
    demand_faults(night, *(fault.kind for fault in STORM))
    night.site.proxy.policy = fair_weather
    night.run(0)
    return f"{_describe(first)}, then fair; answers {done}"


def etags_alone(night: Night) -> str:
    """One answer in five with a flipped bit, and nobody looks at the checksums of the uploader."""
    night.site.proxy.done.clear()
    night.site.proxy.policy = Weather(SEED, {Fault("flipped"): 0.2})
    summary = night.run(0, 4, AWS_RESPONSE_CHECKSUM_VALIDATION="when_required")
    num_flipped = demand_faults(night, "flipped")
    night.site.proxy.policy = fair_weather
    night.run(0)
    return f"{num_flipped} answers flipped, {_describe(summary)}, then fair"


def flipped_headers(night: Night) -> str:
    """A flipped bit in one header in five, where of large slices the headers come first and no checksum guards them."""
    for index in range(2):
        voxels = np.roll(make_chest((72, 384, 384)), index, axis=2)
        write_chest(night.site.folder / "large" / f"large{index}", voxels, PixelSpacing=[1.0, 1.0])
    quiet = Night(night.site, "large", is_remote=False, archive=str(night.site.folder / "large"), mark=night.mark)
    quiet.run(0)
    night.truth, night.archive = collect_facts(quiet.results), f"{night.site.bucket}/large"
    upload(quiet.archive, night.archive, request_checksum_calculation="when_required")
    storm = Weather(SEED, {Fault("flipped", within=HEADER_BYTES): 0.2})
    night.site.proxy.done.clear()
    night.site.proxy.policy = lambda request: storm(request) if request.span and "/large/" in request.path else None
    night.run(0)
    return f"{demand_faults(night, 'flipped')} headers flipped"


def outage(night: Night) -> str:
    """Half a minute without any connection, beginning while scans are fetched."""
    ends_s: list[float] = []
    night.site.proxy.policy = _after_objects(60, lambda: _until(ends_s))
    first = night.run(0, 4)
    if not ends_s:
        raise ChaosError("the outage never began")
    night.site.proxy.policy = fair_weather
    night.run(0)
    return f"{_describe(first)}, then fair"


def endless_outage(night: Night) -> str:
    """No connection any more, with parts staged: exit code 4; the next attempt goes on."""
    job = night.start_and_hold()
    night.site.proxy.release(lambda _: Fault("reset"))
    night.finish(job, 4)
    night.site.proxy.release()
    return f"{night.resume()} sources resumed"


def no_store(night: Night) -> str:
    """No connection at all: exit code 4."""
    night.site.proxy.policy = lambda _: Fault("reset")
    started_s = time.monotonic()
    night.run(4)
    took_s = time.monotonic() - started_s
    night.site.proxy.policy = fair_weather
    night.run(0)
    return f"ended after {took_s:.0f} s, then fair"


def lost_acknowledgement(night: Night) -> str:
    """The put that publishes is carried out, and its answer lost, more often than boto3 asks."""
    return _publish_once(night, Fault("lost"), 7)


def conflict(night: Night) -> str:
    """409 ConditionalRequestConflict to the put that publishes, three times."""
    return _publish_once(night, Fault("ConditionalRequestConflict"), 3)


def flipped_uploads(night: Night) -> str:
    """A flipped bit in the first upload of every object of a night, and nobody sends a checksum with it."""
    night.is_table_damaged = True  # until it is put again, at once
    return _damage_uploads(night, "flipped_upload")


def cut_uploads(night: Night) -> str:
    """The first upload of every object of a night breaks off in its middle."""
    return _damage_uploads(night, "cut_upload")


def forbidden(night: Night) -> str:
    """403 on the keys of one source: it is an ERR row, the others are scored; allowed again, it is scored too."""
    return _refuse_a_source(night, "AccessDenied")


def archived(night: Night) -> str:
    """InvalidObjectState (Glacier) on the keys of one source: the same."""
    return _refuse_a_source(night, "InvalidObjectState")


def expired_credentials(night: Night) -> str:
    """Credentials that expire in mid-run: exit code 5, nothing published; renewed, the run goes on."""
    return _lock_out(night, "ExpiredToken")


def skewed_clock(night: Night) -> str:
    """A node whose clock is a day off, as the store tells it (RequestTimeTooSkewed): exit code 5."""
    return _lock_out(night, "RequestTimeTooSkewed")


def _damage_uploads(night: Night, kind: str) -> str:
    damaged: list[str] = []

    def policy(request: Request) -> Fault | None:
        if request.method != "PUT" or request.attempt:
            return None
        damaged.append(request.path)
        return Fault(kind)

    night.site.proxy.done.clear()
    night.site.proxy.policy = policy
    summary = night.run(0, AWS_REQUEST_CHECKSUM_CALCULATION="when_required")
    demand_faults(night, kind)
    numbers = {part: sum(part in path for path in damaged) for part in ("plan.parquet", "/parts/", "/predictions/")}
    if summary["published"] != 1 or not all(numbers.values()):
        raise ChaosError(f"published as {summary['published']}, damaged {damaged}")
    return f"{len(damaged)} uploads, among them {numbers}"


def _publish_once(night: Night, fault: Fault, times: int) -> str:
    night.site.proxy.done.clear()
    night.site.proxy.policy = _on_publishing(fault, times)
    summary = night.run(0)
    num_faults = demand_faults(night, fault.kind)
    if summary["published"] != 1:
        raise ChaosError(f"published as {summary['published']}")
    return f"published as 1, {num_faults} times {fault.kind}"


def demand_faults(night: Night, *kinds: str) -> int:
    """How often the proxy did these since it was last cleared. Raises: ChaosError if it never did one of them."""
    done = night.site.proxy.done
    if absent := [kind for kind in kinds if not done[kind]]:
        raise ChaosError(f"the proxy never did: {', '.join(absent)}")
    return sum(done[kind] for kind in kinds)


def _refuse_a_source(night: Night, code: str) -> str:
    def policy(request: Request) -> Fault | None:
        return Fault(code) if request.method == "GET" and "/ct/chest01/" in request.path else None

    night.site.proxy.policy = policy
    night.run(0)
    rows = read_rows(night.results).select(["source", "status", "status_detail"]).to_pylist()
    (refused,) = [row for row in rows if row["source"] == "chest01"]
    others = {row["source"]: row["status"] for row in rows if row["source"] != "chest01"}
    if not refused["status"].startswith("ERR_") or [name for name in others.values() if name.startswith("ERR_")]:
        raise ChaosError(f"{refused}, {others}")
    night.site.proxy.policy = fair_weather
    night.run(0)
    return f"{refused['status']} ({refused['status_detail']}), then fair"


def _lock_out(night: Night, code: str) -> str:
    night.site.proxy.policy = _after_objects(100, lambda: Fault(code))
    summary = night.run(5)
    begun = list_runs(night.results)
    night.site.proxy.policy = fair_weather
    night.run(0)
    if (ended := set(read_rows(night.results)["run_id"].to_pylist())) != begun:
        raise ChaosError(f"begun as {begun}, published as {ended}")
    return f"{summary['error'][-60:]}"


def _describe(summary: dict[str, Any]) -> str:
    return str(summary.get("statuses") or summary["error"])


def _after_objects(number: int, fault: Callable[[], Fault | None]) -> Policy:
    """Nothing until so many objects of the archive were asked for, then what `fault` says of every request."""
    seen: set[str] = set()

    def policy(request: Request) -> Fault | None:
        if request.is_of_object and "/ct/" in request.path:
            seen.add(request.path)
        return fault() if len(seen) > number else None

    return policy


def _until(ends_s: list[float]) -> Fault | None:
    """A reset within `OUTAGE_S` of the first call."""
    if not ends_s:
        ends_s.append(time.monotonic() + OUTAGE_S)
    return Fault("reset") if time.monotonic() < ends_s[0] else None


def _on_publishing(fault: Fault, times: int) -> Policy:
    def policy(request: Request) -> Fault | None:
        is_it = request.method == "PUT" and "/predictions/" in request.path
        return fault if is_it and request.attempt < times else None

    return policy
