"""Malformed scans, each made by a function, each with the one status it must end in.

`tests/test_hostile.py` puts them through the road, and among good ones; `tests/fuzz.py` mutates these and
good ones.
"""

from tests.hostile.dicom_cases import DICOM_CASES, SLOW_CASES
from tests.hostile.image_cases import IMAGE_CASES
from tests.hostile.volume_cases import VOLUME_CASES
from tests.hostile.zip_cases import ZIP_CASES

QUICK_CASES = {**DICOM_CASES, **VOLUME_CASES, **IMAGE_CASES, **ZIP_CASES}
CASES = {**QUICK_CASES, **SLOW_CASES}

__all__ = ["CASES", "QUICK_CASES", "SLOW_CASES"]
