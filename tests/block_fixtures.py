"""Rows of decoded scans as a block of the cluster, without a cluster."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.data.block import BlockAccessor


def make_block(rows: Sequence[dict[str, Any]]) -> Any:
    """An Arrow table as Ray Data makes it of rows of `pack_scan`."""
    columns: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in ("voxels", "lung")}
    columns["record"] = np.array([row["record"] for row in rows], object)
    return BlockAccessor.batch_to_arrow_block(columns)
