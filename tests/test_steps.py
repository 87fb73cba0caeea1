"""Sections 4 and 5: networks, the training loop, steps, structured noise."""

import copy
import math
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

NETWORKS = {"LogisticRegression": 7_850, "MLP": 1_863_690, "CNN": 3_333_962}
STEPS = ["backprop", "textbook", "rank one", "one layer", "fast"]
pytestmark = pytest.mark.usefixtures("on_the_cpu")
EXACT = {"rtol": 0, "atol": 1e-11}


def get_step(fwdgrad, name):
    return {
        "backprop": fwdgrad.backprop_step,
        "textbook": fwdgrad.forward_gradient_step,
        "rank one": fwdgrad.structured_step(fwdgrad.every_layer, joint=True),
        "one layer": fwdgrad.structured_step(fwdgrad.one_layer),
        "fast": fwdgrad.fast_forward_gradient_step,
    }[name]


def double_network(fwdgrad, name):
    """Return a network in double precision whose last layer is not zero."""
    torch.manual_seed(1)
    model = getattr(fwdgrad, name)().double()
    for layer in model:
        if hasattr(layer, "bias"):
            nn.init.normal_(layer.bias, std=0.1)
    nn.init.normal_(model[-1].weight, std=0.1)
    return model


def a_batch(size=4, shape=(1, 28, 28), classes=10, dtype=torch.float64):
    noise = seeded(2)
    images = torch.randn(size, *shape, dtype=dtype, generator=noise)
    return images, torch.randint(classes, (size,), generator=noise)


def joined(tensors):
    """Return tensors of any memory format as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def flat(model):
    return joined(model.parameters()).detach()


def gradient(model, images, labels):
    loss = F.cross_entropy(model(images), labels)
    return joined(torch.autograd.grad(loss, list(model.parameters())))


def small_digits(fwdgrad, count=100):
    images, labels = a_batch(count, dtype=torch.float32)
    return fwdgrad.Digits(images, labels, images[:50], labels[:50])


def small_network(units=16):
    """Return a network with blocks of units, and with a batch for it."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, units, 2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(units, units), nn.ReLU()]
    layers += [nn.Linear(units, 4)]
    return nn.Sequential(*layers).double(), *a_batch(8, (1, 4, 4), 4)


def in_full(model, index, direction):
    """Return u wᵀ and u s as full tensors, flat, zero elsewhere."""
    units, u, w, s, _ = direction
    parts = []
    for i, layer in enumerate(model):
        for name, parameter in layer.named_parameters():
            full = torch.zeros(len(parameter), parameter[0].numel())
            full = full.to(parameter.dtype)
            if i == index:
                row = w if name == "weight" else s
                full[units] = torch.einsum("i,j->ij", u, row)
            parts.append(full.flatten())
    return torch.cat(parts)


def slope_by_jvp(model, images, labels, v):
    """Return the slope along the flat direction v, by torch.func.jvp."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    pieces = v.split([p.numel() for p in theta.values()])
    tangents = {
        name: piece.view(p.shape)
        for (name, p), piece in zip(theta.items(), pieces, strict=True)
    }

    def f(theta):
        logits = torch.func.functional_call(model, theta, (images,))
        return F.cross_entropy(logits, labels)

    return torch.func.jvp(f, (theta,), (tangents,))[1].item()


def weighted(model):
    return [i for i, layer in enumerate(model) if hasattr(layer, "weight")]


# Networks


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_its_number_of_parameters(fwdgrad, name):
    model = getattr(fwdgrad, name)()
    assert sum(p.numel() for p in model.parameters()) == NETWORKS[name]
    assert fwdgrad.SIZES[getattr(fwdgrad, name)] == NETWORKS[name]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("step", STEPS)
def test_the_first_loss_is_log_10(fwdgrad, name, step):
    model = getattr(fwdgrad, name)()
    images, labels = a_batch(dtype=torch.float32)
    loss = get_step(fwdgrad, step)(model, images, labels, 0.01)
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stack_has_its_depth_and_width(fwdgrad, depth):
    model = fwdgrad.stack(depth, width=12)
    shapes = [tuple(model[i].weight.shape) for i in weighted(model)]
    assert shapes == [(12, 784)] + [(12, 12)] * (depth - 1) + [(10, 12)]
    assert model(a_batch(dtype=torch.float32)[0]).abs().max() == 0


@pytest.mark.parametrize("name", ["MLP", "CNN"])
def test_hidden_weights_are_kaiming_normal(fwdgrad, name):
    torch.manual_seed(0)
    model = getattr(fwdgrad, name)()
    for i in weighted(model)[:-1]:
        weight, bias = model[i].weight.detach(), model[i].bias
        assert bias.abs().max() == 0
        scaled = weight * math.sqrt(weight[0].numel() / 2)
        error = math.sqrt(2 / weight.numel())  # of a variance
        assert abs(scaled.square().mean() - 1) < 5 * error


# Backprop and the textbook


@pytest.mark.parametrize("name", NETWORKS)
def test_backprop_step_is_plain_sgd(fwdgrad, name):
    model = double_network(fwdgrad, name)
    images, labels = a_batch()
    other = copy.deepcopy(model)
    sgd = torch.optim.SGD(other.parameters(), lr=0.3)
    for _ in range(2):
        sgd.zero_grad()
        expected = F.cross_entropy(other(images), labels)
        expected.backward()
        sgd.step()
        loss = fwdgrad.backprop_step(model, images, labels, 0.3)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(flat(model), flat(other), **EXACT)


@pytest.mark.parametrize("name", NETWORKS)
def test_textbook_update_is_rate_times_slope_times_v(fwdgrad, name):
    model = double_network(fwdgrad, name)
    images, labels = a_batch()
    noise = seeded(4)
    v = joined(
        torch.empty_like(p).normal_(generator=noise)
        for p in model.parameters()
    )
    expected = 1e-3 * (gradient(model, images, labels) @ v) * v
    assert all(part.abs().max() > 0 for part in expected.split(1000))
    before = flat(model)
    fwdgrad.forward_gradient_step(model, images, labels, 1e-3, seeded(4))
    torch.testing.assert_close(before - flat(model), expected, **EXACT)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_returns_the_loss_before_the_update(fwdgrad, step):
    model, images, labels = small_network()
    expected = F.cross_entropy(model(images), labels).item()
    loss = get_step(fwdgrad, step)(model, images, labels, 0.5)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-12)


# Structured steps as a whole


@pytest.mark.parametrize("name", NETWORKS)
def test_rank_one_update_is_rate_times_joint_slope_times_v(fwdgrad, name):
    model = double_network(fwdgrad, name)
    images, labels = a_batch()
    torch.manual_seed(5)
    directions = fwdgrad.every_layer(model)
    assert [index for index, _ in directions] == weighted(model)
    v = sum(in_full(model, *item) for item in directions)
    assert (v.abs() == 1).all()
    expected = 1e-3 * (gradient(model, images, labels) @ v) * v
    before = flat(model)
    torch.manual_seed(5)
    step = fwdgrad.structured_step(fwdgrad.every_layer, joint=True)
    step(model, images, labels, 1e-3)
    torch.testing.assert_close(before - flat(model), expected, **EXACT)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_fast_update_is_each_block_by_its_own_slope(fwdgrad, name, seed):
    model = double_network(fwdgrad, name)
    images, labels = a_batch()
    directions = fwdgrad.fast_choice(model, seeded(seed))
    exact = gradient(model, images, labels)
    expected = torch.zeros_like(exact)
    for index, direction in directions:
        v = in_full(model, index, direction)
        expected += 1e-4 * direction.weight * (exact @ v) * v
    before = flat(model)
    fwdgrad.fast_forward_gradient_step(
        model, images, labels, 1e-4, seeded(seed)
    )
    after = flat(model)
    torch.testing.assert_close(before - after, expected, **EXACT)
    torch.testing.assert_close(before != after, expected != 0)


def test_only_the_chosen_layer_changes(fwdgrad):
    step, changed = fwdgrad.structured_step(fwdgrad.one_layer), set()
    for seed in range(20):
        model, images, labels = small_network()
        before = copy.deepcopy(model)
        torch.manual_seed(seed)
        step(model, images, labels, 0.1)
        moved = [
            i
            for i in weighted(model)
            if not torch.equal(model[i].weight, before[i].weight)
        ]
        assert len(moved) == 1
        for i in weighted(model):
            same = torch.equal(model[i].bias, before[i].bias)
            assert same == (i not in moved)
        changed.update(moved)
    assert changed == set(weighted(model))


def test_only_the_chosen_block_of_units_changes(fwdgrad):
    blocks = set()
    for seed in range(60):
        model, images, labels = small_network(64)
        before = copy.deepcopy(model)
        directions = dict(fwdgrad.fast_choice(model, seeded(seed)))
        fwdgrad.fast_forward_gradient_step(
            model, images, labels, 0.1, seeded(seed)
        )
        for i in weighted(model):
            change = (model[i].weight - before[i].weight).abs() > 1e-12
            moved = change.flatten(1).any(1)
            expected = torch.zeros(len(moved), dtype=torch.bool)
            if i in directions:
                expected[directions[i].units] = True
            dead = i in directions and not moved.any()  # a slope of zero
            assert dead or torch.equal(moved, expected)
            change = (model[i].bias - before[i].bias).abs() > 1e-12
            assert torch.equal(change, moved)
            if i == 4 and moved.any():  # one of 64 blocks
                assert moved.sum() == 1
                blocks.add(moved.int().argmax().item())
    assert len(blocks) > 5


@pytest.mark.parametrize("step", STEPS[1:])
def test_every_step_draws_a_new_direction(fwdgrad, step):
    model, images, labels = small_network()
    step = get_step(fwdgrad, step)
    updates = []
    for _ in range(8):
        before = flat(model)
        step(model, images, labels, 1e-3)
        updates.append((flat(model) - before).sign())
    for i, update in enumerate(updates):
        for other in updates[:i]:
            assert not torch.equal(update.abs(), other.abs()) or (
                update @ other
            ).abs() < 0.9 * (update @ update)


# Slopes


def sizes(largest, smallest=1):
    return st.tuples(*[st.integers(smallest, largest)] * 2)


@st.composite
def convolutions(draw, inputs):
    stride, kernel = draw(sizes(2)), draw(sizes(3))
    padding = draw(sizes(2, 0) | st.sampled_from(["valid", "same"]))
    if padding == "same":  # torch warns of even kernels
        kernel = tuple(k - 1 + k % 2 for k in kernel)
    return nn.Conv2d(
        inputs,
        draw(st.sampled_from([1, 2, 4, 6, 16])),
        kernel,
        stride=(1, 1) if padding == "same" else stride,
        padding=padding,
        dilation=(1, 1) if padding == "same" else draw(sizes(2)),
        bias=draw(st.booleans()),
    )


@st.composite
def pools(draw):
    kernel = draw(sizes(3))
    return nn.MaxPool2d(
        kernel,
        stride=draw(st.none() | sizes(3)),
        padding=tuple(draw(st.integers(0, k // 2)) for k in kernel),
        dilation=draw(sizes(2)),
        ceil_mode=draw(st.booleans()),
    )


def output_of(layer, x):
    """Return layer(x), or None if the layer does not fit x."""
    try:
        y = layer(x)
    except RuntimeError:
        return None
    return y if y.numel() and torch.isfinite(y).all() else None


@st.composite
def stacks(draw):
    """Return a random network in double precision, images and labels."""
    torch.manual_seed(draw(st.integers(0, 999)))
    shape = draw(st.tuples(*[st.integers(1, 3)], *[st.integers(3, 9)] * 2))
    images, labels = a_batch(draw(st.integers(1, 4)), shape, 4)
    layers, x = [], images
    kinds = st.sampled_from(["convolution", "relu", "pool"])
    first = draw(st.sampled_from([[], ["convolution"]]))
    for kind in first + draw(st.lists(kinds, max_size=5)):
        layer = nn.ReLU()
        if kind == "convolution":
            layer = draw(convolutions(x.shape[1])).double()
        elif kind == "pool":
            layer = draw(pools())
        y = output_of(layer, x)
        if y is not None:
            layers, x = layers + [layer], y
    layers.append(nn.Flatten())
    inputs = x[0].numel()
    for units in draw(st.lists(st.sampled_from([3, 8, 16, 32]), max_size=2)):
        layers.append(nn.Linear(inputs, units, bias=draw(st.booleans())))
        layers += draw(st.sampled_from([[], [nn.ReLU()], [nn.Flatten()]]))
        inputs = units
    layers.append(nn.Linear(inputs, 4, bias=draw(st.booleans())))
    model = nn.Sequential(*layers).double()
    if draw(st.booleans()):
        model = model.to(memory_format=torch.channels_last)
    if draw(st.booleans()):  # exact zeros before a ReLU
        dead = model[draw(st.sampled_from(weighted(model)))]
        for parameter in dead.parameters():
            nn.init.zeros_(parameter)
    return model, images, labels


@settings(deadline=None, max_examples=150)
@given(case=stacks(), seed=st.integers(0, 999))
def test_each_slope_matches_torch(fwdgrad, case, seed):
    model, images, labels = case
    directions, noise = [], seeded(seed)
    for i in 2 * weighted(model)[::-1]:  # twice each, the last layer first
        units = len(model[i].weight)
        divisors = [b for b in range(1, 17) if units % b == 0]
        k = torch.randint(len(divisors), (1,), generator=noise).item()
        direction = fwdgrad.draw(model[i], divisors[k], generator=noise)
        directions.append((i, direction))
    with torch.no_grad():
        loss, slopes = fwdgrad.loss_and_slopes(
            model, images, labels, directions
        )
    expected = F.cross_entropy(model(images), labels).item()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    reference = [
        slope_by_jvp(model, images, labels, in_full(model, *item))
        for item in directions
    ]
    np.testing.assert_allclose(slopes, reference, 1e-11, 1e-11)


@pytest.mark.parametrize("blocks", [2, 16])
@pytest.mark.parametrize("index", [0, 3])
def test_every_block_has_its_own_slope(fwdgrad, index, blocks):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 2), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 4)]
    model, batch = nn.Sequential(*layers).double(), a_batch(8, (1, 4, 4), 4)
    direction = fwdgrad.draw(model[index], blocks, generator=seeded())
    size = 16 // blocks
    for block in range(blocks):
        units = slice(size * block, size * (block + 1))
        direction = direction._replace(units=units)
        v = in_full(model, index, direction)
        with torch.no_grad():
            _, (slope,) = fwdgrad.loss_and_slopes(
                model, *batch, [(index, direction)]
            )
        expected = (gradient(model, *batch) @ v).item()
        assert slope == pytest.approx(expected, rel=1e-10, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(case=stacks(), data=st.data(), seed=st.integers(0, 999))
def test_the_joint_slope_matches_torch(fwdgrad, case, data, seed):
    model, images, labels = case
    directions = fwdgrad.every_layer(model, seeded(seed))
    chosen = data.draw(st.sets(st.sampled_from(weighted(model)), min_size=1))
    directions = [item for item in directions if item[0] in chosen]
    with torch.no_grad():
        loss, slopes = fwdgrad.loss_and_slopes(
            model, images, labels, directions, joint=True
        )
    v = sum(in_full(model, *item) for item in directions)
    reference = slope_by_jvp(model, images, labels, v)
    np.testing.assert_allclose(slopes, [reference], 1e-11, 1e-11)


@settings(deadline=None, max_examples=30)
@given(case=stacks(), seed=st.integers(0, 999))
def test_the_notebooks_own_reference_is_right(fwdgrad, case, seed):
    model, images, labels = case
    index = weighted(model)[seed % len(weighted(model))]
    blocks = math.gcd(16, len(model[index].weight))
    direction = fwdgrad.draw(model[index], blocks, 1.0, seeded(seed))
    v = in_full(model, index, direction)
    ours = fwdgrad.written_out(model, index, direction)
    assert [n for n, _ in model.named_parameters()] == list(ours)
    assert torch.equal(torch.cat([t.flatten() for t in ours.values()]), v)
    slope = fwdgrad.slope_by_torch(model, images, labels, index, direction)
    expected = (gradient(model, images, labels) @ v).item()
    assert slope == pytest.approx(expected, rel=1e-10, abs=1e-11)


def test_no_tangent_passes_a_relu_at_exactly_zero(fwdgrad):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    for parameter in model[0].parameters():
        nn.init.zeros_(parameter)
    directions = [(0, fwdgrad.draw(model[0], 1, generator=seeded()))]
    with torch.no_grad():
        batch = a_batch(4, (3,), 3)
        _, slopes = fwdgrad.loss_and_slopes(model, *batch, directions)
    assert slopes == [0]


def test_a_pool_takes_the_winners_tangent(fwdgrad):
    x = torch.tensor([[[[1.0, 4.0, 2.0], [3.0, 0.0, 9.0]]]])
    t = torch.tensor([[[[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]]])
    value, push = fwdgrad.apply_rule(nn.MaxPool2d((2, 1)), x)
    assert value.tolist() == [[[[3, 4, 9]]]]
    pushed, units = push(t, slice(0, 1))
    assert pushed.tolist() == [[[[40, 20, 60]]]]
    assert units == slice(0, 1)


# What has no rule


class Mine(nn.Linear):
    """A linear layer that might compute anything."""


UNKNOWN = {
    "Tanh": nn.Tanh(),
    "BatchNorm2d": nn.BatchNorm2d(2),
    "Dropout": nn.Dropout(),
    "Conv2d.*groups=2": nn.Conv2d(2, 2, 3, padding=1, groups=2),
    "Conv2d.*circular": nn.Conv2d(
        2, 2, 3, padding=1, padding_mode="circular"
    ),
    "Flatten.*start_dim=0": nn.Flatten(0),
    "Flatten.*end_dim=2": nn.Flatten(1, 2),
    "AvgPool2d": nn.AvgPool2d(2),
    "Sequential": nn.Sequential(nn.ReLU()),
    "Mine": Mine(6, 6),
}


@pytest.mark.parametrize("step", ["rank one", "one layer", "fast"])
@pytest.mark.parametrize("message", UNKNOWN)
def test_a_layer_without_a_rule_is_named(fwdgrad, message, step):
    head = [nn.Conv2d(1, 2, 1), copy.deepcopy(UNKNOWN[message])]
    tail = [nn.Flatten(), nn.Linear(72, 10)]
    model = nn.Sequential(*head, *tail).double()
    images, labels = a_batch(4, (1, 6, 6))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=message):
        get_step(fwdgrad, step)(model, images, labels, 0.1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# Moments of the directions


def assert_mean(samples, expected, errors=5):
    error = samples.std(0) / math.sqrt(len(samples)) + 1e-12
    off = ((samples.mean(0) - expected).abs() / error).max().item()
    assert off < errors, f"{off:.1f} standard errors"


def assert_scalar_mean(samples, expected, visible):
    """Check a mean, and that the share visible of it could be missed."""
    error = samples.std() / math.sqrt(len(samples))
    assert 5 * error < visible * expected, f"{error / expected:.2f}"
    assert_mean(samples, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_direction_has_mean_zero_and_identity(fwdgrad, kind, blocks, bias):
    layer = nn.Linear(3, 4, bias=bias)
    if kind == "convolution":
        layer = nn.Conv2d(1, 4, (1, 3), bias=bias)
    model, noise, draws = nn.Sequential(layer), seeded(6), 3000
    directions = [
        fwdgrad.draw(layer, blocks, generator=noise) for _ in range(draws)
    ]
    v = torch.stack([in_full(model, 0, d) for d in directions])
    weights = torch.tensor([d.weight for d in directions])
    assert_mean(v, torch.zeros(()))
    second = weights[:, None, None] * v[:, :, None] * v[:, None, :]
    assert_mean(second, torch.eye(v.shape[1]))
    assert set(v.abs().sum(1).tolist()) == {v.shape[1] / blocks}
    starts = {d.units.start or 0 for d in directions}
    assert starts == set(range(0, 4, 4 // blocks))


def test_units_that_cannot_be_split_move_as_a_whole(fwdgrad):
    direction = fwdgrad.draw(nn.Linear(3, 10), 16, 0.25, seeded())
    assert direction.units == slice(None) and len(direction.u) == 10
    assert direction.weight == 4


def test_a_direction_counts_blocks_over_chance_times(fwdgrad):
    direction = fwdgrad.draw(nn.Linear(3, 32), 16, 0.25, seeded())
    assert direction.weight == 64
    assert len(direction.u) == 2


def test_the_steady_choice_draws_four_blocks_of_a_linear_layer(fwdgrad):
    layers = [nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 10)]
    directions = fwdgrad.steady_choice(nn.Sequential(*layers), seeded())
    assert [index for index, _ in directions] == [0] * 4 + [2] * 4
    assert [d.weight for _, d in directions] == [16] * 4 + [0.25] * 4
    assert [len(d.u) for _, d in directions] == [2] * 4 + [10] * 4


def choose(fwdgrad, name):
    """Return a way to choose directions, joint or not, and each 1/p."""
    return {
        "joint": (fwdgrad.every_layer, True),
        "every layer": (fwdgrad.every_layer, False),
        "one layer": (fwdgrad.one_layer, False),
        "fast": (partial(fwdgrad.fast_choice, blocks=16), False),
        "steady": (fwdgrad.steady_choice, False),
    }[name]


def one_over_p(model, name):
    """Return 1/p for each weighted layer, over its number of draws."""
    roots = [math.sqrt(model[i].weight.numel()) for i in weighted(model)]
    return {
        "joint": [1, 1, 1],
        "every layer": [1, 1, 1],
        "one layer": [3, 3, 3],
        "fast": [sum(roots[:-1]) / root for root in roots[:-1]] + [1],
        "steady": [1, 0.25, 0.25],  # one convolution; four draws of others
    }[name]


@pytest.mark.parametrize("name", ["one layer", "fast"])
def test_layers_are_chosen_with_their_chances(fwdgrad, name):
    model, _, _ = small_network()
    function, _ = choose(fwdgrad, name)
    inverse = dict(zip(weighted(model), one_over_p(model, name), strict=True))
    noise, draws, counts = seeded(7), 2000, dict.fromkeys(inverse, 0)
    for _ in range(draws):
        directions = function(model, noise)
        assert len(directions) == (2 if name == "fast" else 1)
        for index, direction in directions:
            counts[index] += 1
            split = name == "fast" and len(model[index].weight) == 16
            expected = inverse[index] * (16 if split else 1)
            assert direction.weight == pytest.approx(expected, rel=1e-5)
    for index, count in counts.items():
        p = 1 / inverse[index]
        error = math.sqrt(p * (1 - p) / draws) + 1e-12
        assert abs(count / draws - p) < 5 * error


@pytest.mark.parametrize(
    ("name", "draws"),
    [("joint", 2000), ("every layer", 2000), ("one layer", 3000)]
    + [("fast", 5000), ("steady", 5000)],
)
def test_an_estimate_has_the_mean_and_noise_derived(fwdgrad, name, draws):
    model, images, labels = small_network()
    function, joint = choose(fwdgrad, name)
    noise = seeded(8)
    samples = torch.stack(
        [
            fwdgrad.estimate(model, images, labels, function, noise, joint)
            for _ in range(draws)
        ]
    )
    exact = gradient(model, images, labels)
    assert_mean(samples, exact)
    along = samples @ exact / exact.square().sum()
    assert_scalar_mean(along, 1, visible=0.7)
    sizes = [
        sum(p.numel() for p in model[i].parameters()) for i in weighted(model)
    ]
    norms = [part.square().sum() for part in exact.split(sizes)]
    moment = sum(
        factor * d * norm
        for factor, d, norm in zip(
            one_over_p(model, name), sizes, norms, strict=True
        )
    )
    if joint:
        moment = sum(sizes) * sum(norms)
    if name == "steady":  # four draws differ: their products have means
        moment += 0.75 * sum(norms[1:])
    assert_scalar_mean(samples.square().sum(1), moment, visible=0.7)


def test_layer_norms_are_those_of_autograd(fwdgrad):
    model, images, labels = small_network()
    exact, d, norms = fwdgrad.layer_norms(model, images, labels)
    torch.testing.assert_close(exact, gradient(model, images, labels))
    assert d.tolist() == [80, 272, 68]
    expected = [part.square().sum() for part in exact.split([80, 272, 68])]
    torch.testing.assert_close(norms, torch.stack(expected))


# What a step leaves behind


@pytest.mark.parametrize("step", STEPS)
def test_a_step_leaves_no_graph_and_no_gradients(fwdgrad, step):
    model, images, labels = small_network()
    loss = get_step(fwdgrad, step)(model, images, labels, 0.1)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.grad_fn is None
        assert parameter.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("step", STEPS)
def test_only_backprop_keeps_a_tape(fwdgrad, step):
    model, images, labels = small_network()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, kept.pop):
        get_step(fwdgrad, "one layer")(model, images, labels, 0.1)
        if step != "backprop":
            get_step(fwdgrad, step)(model, images, labels, 0.1)
        else:
            F.cross_entropy(model(images), labels)
    assert bool(kept) == (step == "backprop")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("first", ["flatten", "relu", "pool"])
def test_a_step_leaves_its_batch_unchanged(fwdgrad, first, step):
    begin = {
        "flatten": [nn.Flatten(), nn.ReLU()],
        "relu": [nn.ReLU(), nn.Flatten()],
        "pool": [nn.MaxPool2d(1), nn.ReLU(), nn.Flatten()],
    }[first]
    layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    model = nn.Sequential(*begin, *layers).double()
    images, labels = a_batch(8, (1, 4, 4), 4)
    kept = images.clone(), labels.clone()
    get_step(fwdgrad, step)(model, images, labels, 0.1)
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that owns new memory."""

    def __init__(self, model):
        super().__init__()
        self.old = {
            p.untyped_storage().data_ptr() for p in model.parameters()
        }
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor):
                continue
            if "zerotensor" in str(function):  # has no memory
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.old:
                size = storage.nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return out


def test_the_fast_step_makes_no_tensor_as_large_as_a_layer(fwdgrad):
    model = fwdgrad.stack(3, width=256)
    images, labels = a_batch(2, dtype=torch.float32)
    largest = {}
    for step in "fast", "textbook":
        with Largest(model) as mode:
            get_step(fwdgrad, step)(model, images, labels, 0.1)
        largest[step] = mode.elements
    assert largest["textbook"] >= 784 * 256
    assert largest["fast"] < 256 * 256 / 16


def test_peak_megabytes_is_the_most_at_one_time(fwdgrad):
    def step():
        for _ in range(3):
            first = torch.empty(1_000_000)
            second = torch.empty(500_000)
            del first, second

    assert fwdgrad.peak_megabytes(step) == pytest.approx(6, abs=0.1)


def test_only_the_fast_steps_memory_ignores_depth(fwdgrad):
    images, labels = a_batch(512, dtype=torch.float32)
    peaks = {}
    for depth in 4, 32:
        model = fwdgrad.stack(depth, width=64)
        for name in "fast", "textbook", "backprop":
            step = get_step(fwdgrad, name)
            call = partial(step, model, images, labels, 1e-9)
            torch.manual_seed(0)  # the fast step's layers are drawn
            tries = range(10 if name == "fast" else 1)
            found = [fwdgrad.peak_megabytes(call) for _ in tries]
            peaks[name, depth] = max(found)
    assert peaks["fast", 32] < 1.1 * peaks["fast", 4]
    for name in "textbook", "backprop":
        assert peaks[name, 32] > 1.1 * peaks[name, 4]
    activations = 4 * 512 * 64 * 32 / 1e6
    assert peaks["backprop", 32] > activations
    assert peaks["fast", 32] < activations / 4


# The loop


def spy_on(step, seen):
    def spy(model, images, labels, learning_rate):
        seen.append((images.clone(), labels.clone(), learning_rate))
        return step(model, images, labels, learning_rate)

    return spy


@pytest.fixture(scope="module")
def runs(fwdgrad):
    """Return what each method saw, its history and model, twice."""
    digits, results = small_digits(fwdgrad), {}
    for name in STEPS:
        for repeat in range(2):
            model, seen = fwdgrad.LogisticRegression(), []
            step = spy_on(get_step(fwdgrad, name), seen)
            history = fwdgrad.train(
                model, step, digits, 1e-3, 12, seed=5, batch=16, tests=3
            )
            results[name, repeat] = seen, history, flat(model)
            torch.rand(repeat)  # moves the global generator
    return results


@pytest.mark.parametrize("name", STEPS)
def test_the_rate_decays_alike_for_every_method(runs, name):
    rates = [rate for _, _, rate in runs[name, 0][0]]
    expected = [1e-3 * math.exp(-1e-4 * i) for i in range(12)]
    np.testing.assert_allclose(rates, expected, 1e-14)


@pytest.mark.parametrize("name", STEPS[1:])
def test_methods_see_the_same_batches_in_the_same_order(runs, name):
    both = zip(runs["backprop", 0][0], runs[name, 0][0], strict=True)
    for ours, others in both:
        assert len(ours[0]) == 16
        assert torch.equal(ours[0], others[0])
        assert torch.equal(ours[1], others[1])


@pytest.mark.parametrize("name", STEPS)
def test_the_same_seed_gives_the_same_run(runs, name):
    (_, first, model), (_, second, again) = runs[name, 0], runs[name, 1]
    assert torch.equal(model, again)
    for key in "loss", "tested", "accuracy":
        np.testing.assert_array_equal(first[key], second[key])


def test_another_seed_gives_another_run(fwdgrad, runs):
    digits = small_digits(fwdgrad)
    model = fwdgrad.LogisticRegression()
    step = fwdgrad.forward_gradient_step
    fwdgrad.train(model, step, digits, 1e-3, 12, seed=6, batch=16)
    assert not torch.equal(flat(model), runs["textbook", 0][2])


@pytest.mark.parametrize("name", STEPS)
def test_the_history_has_a_row_for_each_iteration(runs, name):
    seen, history, _ = runs[name, 0]
    assert len(seen) == 12
    assert history["loss"].shape == history["seconds"].shape == (12,)
    assert history["tested"].tolist() == [4, 8, 12]
    assert history["accuracy"].shape == (3,)
    assert history["loss"][0] == pytest.approx(math.log(10), abs=1e-6)


def test_backprop_learns_in_the_loop(fwdgrad):
    digits = small_digits(fwdgrad)
    model = fwdgrad.LogisticRegression()
    history = fwdgrad.train(
        model, fwdgrad.backprop_step, digits, 0.05, 60, batch=50
    )
    assert history["loss"][-1] < 0.5
    assert history["accuracy"][-1] > 0.9


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(1, 20),
    batch=st.integers(1, 25),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_each_epoch_visits_each_image_once(
    fwdgrad, count, batch, iterations, seed
):
    numbers = torch.arange(count)
    digits = fwdgrad.Digits(numbers.double(), numbers, None, None)
    drawn = list(fwdgrad.batches(digits, batch, iterations, seed))
    assert len(drawn) == iterations
    for images, labels in drawn:
        assert len(images) == batch
        assert torch.equal(images.long(), labels)
    order = torch.cat([labels for _, labels in drawn]).tolist()
    epochs = [order[i : i + count] for i in range(0, len(order), count)]
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(count))
    assert len(set(epochs[-1])) == len(epochs[-1])


def test_epochs_differ_in_order(fwdgrad):
    numbers = torch.arange(50)
    digits = fwdgrad.Digits(numbers, numbers, None, None)
    one, two = (images for images, _ in fwdgrad.batches(digits, 50, 2, 0))
    other = next(fwdgrad.batches(digits, 50, 1, 1))[0]
    assert not torch.equal(one, two)
    assert not torch.equal(one, numbers)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_train_names_iteration_and_rate_of_a_bad_loss(fwdgrad, value):
    losses = iter([1.0, 2.0, value, 3.0])
    message = f"loss is {value} at iteration 3, learning rate 5.0e-02"

    def step(*batch):
        return torch.tensor(next(losses))

    with pytest.raises(FloatingPointError, match=message):
        model = fwdgrad.LogisticRegression()
        fwdgrad.train(model, step, small_digits(fwdgrad), 0.05, 4, batch=8)
    assert next(losses) == 3  # it stopped there


def test_a_rate_far_too_large_stops_a_real_run(fwdgrad):
    model = fwdgrad.LogisticRegression()
    step = fwdgrad.forward_gradient_step
    with pytest.raises(FloatingPointError, match="1.0e[+]36"):
        fwdgrad.train(model, step, small_digits(fwdgrad), 1e36, 50)


def test_check_finite_returns_a_finite_loss(fwdgrad):
    assert fwdgrad.check_finite(2.5, 1, 0.1) == 2.5


def test_the_clock_of_a_run_counts_its_steps_alone(
    fwdgrad, monkeypatch, capsys
):
    now, spoken = [0.0], [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(fwdgrad, "time", clock)

    def step(*batch):
        if capsys.readouterr().out:
            spoken.append(now[0])
        now[0] += 3
        return torch.tensor(1.0)

    def accuracy(*model_and_digits):
        now[0] += 1000
        return 0.5

    digits = small_digits(fwdgrad)
    with monkeypatch.context() as patch:
        patch.setattr(fwdgrad, "accuracy", lambda *_: 0.5)
        fwdgrad.train(None, step, digits, 0.1, 20, batch=8)
    assert max(np.diff(spoken)) <= 10
    assert len(spoken) > 5
    monkeypatch.setattr(fwdgrad, "accuracy", accuracy)
    history = fwdgrad.train(None, step, digits, 0.1, 6, batch=8, tests=2)
    assert history["seconds"].tolist() == [3, 6, 9, 12, 15, 18]


def test_accuracy_is_the_share_of_right_answers(fwdgrad):
    labels = torch.randint(10, (2345,), generator=seeded())
    images = F.one_hot(labels, 10).float()
    images[:345] = images[:345].roll(1, 1)
    digits = fwdgrad.Digits(None, None, images, labels)
    found = fwdgrad.accuracy(nn.Identity(), digits)
    assert found == pytest.approx(2000 / 2345, abs=1e-6)


@pytest.mark.parametrize(
    "choose", ["every_layer", "one_layer", "fast_choice", "steady_choice"]
)
def test_a_model_without_weights_is_refused(fwdgrad, choose):
    nested = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(36, 10)))
    with pytest.raises(TypeError, match="no tangent rule"):
        getattr(fwdgrad, choose)(nested)
