"""Section 7: each rung's mean and noise, local losses, the schedule."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch import nn

pytestmark = pytest.mark.usefixtures("on_the_cpu")
EXACT = {"rtol": 1e-9, "atol": 1e-12}
RUNGS = ["activities", "+ mask", "+ 16 directions", "+ groups"]
RUNGS += ["+ guess", "+ groups, guess"]
INPUTS, UNITS, BATCH = 5, 32, 8


def mlp(*hidden):
    """Return a small network in double precision, and a batch for it."""
    torch.manual_seed(1)
    layers, inputs = [nn.Flatten()], INPUTS
    for units in hidden:
        layers += [nn.Linear(inputs, units), nn.ReLU()]
        inputs = units
    model = nn.Sequential(*layers, nn.Linear(inputs, 10)).double()
    noise = seeded(2)
    images = torch.randn(BATCH, 1, 1, INPUTS, generator=noise).double()
    return model, images, torch.randint(10, (BATCH,), generator=noise)


def cnn():
    """Return a convolutional network for 14×14 pixels, and a batch."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(16 * 49, 16), nn.ReLU(), nn.Linear(16, 10)]
    noise = seeded(2)
    images = torch.randn(2, 1, 14, 14, generator=noise).double()
    labels = torch.randint(10, (2,), generator=noise)
    return nn.Sequential(*layers).double(), images, labels


def weighted(model):
    return [layer for layer in model if hasattr(layer, "weight")]


def joined(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradients(layer):
    """Return a layer's .grad as a vector."""
    return joined([layer.weight.grad, layer.bias.grad]).clone()


def exact(loss, *layers):
    """Return the gradient of loss for each layer, as vectors."""
    parameters = [p for layer in layers for p in layer.parameters()]
    found = torch.autograd.grad(loss, parameters)
    return [
        joined(pair) for pair in zip(found[::2], found[1::2], strict=True)
    ]


def sample(estimate, batch, layers, count, seed=3):
    """Return count estimates of every layer's gradient, (count, n) each."""
    torch.manual_seed(seed)
    found = []
    for _ in range(count):
        estimate(*batch)
        found.append([gradients(layer) for layer in layers])
    return [torch.stack(part) for part in zip(*found, strict=True)]


def assert_mean(samples, expected, errors=5, visible=None):
    """Check a mean within standard errors, small enough to see a bug."""
    error = samples.std(0) / math.sqrt(len(samples))
    off = (samples.mean(0) - expected).abs()
    assert (off <= errors * error + 1e-9).all()
    if visible is not None:  # a mistake by this share would be noticed
        assert errors * error < visible * abs(expected)


def assert_unbiased(samples, gradient):
    assert_mean(samples, gradient)
    along = samples @ gradient / gradient.square().sum()
    assert_mean(along, torch.tensor(1.0), visible=0.3)


def assert_second_moment(samples, moment):
    assert_mean(samples.square().sum(1), moment, visible=0.3)


def a_guess(sizes, seed=4):
    """Return matrices A for wrong guesses, in double precision."""
    noise = seeded(seed)
    return [
        (torch.randn(10, n, generator=noise) / 4).double().requires_grad_()
        for n in sizes
    ]


def make_rung(fwdgrad, name, sizes):
    rung = fwdgrad.RUNGS[name](sizes)
    if isinstance(rung, fwdgrad.Guess):
        rung.parameters = a_guess(sizes)
    return rung


def delta_of(model, images, labels):
    """Return δ of every hidden layer, its inputs and masks, by autograd."""
    x, before, inputs, masks = images.flatten(1), [], [], []
    *hidden, last = weighted(model)
    for layer in hidden:
        inputs.append(torch.cat([x, torch.ones(len(x), 1).double()], 1))
        before.append(layer(x))
        masks.append((before[-1] > 0).double())
        x = F.relu(before[-1])
    loss = F.cross_entropy(last(x), labels, reduction="sum")
    return torch.autograd.grad(loss, before), inputs, masks


# Random signs


def test_signs_are_even_and_independent(fwdgrad):
    torch.manual_seed(0)
    signs = fwdgrad.signs((4000, 7), torch.zeros(1).double())
    assert signs.shape == (4000, 7)
    assert signs.dtype == torch.float64
    assert (signs.abs() == 1).all()
    moments = signs.T @ signs / 4000
    assert (moments - torch.eye(7)).abs().max() < 5 / math.sqrt(4000)
    assert signs.mean(0).abs().max() < 5 / math.sqrt(4000)
    lags = [(signs[:-k] * signs[k:]).mean(0).abs().max() for k in (1, 2, 3)]
    assert max(lags) < 5 / math.sqrt(4000)
    assert not torch.equal(signs, fwdgrad.signs((4000, 7), signs))


# One hidden layer: every rung


def test_the_forward_pass_is_the_models(fwdgrad):
    model, images, labels = mlp(UNITS, 16)
    loss, error, inputs, masks = fwdgrad.forward_pass(model, images, labels)
    logits = model(images)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    expected = logits.softmax(1) - F.one_hot(labels, 10)
    torch.testing.assert_close(error, expected)
    deltas, with_ones, expected = delta_of(model, images, labels)
    for ours, other in zip(inputs, with_ones, strict=False):
        torch.testing.assert_close(ours, other[:, :-1])
    torch.testing.assert_close(masks, expected)
    assert len(inputs) == 3


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_has_the_gradient_as_its_mean_and_its_noise(fwdgrad, name):
    model, *data = mlp(UNITS)
    (delta,), (x,), (mask,) = delta_of(model, *data)
    layer = weighted(model)[0]
    estimate = fwdgrad.estimator(make_rung(fwdgrad, name, [UNITS]))
    (samples,) = sample(estimate, (model, *data), [layer], 3000)
    (gradient,) = exact(F.cross_entropy(model(data[0]), data[1]), layer)
    assert_unbiased(samples, gradient)
    on, rest = mask, delta
    if name == "activities":
        on = torch.ones_like(mask)
    if "guess" in name:
        logits = model(data[0]).detach()
        error = logits.softmax(1) - F.one_hot(data[1], 10)
        rest = delta - error @ a_guess([UNITS])[0].detach() * mask
    V = torch.zeros(BATCH)
    size = 16 if "groups" in name else UNITS
    for begin in range(0, UNITS, size):
        group = slice(begin, begin + size)
        square = rest[:, group].square().sum(1)
        V = V + (on[:, group].sum(1) - 1) * square
    if "directions" in name:
        V = V / 16
    noise = (V * x.square().sum(1)).sum() / BATCH**2
    assert_second_moment(samples, gradient.square().sum() + noise)
    assert_mean((samples - gradient).square().sum(1), noise, visible=0.3)
    found = fwdgrad.NOISE[name](mask, delta, rest)
    torch.testing.assert_close(found, V, **EXACT)


def test_the_rungs_tested_are_all(fwdgrad):
    assert list(fwdgrad.RUNGS) == list(fwdgrad.NOISE) == RUNGS
    assert set(RUNGS) < set(fwdgrad.METHODS)


@pytest.mark.parametrize("name", RUNGS)
def test_the_output_layer_is_exact(fwdgrad, name):
    model, *data = mlp(UNITS)
    last = weighted(model)[-1]
    fwdgrad.estimator(make_rung(fwdgrad, name, [UNITS]))(model, *data)
    (gradient,) = exact(F.cross_entropy(model(data[0]), data[1]), last)
    torch.testing.assert_close(gradients(last), gradient, **EXACT)


@pytest.mark.parametrize("name", RUNGS[1:])
def test_a_unit_that_is_off_gets_no_gradient(fwdgrad, name):
    model, *data = mlp(UNITS)
    layer = weighted(model)[0]
    with torch.no_grad():
        layer.bias[3] = -1e6
    fwdgrad.estimator(make_rung(fwdgrad, name, [UNITS]))(model, *data)
    assert layer.weight.grad[3].abs().max() == 0
    assert layer.weight.grad[4].abs().max() > 0


@pytest.mark.parametrize("name", RUNGS)
def test_examples_and_steps_have_directions_of_their_own(fwdgrad, name):
    weights = [torch.randn(10, UNITS, generator=seeded(5)).double()]
    masks = [torch.ones(BATCH, UNITS).double()]
    error = torch.randn(1, 10, generator=seeded(6)).double()
    error = error.expand(BATCH, 10)  # the same δ for every example
    rung = make_rung(fwdgrad, name, [UNITS])
    torch.manual_seed(7)
    first, second = (
        rung(weights, masks, error)[0],
        rung(weights, masks, error)[0],
    )
    rows = torch.cat([first, second])
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert not torch.allclose(row, other)
            assert not torch.allclose(row, -other)


def test_groups_of_one_unit_are_backprop(fwdgrad):
    weight = torch.randn(10, UNITS, generator=seeded(5)).double()
    mask = (torch.rand(BATCH, UNITS, generator=seeded(6)) > 0.5).double()
    error = torch.randn(BATCH, 10, generator=seeded(7)).double()
    (delta,) = fwdgrad.grouped([weight], [mask], error, size=1)
    torch.testing.assert_close(delta, error @ weight * mask, **EXACT)


# Weights


@pytest.mark.parametrize("k", [1, 4])
def test_weight_directions_have_mean_and_noise(fwdgrad, k):
    model, *data = mlp(UNITS)
    layer, last = weighted(model)
    estimate = fwdgrad.weight_rung(k)
    (samples,) = sample(estimate, (model, *data), [layer], 6000)
    loss = F.cross_entropy(model(data[0]), data[1])
    gradient, output = exact(loss, layer, last)
    assert_unbiased(samples, gradient)
    moment = (1 + (gradient.numel() - 1) / k) * gradient.square().sum()
    assert_second_moment(samples, moment)
    torch.testing.assert_close(gradients(last), output, **EXACT)


def test_projection_is_the_gradients_on_the_span(fwdgrad):
    model, *data = mlp(UNITS)
    layer = weighted(model)[0]
    (gradient,) = exact(F.cross_entropy(model(data[0]), data[1]), layer)
    torch.manual_seed(8)
    fwdgrad.weight_rung(5, projected=True)(model, *data)
    torch.manual_seed(8)
    like = torch.zeros(1).double()
    u = fwdgrad.signs((5, UNITS), like)
    w = fwdgrad.signs((5, INPUTS + 1), like)
    full = torch.einsum("ki,kj->kij", u, w)
    span = torch.cat([full[:, :, :-1].flatten(1), full[:, :, -1]], 1)
    expected = span.T @ torch.linalg.lstsq(span.T, gradient[:, None]).solution
    torch.testing.assert_close(gradients(layer), expected[:, 0], **EXACT)


# Several hidden layers


def test_one_slope_hears_every_layer_and_own_slopes_do_not(fwdgrad):
    model, *data = mlp(16, 8)
    deltas, inputs, masks = delta_of(model, *data)
    layers = weighted(model)[:-1]
    every = exact(F.cross_entropy(model(data[0]), data[1]), *layers)
    whole = sum(delta.square().sum(1) for delta in deltas)
    for rung in fwdgrad.one_slope, fwdgrad.own_slopes:
        estimate = fwdgrad.estimator(rung)
        found = sample(estimate, (model, *data), layers, 4000)
        parts = zip(found, every, deltas, inputs, masks, strict=True)
        for samples, gradient, delta, x, mask in parts:
            assert_unbiased(samples, gradient)
            own = delta.square().sum(1)
            heard = whole if rung is fwdgrad.one_slope else own
            V = mask.sum(1) * heard - own
            noise = (V * x.square().sum(1)).sum() / BATCH**2
            moment = gradient.square().sum() + noise
            assert_second_moment(samples, moment)


def test_a_guess_in_every_layer_stays_unbiased(fwdgrad):
    model, *data = mlp(16, 8)
    rung = fwdgrad.Guess(fwdgrad.one_slope, [16, 8])
    rung.parameters = a_guess([16, 8])
    layers = weighted(model)[:-1]
    estimate = fwdgrad.estimator(rung)
    every = exact(F.cross_entropy(model(data[0]), data[1]), *layers)
    found = sample(estimate, (model, *data), layers, 4000)
    for samples, gradient in zip(found, every, strict=True):
        assert_unbiased(samples, gradient)


# Guesses


@pytest.mark.parametrize("inner", ["one_slope", "grouped"])
def test_a_perfect_guess_leaves_no_noise(fwdgrad, inner):
    model, *data = mlp(UNITS)
    layer, last = weighted(model)
    rung = fwdgrad.Guess(getattr(fwdgrad, inner), [UNITS])
    rung.parameters = [last.weight.detach().clone().requires_grad_()]
    fwdgrad.estimator(rung)(model, *data)
    (gradient,) = exact(F.cross_entropy(model(data[0]), data[1]), layer)
    torch.testing.assert_close(gradients(layer), gradient, **EXACT)
    assert rung.parameters[0].grad.abs().max() < 1e-12


@pytest.mark.parametrize("inner", ["one_slope", "grouped"])
def test_a_guess_learns_along_the_gradient_of_its_error(fwdgrad, inner):
    model, *data = mlp(UNITS)
    (delta,), _, (mask,) = delta_of(model, *data)
    error = model(data[0]).softmax(1) - F.one_hot(data[1], 10)
    (wrong,) = a_guess([UNITS])
    left = delta.detach() - error.detach() @ wrong * mask
    loss = left.square().sum(1).mean() / 2
    (gradient,) = torch.autograd.grad(loss, wrong)
    rung, samples = fwdgrad.Guess(getattr(fwdgrad, inner), [UNITS]), []
    rung.parameters = [wrong]
    torch.manual_seed(10)
    for _ in range(3000):
        fwdgrad.estimator(rung)(model, *data)
        samples.append(wrong.grad.flatten().clone())
    assert_unbiased(torch.stack(samples), gradient.flatten())


def test_a_guess_starts_at_zero_and_is_trained(fwdgrad):
    model, *data = mlp(UNITS)
    model.float()
    rung = fwdgrad.Guess(fwdgrad.grouped, [UNITS])
    assert rung.parameters[0].abs().max() == 0
    step = fwdgrad.adam(model, fwdgrad.estimator(rung))
    for _ in range(300):
        step(model, data[0].float(), data[1], 1e-2)
    similar = F.cosine_similarity(
        rung.parameters[0].flatten(), weighted(model)[-1].weight.flatten(), 0
    )
    assert similar > 0.3


# Local losses


def local_gradients(fwdgrad, local, model, images, labels):
    """Return, layer by layer, the exact gradients of the local losses."""
    x, every = images, []
    for layer in list(model)[:-1]:
        if layer not in local.parts:
            x = layer(x)
            continue
        readout, h = local.parts[layer][0], F.relu(layer(x.detach()))
        cells = h
        if h.dim() == 4:
            cells = F.adaptive_avg_pool2d(h, 7)
        logits = readout(cells.flatten(1))
        every.append(exact(F.cross_entropy(logits, labels), layer, readout))
        x = h.detach()
    return every


@pytest.mark.parametrize("name", ["+ groups", "+ groups, guess"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_local_losses_follow_each_layers_own_loss(fwdgrad, network, name):
    model, *data = mlp(UNITS, 16) if network == "mlp" else cnn()
    local = fwdgrad.LocalLosses(model, partial(make_rung, fwdgrad, name))
    for i, (readout, _) in enumerate(local.parts.values()):
        readout.double()
        nn.init.normal_(readout.weight, generator=seeded(i))
    layers = list(local.parts)
    expected = local_gradients(fwdgrad, local, model, *data)
    count = 3000 if network == "mlp" else 1500
    found = sample(local, (model, *data), layers, count)
    for samples, (gradient, _) in zip(found, expected, strict=True):
        assert_unbiased(samples, gradient)
    for (readout, _), pair in zip(
        local.parts.values(), expected, strict=True
    ):
        torch.testing.assert_close(gradients(readout), pair[1], **EXACT)


def test_a_local_loss_of_exact_slopes_is_exact_for_a_convolution(fwdgrad):
    model, *data = cnn()
    one = partial(fwdgrad.grouped, size=1)
    local = fwdgrad.LocalLosses(model, lambda sizes: one)
    for i, (readout, _) in enumerate(local.parts.values()):
        readout.double()
        nn.init.normal_(readout.weight, generator=seeded(i))
    local(model, *data)
    expected = local_gradients(fwdgrad, local, model, *data)
    for layer, pair in zip(local.parts, expected, strict=True):
        torch.testing.assert_close(gradients(layer), pair[0], **EXACT)


def test_the_last_read_out_is_the_output_layer_and_counted_once(fwdgrad):
    model, *_ = mlp(UNITS, 16)
    local = fwdgrad.LocalLosses(model, fwdgrad.RUNGS["+ groups, guess"])
    readouts = [readout for readout, _ in local.parts.values()]
    assert readouts[-1] is model[-1]
    everything = [*model.parameters(), *local.parameters]
    assert len({id(p) for p in everything}) == len(everything)
    shapes = sorted(tuple(p.shape) for p in local.parameters)
    assert shapes == [(10,), (10, 16), (10, UNITS), (10, UNITS)]


def test_local_group_losses_follow_each_groups_own_loss(fwdgrad):
    model, *data = mlp(UNITS, 16)
    local, noise = fwdgrad.LocalGroupLosses(model), seeded(11)
    for p in local.parameters:
        p.normal_(generator=noise)
    layers, x, expected = weighted(model), data[0].flatten(1), []
    for layer, part in zip(layers, local.parts, strict=False):
        readout, bias = (p.clone().requires_grad_() for p in part)
        h, loss = F.relu(layer(x)), 0
        for g in range(len(bias)):
            logits = h[:, 16 * g : 16 * g + 16] @ readout[g].T + bias[g]
            loss = loss + F.cross_entropy(logits, data[1])
        own = torch.autograd.grad(loss, [readout, bias], retain_graph=True)
        expected.append((*exact(loss, layer), own))
        x = h.detach()
    found = sample(local, (model, *data), layers[:-1], 3000)
    both = zip(found, local.parts, expected, strict=True)
    for samples, part, (gradient, own) in both:
        assert_unbiased(samples, gradient)
        for p, derivative in zip(part, own, strict=True):
            torch.testing.assert_close(p.grad, derivative, **EXACT)
    loss = F.cross_entropy(layers[-1](x), data[1])
    (output,) = exact(loss, layers[-1])
    torch.testing.assert_close(gradients(layers[-1]), output, **EXACT)


# The loop


def test_a_rate_warms_up_and_decays_to_zero(fwdgrad):
    seen = []
    step = fwdgrad.scheduled(lambda *args: seen.append(args[-1]), 10, 4)
    for _ in range(10):
        step(None, None, None, 2.0)
    ramps = [0.25, 0.5, 0.75] + [1.0] * 7
    expected = [2 * r * (1 - i / 10) for i, r in enumerate(ramps)]
    assert seen == pytest.approx(expected)


def test_adam_follows_the_estimate(fwdgrad):
    model, *data = mlp(UNITS)
    other = copy.deepcopy(model)
    step = fwdgrad.adam(model, fwdgrad.backprop_gradient)
    optimiser = torch.optim.Adam(other.parameters(), lr=1e-2)
    for _ in range(3):
        loss = step(model, *data, 1e-2)
        optimiser.zero_grad()
        expected = F.cross_entropy(other(data[0]), data[1])
        expected.backward()
        optimiser.step()
        torch.testing.assert_close(loss, expected.detach())
    for ours, reference in zip(
        model.parameters(), other.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, reference)
        assert ours.grad is None


@pytest.mark.parametrize("name", [*RUNGS, "local group losses"])
def test_a_forward_only_method_keeps_no_tape(fwdgrad, name):
    model = fwdgrad.stack(1, width=32)
    images = torch.randn(4, 1, 28, 28, generator=seeded())
    step, kept = fwdgrad.METHODS[name](model), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, kept.pop):
        loss = step(model, images, torch.arange(4), 1e-3)
    assert not kept
    assert loss.grad_fn is None


def easy_digits(fwdgrad):
    """Return digits that are one bright row each, with a little noise."""
    labels = torch.arange(400) % 10
    images = 0.3 * torch.randn(400, 1, 28, 28, generator=seeded(12))
    images[torch.arange(400), 0, 2 * labels] += 2
    return fwdgrad.Digits(images, labels, images, labels)


RATES = {"textbook": 1e-3, "fast step, SGD": 1e-3, "backprop, SGD": 0.1}
METHODS = [
    "textbook",
    "fast step, SGD",
    "output layer only",
    "weights, 16 directions",
    *RUNGS,
]
METHODS += ["local group losses", "backprop, SGD", "backprop"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_in_the_loop(fwdgrad, name):
    data, make_step = easy_digits(fwdgrad), fwdgrad.METHODS[name]
    history = fwdgrad.climb(make_step, RATES.get(name, 4e-3), 150, data=data)
    assert history["accuracy"][-1] > (0.2 if name in METHODS[:2] else 0.9)


def test_the_methods_tested_are_all(fwdgrad):
    assert list(fwdgrad.METHODS) == METHODS
