"""Preparing a cohort on a small Ray cluster: what the table knows to be faulty is mended or left out, and told."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from darnet.auditing.audit import audit_cohort, summarise_audit
from darnet.cohort import read_cohort
from darnet.errors import RunError, UsageError
from darnet.ray_prepare import prepare_volumes
from darnet.settings import PrepareSettings
from darnet.storage import open_store
from darnet.volumes_folder import read_facts, read_index
from tests.ct_fixtures import make_chest

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")]

LABELS = ("CP", "NCP", "Normal")
FAULTS = {"p03": ("reversed", "0"), "p04": ("shuffled", "0"), "p05": ("", "1")}


def write_archive(folder: Path) -> pd.DataFrame:
    """15 patients with a scan each in the layout of CC-CCII; all are one and the same chest, that of p03 reversed.

    p14 is in neither of the paper's cohorts, p13 is not in the archive, p00 and p12 are test patients.
    """
    display = ((make_chest().astype(np.float32) + 1350) * 255 / 1500).clip(0, 255).astype(np.uint8)
    rows = []
    for number in range(15):
        patient, diagnosis = f"p{number:02d}", LABELS[number % 3]
        order_defect, discard = FAULTS.get(patient, ("", "0"))
        cohort = {0: "test", 12: "test", 14: ""}.get(number, "train")
        rows.append([f"{number}", patient, diagnosis, cohort, order_defect, discard])
        place = folder / diagnosis / patient / f"{number}"
        if number == 13:
            continue
        place.mkdir(parents=True)
        voxels = display[::-1] if order_defect == "reversed" else display
        for index, image in enumerate(voxels):
            assert cv2.imwrite(str(place / f"{index + 1}.png"), image)
    columns = ["scan_id", "patient_id", "diagnosis", "paper_cohort", "order_defect", "discard"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.slow
def test_faulty_scans_are_turned_or_left_out_with_their_reason_and_audited(ray_cluster: None, tmp_path: Path) -> None:  # noqa: ARG001
    table = write_archive(tmp_path / "archive").to_csv(index=False)
    settings = PrepareSettings.model_validate(
        {
            "cohort": "table.csv",
            "archive": str(tmp_path / "archive"),
            "volumes": str(tmp_path / "volumes"),
            "volume": {"shape": (16, 32, 32)},
            "cohorts": {"division": "paper", "drop_discarded": True, "drop_shuffled": True},
            "train": {"num_folds": 2},
        }
    )
    cohort = read_cohort("table.csv", table.encode())
    volumes = open_store(settings.volumes, create=True)
    done = prepare_volumes(open_store(settings.archive), cohort, volumes, settings)

    excluded = pd.read_csv(tmp_path / "volumes" / "excluded.csv", dtype=str).set_index("patient_id")["status"]
    reasons = {"p04": "SHUFFLED", "p05": "DISCARDED", "p13": "NOT_IN_ARCHIVE", "p14": "NOT_IN_COHORT"}
    assert excluded.to_dict() == reasons
    assert done["excluded"] == dict.fromkeys(reasons.values(), 1)
    assert read_index(tmp_path / "volumes").excluded == dict.fromkeys(reasons.values(), 1)
    assert (done["scans"], done["turned"], done["patients_in_both_cohorts"]) == (11, 1, 0)
    index = read_index(tmp_path / "volumes")
    assert index.frame.set_index("patient_id")["cohort"].to_dict() == {
        f"p{number:02d}": "test" if number in (0, 12) else "train" for number in range(13) if number not in (4, 5)
    }
    assert index.frame["sha256"].nunique() == 1  # the reversed one too
    assert index.division is not None
    assert index.division.cohorts == settings.cohorts
    assert (index.division.cohorts_by, index.division.folds_by, index.division.num_folds) == (
        "paper_cohort",
        "patient",
        2,
    )
    facts = read_facts(volumes).set_index("scan_id")
    assert set(facts["file_format"]) == {"png"}
    assert facts.loc["3", ["num_slices", "num_rows", "num_columns", "source"]].tolist() == [24, 64, 64, "CP/p03/3"]

    audit = summarise_audit(audit_cohort(cohort, settings.model_copy(update={"audit": True})))
    (group,) = audit["duplicates"]
    assert (group["by"], len(group["scan_ids"])) == (["files", "pixels"], 14)
    assert audit["looked_at"] == ["table", "archive", "volumes"]

    again = prepare_volumes(open_store(settings.archive), cohort, volumes, settings)
    assert (done["sources_reused"], again["sources_reused"]) == (0, 11)
    assert {**again, "sources_reused": 0} == done
    reseeded = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 1})})
    assert prepare_volumes(open_store(settings.archive), cohort, volumes, reseeded) == again
    (tmp_path / "volumes" / index.frame.set_index("patient_id").loc["p02", "array"]).unlink()
    (tmp_path / "archive" / "NCP" / "p01" / "1" / "1.png").touch()
    assert prepare_volumes(open_store(settings.archive), cohort, volumes, settings)["sources_reused"] == 9
    assert read_index(tmp_path / "volumes").cohort_sha256 == index.cohort_sha256

    as_stored = settings.cohorts.model_copy(update={"turn_reversed": False})
    unturned = settings.model_copy(update={"cohorts": as_stored})
    done = prepare_volumes(open_store(settings.archive), cohort, volumes, unturned)
    assert (done["sources_reused"], done["turned"]) == (10, 0)
    changed, voxels = read_index(tmp_path / "volumes"), {}
    for patient, array in changed.frame.set_index("patient_id")["array"].items():
        voxels[patient] = np.load(tmp_path / "volumes" / array)
    assert changed.division is not None
    assert not changed.division.cohorts.turn_reversed
    np.testing.assert_array_equal(voxels["p03"], voxels["p02"][::-1])
    with pytest.raises(UsageError, match=r"prepared with other settings \(cohorts\.turn_reversed\)"):
        audit_cohort(cohort, settings.model_copy(update={"audit": True}))
    assert prepare_volumes(open_store(settings.archive), cohort, volumes, settings)["sources_reused"] == 11

    absent = cohort.assign(scan_id="not-" + cohort["scan_id"])
    with pytest.raises(UsageError, match="no scan of the cohort is usable"):
        prepare_volumes(open_store(settings.archive), absent, volumes, settings)
    with pytest.raises(UsageError, match=r"volumes\.json"):  # its neighbour excluded.csv is of this table
        read_index(tmp_path / "volumes")


@pytest.mark.slow
def test_a_preparation_that_an_outage_spoilt_declares_no_volumes_and_tries_only_those_again(
    ray_cluster: None,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    table = write_archive(tmp_path / "archive").query("scan_id != '13'").to_csv(index=False)
    cohort = read_cohort("table.csv", table.encode())
    places = {"cohort": "table.csv", "archive": str(tmp_path / "archive"), "volumes": str(tmp_path / "volumes")}
    config = {"volume": {"shape": (16, 32, 32)}, "cohorts": {"division": "paper"}, "train": {"num_folds": 2}}
    settings = PrepareSettings.model_validate(places | config)
    archive, volumes = open_store(settings.archive), open_store(settings.volumes, create=True)
    unreadable = tmp_path / "archive" / "NCP" / "p01" / "1" / "1.png"
    told = unreadable.stat()
    data = unreadable.read_bytes()
    unreadable.unlink()
    unreadable.symlink_to("/proc/self/mem")  # listed, and read with an error of input and output
    with pytest.raises(RunError, match=r"1 scans may yet be usable \(1 ERR_\w+; .*excluded\.csv names each\)"):
        prepare_volumes(archive, cohort, volumes, settings)
    assert not (tmp_path / "volumes" / "volumes.json").exists()
    unreadable.unlink()
    unreadable.write_bytes(data)
    assert told.st_size == len(data)
    done = prepare_volumes(archive, cohort, volumes, settings)
    assert (done["scans"], done["sources_reused"]) == (13, 12)
