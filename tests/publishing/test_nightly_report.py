"""The night's page tells what the rows hold, whatever they hold, and needs nothing from anywhere."""

import base64
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from darnet import NOTICE
from darnet.config import ScoreConfig
from darnet.errors import STATUS_MEANINGS, Status
from darnet.page import HtmlFigure
from darnet.publishing.gates import judge
from darnet.publishing.nightly_report import NIGHT_COLUMNS, Night, render_nightly
from darnet.publishing.rows import make_table
from darnet.publishing.tally import TALLY_COLUMNS, Tally
from tests.browser_fixtures import draw_screen, list_requests, read_dom
from tests.nights_fixtures import make_night_rows
from tests.results_fixtures import make_row


def render(tonight: list[dict[str, Any]], earlier: list[dict[str, Any]], **pictures: HtmlFigure) -> str:
    night, before = Night(), Tally()
    night.add(make_table(tonight).select(NIGHT_COLUMNS))
    before.add(make_table(earlier).select(TALLY_COLUMNS))
    return render_nightly(night, before, judge(night.tally, before, ScoreConfig()), pictures)


def render_weeks(num_scans: int = 600, shift: float = 1.0, picture: HtmlFigure | None = None) -> str:
    """A night after two weeks; `picture` is that of every scan."""
    earlier = [row for night in range(1, 15) for row in make_night_rows(night, 100)]
    tonight = make_night_rows(15, num_scans, shift=shift)
    return render(tonight, earlier, **({} if picture is None else {row["scan_id"]: picture for row in tonight}))


def find_rows(page: str, name: str) -> list[list[str]]:
    """Cells of the table rows that this name heads."""
    found = re.findall(rf'<th scope="row" class="\w+">{re.escape(name)}</th>(.*?)</tr>', page, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in found]


def test_every_status_is_explained() -> None:
    assert list(STATUS_MEANINGS) == list(Status)
    assert all(STATUS_MEANINGS.values())


def test_counts_are_those_of_the_rows() -> None:
    tonight = [make_row("a"), make_row("b"), make_row("c", "BAD_TILT"), make_row("d", "ERR_TIMEOUT")]
    earlier = [make_row("e"), make_row("f", "SKIP_NO_LUNG")]
    page = render([{**row, "night": make_row("x", night=2)["night"]} for row in tonight], earlier)
    assert find_rows(page, "OK") == [["2", "50.0%", "50.0%", "scored"]]
    assert find_rows(page, "BAD_TILT") == [["1", "25.0%", "0.0%", "gantry tilt: slices are sheared"]]
    assert find_rows(page, "SKIP_NO_LUNG") == [["0", "0.0%", "50.0%", "a head, an abdomen"]]
    assert find_rows(page, "NCP") == [["2", "100.0%", "100.0%", "0.7000", "0.7000"]]
    assert find_rows(page, "c")[0][:2] == ["BAD_TILT", "what happened"]
    assert "4 scans of 0.00 GB, 2 of them scored, beside 2 rows of 1 earlier nights" in page
    assert "not judged: 4 scans, the gates need 500" in page
    assert page.count(NOTICE) >= 2


def test_scans_to_look_at_are_the_outermost() -> None:
    facts = [(0.9, 0.01, 0.9), (0.8, 0.2, 0.4), (0.7, 0.05, 0.2), (0.6, 0.0, None)]
    tonight = [
        make_row(f"s{index}", probability_ncp=ncp, fold_std_ncp=std, cam_in_lung_fraction=inside, cam_peak_slice=7)
        for index, (ncp, std, inside) in enumerate(facts)
    ]
    page = render(tonight, [], s1=HtmlFigure(b"pixels", "a thumbnail"))
    tables = re.findall(r"<caption><span>(.*?)</span>(.*?)</table>", page, re.DOTALL)
    order = {caption[:7]: re.findall(r'row" class="\w+">(s\d)<', body) for caption, body in tables}
    assert order["Highest"] == ["s0", "s1", "s2", "s3"]
    assert order["The fol"] == ["s1", "s2", "s0"]
    assert order["Predict"] == ["s2", "s1"]
    assert find_rows(page, "s1")[0] == ["NCP", "0.8000", "0.2000", "40.0%", "7"]
    assert page.count("a thumbnail") == 2  # once to see, once to hear
    assert f'src="data:image/jpeg;base64,{base64.b64encode(b"pixels").decode()}"' in page


def test_the_slowest_stage_and_its_scan_come_first() -> None:
    tonight = [
        make_row("a", fetch_s=1.0, decode_s=3.0, model_s=0.5),
        make_row("b", "BAD_TILT", fetch_s=2.0, decode_s=8.0),
    ]
    page = render(tonight, [])
    assert find_rows(page, "decode") == [["2", "11.0", "5.50", "7.75", "8.00", "b"]]
    assert find_rows(page, "model") == [["1", "0.5", "0.50", "0.50", "0.50", "a"]]
    assert page.index(">decode<") < page.index(">fetch<") < page.index(">model<")


def test_a_breach_is_told_at_the_top() -> None:
    page = render_weeks()
    assert "Quality gates: held: PSI of probability_" in page[: page.index("<main>")]
    assert find_rows(page, "PSI of probability_ncp")[0][2] == "above the limit"
    assert find_rows(page, "PSI of manufacturer")[0][2] == "within"


@pytest.mark.parametrize("status", ["ERR_STORAGE", "BAD_ZIP", "SKIP_FEW_SLICES"])
def test_a_night_without_any_score_has_its_page(status: str) -> None:
    page = render([make_row("a", status)], [])
    assert "No scan was scored tonight." in page
    assert find_rows(page, "share of BAD")[0][1:] == ["–", "not measured", "no earlier night"]
    assert "nan" not in re.sub("<style>.*</style>|base64[^ ]*", "", page, flags=re.DOTALL)
    assert find_rows(page, status)


def test_the_first_night_has_nothing_to_stand_beside() -> None:
    assert find_rows(render([make_row("a")], []), "NCP") == [["1", "100.0%", "–", "0.7000", "–"]]


def test_a_scans_name_is_text_and_not_markup() -> None:
    page = render([make_row("<script>alert(1)</script>", fold_std_ncp=0.1)], [])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_is_the_same_in_whatever_pieces_its_rows_come() -> None:
    """Also where scans are equal in what they are chosen by: the first by name are."""
    rows = make_table(
        [
            *make_night_rows(1, 90),
            *(make_row(f"equal{number:02d}", fold_std_ncp=0.5, probability_ncp=0.99) for number in range(29, -1, -1)),
            *(make_row(f"bad{number:02d}", "BAD_TILT", fetch_s=9.0) for number in range(30, 0, -1)),
        ]
    ).select(NIGHT_COLUMNS)
    pages = []
    for size in (len(rows), 40, 13):
        night = Night()
        for start in range(0, len(rows), size):
            night.add(rows.slice(start, size))
        pages.append(render_nightly(night, Tally(), judge(night.tally, Tally(), ScoreConfig())))
    assert pages[0] == pages[1] == pages[2]
    assert [f"equal{number:02d}" in pages[0] for number in range(12)] == [True] * 10 + [False] * 2
    assert [f"bad{number:02d}" in pages[0] for number in (1, 10, 11, 29)] == [True, True, False, False]
    assert find_rows(pages[0], "fetch")[0][-1] == "bad30"


@pytest.mark.browser
def test_a_browser_shows_the_night_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    import matplotlib.image

    page = tmp_path / "nightly.html"
    violet = cv2.imencode(".jpg", np.full((100, 200, 3), (200, 0, 120), np.uint8))[1].tobytes()
    page.write_text(render_weeks(picture=HtmlFigure(violet, "a_scan_" + "with_a_long_name_" * 8)))
    num_images = read_dom(page).count("<img")
    assert 2 + 10 <= num_images <= 2 + 30
    assert list_requests(page) == []
    for width, height in ((1000, 7000), (500, 14_000)):
        draw_screen(page, tmp_path / "screen.png", width, height)
        pixels = (matplotlib.image.imread(tmp_path / "screen.png")[..., :3] * 255).round().astype(int)
        assert pixels.shape[:2] == (height, width)
        assert (np.abs(pixels - (0x00, 0x72, 0xB2)).max(axis=2) < 3).sum() > 100  # a class's line
        assert (pixels[:, -8:] > 200).mean() > 0.99  # nothing runs off the right edge
        assert (np.abs(pixels - (120, 0, 200)).max(axis=2) < 8).sum() > 10_000  # the pictures
