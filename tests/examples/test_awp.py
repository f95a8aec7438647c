"""awp() of train.py perturbs weights as the code of its authors does, and leaves nothing else behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train import awp

GAMMA = 0.05


@pytest.fixture
def batch():
    return torch.rand(6, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def net():
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double()


def at(model, x_adv, x, y):
    return F.cross_entropy(model(x_adv), y)


def trades(model, x_adv, x, y):
    robust = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="batchmean")
    return F.cross_entropy(model(x), y) + 6.0 * robust


def published_step(model, loss, x_adv, x, y, lr):
    """A step of github.com/csdongxian/AWP, utils_awp.py and the lines of train_*.py around it, without weight decay."""
    proxy = copy.deepcopy(model)
    proxy_optim = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    # calc_awp
    proxy.train()
    proxy_optim.zero_grad()
    (-1.0 * loss(proxy, x_adv, x, y)).backward()
    proxy_optim.step()
    # diff_in_weights
    diff = {}
    for (name, old), new in zip(model.state_dict().items(), proxy.state_dict().values(), strict=True):
        if len(old.size()) <= 1:
            continue
        if "weight" in name:
            change = new - old
            diff[name] = old.norm() / (change.norm() + 1e-20) * change
    # perturb, train, restore
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in diff:
                parameter.add_(1.0 * GAMMA * diff[name])
    optimizer.zero_grad()
    loss(model, x_adv, x, y).backward()
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in diff:
                parameter.add_(-1.0 * GAMMA * diff[name])


@pytest.mark.parametrize("loss", [at, trades])
def test_steps_are_the_published_ones(batch, loss):
    x, y = batch
    ours, theirs = net(), net()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for seed in range(3):
        x_adv = x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed)).sign()
        published_step(theirs, loss, x_adv, x, y, lr=0.1)
        optimizer.zero_grad()
        with awp(ours, lambda x_adv=x_adv: loss(ours, x_adv, x, y), GAMMA):
            loss(ours, x_adv, x, y).backward()
        optimizer.step()
    for (name, value), wanted in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_move_by_gamma_of_their_norm_inside_and_come_back_to_the_bit(batch):
    x, y = batch
    model = net()
    before = copy.deepcopy(model.state_dict())
    with awp(model, lambda: at(model, x, x, y), GAMMA):
        for name in ("0.weight", "4.weight"):
            moved = (model.state_dict()[name] - before[name]).norm() / before[name].norm()
            assert moved.item() == pytest.approx(GAMMA)
        for name in ("0.bias", "1.weight", "1.bias", "4.bias", "1.running_mean", "1.num_batches_tracked"):
            assert torch.equal(model.state_dict()[name], before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_overflows_moves_nothing(batch):
    x, y = batch
    model = net()
    before = copy.deepcopy(model.state_dict())
    with awp(model, lambda: float("inf") * at(model, x, x, y), GAMMA):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
