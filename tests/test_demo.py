"""The demo's folder: made anew each time, and never at the cost of what somebody else keeps there."""

import sys
from pathlib import Path

import pytest

from darnet.demo import MARKER, empty_folder
from darnet.errors import ExitCode, UsageError


def test_a_folder_that_no_demo_made_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import demo

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path)])
    assert demo.main() == ExitCode.WRONG_USE
    told = capsys.readouterr().err
    assert f"{tmp_path}: has no mark that a demo made it" in told
    assert "name a new or an empty folder with --out" in told
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.tex"]


@pytest.mark.parametrize("out", ["file", "file/folder"])
def test_a_file_is_refused(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="a file is there"):
        empty_folder(tmp_path / out)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_earlier_demo_s_folder_is_emptied_and_no_link_in_it_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    out = tmp_path / "new" / "demo"
    empty_folder(out)
    (out / "archive" / "ct").mkdir(parents=True)
    (out / "archive" / "ct" / "1.dcm").touch()
    (out / "cam.png").touch()
    (out / "link").symlink_to(tmp_path / "elsewhere")
    empty_folder(out)
    assert [path.name for path in out.iterdir()] == [MARKER]
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_a_demo_killed_while_it_empties_its_folder_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_folder(tmp_path)
    for name in ("archive", "volumes"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", _fail)
        with pytest.raises(KeyboardInterrupt):
            empty_folder(tmp_path)
    empty_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


def _fail(path: Path) -> None:
    raise KeyboardInterrupt(path)
