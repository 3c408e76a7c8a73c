"""The cluster actor that scores: decoded scans enter, results rows leave.

The driver names it, and nodes run it. What these alone need is imported where they use it: torch takes seconds to come
and to go.
"""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]
import ray
from ray.data.block import BlockAccessor

from darnet.code_version import name_scoring_code
from darnet.config import ScoreConfig
from darnet.decoded_scan import DecodedScan, unpack_scan
from darnet.errors import RunError, name_defect
from darnet.manifest import RunFacts
from darnet.publishing.outermost import Outermost
from darnet.ray_token import refuse_open_node
from darnet.scan import StandardVolume
from darnet.storage import Store

if TYPE_CHECKING:
    from darnet.cam_images import CamImages
    from darnet.score import Ensemble, ScanScore


class ScoringActor:
    """Holds the ensemble that a run was planned with, and turns decoded scans into rows.

    A bundle or a node that it refuses stops the job when that reaches the driver: raised here, Ray would strip it of
    its type.
    """

    def __init__(
        self, model: Store, run: RunFacts, config: ScoreConfig, device: str, images: "CamImages | None" = None
    ) -> None:
        # Of this node, which may have another program installed than the driver's machine.
        self._run = replace(run, code_version=name_scoring_code())
        self._images, self._outermost = images, Outermost()
        self._ensemble: Ensemble | RunError
        try:
            refuse_open_node()
            self._ensemble = _load_ensemble(model, run, config, device)
        except RunError as error:
            self._ensemble = error
        except Exception as error:  # no scan is in its text; a driver or a memory of this node's may be
            told = f"no network was made on node {ray.util.get_node_ip_address()}: {name_defect(error)}: {error}"
            self._ensemble = RunError(told)

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        """Rows of `ray_cluster.decode_planned` in, of one block or several; per scan a pickle of (source, scans of the
        source, row or failure) out.

        One failure stands for all scans where bundle or node is refused, or scoring fails.
        """
        ensemble = self._ensemble
        if isinstance(ensemble, RunError):
            return _pack_failure(ensemble)
        try:
            return {"row": [pickle.dumps(row) for row in self._score(ensemble, batch)]}
        except RunError as error:
            return _pack_failure(error)
        except Exception as error:  # Ray would write its text to its logs, and to the driver's stderr
            node = ray.util.get_node_ip_address()
            return _pack_failure(RunError(f"node {node}: scoring ended in an unexpected {name_defect(error)}"))

    def _score(self, ensemble: "Ensemble", batch: pa.Table) -> Iterator[tuple[str, int, dict[str, Any] | RunError]]:
        from darnet.score import make_row

        decoded = list(unpack_batch(batch))
        scores = iter(ensemble.score([item.scan.volume.voxels for item in decoded if item.scan.volume is not None]))
        for item in decoded:
            score = None if item.scan.volume is None else next(scores)
            row = make_row(self._run, item.source_name, item.input_sha256, item.scan, score, datetime.now(UTC))
            if self._images is not None and score is not None and item.scan.volume is not None:
                self._keep_picture(self._images, row, item.scan.volume, score)
            yield item.source_key, item.num_scans, item.failure or row

    def _keep_picture(
        self, images: "CamImages", row: dict[str, Any], volume: StandardVolume, score: "ScanScore"
    ) -> None:
        if images.wants(row, self._outermost):
            images.write(row, volume, score.draw_cam(score.prediction, volume.voxels.shape))


def unpack_batch(batch: pa.Table) -> Iterator[DecodedScan]:
    """The scans of a batch, whose voxels stay where the cluster has them.

    One array for all would copy those that came in several blocks.
    """
    for block in batch.to_batches():
        columns = BlockAccessor.for_block(pa.Table.from_batches([block])).to_numpy()
        assert isinstance(columns, dict)
        yield from map(unpack_scan, columns["record"], columns["voxels"], columns["lung"])


def _pack_failure(error: RunError) -> dict[str, list[bytes]]:
    """What stops the job, for all scans of a batch."""
    return {"row": [pickle.dumps(("", 1, error))]}


def _load_ensemble(model: Store, run: RunFacts, config: ScoreConfig, device: str) -> "Ensemble":
    """Raises: RunError if the bundle is another one by now than the run was planned with; as `read_model`."""
    from darnet.bundle import read_model
    from darnet.score import Ensemble

    bundle = read_model(model, config)
    if bundle.manifest != run.model:
        raise RunError(f"{model.uri}: the model bundle changed during the run; start it again")
    return Ensemble.from_bundle(bundle, config, device)
