"""Patients' data and secrets are looked for, as marked strings, in everything that a night leaves and says."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydicom.dataset import FileDataset

from darnet.storage import open_store
from tests.bundle_fixtures import write_random_bundle
from tests.ct_fixtures import make_chest, write_chest
from tests.fault_proxy import Fault, Request, run_fault_proxy
from tests.places import ROOT
from tests.poison_fixtures import write_crash

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

TEXT, FILE, FOLDER = "ZQ7CANARYTEXT", "Zq7CanaryFile", "Zq7CanaryFolder"
SECRETS = {
    "DARNET_PSEUDONYM_KEY": "Zq7CanarySecretOfThirtyTwoBytesOrMore",
    "AWS_SECRET_ACCESS_KEY": "Zq7CanaryPasswordOfTheStore",
}
PICTURE_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"pHYs", b"sRGB", b"gAMA"}  # none of which holds text
# Every text that a scanner, a registry or a reader may have filled in.
TAGS = """PatientName PatientID OtherPatientNames PatientBirthName PatientMotherBirthName PatientAddress PatientComments
    PatientTelephoneNumbers MilitaryRank Occupation EthnicGroup AdditionalPatientHistory
    AccessionNumber StudyID StudyDescription SeriesDescription ProtocolName ImageComments InstitutionName
    InstitutionAddress InstitutionalDepartmentName ReferringPhysicianName PerformingPhysicianName OperatorsName
    NameOfPhysiciansReadingStudy RequestingPhysician RequestedProcedureDescription RequestedProcedureComments
    RequestedProcedureID AdmittingDiagnosesDescription StationName DeviceSerialNumber ManufacturerModelName
    Manufacturer SoftwareVersions BodyPartExamined ContrastBolusAgent ConvolutionKernel DerivationDescription
    PerformedProcedureStepDescription PerformedProcedureStepID ScheduledProcedureStepDescription CurrentPatientLocation
    MedicalAlerts Allergies""".split()


def mark(_: int, dataset: FileDataset) -> None:
    """The marked text in every tag, in a private block, and as a long comment."""
    for name in TAGS:
        setattr(dataset, name, TEXT)
    block = dataset.private_block(0x0041, TEXT, create=True)
    block.add_new(1, "LO", TEXT)
    block.add_new(2, "OB", TEXT.encode())
    dataset.ImageComments = TEXT * 100


def spoil(name: str, text: str) -> Any:
    """Marks a slice and puts words where a number belongs, as damaged headers do: parsers like to repeat those."""

    def edit(index: int, dataset: FileDataset) -> None:
        mark(index, dataset)
        if index == 5:
            dataset.add_new(name, "LO", text)

    return edit


def write_archive(folder: Path) -> None:
    """Sound, refused and deadly scans, all marked."""
    write_chest(folder / f"{FOLDER} sound", make_chest(), edit=mark)
    for path in (folder / f"{FOLDER} sound").iterdir():
        path.rename(path.with_name(f"{FILE} {path.name}"))
    for number, name in enumerate(("PixelSpacing", "RescaleSlope", "ImagePositionPatient", "Rows", "Columns")):
        write_chest(folder / f"{FOLDER} spoiled {number}", edit=spoil(name, TEXT))
    gap = write_chest(folder / f"{FOLDER} gap", edit=mark)
    gap.pop(7).unlink()
    cut = write_chest(folder / f"{FOLDER} cut", edit=mark)[5]
    cut.write_bytes(cut.read_bytes()[:-100])
    for path in [*gap, cut]:
        path.rename(path.with_name(f"{FILE} {path.name}"))
    write_crash(folder / f"{FOLDER} crash")
    (folder / f"{FILE}.nii.gz").write_bytes(TEXT.encode() * 10)
    (folder / f"{FOLDER} zip").mkdir()
    (folder / f"{FOLDER} zip" / f"{FILE}.zip").write_bytes(b"PK\3\4" + TEXT.encode() * 10)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie in its folder, and their addresses hold 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="zq", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def list_chunks(png: bytes) -> set[bytes]:
    """Kinds of a PNG's chunks. Source: its specification, section 5.3."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    kinds, place = set(), 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kinds.add(png[place + 4 : place + 8])
        place += 12 + length
    return kinds


def find_texts(texts: tuple[str, ...], folder: Path, but: str = "") -> list[str]:
    """Files of a folder, by their bytes or, of Parquet, their values, that hold one of these, whatever its case.

    A PNG must have no chunk that text could be packed in. `but` names a folder of which nothing is looked at.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_socket() or but in path.parts:
            continue
        data = path.read_bytes().lower()
        if path.suffix == ".png":
            assert list_chunks(path.read_bytes()) <= PICTURE_CHUNKS, "text may be packed in it"
        if path.suffix == ".parquet":
            data += str(pq.read_table(path).to_pylist()).lower().encode()
        found += [f"{path.name}: {text}" for text in texts if text.lower().encode() in data]
    return found


def score(folder: Path, ray_folder: Path, *flags: str, archive: str = "") -> tuple[dict[str, Any], str]:
    """The summary of a night on `archive`, by default `folder`/archive, and all that was said."""
    places = [f"--{name}={folder / name}" for name in ("model", "results", "cam-images")]
    places.append(f"--archive={archive or folder / 'archive'}")
    environment = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", *SECRETS}}
    environment |= {**SECRETS, "AWS_ACCESS_KEY_ID": "key", "RAY_TMPDIR": str(ray_folder)}
    job = subprocess.run(
        [sys.executable, "-m", "jobs.score", *places, "--cam-choice.predictions=CP,NCP,Normal", *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    return json.loads(job.stdout.splitlines()[-1]), job.stdout + job.stderr


@pytest.mark.parametrize("scan_id", ["key", pytest.param("hmac", marks=pytest.mark.slow)])
def test_marked_strings_are_nowhere(scan_id: str, short_folder: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "archive")
    write_random_bundle(tmp_path / "model")
    summary, said = score(tmp_path, short_folder, "--scan-id", scan_id)
    assert summary["exit_code"] == 0, said[-2000:]
    results, images = tmp_path / "results", tmp_path / "cam-images"
    rows = pq.read_table(results / "predictions" / "c00000001.parquet").to_pylist()
    statuses = Counter(row["status"] for row in rows)
    assert (statuses["OK"], statuses["ERR_DECODER_CRASH"], len(rows)) == (1, 1, 11)
    assert list(images.rglob("*.png"))

    forbidden = (TEXT, *SECRETS.values())
    assert not [text for text in (*forbidden, FILE, FOLDER) if text.lower() in said.lower()]
    assert find_texts((*forbidden, FILE, FOLDER), short_folder) == []
    assert find_texts((*forbidden, FILE, FOLDER), images) == []
    assert find_texts(forbidden, results) == []
    assert find_texts(("ScoringActor",), short_folder), "the search does not see what is there"
    if scan_id == "hmac":  # the scans' keys are where they are fetched by, and nowhere else
        assert {found.partition(":")[0] for found in find_texts((FILE, FOLDER), results)} == {"plan.parquet"}
        write_crash(tmp_path / "archive" / f"{FOLDER} crash again")  # a scan that failed before is not judged
        gates = ["--score.gate-min-scans=1", "--score.gate-min-nights=1", "--night=2100-01-01"]
        again, told = score(tmp_path, short_folder, "--scan-id", scan_id, *gates)
        assert again["exit_code"] == 3, told[-2000:]
        planned = pq.read_table(results / "_runs" / again["held"] / "plan.parquet")["reason"].to_pylist()
        assert sorted(planned) == ["new", "retry"], "what is settled is found by its digest"
        accepted, more = score(tmp_path, short_folder, "--accept", again["held"], "--reason", "looked")
        assert (accepted["exit_code"], accepted["published"]) == (0, 2), more[-2000:]
        assert not [text for text in (*forbidden, FILE, FOLDER) if text.lower() in (told + more).lower()]
        refused, told = score(tmp_path, short_folder)
        assert refused["exit_code"] == 2
        assert "--scan-id hmac" in told
        return
    (page,) = results.glob("_runs/*/nightly.html")
    assert FOLDER.lower() in page.read_text().lower()
    assert f"{FILE} ".lower() not in page.read_text().lower(), "the page names a slice's file"
    # Results hold the scans' own keys in the archive, of which a volume file's name is one, and nothing else of these.
    kept = {name: {str(row[name]) for row in rows} for name in rows[0]}
    assert {name for name, values in kept.items() if FILE in str(values)} <= {"source", "scan_id"}
    assert {name for name, values in kept.items() if FOLDER in str(values)} == {"source", "scan_id"}


@pytest.mark.slow
@pytest.mark.s3
def test_marked_keys_of_a_bucket_are_nowhere_whatever_the_store_refuses(
    s3: Callable[[], str], short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store's own error texts name keys. Under --scan-id hmac these are in the plan alone, which fetches by them."""
    refusals = {"AccessDenied": "ERR_DENIED", "InvalidObjectState": "ERR_ARCHIVED", "truncated": "ERR_STORAGE"}
    bucket = s3()
    store = open_store(f"{bucket}/{FOLDER}", create=True)
    for kind in ("sound", *refusals):
        for path in write_chest(tmp_path / kind, make_chest(), edit=mark):
            store.write_bytes(f"{FOLDER} {kind}/{FILE} {path.name}", path.read_bytes())

    def refuse(request: Request) -> Fault | None:
        kind = next((kind for kind in refusals if f" {kind}/" in request.path and request.method == "GET"), None)
        return None if kind is None else Fault(kind)

    write_random_bundle(tmp_path / "model")
    with run_fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.policy = refuse
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        summary, said = score(tmp_path, short_folder, "--scan-id=hmac", archive=store.uri)
    assert summary["exit_code"] == 0, said[-2000:]
    rows = pq.read_table(tmp_path / "results" / "predictions" / "c00000001.parquet").to_pylist()
    assert Counter(row["status"] for row in rows) == Counter(["OK", *refusals.values()])
    assert all(row["status_detail"] for row in rows if row["status"] != "OK")
    names = (TEXT, FILE, f"{FOLDER} ", *SECRETS.values())  # the archive's own address is no patient's
    assert not [text for text in names if text.lower() in said.lower()]
    assert find_texts(names, short_folder) == []
    assert {found.partition(":")[0] for found in find_texts(names, tmp_path / "results")} == {"plan.parquet"}


@pytest.mark.slow
def test_what_ray_lists_of_a_submitted_night_is_free_of_them(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Head and job have the secrets in their environment, as every node should; Ray lists jobs, workers and tasks."""
    for name, value in {**SECRETS, "AWS_ACCESS_KEY_ID": "key"}.items():
        monkeypatch.setenv(name, value)
    ray, environment = request.getfixturevalue("head_node")
    write_chest(tmp_path / "archive" / FOLDER, make_chest(), edit=mark)
    write_random_bundle(tmp_path / "model")
    places = [f"--{name}={tmp_path / name}" for name in ("archive", "model", "results")]
    night = ["job", "submit", "--working-dir", str(ROOT), "--submission-id", "marked-night", "--", "python", "-m"]

    def ask(*command: str) -> str:
        done = subprocess.run(
            [ray, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    told = {"night": ask(*night, "jobs.score", "--scan-id=hmac", *places)}
    (row,) = pq.read_table(tmp_path / "results" / "predictions" / "c00000001.parquet").to_pylist()
    assert (row["status"], row["patient_key"] is not None) == ("OK", True), "the job had the key"
    address = environment["RAY_API_SERVER_ADDRESS"]
    told["jobs"], told["logs"] = ask("job", "list"), ask("job", "logs", "marked-night")
    for kind in ("jobs", "workers", "tasks", "actors", "nodes", "runtime-envs"):
        listing = ["list", kind, "--format=json", "--detail", "--limit=1000", f"--address={address}"]
        told[f"list {kind}"] = ask(*listing)
    for path in ("/api/jobs/", "/nodes?view=summary"):
        with urllib.request.urlopen(address + path, timeout=30) as answer:
            told[path] = answer.read().decode()
    assert "marked-night" in told["/api/jobs/"]
    assert "ScoringActor" in told["list actors"]
    forbidden = (TEXT, FOLDER, *SECRETS.values())
    assert [(place, text) for place, said in told.items() for text in forbidden if text.lower() in said.lower()] == []
    session = Path(environment["RAY_TMPDIR"])
    assert find_texts(forbidden, session, but="runtime_resources") == []  # the working directory, as it was submitted
