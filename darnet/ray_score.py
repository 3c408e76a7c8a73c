"""An archive, a bundle and a results table in; the table's next object out, and a summary of the run.

The driver plans, collects, verifies and publishes; decoding and the networks run wherever the cluster has room.
"""

import functools
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any

from ray.data import ActorPoolStrategy, Dataset

from darnet.archive import EVERYTHING, Selection
from darnet.cam_images import IMAGE_COLUMNS, CamImages
from darnet.code_version import name_scoring_code
from darnet.config import GateConfig, ScoreConfig, digest_json
from darnet.errors import RunError
from darnet.manifest import BundleManifest, RunFacts, read_manifest
from darnet.pseudonym import OPEN_KEYS, KeyNames
from darnet.publishing.commit import Outlook, check_rows, read_outlook
from darnet.publishing.hold import PAGE, is_published, publish_run, refuse_if_held, review_run
from darnet.publishing.objects import suggest_discard
from darnet.publishing.origin import Origin
from darnet.publishing.planning import plan_night, preview_night, warn_of_others
from darnet.publishing.runs import RunFolder, RunRecord, Work, list_open_runs, name_part, sort_unfinished
from darnet.publishing.staged import StagedRows
from darnet.ray_actor import ScoringActor
from darnet.ray_cluster import DecodePlan, agree_on_secret, connect, decode_planned, iterate_blocks
from darnet.ray_metrics import ScanCounters
from darnet.ray_token import list_nodes
from darnet.reading.road import Road
from darnet.scan import Source
from darnet.storage import Store
from darnet.terminal import show_progress
from darnet.training_plan import place_networks, plan_actors, read_room


@dataclass(frozen=True)
class NightRequest:
    """What a night is asked for: places, settings of scoring, and what of the archive, under which names.

    `night` is today if none is given; `moved_from` as `Origin.here` takes it.
    """

    archive: Store
    model: Store
    results: Store
    config: ScoreConfig
    night: date | None = None
    selection: Selection = EVERYTHING
    images: CamImages | None = None
    names: KeyNames = OPEN_KEYS
    moved_from: str = ""


def score_archive(request: NightRequest) -> dict[str, Any]:
    """Score what is new or changed in the archive and publish it as one object; a summary for people and schedulers.

    Runs of the same archive, model and settings that were begun and not ended are finished first, each under its own
    plan and night; what is new beside them is a run of its own. The summary is of the last run, `finished_first` of
    those before it.
    Raises: RunError of every kind, HeldError if a quality gate holds one of these runs or an earlier one; nothing of
        that run is published then.
    """
    archive, results, selection = request.archive, request.results, request.selection
    refuse_if_held(results)
    if request.images is not None:
        request.images.check(archive, results, selection.list_prefixes())
    manifest = read_manifest(request.model, request.config)
    work, choose = describe_work(request, manifest), functools.partial(choose_device, request.config)
    if list_open_runs(results):
        work = replace(work, device=choose())
    finish = functools.partial(finish_run, request, manifest)
    unfinished, others = sort_unfinished(results, work)
    warn_of_others(results, others)
    runs = [finish(folder) for folder in unfinished]
    plan = plan_night(archive, results, work, request.night or _now().date(), selection, choose)
    if plan.folder is not None:
        runs.append(finish(plan.folder))
    summary = {
        "model": manifest.model_name,
        **plan.survey.describe(),
        "left_behind_runs": others,
        "published": None,
    }
    if not runs:
        message = "nothing new in the archive: nothing to score, nothing published"
        if plan.survey.waiting:
            message += f"; sources that still arrive, left to the next night: {plan.survey.waiting}"
        return summary | {"message": message}
    return summary | runs[-1] | {"finished_first": runs[:-1]}


def preview_archive(request: NightRequest) -> dict[str, Any]:
    """What `score_archive` would do, on stderr and as a summary; nothing is scored, and nothing is written anywhere."""
    refuse_if_held(request.results)
    work = describe_work(request, read_manifest(request.model, request.config))
    work = replace(work, device=_name_device(request.config))  # a preview asks no cluster
    return preview_night(request.archive, request.results, work, request.selection, _now)


def describe_work(request: NightRequest, manifest: BundleManifest) -> Work:
    """What runs must agree in so that one may finish the other. Limits decide final rows: they are among it.

    Gates are not: they decide whether rows are published, and a night may be finished under others than it began with.
    """
    # These change no row. Backend and device do, in its last digits: one run is finished under one backend, on one kind
    # of device. The latter may depend on the cluster: `choose_device`.
    changes_no_row = {"num_actors", "part_scans", "cache", *GateConfig.model_fields}
    settings = request.config.model_dump(mode="json", exclude=changes_no_row)
    origin = Origin.here(request.archive.uri, request.names, request.moved_from)
    return Work(origin, manifest.model_sha256, manifest.preprocessing_version, digest_json(settings))


def choose_device(config: ScoreConfig) -> str:
    """What the networks of a run that begins now run on, "cpu" or "gpu"; the cluster is asked where it matters.

    Raises: UsageError as `connect` and `place_networks`.
    """
    if _name_device(config) == "cpu":
        return "cpu"
    connect()
    return place_networks(read_room(list_nodes()), config.device)


def _name_device(config: ScoreConfig) -> str:
    """What the settings alone say of the device: "" where it depends on the cluster."""
    if config.backend != "torch":
        return "cpu"
    return "" if config.device == "auto" else config.device


def finish_run(request: NightRequest, manifest: BundleManifest, folder: RunFolder) -> dict[str, Any]:
    """Score what a run's plan still lacks and publish the run; its part of the summary.

    Raises: as `score_archive`.
    """
    record = folder.read_record()
    num_planned, missing = _list_missing(folder, record)
    device = record.work.device or choose_device(request.config)
    if missing:
        connect()
        run = RunFacts(folder.run_id, record.night, manifest, name_scoring_code())
        hides_keys = bool(record.work.origin.recall_names().scheme)
        dataset = score_planned(
            request, run, missing, folder.read_sources, has_gpus=device == "gpu", hides_keys=hides_keys
        )
        stage_rows(dataset, folder, len(missing), request.config.part_scans)
    rows = _read_whole_rows(folder, record)
    outlook = read_outlook(folder.store, rows, record.listing)
    gates = _judge(request, folder, rows, outlook)
    number = publish_run(folder, rows, record)
    return {
        "run_id": folder.run_id,
        "night": record.night.isoformat(),
        "planned_sources": num_planned,
        "resumed_sources": num_planned - len(missing),
        "device": device,
        "scans": rows.num_rows,
        "statuses": outlook.statuses,
        "tried_in_vain": int(outlook.is_repeat.sum()),
        "settled_before": int(outlook.is_settled.sum()),
        "gates": gates,
        "report": f"{folder.store.uri}/{folder.locate(PAGE)}",
        "published": number,
        **_describe_pictures(request.images, folder, rows),
    }


def _list_missing(folder: RunFolder, record: RunRecord) -> tuple[int, list[int]]:
    """How many sources are planned, and the places in the plan of those without rows; their keys are not kept."""
    planned, staged = folder.list_planned_sources(), folder.list_staged_sources()
    name = record.work.origin.recall_names().name_source
    return len(planned), [place for place, key in enumerate(planned) if name(key) not in staged]


def _read_whole_rows(folder: RunFolder, record: RunRecord) -> StagedRows:
    """The rows of a run of which every planned source has its own. Raises: RunError as `check_rows`."""
    rows = folder.read_parts()
    folder.refuse_if_discarded()  # which has taken parts away
    remedy = suggest_discard(folder.store, folder.run_id)
    check_rows(folder.list_planned_sources(), rows, record.work.origin, remedy)
    return rows


def _judge(request: NightRequest, folder: RunFolder, rows: StagedRows, outlook: Outlook) -> str:
    """What the gates say, for the summary. Raises: HeldError as `review_run`."""
    if is_published(folder.store, folder.run_id):
        return "judged by another driver"
    return review_run(folder, rows, outlook, request.config, request.images).describe()


def _describe_pictures(images: CamImages | None, folder: RunFolder, rows: StagedRows) -> dict[str, Any]:
    """The summary's part on class maps, where they are kept."""
    if images is None:
        return {}
    shown = (row for _, piece in rows.stream(IMAGE_COLUMNS) for row in piece.to_pylist())
    return {"cam_images": images.describe(folder.run_id, shown)}


def _now() -> datetime:
    return datetime.now(UTC)


def stage_rows(dataset: Dataset, folder: RunFolder, num_sources: int, part_scans: int) -> None:
    """Run the road of `score_planned` and stage its rows, `part_scans` or a few more a part, every source whole."""
    finished: dict[str, list[dict[str, Any]]] = {}
    num_rows = 0
    counters = ScanCounters()
    with show_progress("scoring", num_sources) as meter:
        for source_key, rows in collect_sources(dataset):
            if source_key in finished and any(row["status"].startswith("ERR_") for row in rows):
                continue  # a task that was run again met trouble with what it had read before
            finished[source_key] = rows
            num_rows += len(rows)
            counters.note(rows)
            meter.advance(1, Counter(row["status"] for row in rows))
            if num_rows >= part_scans:
                _write_part(folder, finished)
                num_rows = 0
        if finished:
            _write_part(folder, finished)


def score_planned(
    request: NightRequest,
    run: RunFacts,
    places: Sequence[int],
    read: Callable[[Sequence[int]], list[Source]],
    *,
    has_gpus: bool = False,
    hides_keys: bool = False,
) -> Dataset:
    """The lazy road on the cluster: decode on CPUs, networks in actors with a GPU each, or on CPUs.

    Workers `read` sources by their places in the plan.

    Raises: UsageError as `agree_on_secret`, `plan_actors`.
    """
    config = request.config
    num_actors, num_threads, decode_threads = config.num_actors, config.num_threads, config.decode.num_threads
    room = read_room(list_nodes())
    plan = plan_actors(room, num_actors, num_threads, has_gpus=has_gpus, decode_threads=decode_threads)
    print(f"score.device is {config.device}: {plan.title}", file=sys.stderr)
    road = Road(run.model.settings.volume, config.decode, secret_mark=agree_on_secret(), hides_keys=hides_keys)
    max_waiting = max(config.part_scans, 2 * config.batch_size * config.num_actors)
    how = DecodePlan(plan.decode_cpus, config.batch_size, max_waiting)
    return decode_planned(places, read, request.archive, road, how).map_batches(
        ScoringActor,
        fn_constructor_args=(request.model, run, config, "cuda" if plan.has_gpus else "cpu", request.images),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.num_actors),
        num_gpus=1 if plan.has_gpus else None,
        num_cpus=plan.num_cpus,
    )


def collect_sources(dataset: Dataset) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run the road and yield each source when all its scans have come, each once.

    A task whose worker died is run again, and Ray takes of it what it has not had: if a source ended otherwise the
    second time, rows come twice or not at all. Of such a source the newest telling counts, and if that is not whole it
    is left out here, missed by `check_rows`, and scored when the job is started again; one that is yielded twice is
    read as `StagedRows` says.
    Raises: RunError, of a worker or as `iterate_blocks`.
    """
    waiting: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {}
    for batch in iterate_blocks(dataset):
        for source_key, num_scans, row in map(pickle.loads, batch["row"]):
            if isinstance(row, RunError):
                raise row
            num_told, rows = waiting.pop(source_key, (num_scans, {}))
            rows = (rows if num_told == num_scans else {}) | {row["scan_id"]: row}
            if len(rows) == num_scans:
                yield source_key, list(rows.values())
            else:
                waiting[source_key] = num_scans, rows


def _write_part(folder: RunFolder, finished: dict[str, list[dict[str, Any]]]) -> None:
    folder.write_part(name_part(finished), [row for rows in finished.values() for row in rows])
    finished.clear()
