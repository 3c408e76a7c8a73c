"""Which code made a result: modules that decide it enter, the version with a digest of their sources leaves.

`__version__` stays the same from commit to commit, so alone it cannot tell one training's code from another's.
"""

import ast
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from darnet import __version__

HOME = Path(__file__).parent
# Of what training and preparing import, the modules that can change a weight or a voxel. Settings are digested by value
# wherever these are, so `config` counts only where it holds numbers that are no setting.
TRAINING = (
    *("augment", "calibration", "dataset", "gang", "metrics", "model", "ray_rank", "scan", "threads", "train"),
    "volumes_folder",
)
PREPARING = (
    *("archive", "config", "decode", "ingest", "lung", "reading.dicom", "reading.excerpt", "reading.pixel_length"),
    *("reading.plain_header", "reading.road", "reading.series", "reading.stored_pixels", "reading.volume_file"),
    *("reading.zipped", "scan", "staging", "threads", "volume"),
)
# And of a row: what `score` makes of a scan, and how it ended. Storage decides only rows that are tried again.
SCORING = (
    *PREPARING,
    *("bundle", "cam", "cam_statistics", "inference.graph", "inference.openvino_backend", "inference.torch_backend"),
    *("manifest", "model", "pseudonym", "reading.sandbox", "score"),
)


@functools.cache
def name_training_code() -> str:
    """Version and digest of what decides a network's weights, such as 0.1.0+0123456789ab."""
    return f"{__version__}+{digest_sources(HOME, TRAINING)[:12]}"


@functools.cache
def name_preparing_code() -> str:
    """Version and digest of what decides a standard volume.

    Source: ours: only for what a restarted jobs.prepare takes over. The results table rests on `preprocessing_version`,
            which a person raises: a night must not score an archive again because a line was written otherwise.
    """
    return f"{__version__}+{digest_sources(HOME, PREPARING)[:12]}"


@functools.cache
def name_scoring_code() -> str:
    """Version and digest of what decides a row of the results table, from a scan's bytes to its numbers.

    Source: ours: it tells rows apart, and no night scores a scan again for it (see `name_preparing_code`).
    """
    return f"{__version__}+{digest_sources(HOME, SCORING)[:12]}"


def digest_sources(home: Path, modules: Sequence[str]) -> str:
    """SHA-256 of the modules' code below `home`; comments, documentation and layout are not in it."""
    digest = hashlib.sha256()
    for module in modules:
        code = ast.parse(home.joinpath(*module.split(".")).with_suffix(".py").read_bytes())
        digest.update(f"{module}\0{ast.dump(_WithoutDocs().visit(code))}\0".encode())
    return digest.hexdigest()


class _WithoutDocs(ast.NodeTransformer):
    """Drops texts that stand alone, of functions, classes and fields."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node
