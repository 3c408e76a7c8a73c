"""Headless Chromium as a reader of our pages: what it shows, draws and asks the network for."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)
LIMIT_S = 90


def find_browser() -> str:
    """Path of Chromium; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on the PATH")
    return found


def read_dom(page: Path) -> str:
    """The page's document as Chromium understands it."""
    return _run(page, "--dump-dom")


def draw_screen(page: Path, picture: Path, width: int, height: int) -> None:
    """Write a PNG of the page in a window of this size."""
    _run(page, f"--screenshot={picture}", f"--window-size={width},{height}")


def list_requests(page: Path) -> list[str]:
    """Addresses on the network that showing the page makes Chromium ask for, beyond those it asks for by itself."""
    blank = page.with_name("blank.html")
    blank.write_text("<!DOCTYPE html><title>blank</title>")
    return sorted(_log_addresses(page) - _log_addresses(blank))


def _log_addresses(page: Path) -> set[str]:
    log = page.with_suffix(".netlog.json")
    _run(page, f"--log-net-log={log}", "--dump-dom")
    addresses = [str(event.get("params", {}).get("url", "")) for event in json.loads(log.read_text())["events"]]
    return {address.partition("?")[0] for address in addresses if address.startswith(("http:", "https:", "ws:"))}


def _run(page: Path, *flags: str) -> str:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [find_browser(), *FLAGS, profile, *flags, page.absolute().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
