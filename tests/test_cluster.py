"""The cluster file is one that Ray accepts."""

import json
from pathlib import Path

import jsonschema
import yaml

from tests.places import ROOT


def _read() -> dict[str, object]:
    document: dict[str, object] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return document


def test_cluster_file_follows_rays_schema() -> None:
    from importlib.util import find_spec

    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(_read(), schema)


def test_the_head_does_no_work_and_gpu_nodes_are_spot() -> None:
    nodes = _read()["available_node_types"]
    assert isinstance(nodes, dict)
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
