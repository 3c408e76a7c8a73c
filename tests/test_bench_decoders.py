"""The decoders' benchmark tells of every format who is how fast and who agrees; what scans are read by, agrees."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench import decoders


def test_what_scans_are_read_by_gives_simpleitks_values(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (48, 64)).astype(np.uint16)
    found = decoders.measure(decoders.list_decoders(tmp_path, stored), repeats=1)
    used = {
        *(("png, 8 bits", "png"), ("jpg, 8 bits", "jpeg8"), ("JPEG-LS", "jpegls"), ("JPEG 2000", "jpeg2k")),
        *(("RLE", "dicomrle"), ("uncompressed", "numpy")),
    }
    assert {way: is_same for way, (*_, is_same) in found.items() if way in used} == dict.fromkeys(used, True)


def test_every_format_is_timed_beside_simpleitk(capsys: pytest.CaptureFixture[str]) -> None:
    decoders.main(["--size", "64", "--repeats", "1"])
    told = json.loads(capsys.readouterr().out)["ms"]
    names = {way.rpartition(", ")[0] for way in told}
    assert names == {"png, 8 bits", "jpg, 8 bits", "JPEG-LS", "JPEG 2000", "JPEG Lossless SV1", "RLE", "uncompressed"}
    assert all(f"{name}, SimpleITK" in told for name in names)
    assert "uncompressed, numpy" in told
