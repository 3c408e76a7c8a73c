"""A place is tried for true: good ones pass and are left as they were, each kind of bad one is caught by its check."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from botocore.config import Config
from botocore.stub import ANY, Stubber

from darnet.checkup.findings import Finding, UnfitError, Verdict, examine, report_findings
from darnet.checkup.places import Trial, check_archive, check_reach, check_removal, check_results
from darnet.errors import CredentialsError, ExitCode
from darnet.scan import StoredObject
from darnet.storage import Store, open_store
from darnet.storage_local import LocalStore
from darnet.storage_s3 import UPLOADS, S3Store
from tests.conftest import find_free_port, wait_until_it_answers

KEYS = {"AWS_ACCESS_KEY_ID": "operator", "AWS_SECRET_ACCESS_KEY": "secret-of-a-test"}


class BlindStore(LocalStore):
    """Accepts the condition of a put and ignores it."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.write_bytes(key, data)
        return True


class FlippingStore(LocalStore):
    """One bit of what it gives back is another."""

    def read_bytes(self, key: str) -> bytes:
        data = bytearray(super().read_bytes(key))
        data[len(data) // 2] ^= 1
        return bytes(data)


class ForgetfulStore(LocalStore):
    """What was written is listed later."""

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        yield from (item for item in super().list_objects(prefix) if time.time() - item.modified_s > 60)


class CarelessStore(LocalStore):
    """Gives whatever version is there."""

    def fetch(self, item: StoredObject, path: Path) -> None:
        path.write_bytes(self.read_bytes(item.key))


class ReadOnlyTable(LocalStore):
    """Takes work and no night, as a bucket whose policy names the wrong prefix."""

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        if key.startswith("predictions/"):
            raise CredentialsError(f"{self.uri}/{key}: may not be put; give this job the right to")
        return super().put_if_absent(key, data)


def _try_results(store: Store) -> dict[str, Finding]:
    trial = Trial(store)
    findings = [finding for group in (*check_results(trial), check_removal(trial)) for finding in examine(group)]
    return {finding.check.removeprefix("results: "): finding for finding in findings}


def _try_archive(store: Store) -> dict[str, Finding]:
    return {finding.check.removeprefix("archive: "): finding for finding in examine(check_archive(store))}


def test_a_good_place_passes_and_is_left_as_it_was(store: Store) -> None:
    store.write_bytes("predictions/c00000001.parquet", b"kept")
    (before,) = store.list_objects()
    found = _try_results(store)
    found.pop("a wrong checksum is refused", None)  # the S3 server of these tests looks at none
    assert {finding.verdict for finding in found.values()} == {Verdict.FINE}
    assert list(store.list_objects()) == [before]


@pytest.mark.s3
def test_a_server_that_takes_a_wrong_checksum_is_told(s3: Callable[[], str]) -> None:
    store = open_store(s3())
    found = _try_results(store)
    taken = found["a wrong checksum is refused"]
    assert (taken.verdict, taken.told) == (Verdict.MIND, "the store keeps uploads whose checksum is wrong")
    assert "jobs.results check" in taken.remedy
    assert found["removing"].verdict is Verdict.FINE
    assert list(store.list_objects()) == []


@pytest.mark.parametrize(
    ("code", "verdict", "told"),
    [
        ("BadDigest", Verdict.FINE, "in a header, as BadDigest"),
        ("XAmzContentChecksumMismatch", Verdict.FINE, "in a header, as XAmzContentChecksumMismatch"),
        ("InvalidDigest", Verdict.FINE, "in a header, as InvalidDigest"),
        ("InvalidRequest", Verdict.MIND, "the store takes no CRC32 in a header: s3://bucket/_runs/doctor-1/damaged: "),
        ("NotImplemented", Verdict.MIND, "the store takes no CRC32 in a header: s3://bucket"),
    ],
)
def test_a_refusal_is_one_for_the_checksum_alone(code: str, verdict: Verdict, told: str) -> None:
    """And what is refused carried the checksum of other bytes."""
    client = _connect("http://127.0.0.1:9")
    sent = {"Bucket": "bucket", "Key": "_runs/doctor-1/damaged", "Body": ANY, "ChecksumCRC32": "AAAAAA=="}
    with Stubber(client) as stub:
        for _ in range(UPLOADS):
            stub.add_client_error("put_object", code, http_status_code=400, expected_params=sent)
        trial = Trial(S3Store("bucket", "", lambda: client), "_runs/doctor-1/")
        (finding,) = examine([("checksum", trial.put_damaged)])
    assert (finding.verdict, finding.told.startswith(told)) == (verdict, True), finding


def test_a_folder_is_sent_no_checksum(tmp_path: Path) -> None:
    assert "a wrong checksum is refused" not in _try_results(LocalStore(tmp_path))


def test_the_right_to_publish_is_tried_on_what_is_published_alone(tmp_path: Path) -> None:
    empty = _try_results(LocalStore(tmp_path / "empty"))["the right to publish"]
    assert (empty.verdict, empty.told.partition(":")[0]) == (Verdict.UNTRIED, "not tried")
    assert not (tmp_path / "empty" / "predictions").exists()

    store = ReadOnlyTable(tmp_path / "results")
    store.write_bytes("predictions/c00000001.parquet", b"kept")
    found = _try_results(store)
    refused = found.pop("the right to publish")
    assert (refused.verdict, refused.exit_code) == (Verdict.WRONG, ExitCode.CREDENTIALS)
    assert (refused.told, refused.remedy) == (
        f"{store.uri}/predictions/c00000001.parquet: may not be put",
        "give this job the right to",
    )
    assert {finding.verdict for finding in found.values()} == {Verdict.FINE}


@pytest.mark.s3
def test_a_store_that_would_replace_a_night_is_not_asked_to(rclone_bucket: S3Store) -> None:
    rclone_bucket.write_bytes("predictions/c00000001.parquet", b"kept")
    assert _try_results(rclone_bucket)["the right to publish"].verdict is Verdict.UNTRIED


def test_another_machine_reads_what_the_driver_wrote_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.nii").write_bytes(b"x")
    archive, trial = LocalStore(tmp_path / "archive"), Trial(LocalStore(tmp_path / "results"))
    assert [name for group in check_reach(None, trial) for name, _ in group] == []  # nothing to read yet
    trial.write_and_read()
    before = sorted(tmp_path.rglob("*"))

    def look() -> dict[str, Finding]:
        there = pickle.loads(pickle.dumps((archive, trial)))
        return {item.check.partition(" ")[2]: item for group in check_reach(*there) for item in examine(group)}

    assert {name: item.verdict for name, item in look().items()} == dict.fromkeys(
        ("listing the archive", "reading the archive", "reading the results", "clock"), Verdict.FINE
    )
    assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "results").rename(tmp_path / "elsewhere")  # where nothing is mounted
    (tmp_path / "archive" / "a.nii").unlink()
    found = look()
    assert [item.verdict for item in found.values()] == [Verdict.WRONG, Verdict.UNTRIED] * 2
    assert "mount that folder on every machine" in found["reading the results"].remedy
    assert not (tmp_path / "results").exists()


def test_no_folder_of_a_check_up_stays_on_a_disk(local: Store, tmp_path: Path) -> None:
    _try_results(local)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["_runs", "results"]


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (BlindStore, "the second of two puts is refused", "ignores it"),
        (FlippingStore, "writing and reading back", "are not the"),
        (ForgetfulStore, "listing what was written", "not listed"),
    ],
)
def test_a_bad_place_is_caught(kind: type[LocalStore], check: str, words: str, tmp_path: Path) -> None:
    found = _try_results(kind(tmp_path))
    assert found[check].verdict is Verdict.WRONG
    assert words in found[check].told
    assert [name for name, finding in found.items() if finding.verdict is Verdict.WRONG] == [check]


@pytest.fixture
def rclone_bucket(tmp_path: Path) -> Iterator[S3Store]:
    """A bucket of `rclone serve s3`, a real server that ignores the condition of a put."""
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    port = find_free_port()
    log = tmp_path / "rclone.log"
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", ",".join(KEYS.values()), "--config", os.devnull, str(tmp_path / "served")]
    with log.open("wb") as sink:
        server = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        wait_until_it_answers(server, port, log)
        yield S3Store("bucket", "results/", lambda: _connect(f"http://127.0.0.1:{port}"))
    finally:
        server.terminate()
        server.wait(timeout=30)


def _connect(endpoint: str) -> Any:
    session = boto3.session.Session(
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    return session.client("s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}))


@pytest.mark.s3
def test_a_real_server_that_ignores_the_condition_is_caught(rclone_bucket: S3Store) -> None:
    found = _try_results(rclone_bucket)
    assert found["writing and reading back"].verdict is Verdict.FINE
    refused = found["the second of two puts is refused"]
    assert (refused.verdict, refused.exit_code) == (Verdict.WRONG, ExitCode.FAILED)
    assert "would lose nights" in refused.remedy


@pytest.mark.parametrize(("apart_s", "verdict"), [(0.0, Verdict.FINE), (120.0, Verdict.MIND), (-3600.0, Verdict.WRONG)])
def test_a_clock_that_is_off_is_told(apart_s: float, verdict: Verdict, local: Store) -> None:
    trial = Trial(local, "_runs/doctor-1/", lambda: time.time() + apart_s)
    findings = examine([("write", trial.write_and_read), ("clock", trial.compare_clocks)])
    assert findings[-1].verdict is verdict


def test_a_held_run_makes_the_place_unfit_with_the_code_of_a_held_night(local: Store) -> None:
    local.write_bytes("_runs/run7/HELD.json", b"{}")
    found = _try_results(local)
    held = found["the table there"]
    assert (held.verdict, held.told) == (Verdict.WRONG, "run run7 is held, so that no night is scored")
    assert "--accept run7 or --discard run7" in held.remedy
    assert [name for name, finding in found.items() if finding.verdict is Verdict.WRONG] == ["the table there"]
    with pytest.raises(UnfitError, match="run7 is held") as caught:
        report_findings(list(found.values()))
    assert caught.value.exit_code is ExitCode.HELD


def test_a_hole_in_the_table_is_told_and_stops_no_night(local: Store) -> None:
    for number in (1, 3):
        local.write_bytes(f"predictions/c{number:08d}.parquet", b"")
    found = _try_results(local)["the table there"]
    assert (found.verdict, found.told) == (Verdict.MIND, "2 objects that are not numbered 1 to 2")


def test_a_place_without_uploads_in_parts_is_fit_for_a_night(local: Store) -> None:
    local.write_bytes("_runs/doctor-1", b"a file, below which pyarrow can write nothing")
    (finding,) = examine([("parts", Trial(local, "_runs/doctor-1/").upload_in_parts)])
    assert finding.verdict is Verdict.MIND
    assert "nights do without" in finding.remedy


@pytest.mark.s3
def test_uploads_in_parts_go_where_the_endpoint_of_a_profile_says(
    s3: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the checkpoints of a training do: pyarrow alone would send them to Amazon."""
    store = open_store(f"{s3()}/results")
    (tmp_path / "config").write_text(f"[profile own]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    for name, value in {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "own"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (finding,) = examine([("parts", Trial(store, "_runs/doctor-1/").upload_in_parts)])
    assert (finding.verdict, finding.told) == (Verdict.FINE, "24 MiB")
    assert [item.key for item in store.list_objects()] == ["_runs/doctor-1/parts"]


def test_an_archive_is_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "1.dcm").write_bytes(b"x" * 100)
    found = _try_archive(open_store(str(tmp_path)))
    assert {finding.verdict for finding in found.values()} == {Verdict.FINE}
    assert found["listing"].told == "1 sources of scans among 1 objects, of which the first is no stray"
    assert [path.name for path in tmp_path.rglob("*")] == ["ct", "1.dcm"]


def test_strays_before_the_first_scan_are_no_harm(tmp_path: Path) -> None:
    for number in range(1_001):
        (tmp_path / f"a{number:04d}.log").touch()
    (tmp_path / "b.nii").write_bytes(b"x")
    assert {finding.verdict for finding in _try_archive(open_store(str(tmp_path))).values()} == {Verdict.FINE}


def test_an_archive_without_a_scan_or_a_folder_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no scan")
    assert _try_archive(open_store(str(tmp_path)))["listing"].remedy == "is the address right?"
    missing = _try_archive(open_store(str(tmp_path / "nowhere")))["listing"]
    assert missing.verdict is Verdict.WRONG


def test_an_archive_that_gives_another_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"x" * 100)
    found = _try_archive(CarelessStore(tmp_path))
    assert found["replaced scans"].verdict is Verdict.MIND
