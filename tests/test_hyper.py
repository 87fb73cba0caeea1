"""Section 9: derivatives of a whole training run by its hyperparameters."""

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(params=[3, 12])
def course(request):
    """Return data and start of a small training run."""
    source = torch.Generator().manual_seed(request.param)
    x = torch.randn(request.param, 5, 7, generator=source, dtype=torch.double)
    y = torch.randint(4, (request.param, 5), generator=source)
    W = torch.randn(7, 6, generator=source, dtype=torch.double)
    U = torch.randn(6, 4, generator=source, dtype=torch.double)
    state = [W, U, torch.zeros_like(W), torch.zeros_like(U)]
    data = [*zip(x, F.one_hot(y, 4).double(), strict=True)]
    return {"state": state, "data": data, "test": (x[0], y[0])}


def by_torch(raw, state, data, test):
    """Return the loss after torch.optim.SGD's steps."""
    W, U = (p.clone().requires_grad_() for p in state[:2])
    rate, momentum = raw[0].exp().item(), raw[1].sigmoid().item()
    sgd = torch.optim.SGD([W, U], rate, momentum)
    for x, y in data:
        sgd.zero_grad()
        F.cross_entropy(torch.tanh(x @ W) @ U, y.argmax(1)).backward()
        sgd.step()
    return F.cross_entropy(torch.tanh(test[0] @ W) @ U, test[1])


RAW = torch.tensor([-2.0, 1.0], dtype=torch.double)


def test_training_by_hand_is_torch_sgd(fwdgrad, course):
    ours, theirs = fwdgrad.final_loss(RAW, **course), by_torch(RAW, **course)
    torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("block", [None, 1, 2, 5, 100])
def test_both_modes_and_differences_agree(fwdgrad, course, block):
    def loss(raw):
        return fwdgrad.final_loss(raw, **course, block=block)

    reverse = torch.autograd.functional.jacobian(loss, RAW)
    forward = torch.func.jacfwd(lambda raw: fwdgrad.final_loss(raw, **course))(RAW)
    torch.testing.assert_close(reverse, forward)
    for k, h in enumerate(1e-5 * torch.eye(2).double()):
        quotient = by_torch(RAW + h, **course) - by_torch(RAW - h, **course)
        torch.testing.assert_close(quotient / 2e-5, forward[k], rtol=1e-6, atol=1e-8)
