"""Sections 3, 5 and 6: steps, estimates and their table, mirrors, training.

Means are exact where the signs come from a Hadamard matrix (all_draws).
"""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_mean, lift, seeded
from torch import nn

pytestmark = pytest.mark.usefixtures("on_the_cpu")
same = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
FOUR, B = "AvgPool2d(2), Flatten()", "Linear(4, 3)"
NETWORKS = {  # for 4×4 pixels and 3 classes
    "ReLU": f"{FOUR}, Linear(4, 3), ReLU(), Linear(3, 4), ReLU(), {B}",
    "smooth": f"{FOUR}, Linear(4, 3), Tanh(), Linear(3, 4), GELU(), {B}",
    "dropout": f"{FOUR}, Dropout(0.3), Linear(4, 3), Dropout(0.3), "
    "Linear(3, 4, bias=False), Linear(4, 3, bias=False)",
    "convolutions": "Conv2d(1, 2, 2), ReLU(), Conv2d(2, 2, 2), LeakyReLU(), "
    "AvgPool2d(2), Flatten(), Linear(2, 3)",
    "pools": "Conv2d(1, 2, 2), BatchNorm2d(2, affine=False).eval(), Tanh(), "
    "AvgPool2d(2, 1), Conv2d(2, 3, 1), MaxPool2d(2), Flatten(), Linear(3, 3)",
    "geometry": "Conv2d(1, 2, (1, 2), (1, 2), (0, 1)), ReLU(), "
    "Conv2d(2, 4, (2, 1), dilation=(2, 1)), ReLU(), "
    "Conv2d(4, 1, 1, bias=False), Flatten(), Linear(6, 3)",
}
FROZEN = {
    "a frozen layer": ("ReLU", "4.weight", "4.bias"),
    "a frozen last layer": ("ReLU", "6.weight", "6.bias"),
    "a frozen bias": ("smooth", "2.bias"),
    "a frozen weight": ("convolutions", "2.weight"),
}
METHODS = lift("fwdgrad").METHODS
PLAIN = ["backprop_step", "forward_gradient_step", "backprop", "textbook"]
STEPS = [*PLAIN[:2], "rank_one_step", "one_layer_step"]
WHOLE = [*NETWORKS, *FROZEN][:-2]  # no layer is frozen in part
networks = pytest.mark.parametrize("name", [*NETWORKS, *FROZEN])
acts = pytest.mark.parametrize("act", [*STEPS, *METHODS])
methods = pytest.mark.parametrize("method", METHODS)


def network(name="ReLU", batch=2):
    """Return a network in double precision, and a batch for it."""
    torch.manual_seed(9)
    text, *parameters = FROZEN.get(name, [name])
    layers = eval(f"[{NETWORKS.get(text, text)}]", dict(vars(nn)))
    model = nn.Sequential(*layers).double()
    for parameter in parameters:
        model.get_parameter(parameter).requires_grad_(False)
    return model, torch.randn(batch, 1, 4, 4).double(), torch.arange(batch)


def get(fwdgrad, act, model, rate=1.0):
    """Return a step of this rate, or a method's estimate for the model."""
    if act in STEPS:
        return partial(getattr(fwdgrad, act), learning_rate=rate)
    return METHODS[act].make(model)


def weighted(model):
    return [k for k in model if isinstance(k, nn.Linear | nn.Conv2d)]


def free(module):
    return [p for p in module.parameters() if p.requires_grad]


def joined(tensors):
    return torch.cat([torch.empty(0), *(t.detach().ravel() for t in tensors)])


def by_layer(model, vector):
    """Return the parts of a vector that belong to the weighted layers."""
    return vector.split([len(joined(free(k))) for k in weighted(model)])


def filled(estimate, model, *batch, seed=3):
    """Return the .grad that an estimate fills in; the seed rules dropout."""
    for p in free(model):
        p.grad = torch.ones_like(p)  # left from another step
    torch.manual_seed(seed)
    estimate(model, *batch)
    grads = [(p, p.grad) for p in free(model)]
    return joined(torch.zeros_like(p) if g is None else g for p, g in grads)


def moved(step, model, *batch):
    """Return what a step of rate 1 subtracts from the weights of a copy."""
    after = copy.deepcopy(model)
    torch.manual_seed(3)
    step(after, *batch)
    return joined(free(model)) - joined(free(after))


def exact(model, images, labels):
    """Return the gradient by autograd."""
    torch.manual_seed(3)
    loss = F.cross_entropy(model(images), labels)
    return joined(torch.autograd.grad(loss, free(model)))


def random_guess(fwdgrad, model):
    weights = {k: torch.randn_like(k.weight) for k in weighted(model)[1:]}
    return partial(fwdgrad.down, weights=weights)


def all_draws(fwdgrad, run, count):
    """Return run() for signs that are uncorrelated over all these runs.

    count: how often; a power of 2 above the number of signs in a run.
    """
    found = []

    def signs(shape, like, generator=None):
        dealt = itertools.islice(row, math.prod(shape))
        return like.new_tensor([*dealt]).view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fwdgrad, "signs", signs)
        for i in range(count):  # a row of Hadamard's matrix; column 0 is ones
            row = ((-1.0) ** (i & j).bit_count() for j in range(1, count))
            found.append(run())
    return torch.stack(found)


def assert_along(found, a, factor=1):
    """Check for (a·v) v with signs v: its noise is (n − 1)‖a‖²."""
    v = found.sign()
    same(found, factor * (a @ v) * v)
    assert v.all()


# Estimates


@networks
def test_guessing_by_its_own_weights_is_backprop(fwdgrad, name):
    model, *batch = network(name)
    for noise in None, fwdgrad.RankOne, fwdgrad.Activities:
        for separate in False, True:
            options = {"noise": noise, "separate": separate}
            options |= {"guess": fwdgrad.down, "generator": seeded(5)}
            estimate = partial(fwdgrad.estimate, **options)
            same(filled(estimate, model, *batch), exact(model, *batch))


@pytest.mark.parametrize("separate", [False, True])
@networks
def test_noise_in_activities_has_the_gradient_as_mean(fwdgrad, name, separate):
    model, *batch = network(name)
    options = {"noise": fwdgrad.Activities, "separate": separate}
    options["guess"] = random_guess(fwdgrad, model) if separate else None
    estimate = partial(fwdgrad.estimate, **options)
    found = all_draws(fwdgrad, partial(filled, estimate, model, *batch), 128)
    same(found.mean(0), exact(model, *batch))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_noise_in_weights_is_slope_times_signs(fwdgrad, name, separate):
    model, *batch = network(name)
    options = {"separate": separate, "generator": seeded(5)}
    options["guess"] = random_guess(fwdgrad, model) if separate else None
    known = filled(partial(fwdgrad.estimate, **options), model, *batch)
    options["noise"] = fwdgrad.RankOne
    found = filled(partial(fwdgrad.estimate, **options), model, *batch)
    pairs = found - known, exact(model, *batch) - known
    found, rest = (by_layer(model, g)[:-1] for g in pairs)
    cases = zip(found, rest, strict=True)
    for case in cases if separate else [(joined(found), joined(rest))]:
        assert_along(*case)


@pytest.mark.parametrize("name", ["smooth", "a frozen bias", "a frozen weight"])
@methods
def test_a_method_has_the_gradient_as_mean_or_is_biased(method, name):
    model, *batch = network(name)
    expected, found = exact(model, *batch), []
    for seed in range(200):
        torch.manual_seed(0)  # the same random feedback; new mirrors
        estimate = METHODS[method].make(model)
        found.append(filled(estimate, model, *batch, seed=seed))
    if METHODS[method].formula == "0" and method != "backprop":  # no noise
        with pytest.raises(AssertionError):
            assert_mean(torch.stack(found), expected)
    else:
        assert_mean(torch.stack(found), expected)
    if method != "textbook":
        same(*(by_layer(model, g)[-1] for g in (found[0], expected)))


@pytest.mark.parametrize("name", ["ReLU", "smooth"])
@pytest.mark.parametrize("method", ["activities", "slope per layer", "corrected"])
def test_a_methods_noise_is_its_formula(fwdgrad, method, name):
    model, *one = network(name, batch=1)
    estimate, gradient = METHODS[method].make(model), exact(model, *one)
    rest = gradient
    if guess := estimate.keywords["guess"]:
        guess.learn()
        guess.probes = 0  # it stops to learn
        guessed = partial(fwdgrad.estimate, guess=guess)
        rest = gradient - filled(guessed, model, *one)

    def hidden(g):  # a bias's gradient is its unit's cotangent
        pairs = zip(weighted(model), by_layer(model, g), strict=True)
        return [a[-len(k.bias) :] for k, a in pairs][:-1]

    on = [a.count_nonzero() for a in hidden(gradient)]
    squares = [a.square().sum() for a in hidden(rest)]
    run = partial(filled, estimate, model, *one)
    variance = all_draws(fwdgrad, run, 8).var(0, correction=0)
    formula = fwdgrad.NOISE[METHODS[method].formula](on, squares)
    same(joined(hidden(variance)).sum(), formula)


def test_every_example_has_a_direction_of_its_own(fwdgrad):
    model, x, y = network("smooth", batch=1)
    errors, estimate = [], partial(fwdgrad.estimate, noise=fwdgrad.Activities)
    for n in 1, 64:
        found = filled(estimate, model, x.expand(n, 1, 4, 4), y.expand(n))
        errors.append((found - exact(model, x, y)).norm())
    assert errors[1] < 0.3 * errors[0]  # about an eighth


# Steps


@networks
def test_steps_follow_their_slopes(fwdgrad, name):
    model, *batch = network(name)
    gradient, noise = exact(model, *batch), seeded(6)
    v = [torch.empty_like(p).normal_(generator=noise) for p in free(model)]
    along = (gradient @ joined(v)) * joined(v)
    step = get(fwdgrad, "backprop_step", model, 0.5)
    same(moved(step, model, *batch), 0.5 * gradient)
    step = get(fwdgrad, "forward_gradient_step", model, 0.5)
    step = partial(step, generator=seeded(6))
    same(moved(step, model, *batch), 0.5 * along)
    step = partial(get(fwdgrad, "rank_one_step", model), generator=seeded(5))
    if name not in WHOLE:  # what is frozen adds to the slope, with mean 0
        found = [moved(step, model, *batch) for _ in range(400)]
        return assert_mean(torch.stack(found), gradient)
    assert_along(moved(step, model, *batch), gradient)
    parts, moving = by_layer(model, gradient), []
    layers = {k for k, a in enumerate(parts) if len(a)}
    for seed in range(16):
        step = get(fwdgrad, "one_layer_step", model)
        found = moved(partial(step, generator=seeded(seed)), model, *batch)
        found = by_layer(model, found)
        moving.append({k for k in layers if found[k].abs().max() > 1e-9})
        for k in moving[-1]:
            assert_along(found[k], parts[k], factor=len(layers))
    assert set.union(*moving) == layers and max(map(len, moving)) == 1


@acts
@pytest.mark.parametrize("name", ["pools", *FROZEN])
def test_what_is_frozen_stays_and_all_else_moves(fwdgrad, name, act):
    model, *batch = network(name)
    before, last = copy.deepcopy(model), [*model[-1].parameters()]
    expected = F.cross_entropy(model(batch[0]), batch[1]).detach()
    with torch.device("meta"):  # every new tensor needs a device by name
        ours = get(fwdgrad, act, model, 1e-2)
        losses = [ours(model, *batch) for _ in range(12)]
    same(losses[0], expected)  # the loss before the step
    for p in model.parameters():
        may = p.requires_grad and act not in STEPS[2:]
        assert p.grad is None or may
    if act in METHODS:
        torch.optim.SGD(model.parameters(), 1e-2).step()
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        moves = act != "output layer only" or any(p is k for k in last)
        assert torch.equal(p, old) != (moves and p.requires_grad)
    for ours, old in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(ours, old)


@pytest.mark.parametrize("act", ["textbook", "rank one", "activities", *STEPS[1:]])
def test_a_generator_decides_all_that_is_random(fwdgrad, act):
    model, *batch = network("smooth")

    def run(generator=None):
        other = copy.deepcopy(model)
        get(fwdgrad, act, other)(other, *batch, generator=generator)
        grads = [p.grad for p in free(other) if p.grad is not None]
        return joined([*other.parameters(), *grads])

    state = torch.get_rng_state()
    first, again, other = (run(seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(run(), run())


# What cannot work: one sentence, before anything is touched

BATCHES = {
    "images: none": lambda x, y: (x[:0], y[:0]),
    "images: bytes": lambda x, y: (x.byte(), y),
    "labels: numbers": lambda x, y: (x, y.double()),
    "labels: bytes": lambda x, y: (x, y.byte()),
    "labels: one-hot": lambda x, y: (x, F.one_hot(y, 3)),
    "labels: below 0": lambda x, y: (x, y - 1),
    "labels: above the last": lambda x, y: (x, y + 2),
    "labels: too few": lambda x, y: (x, y[:1]),
}
A = "Flatten(), Linear(16, 4)"
MODELS = {  # what the sentence names, and the layers
    "BatchNorm1d(4, eps": f"{A}, BatchNorm1d(4), {B}",
    "affine=False": f"{A}, BatchNorm1d(4, affine=False), {B}",
    "LayerNorm": f"{A}, LayerNorm(4), {B}",
    "layer 2": f"{A}, Sequential(Linear(4, 4), ReLU()), {B}",
    "Conv1d": "Flatten(2), Conv1d(1, 1, 1), Flatten(), Linear(16, 3)",
    "Linear(in_features=4": f"{A}, *[Linear(4, 4)] * 2, {B}",
    "ReLU": f"{A}, ReLU(inplace=True), {B}",
    "Dropout": f"{A}, Dropout(0.5, inplace=True), {B}",
    "padding": "Conv2d(1, 1, 3, padding='same'), Flatten(), Linear(16, 3)",
    "groups": "Conv2d(1, 2, 1), Conv2d(2, 2, 1, groups=2), Flatten(), Linear(32, 3)",
    "padding_mode": f"Conv2d(1, 1, 3, 2, 1, 1, 1, True, 'circular'), {A}",
    "the last layer": f"{A}, {B}, Softmax(1)",
    "nn.Sequential": B,
    "last layer": f"{A}, *(lambda r: (r, {B}, r))(ReLU())",
}


@acts
@pytest.mark.parametrize("case", [*BATCHES, *MODELS])
def test_what_cannot_work_is_refused_in_one_sentence(fwdgrad, case, act):
    layers, words = MODELS.get(case, "ReLU"), case
    model, *batch = network(layers)
    if case in BATCHES:
        batch, words = BATCHES[case](*batch), case[:6]
    elif case == "nn.Sequential":
        model = model[-1]
    if act in PLAIN and case in MODELS and "BatchNorm" not in layers:
        return  # for any model
    for p in free(model):
        p.grad = torch.ones_like(p)
    before, ours = copy.deepcopy(model.state_dict()), None
    with pytest.raises((TypeError, ValueError)) as caught:
        ours = get(fwdgrad, act, model)
        ours(model, *batch)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all((p.grad == 1).all() for p in free(model))
    if act == "corrected" and case in BATCHES:
        mirrors = ours.keywords["guess"].weights.values()
        assert not any(a.any() for a in mirrors)


@acts
def test_a_model_of_which_nothing_may_move_is_refused(fwdgrad, act):
    model, *batch = network()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="may move"):
        get(fwdgrad, act, model)(model, *batch)


# Signs and mirrors


@pytest.mark.parametrize("shape", [(), (63,), (2, 32), (5, 13), (4000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_even_and_uncorrelated(fwdgrad, shape, dtype):
    found = fwdgrad.signs(shape, torch.empty(2, dtype=dtype), seeded())
    assert found.shape == shape and found.dtype == dtype
    assert (found.abs() == 1).all()
    if len(found.ravel()) > 1000:  # all pairs in a word, and in neighbours
        rows = torch.cat([found[1:], found[:-1], torch.ones(3999, 1)], 1)
        moments = rows.T @ rows / 3999 - torch.eye(129)
        assert moments.abs().max() < 5.5 / math.sqrt(3999)


def test_mirrors_follow_the_weights_by_what_they_make_of_signs(fwdgrad):
    model, *batch = network("smooth")
    mirrors, once = fwdgrad.Mirrors(model), fwdgrad.Mirrors(model, probes=1)
    assert mirrors.weights.keys() == set(weighted(model)[1:])
    once.learn()
    for layer, a in once.weights.items():
        x = a[0].sign()
        same(a, torch.outer(layer.weight.detach() @ x, x) / (1 + len(x)))

    def miss(guess=None):  # its square is the noise, but for a factor
        guessed = partial(fwdgrad.estimate, guess=guess)
        return (filled(guessed, model, *batch) - exact(model, *batch)).norm()

    assert not any(a.any() for a in mirrors.weights.values())
    random = [miss(random_guess(fwdgrad, model)) for _ in range(9)]
    assert sum(random) / 9 > miss()
    first, *_, last = [miss(mirrors) for _ in range(20)]  # each call learns
    assert 0 < last < 1e-6 * first < first < miss()
    for layer in 50 * weighted(model)[1:]:
        layer.weight.data += 0.05 * torch.randn_like(layer.weight)
        mirrors.learn()
    assert miss(mirrors) < 0.2 * miss()


# Training


def train(fwdgrad, method, rate=0.2, steps=30, **options):
    """Return the history, the batches, the rates and the end of a run."""
    (model, *_), labels = network(), torch.arange(90) % 3
    images = torch.randn(90, 1, 4, 4, generator=seeded(8)).double()
    images += 3 * labels[:, None, None, None] - 3
    digits = fwdgrad.Digits(images, labels, images[:60], labels[:60])
    optimizer = torch.optim.SGD(model.parameters(), rate)
    ours, seen, rates = METHODS[method].make(model), [], []

    def estimate(model, images, labels):
        seen.append(torch.cat([images.flatten(1), labels[:, None]], 1))
        rates.append(optimizer.param_groups[0]["lr"])
        return ours(model, images, labels)

    inputs = model, estimate, optimizer, digits, steps
    torch.seed()  # the run sets its own
    with torch.device("meta"):
        history = fwdgrad.train(*inputs, batch=20, **options)
    return history, torch.stack(seen), np.array(rates), joined(free(model))


@methods
def test_a_run_has_its_seeds_batches_and_a_history(fwdgrad, method):
    history, seen, _, end = train(fwdgrad, method, tests=3)
    assert torch.equal(train(fwdgrad, method, tests=3)[-1], end)
    assert torch.equal(train(fwdgrad, "backprop")[1], seen)
    assert not torch.equal(train(fwdgrad, method, seed=1)[1], seen)
    assert history["loss"].shape == history["seconds"].shape == (30,)
    assert (np.diff(history["seconds"]) > 0).all()
    assert history["tested"][-1] == 30 and len(history["tested"]) == 3
    assert history["accuracy"].shape == (3,)


def test_weights_directions_and_batches_have_seeds_of_their_own(fwdgrad):
    """Else the directions would repeat the numbers that the weights began with."""
    model, images, labels = network(batch=20)
    seeds, data = [], fwdgrad.Digits(images, labels % 3, images, labels % 3)

    def estimate(model, *batch):
        seeds.append(torch.initial_seed())
        return fwdgrad.backprop(model, *batch)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fwdgrad.train(model, estimate, optimizer, data, 2, seed=5, batch=20)
    numbers = torch.arange(20)
    (first, _), *_ = fwdgrad.batches(numbers, numbers, 1, 20, seed=5)
    for seed in 5, seeds[0]:
        assert not torch.equal(first, torch.randperm(20, generator=seeded(seed)))
    assert len({5, *seeds}) == 2


def test_training_learns_by_its_schedule_and_a_diverging_run_goes_on(fwdgrad):
    history, _, rates, _ = train(fwdgrad, "backprop", steps=300)
    assert history["loss"][-20:].mean() < 0.5 * history["loss"][:20].mean()
    assert 0.8 < history["accuracy"][-1] <= 1
    assert 0.15 < max(rates) <= 0.2 and 0 < rates[-1] < 0.01 * max(rates)
    options = {"schedule": lambda i: 1 / (1 + i)}
    rates = train(fwdgrad, "backprop", **options)[2]
    np.testing.assert_allclose(rates, 0.2 / np.arange(1, 31))
    history, *_ = train(fwdgrad, "textbook", 1e9, 90)
    assert len(history["loss"]) == 90 and np.isnan(history["loss"][-1])
    assert history["accuracy"][-1] < 0.6


def test_an_epoch_has_every_image_once(fwdgrad):
    numbers, orders = torch.arange(20), []
    for seed in 0, 0, 1:
        found = [*fwdgrad.batches(numbers / 2, numbers, 5, 8, seed)]
        orders.append(torch.stack([y for _, y in found]).view(2, 20))
        assert all(torch.equal(x * 2, y) for x, y in found)
        assert torch.equal(orders[-1].sort()[0], numbers.expand(2, 20))
    assert torch.equal(orders[0], orders[1])
    assert len(torch.cat(orders[1:]).unique(dim=0)) == 4
