"""A decoded scan on its way through the cluster: it enters, and leaves as a row of arrays and bytes; and back.

It knows nothing of decoding, so that who scores need not load what decodes.
"""

import pickle
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from darnet.config import VolumeConfig
from darnet.errors import RunError
from darnet.scan import IngestedScan

RECORD_BYTES = 1000  # of a row beside its voxels and mask, as Ray counts them. Source: ours; 750 to 1,100 were seen


@dataclass(frozen=True)
class DecodedScan:
    """One scan on its way through the cluster, with what its row needs of its source, which is named there as it says.

    `failure` stops the job when it reaches the driver: raised in a worker, Ray would strip it of its type.
    """

    source_key: str
    source_name: str
    input_sha256: str
    num_scans: int
    scan: IngestedScan
    failure: RunError | None = None


def pack_scan(decoded: DecodedScan, volume: VolumeConfig) -> dict[str, Any]:
    """A row: `voxels` (D, H, W) uint8, `lung` its mask as packed bits, `record` the rest.

    A scan that is not OK carries zeros, so that every row and block has one shape.
    """
    scan = decoded.scan
    voxels = np.zeros(volume.shape, np.uint8) if scan.volume is None else scan.volume.voxels
    lung = np.zeros(volume.shape, np.bool_) if scan.lung is None else scan.lung
    slim = replace(
        scan,
        volume=None if scan.volume is None else replace(scan.volume, voxels=np.empty((0, 0, 0), np.uint8)),
        lung=None if scan.lung is None else np.empty((0, 0, 0), np.bool_),
    )
    return {"voxels": voxels, "lung": np.packbits(lung), "record": pickle.dumps(replace(decoded, scan=slim))}


def unpack_scan(record: bytes, voxels: np.ndarray[Any, Any], lung: np.ndarray[Any, Any]) -> DecodedScan:
    """A row as the decoded scan it was made of."""
    decoded: DecodedScan = pickle.loads(record)
    scan = decoded.scan
    if scan.volume is None:
        return decoded
    mask = np.unpackbits(lung, count=voxels.size).reshape(voxels.shape).astype(np.bool_)
    has_mask = scan.lung is not None
    volume = replace(scan.volume, voxels=voxels)
    return replace(decoded, scan=replace(scan, volume=volume, lung=mask if has_mask else None))


def size_block(volume: VolumeConfig, batch_size: int) -> int:
    """Bytes to be named to Ray, so that a block has the rows of a batch: it ends one with the row that exceeds them.

    Half a row less than a batch is as far from a row too few as from one too many. Source: Ray's BlockOutputBuffer.
    """
    voxels = int(np.prod(volume.shape))
    return int((batch_size - 0.5) * (voxels + voxels // 8 + RECORD_BYTES))
