"""python -m jobs.quantize: bundle + volumes -> the same bundle with INT8 graphs for scoring on CPUs."""

import sys
from typing import Any

from darnet.inference.quantization import quantize_bundle
from darnet.job import leave, run_job
from darnet.settings import QuantizeSettings
from darnet.storage import open_store
from darnet.volumes_cache import open_volumes


def work(settings: QuantizeSettings) -> dict[str, Any]:
    """Quantise the folds and tell what that changes."""
    index = open_volumes(settings.volumes, settings.cache)
    bundle = quantize_bundle(open_store(settings.model), index, settings.out, settings.score)
    records = [fold.int8 for fold in bundle.manifest.folds if fold.int8 is not None]
    return {"out": settings.out, "int8": [record.model_dump(mode="json") for record in records]}


def main() -> int:
    """Run the job and return its exit code."""
    return run_job("quantize", QuantizeSettings, work, sys.argv[1:])


if __name__ == "__main__":
    leave(main())
