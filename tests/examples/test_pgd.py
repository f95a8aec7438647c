"""examples/pgd.py: strong enough, inside its bounds, and without a trace on the model."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pgd import check, direction, fraction, pgd
from torch import nn

USUAL = {"eps": 0.1, "step": 0.05, "steps": 3}


class Net(nn.Module):
    """Convolution, BatchNorm, Dropout and a head; counts its forwards and notes the mode of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4 * 6 * 6, 3)
        self.modes: list[list[bool]] = []

    def forward(self, x):
        self.modes.append([module.training for module in self.modules()])
        return self.head(self.dropout(self.bn(self.conv(x)).relu()).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y():
    return torch.tensor([0, 1, 2, 0])


def linear(pixels=6, classes=3, dtype=torch.float64):
    """A linear classifier, on which the cross-entropy is convex in the image."""
    torch.manual_seed(0)
    return nn.Linear(pixels, classes, dtype=dtype)


def lengths(change, norm):
    """A plain computation of how far each image was moved."""
    rows = change.double().flatten(1)
    return rows.abs().amax(1) if norm == "linf" else rows.square().sum(1).sqrt()


def trades_attack(model, x, *, eps, step, steps, start):
    """An attack as in the code of TRADES' authors, who compute the clean logits anew for each step."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        loss = F.kl_div(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0.0, 1.0)
    return x_adv


# Bounds


@given(
    norm=st.sampled_from(["linf", "l2"]),
    loss=st.sampled_from(["ce", "kl"]),
    share=st.floats(0, 1),
    step=st.floats(1e-3, 5),
    steps=st.integers(1, 4),
    random_start=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_images_stay_in_the_ball_and_in_0_1(norm, loss, share, step, steps, random_start, dtype):
    eps = 1e-6 + share * (0.99 if norm == "linf" else 3)
    model, y = linear(dtype=dtype), torch.tensor([0, 1, 2, 0, 1])
    x = torch.rand(5, 6, dtype=dtype)
    x[0], x[1] = 0, 1
    how = {"norm": norm, "loss": loss, "start": None if random_start else x}
    x_adv = pgd(model, x, y, eps=eps, step=step, steps=steps, **how)
    assert (lengths(x_adv - x, norm) <= eps + 1e-6).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert x_adv.dtype == dtype
    assert not x_adv.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_images_come_out_in_float32(net, x, y, dtype):
    assert pgd(net, x.to(dtype), y, **USUAL).dtype == torch.float32


def test_a_batch_of_none(net, x, y):
    assert pgd(net, x[:0], y[:0], **USUAL, norm="l2").shape == (0, 1, 8, 8)


# Strength


def two_classes(weight):
    """Logits 0 and x @ weight: for class 0, the loss only grows with x @ weight."""
    model = nn.Linear(len(weight), 2, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
    return model


def test_one_linf_step_reaches_the_optimum_of_a_linear_model():
    weight = torch.tensor([0.5, -2.0, 1e-3, -1e-3, 3.0, -0.1])
    x, y = torch.rand(20, 6), torch.zeros(20, dtype=torch.long)
    x_adv = pgd(two_classes(weight), x, y, eps=0.3, step=0.3, steps=1, start=x)
    torch.testing.assert_close(x_adv, (x + 0.3 * weight.sign()).clamp(0, 1))


@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0.01, 0.2),
    step=st.floats(1e-3, 1),
    steps=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_the_loss_does_not_fall_below_the_clean_one_on_a_linear_model(norm, eps, step, steps, seed):
    model, y = linear(), torch.tensor([0, 1, 2, 0, 1])
    x = 0.3 + 0.4 * torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x_adv = pgd(model, x, y, eps=eps, step=step, steps=steps, norm=norm, start=x)
    before, after = (F.cross_entropy(model(images), y, reduction="none") for images in (x, x_adv))
    assert (after >= before - 1e-12).all()
    assert after.sum() > before.sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_does_not_notice_the_others_of_its_batch(net, x, y, norm):
    start = (x + 0.02 * torch.randn_like(x)).clamp(0, 1)
    together = pgd(net, x, y, **USUAL, norm=norm, start=start)
    for i in range(4):
        one = slice(i, i + 1)
        alone = pgd(net, x[one], y[one], **USUAL, norm=norm, start=start[one])
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("scale", [1e-39, 1e-25, 1.0, 1e25])
def test_an_l2_step_is_as_long_whatever_the_gradients_scale(scale):
    """A saturated model's gradients are so small that their squares are zero, in float32."""
    step = direction(scale * torch.tensor([[3.0, -4.0]]), "l2")
    torch.testing.assert_close(step, torch.tensor([[0.6, -0.8]]), rtol=1e-4, atol=0)


def test_the_kl_attack_is_that_of_trades():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    with torch.no_grad():
        model[2].weight *= 10
    x = 0.1 + 0.8 * torch.rand(50, 6, dtype=torch.float64)
    start = x + 0.001 * torch.randn_like(x)
    wide = {"eps": 0.6, "step": 0.2, "steps": 6}  # close to x, the KL's other direction would lead to the same place
    ours = pgd(model, x, torch.zeros(50, dtype=torch.long), **wide, loss="kl", start=start)
    torch.testing.assert_close(ours, trades_attack(model, x, **wide, start=start))


@pytest.mark.parametrize("reduced", [False, True])
def test_a_function_is_a_loss_too(reduced):
    """Here the label's logit, against the cross-entropy. On a linear model, one step goes to its best point."""
    model, y = linear(), torch.tensor([0, 1, 2, 0, 1])
    x = 0.3 + 0.4 * torch.rand(5, 6, dtype=torch.float64)

    def loss(logits, y):
        value = logits.gather(1, y[:, None]).squeeze(1)
        return value.sum() if reduced else value

    x_adv = pgd(model, x, y, eps=0.1, step=0.1, steps=1, loss=loss, start=x)
    torch.testing.assert_close(x_adv, x + 0.1 * model.weight[y].sign())


# Starts


def test_torch_manual_seed_repeats_a_random_start(net, x, y):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(pgd(net, x, y, **USUAL, norm="l2"))
    assert torch.equal(*runs)


def test_random_starts_fill_the_linf_ball():
    x = torch.full((5000, 2), 0.5)
    x_adv = pgd(two_classes(torch.ones(2)), x, torch.zeros(5000, dtype=torch.long), eps=0.4, step=1e-6, steps=1)
    change = x_adv - x
    assert change.abs().max() > 0.39
    assert change.std().item() == pytest.approx(0.4 / 3**0.5, rel=0.03)


def test_random_starts_fill_the_l2_ball():
    x, y = torch.full((5000, 2), 0.5), torch.zeros(5000, dtype=torch.long)
    x_adv = pgd(two_classes(torch.ones(2)), x, y, eps=0.4, step=1e-6, steps=1, norm="l2")
    radius = lengths(x_adv - x, "l2")
    assert (radius < 0.2).double().mean().item() == pytest.approx(0.25, abs=0.03)  # a quarter of the disc's area
    assert (x_adv - x).mean(0).abs().max() < 0.02


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("outside", [True, False])
def test_the_model_sees_nothing_outside_of_the_bounds(net, x, y, norm, outside):
    """From the first step on, with a given start outside of the ball and with a random one."""
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    pgd(net, x, y, **USUAL, norm=norm, start=1.5 - x if outside else None)
    assert len(seen) == 3
    for images in seen:
        assert (lengths(images - x, norm) <= 0.1 + 1e-6).all()
        assert images.min() >= 0
        assert images.max() <= 1


# No trace on the model


@pytest.mark.parametrize(("loss", "forwards"), [("ce", 3), ("kl", 4)])
def test_the_model_runs_in_eval_mode_and_stays_as_it_was(net, x, y, loss, forwards):
    """Module by module. The clean logits of "kl" are computed once."""
    net.dropout.eval()
    modes = [module.training for module in net.modules()]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    pgd(net, x, y, **USUAL, loss=loss)
    assert len(net.modes) == forwards
    assert not any(training for modes in net.modes for training in modes)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_modes_are_put_back_after_an_exception(net, x, y):
    net.bn.eval()
    before = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError):
        pgd(net, x[..., :5], y, **USUAL)
    assert [module.training for module in net.modules()] == before


# Company


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_autocast(net, x, y, loss):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = pgd(net, x, y, **USUAL, loss=loss)
        loss = net(x_adv).float().logsumexp(1).sum()
    assert x_adv.dtype == torch.float32
    assert (lengths(x_adv - x, "linf") > 0.09).all()
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_compiled_model(net, x, y):
    compiled = torch.compile(net, backend="eager")
    net.bn.eval()
    before = [module.training for module in net.modules()]
    x_adv = pgd(compiled, x, y, **USUAL, start=x)
    assert [module.training for module in net.modules()] == before
    torch.testing.assert_close(x_adv, pgd(net, x, y, **USUAL, start=x))


# Bad arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "at most 1 with norm linf, 100 with norm l2; got 0.1 with norm l1"),
        ({"eps": -0.1}, "got -0.1 with norm linf$"),
        ({"eps": 0}, "eps must be above 0"),
        ({"eps": float("nan")}, "got nan"),
        ({"eps": 8}, r"got 8 with norm linf: pixels are in \[0, 1\], so write 8/255"),
        ({"eps": 128, "norm": "l2"}, "got 128 with norm l2: .* write 128/255"),
        ({"step": 0.0}, r"step a finite number above 0, got 3 and 0\.0"),
        ({"step": float("inf")}, "got 3 and inf"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"x": torch.full((4, 1, 8, 8), -1.5)}, r"x must be images in \[0, 1\], got \[-1\.5, "),
        ({"x": torch.full((4, 1, 8, 8), float("nan"))}, r"x must be images in \[0, 1\]"),
        ({"x": torch.full((4, 1, 8, 8), 255, dtype=torch.uint8)}, r"got \[255, 255"),
    ],
)
def test_bad_arguments_are_named(net, x, y, change, message):
    with pytest.raises(ValueError, match=message):
        pgd(net, **{"x": x, "y": y, **USUAL, **change})


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.1", 0.1), ("1e-3", 1e-3)])
def test_numbers_can_be_fractions(text, value):
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["8/", "/255", "eight", "", "8/2/5", "8/0"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        check(fraction(text), "linf")
