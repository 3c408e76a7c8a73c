"""OpenVINO's profile of a forward pass is summed by primitive, and its products run in the numbers asked for."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from darnet.config import ModelConfig
from darnet.inference.openvino_backend import convert_network
from darnet.model import build_network
from tests.bench import layers


def make_item(kind: str, primitive: str, ms: int, status: str = "EXECUTED") -> Any:
    return SimpleNamespace(
        node_type=kind,
        exec_type=primitive,
        real_time=timedelta(milliseconds=ms),
        status=SimpleNamespace(name=status),
    )


def test_layers_are_summed_by_kind_and_primitive() -> None:
    """What was optimised out takes no time and is no layer."""
    profile = [
        *(make_item("Convolution", "brgconv", ms) for ms in (10, 20)),
        make_item("Convolution", "jit", 5),
        make_item("Reshape", "ref", 1, "OPTIMIZED_OUT"),
    ]
    expected = {("Convolution", "brgconv"): (2, pytest.approx(0.03)), ("Convolution", "jit"): (1, 0.005)}
    assert layers.sum_layers(profile) == expected


def test_passes_give_medians_the_longest_first() -> None:
    short, long = ("Add", "a"), ("Convolution", "b")
    passes = [{short: (1, 0.1), long: (2, seconds)} for seconds in (3.0, 9.0, 4.0)]
    assert list(layers.merge_passes(passes).items()) == [(long, (2, 4.0)), (short, (1, 0.1))]


def make_row(primitive: str = "brgconv_avx2_f32", times: float = 1.25) -> dict[str, Any]:
    """Ten seconds of eager torch, eight of a pass in OpenVINO, and five of products."""
    found = [["Convolution", primitive, 20, 7.2], ["Pooling", "jit", 2, 0.76], ["Add", "jit", 9, 0.03]]
    return {
        "section": "network",
        "road": "ours, openvino fp32",
        "goals": {"eager torch": 1.5},
        "times": {"eager torch": times},
        "seconds": 8.0,
        "eager_s": 10.0,
        "layers": [*found, ["Reorder", "ref", 1, 0.01]],
        "products_s": 5.0,
        "products_by": "brgemm",
        "products_side": 512,
    }


def test_light_layers_are_told_as_one() -> None:
    lines = layers.list_lines(make_row())
    assert [line[0] for line in lines] == ["Convolution", "Pooling", "all else"]
    assert lines[0][-1] == "90.0%"
    assert lines[2][2:4] == [10, pytest.approx(0.04)]


def test_a_missed_goal_is_explained_by_what_was_measured() -> None:
    missed = layers.explain_layers(make_row())
    assert missed.startswith("ours, openvino fp32: 1.25 x eager torch, at least 1.5: missed; convolutions take 90% of")
    assert "none of them by a primitive named after Winograd" in missed
    assert missed.endswith("of 512 (brgemm), take 5 s, with which a pass would be 2 x eager torch")
    assert "some of them by a primitive named after Winograd" in layers.explain_layers(make_row("jit_Winograd_f32"))
    assert layers.explain_layers(make_row() | {"products_s": 8.5}).endswith("8.5 s, more than its layers: no floor")
    assert "at least 1.5: reached" in layers.explain_layers(make_row(times=1.5))


def test_ways_in_openvino_that_have_a_goal_are_profiled() -> None:
    named = {"section": "network", "what": "a forward pass", "times": {}}
    goal = {"eager torch": 1.5}
    roads = {"eager torch": {}, "ours, torch fp32": {}, "ours, openvino bf16": {}, "ours, openvino int8": goal}
    rows = [named | {"road": road, "goals": goals, "seconds": 10.0} for road, goals in roads.items()]
    (found,) = layers.profile_network(lambda precision: {"seconds": len(precision)}, rows, "layers")
    assert (found["road"], found["what"], found["seconds"]) == ("ours, openvino int8", "layers", 4)
    assert found["eager_s"] == 10.0


def test_every_convolution_of_a_network_is_in_its_profile() -> None:
    network = build_network(ModelConfig(volume_shape=(16, 32, 32), base_channels=8), 0).eval()
    request = layers.compile_profiled(convert_network(network), "fp32")
    (found,) = layers.repeat(request, np.zeros((1, 16, 32, 32), np.uint8), 1)
    expected = sum(isinstance(layer, torch.nn.Conv3d) for layer in network.modules())
    assert sum(count for (kind, _), (count, _) in found.items() if kind == layers.CONVOLUTION) == expected
    assert sum(seconds for _, seconds in found.values()) > 0


@pytest.mark.parametrize(("precision", "number"), [("fp32", "f32"), ("int8", "i8")])
def test_products_run_in_the_numbers_asked_for(precision: str, number: str) -> None:
    seconds, primitive = layers.measure_products(precision, side=256)
    assert seconds > 0
    assert primitive.lower().endswith(number), primitive
