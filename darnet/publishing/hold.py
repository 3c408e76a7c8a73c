"""The gate between a run's rows and the table: a run unlike the nights before is held until a person has decided.

Rows of a run and the table go in; a verdict and the night's page come out, or `HELD.json` and an error.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from darnet.cam_images import CamImages
from darnet.config import GateConfig
from darnet.errors import HeldError, RunError, UsageError
from darnet.publishing.commit import Outlook, check_rows, give_up, publish
from darnet.publishing.gates import Verdict, judge
from darnet.publishing.nightly_report import NIGHT_COLUMNS, Night, render_nightly
from darnet.publishing.objects import NOTICE, list_commit_objects, stream_objects, suggest_discard
from darnet.publishing.runs import DISCARDED, HELD, PLAN, RUNS, RunFolder, RunRecord, list_run_files
from darnet.publishing.staged import StagedRows
from darnet.publishing.tally import TALLY_COLUMNS, Tally
from darnet.settings import ScoreSettings
from darnet.storage import Store

ACCEPTED = "ACCEPTED.json"
PAGE = "nightly.html"


def list_held_runs(store: Store) -> list[str]:
    """Runs that wait for a person's decision."""
    return [run_id for run_id, names in list_run_files(store).items() if HELD in names]


def refuse_if_held(store: Store) -> None:
    """Raises: HeldError naming the run that an earlier night left held, and what to do."""
    if held := list_held_runs(store):
        raise _explain_hold(store, _read_hold(store, held[0]))


def review_run(
    folder: RunFolder, rows: StagedRows, outlook: Outlook, config: GateConfig, images: CamImages | None = None
) -> Verdict:
    """Judge a run's rows against the nights before, and write the night's page, with pictures where there are any.

    The page shows what the table will take, as it will, and what only repeats the table, which is not judged.
    Raises: HeldError if a gate is breached; `HELD.json` of the run says which, and nothing may be published. RunError
        if the run was discarded: it must not hold the nights after it.
    """
    folder.refuse_if_discarded()
    earlier = read_earlier_nights(folder.store, rows.keys["night"][0].as_py(), config.gate_nights)
    tonight, judged = Night(), Tally()
    for where, piece in rows.stream(NIGHT_COLUMNS):
        is_left_out = outlook.is_settled[where] | outlook.is_repeat[where]
        ended = give_up(piece, outlook.is_given_up[where])
        tonight.introduce(piece)
        tonight.add(ended.filter(pa.array(~outlook.is_settled[where])))
        judged.add(ended.filter(pa.array(~is_left_out)))
    num_repeats, num_settled = int(outlook.is_repeat.sum()), int(outlook.is_settled.sum())
    verdict = replace(judge(judged, earlier, config), num_repeats=num_repeats, num_settled=num_settled)
    pictures = {} if images is None else images.read_thumbnails(tonight.list_rows())
    folder.store.write_bytes(folder.locate(PAGE), render_nightly(tonight, earlier, verdict, pictures).encode())
    if verdict.breaches:
        hold = _describe_hold(folder.run_id, rows, verdict)
        folder.store.write_bytes(folder.locate(HELD), _to_json(hold))
        raise _explain_hold(folder.store, hold)
    return verdict


def publish_run(folder: RunFolder, rows: StagedRows, record: RunRecord) -> int | None:
    """Publish a run and note that it is over; its number, or None if it holds nothing new.

    Raises: RunError if the run was discarded; as `publish`.
    """
    refuse = folder.refuse_if_discarded  # a person may decide while its driver scores, and while it gathers the rows
    refuse()
    facts = {"settings_sha256": record.work.settings_sha256, "device": record.work.device}
    number = publish(folder.store, folder.run_id, rows, record.listing, record.work.origin, confirm=refuse, facts=facts)
    folder.write_end(number)
    return number


def read_earlier_nights(store: Store, night: date, num_nights: int) -> Tally:
    """What gates and page need of the last nights before this one that are in the table.

    Raises: StorageError, CredentialsError.
    """
    earlier = Tally()
    for stored in stream_objects(store, list_commit_objects(store)[::-1], TALLY_COLUMNS):  # a commit is of one night
        if not stored.rows.num_rows or (dated := stored.rows["night"][0].as_py()) >= night:
            continue
        if dated not in earlier.nights and len(earlier.nights) == num_nights:
            break
        earlier.add(stored.rows)
    return earlier


def decide_hold(store: Store, settings: ScoreSettings) -> dict[str, Any]:
    """Carry out a person's decision on a run, and keep the reason beside it; again after a kill is harmless.

    Raises: UsageError naming what is held, if a run to accept is not, or one to discard is not even begun, and for one
        to discard that is published; as `check_rows` and `publish`.
    """
    run_id = settings.accept or settings.discard or ""
    files = list_run_files(store)
    held = [name for name, names in files.items() if HELD in names]
    is_begun = settings.discard is not None and PLAN in files.get(run_id, ()) and not is_published(store, run_id)
    if run_id not in held and not is_begun:
        raise UsageError(f"{store.uri}: run {run_id!r} is not held; held here: {', '.join(held) or 'none'}")
    if settings.discard is not None and not is_begun and is_published(store, run_id):
        store.delete(RunFolder(store, run_id).locate(DISCARDED))  # as below, where that was killed
        raise _explain_published(store, run_id)
    folder = RunFolder(store, run_id)
    hold = _read_hold(store, run_id) if run_id in held else {"run_id": run_id, "notice": NOTICE}
    decision: dict[str, Any] = hold | {"reason": settings.reason, "published": None}
    if settings.accept is not None:
        rows = folder.read_parts()
        record = folder.read_record()
        check_rows(folder.list_planned_sources(), rows, record.work.origin, suggest_discard(store, run_id))
        decision["published"] = publish_run(folder, rows, record)
    store.write_bytes(folder.locate(ACCEPTED if settings.accept else DISCARDED), _to_json(decision))
    if settings.discard is not None:
        if is_published(store, run_id):  # by a driver that asked before this was written
            store.delete(folder.locate(DISCARDED))
            raise _explain_published(store, run_id)
        folder.delete_work()
    store.delete(folder.locate(HELD))  # last: until here the decision can be carried out again
    return {"decision": "accepted" if settings.accept else "discarded", **decision}


def _explain_published(store: Store, run_id: str) -> UsageError:
    return UsageError(
        f"{store.uri}: run {run_id} is in the table already, and what is published stays; if it is held, say --accept "
        "in place of --discard, which only ends the hold"
    )


def is_published(store: Store, run_id: str) -> bool:
    """Whether the table has this run."""
    return any(stored.run_id == run_id for stored in stream_objects(store, list_commit_objects(store), []))


def _describe_hold(run_id: str, rows: StagedRows, verdict: Verdict) -> dict[str, Any]:
    """What `HELD.json` says."""
    breaches = [
        {"gate": item.gate, "value": item.value, "limit": item.limit, "detail": item.detail}
        for item in verdict.breaches
    ]
    night = rows.keys["night"][0].as_py().isoformat()
    return {"run_id": run_id, "night": night, "scans": rows.num_rows, "breaches": breaches, "notice": NOTICE}


def _explain_hold(store: Store, hold: Mapping[str, Any]) -> HeldError:
    run_id = hold["run_id"]
    breaches = "; ".join(f"{item['gate']} {item['value']:.3f} (limit {item['limit']:.3f})" for item in hold["breaches"])
    return HeldError(
        f"run {run_id} of {hold['night']} is held by a quality gate: {breaches}. Nothing is published until that is "
        f"decided: look at {store.uri}/{RUNS}{run_id}/{PAGE}, then say python -m jobs.score "
        f"--results {store.uri} --accept {run_id} --reason WHY, or --discard in place of --accept",
        {"held": run_id, "breaches": hold["breaches"]},
    )


def _read_hold(store: Store, run_id: str) -> dict[str, Any]:
    """Raises: RunError if the file does not say what `_describe_hold` says."""
    key = f"{RUNS}{run_id}/{HELD}"
    try:
        hold: dict[str, Any] = json.loads(store.read_bytes(key))
        _explain_hold(store, hold)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{store.uri}/{key}: damaged ({error!r}); delete it, and the next night judges its run anew"
        ) from error
    return hold


def _to_json(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()
