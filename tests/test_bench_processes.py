"""The shares of a night's processes are those of made-up looks, and processes are told apart by what they really do."""

import sys

import pytest

from tests.bench.processes import ACTOR, DRIVER, KINDS, NOTHING, OTHERS, READING, Look, name_kind, share_out, watch


def test_shares_are_of_all_cores_while_the_network_works() -> None:
    """The first look is at a cold network, the last at none; a process that comes or goes meanwhile counts too."""
    looks = [
        Look(0, {1: (DRIVER, 9.0), 2: (ACTOR, 5.0)}),
        Look(10, {1: (DRIVER, 10.0), 2: (ACTOR, 21.0), 3: (READING, 1.0), 4: (OTHERS, 2.0)}),
        Look(30, {1: (DRIVER, 11.0), 2: (ACTOR, 51.0), 3: (READING, 3.0), 4: (OTHERS, 2.5), 5: (OTHERS, 0.5)}),
        Look(32, {1: (DRIVER, 13.0)}),
    ]
    shares = share_out(looks, 2)
    expected = {ACTOR: 30 / 40, READING: 2 / 40, DRIVER: 1 / 40, OTHERS: 1 / 40, NOTHING: 6 / 40}
    assert {kind: shares[kind] for kind in KINDS} == pytest.approx(expected)
    assert shares["seconds"] == 20
    with pytest.raises(ValueError, match="more scans"):
        share_out(looks[:2], 2)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ray::MapWorker(MapBatches(ScoringActor)).submit", ACTOR),
        ("ray::MapBatches(read_sources)", READING),
        ("ray::IDLE", READING),
        ("/x/.venv/bin/python -c import sys; from darnet.reading.child import serve; serve()", READING),
        ("ray::_StatsActor", OTHERS),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=a", OTHERS),
    ],
)
def test_processes_are_known_by_their_titles(command: str, kind: str) -> None:
    assert name_kind(command) == kind


def test_a_watched_process_is_the_driver_and_its_children_are_not() -> None:
    spin = "import time; e = time.process_time() + 1.2\nwhile time.process_time() < e: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    kinds = {kind: seconds for look in watch([sys.executable, "-c", code]) for kind, seconds in look.taken_s.values()}
    assert set(kinds) == {DRIVER, OTHERS}
    assert kinds[DRIVER] < kinds[OTHERS]
