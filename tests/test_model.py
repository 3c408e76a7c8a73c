"""The network against the paper's numbers and against its equations written as loops."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from darnet.model import (
    ChannelAttention,
    DARNet,
    DepthAttention,
    ModelConfig,
    RowwiseLinear,
    build_network,
    count_parameters,
)

TINY = ModelConfig(volume_shape=(16, 32, 32), base_channels=4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _two_layer_gates(means: list[float], squeeze: nn.Linear, excite: nn.Linear) -> list[float]:
    """sigmoid(W2 relu(W1 z + b1) + b2), one multiplication at a time."""
    w1, b1, w2, b2 = (p.tolist() for p in (squeeze.weight, squeeze.bias, excite.weight, excite.bias))
    hidden = [max(0.0, b1[i] + sum(w1[i][j] * means[j] for j in range(len(means)))) for i in range(len(b1))]
    return [_sigmoid(b2[i] + sum(w2[i][j] * hidden[j] for j in range(len(hidden)))) for i in range(len(b2))]


def _with_wide_weights(module: nn.Module) -> nn.Module:
    """Weights and biases large enough that a gate in the wrong place shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1.0, generator=generator)
    return module.double()


@pytest.mark.parametrize(
    ("channel_attention", "depth_attention", "expected"),
    [(False, False, 33_148_995), (True, False, 33_238_075), (False, True, 35_148_083), (True, True, 35_237_163)],
)
def test_parameter_count_is_the_papers(channel_attention: bool, depth_attention: bool, expected: int) -> None:
    with torch.device("meta"):
        network = DARNet(ModelConfig(channel_attention=channel_attention, depth_attention=depth_attention))
    assert count_parameters(network) == expected


def test_default_feature_map_is_512_by_8_by_14_by_14() -> None:
    with torch.device("meta"):
        network, x = DARNet(ModelConfig()), torch.empty(2, 1, 64, 224, 224)
        shapes = [tuple(x.shape)]
        for step in (network.stem, *network.stages):
            x = step(x)
            shapes.append(tuple(x.shape))
    assert shapes == [
        (2, 1, 64, 224, 224),
        (2, 64, 64, 112, 112),
        (2, 64, 64, 112, 112),
        (2, 128, 32, 56, 56),
        (2, 256, 16, 28, 28),
        (2, 512, 8, 14, 14),
    ]


@pytest.mark.parametrize("volume_shape", [(16, 32, 32), (13, 33, 47)])
def test_feature_map_is_depth_over_8_and_plane_over_16_rounded_up(volume_shape: tuple[int, int, int]) -> None:
    depth, height, width = volume_shape
    network = build_network(ModelConfig(volume_shape=volume_shape, base_channels=2), seed=0).eval()
    trace = network.trace(_random(2, 1, *volume_shape))
    expected = (2, 16, math.ceil(depth / 8), math.ceil(height / 16), math.ceil(width / 16))
    assert tuple(trace.features.shape) == expected
    assert trace.depth_gates is not None
    assert tuple(trace.depth_gates.shape) == expected[:3]


def test_depth_attention_is_equations_1_and_2_of_the_paper() -> None:
    channels, depth, height, width = 3, 4, 2, 5
    module = _with_wide_weights(DepthAttention(channels, depth))
    x = _random(2, channels, depth, height, width).double()
    expected = torch.empty(2, channels, depth, dtype=torch.float64)
    for b in range(2):
        z = []
        for i, j in product(range(channels), range(depth)):
            total = sum(x[b, i, j, h, w].item() for h, w in product(range(height), range(width)))
            z.append(total / (height * width))
        gates = _two_layer_gates(z, module.squeeze, module.excite)
        for i, j in product(range(channels), range(depth)):
            expected[b, i, j] = gates[i * depth + j]
    torch.testing.assert_close(module(x.mean(dim=(3, 4))), expected, rtol=1e-12, atol=1e-12)


def test_channel_attention_gates_whole_channels() -> None:
    channels = 32
    module = _with_wide_weights(ChannelAttention(channels))
    means = _random(2, channels).double()
    expected = [_two_layer_gates(means[b].tolist(), module.squeeze, module.excite) for b in range(2)]
    assert module.squeeze.out_features == 2
    torch.testing.assert_close(module(means), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_depth", [True, False])
@pytest.mark.parametrize("has_channel", [True, False])
def test_block_scales_by_depth_then_by_channel_then_adds_the_shortcut(has_depth: bool, has_channel: bool) -> None:
    """The block gates once; here the map is scaled twice, and CA averages what DA has really left."""
    config = TINY.model_copy(update={"depth_attention": has_depth, "channel_attention": has_channel})
    block = _with_wide_weights(build_network(config, seed=0).stages[1][0]).eval()
    x = _random(2, 4, 16, 4, 4).double()
    conv1, norm1, _, conv2, norm2 = block.residual
    y = norm2(conv2(norm1(conv1(x)).clamp(min=0)))
    if has_depth:
        y = y * block.depth_attention(y.mean(dim=(3, 4)))[..., None, None]
    if has_channel:
        y = y * block.channel_attention(y.mean(dim=(2, 3, 4)))[..., None, None, None]
    y = y + block.shortcut(x)
    assert (y < 0).any()
    torch.testing.assert_close(block(x), y.clamp(min=0), rtol=1e-10, atol=1e-10)


def test_without_attention_there_is_no_gate_and_no_linear_but_the_head() -> None:
    config = TINY.model_copy(update={"channel_attention": False, "depth_attention": False})
    network = build_network(config, seed=0).eval()
    assert network.trace(_random(1, 1, 16, 32, 32)).depth_gates is None
    assert [name for name, module in network.named_modules() if isinstance(module, nn.Linear)] == ["head"]


def test_traced_gates_are_those_of_the_last_block() -> None:
    network = build_network(TINY, seed=0).eval()
    seen: list[Tensor] = []
    last = network.stages[3][1]
    last.residual.register_forward_hook(lambda _module, _inputs, y: seen.append(y.clone()))
    trace = network.trace(_random(1, 1, 16, 32, 32))
    torch.testing.assert_close(trace.depth_gates, last.depth_attention(seen[0].mean(dim=(3, 4))))


def test_forward_is_the_head_on_the_mean_feature() -> None:
    network = build_network(TINY, seed=0).eval().double()
    x = _random(2, 1, 16, 32, 32).double()
    means = network.features(x).flatten(2).mean(2)
    torch.testing.assert_close(network(x), means @ network.head.weight.T + network.head.bias)


@pytest.mark.parametrize("config", [TINY, ModelConfig()])
def test_only_the_head_has_one_output_a_class(config: ModelConfig) -> None:
    with torch.device("meta"):
        network = DARNet(config)
    matching = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == config.num_classes]
    assert matching == [network.head]


@pytest.mark.parametrize("depth_attention", [True, False])
def test_depth_63_raises_naming_both_shapes(depth_attention: bool) -> None:
    with torch.device("meta"):
        network = DARNet(ModelConfig(depth_attention=depth_attention))
        x = torch.empty(1, 1, 63, 224, 224)
    with pytest.raises(ValueError, match=r"64, 224, 224.*63, 224, 224"):
        network(x)


@pytest.mark.parametrize("shape", [(1, 2, 16, 32, 32), (1, 16, 32, 32), (1, 1, 16, 32, 31), (1, 1, 17, 32, 32)])
def test_any_other_input_shape_raises(shape: tuple[int, ...]) -> None:
    network = build_network(TINY, seed=0)
    with pytest.raises(ValueError, match="the network takes"):
        network.features(torch.zeros(shape))


def test_depth_attention_alone_raises_on_a_wrong_depth() -> None:
    with pytest.raises(ValueError, match="depth 4"):
        DepthAttention(3, 4)(torch.zeros(1, 3, 5))


def test_same_seed_gives_same_weights_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_network(TINY, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_initial_weights_follow_the_paper() -> None:
    network = build_network(ModelConfig(volume_shape=(16, 32, 32), base_channels=32), seed=0)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            spread = math.sqrt(2 / fan_out)
            assert module.weight.std().item() == pytest.approx(spread, rel=0.08)
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.15)
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm3d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert all(conv.bias is None for conv in network.modules() if isinstance(conv, nn.Conv3d))


def test_every_parameter_receives_a_gradient() -> None:
    network = build_network(TINY, seed=0)
    network(_random(2, 1, 16, 32, 32)).logsumexp(1).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_wider_head_start_changes_the_head_alone() -> None:
    usual, wide = build_network(TINY, seed=5), build_network(TINY, seed=5, head_std=0.1)
    assert abs(wide.head.weight.std().item() / 0.1 - 1) < 0.2
    torch.testing.assert_close(wide.head.weight, 10 * usual.head.weight)
    others = [name for name in usual.state_dict() if name != "head.weight"]
    assert all(torch.equal(usual.state_dict()[name], wide.state_dict()[name]) for name in others)


def test_recomputed_blocks_keep_less_and_give_the_same_bits() -> None:
    """The running statistics too: a second pass must not move them again."""
    x = torch.rand((2, 1, 8, 16, 16), generator=torch.Generator().manual_seed(0))

    def train_once(recomputes: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
        network = build_network(ModelConfig(volume_shape=(8, 16, 16), base_channels=4), seed=0)
        network.recomputes_blocks = recomputes
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(x).square().sum()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        return gradients, {name: buffer.clone() for name, buffer in network.named_buffers()}, sum(kept)

    gradients, buffers, num_kept = train_once(False)
    again, moved, num_kept_again = train_once(True)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert all(torch.equal(buffers[name], moved[name]) for name in buffers)
    assert num_kept_again < num_kept / 2


@pytest.mark.parametrize("features", [7, 64, 192, 512])
def test_a_linear_layer_gives_a_row_the_same_bits_at_any_place(features: int) -> None:
    layer = RowwiseLinear(features, 24).eval()
    rows = _random(5, features)
    alone = torch.cat([layer(row[None]) for row in rows])
    assert torch.equal(layer(rows), alone)
    assert torch.equal(layer(rows.flip(0)), alone.flip(0))
    torch.testing.assert_close(layer.train()(rows), alone)
