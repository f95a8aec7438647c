"""The losses of examples/methods.py are the published formulae, computed here in float64 with NumPy and loops."""

import numpy as np
import pytest
import torch

from cktat_loss import CKTATLoss
from tests.examples_path import imported

N, C = 7, 5


@pytest.fixture(scope="module")
def methods():
    with imported("methods") as modules:
        yield modules.methods


@pytest.fixture
def batch():
    logits = {name: 3 * torch.randn(N, C) for name in ("clean_logits", "adv_logits", "teacher_logits")}
    return {**logits, "y": torch.randint(C, (N,))}


def softmax(row):
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def kl(p, q):
    return sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(C))


def expected(batch, sample):
    """The mean over the batch of what `sample` says of (clean, adversarial, teacher) logits and class."""
    c, a, t, y = (batch[name].double().numpy() for name in ("clean_logits", "adv_logits", "teacher_logits", "y"))
    return np.mean([sample(c[i], a[i], t[i], int(y[i])) for i in range(N)])


def test_trades_is_the_published_formula(methods, batch):
    terms = methods.TRADES()(**batch, beta=6.0)
    wanted = expected(batch, lambda c, a, t, y: -np.log(softmax(c)[y]) + 6.0 * kl(softmax(c), softmax(a)))
    assert terms.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert terms.consistency.item() == pytest.approx(
        expected(batch, lambda c, a, t, y: kl(softmax(c), softmax(a))), rel=1e-5
    )
    assert terms.guidance is None


def test_trades_trains_through_both_predictions(methods, batch):
    clean, adv = batch["clean_logits"].requires_grad_(), batch["adv_logits"].requires_grad_()
    y = torch.nn.functional.one_hot(batch["y"], C)
    loss = methods.TRADES()(**batch, beta=6.0).loss
    grads = torch.autograd.grad(loss, [clean, adv])
    c, a = (logits.detach().double().softmax(1) for logits in (clean, adv))
    log_ratio = c.log() - a.log()
    d_clean = (c - y + 6.0 * c * (log_ratio - (c * log_ratio).sum(1, keepdim=True))) / N
    torch.testing.assert_close(grads, (d_clean.float(), (6.0 * (a - c) / N).float()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "of"), [("PGDAT", "adv_logits"), ("Clean", "clean_logits")])
def test_pgd_at_and_clean_training_are_cross_entropies(methods, batch, method, of):
    wanted = expected(batch, lambda c, a, t, y: -np.log(softmax(a if of == "adv_logits" else c)[y]))
    only = {name: value if name in (of, "y") else None for name, value in batch.items()}
    assert getattr(methods, method)()(**only, beta=0.0).loss.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_cktat_is_equation_17_with_either_weight(methods, batch, adaptive, guidance):
    def sample(c, a, t, y):
        beta = 6.0 * (softmax(a)[y] if adaptive else 1.0)
        return guidance * kl(softmax(t / 2.0), softmax(a)) + beta * kl(softmax(c), softmax(a))

    method = methods.CKTAT(CKTATLoss(None, tau=2.0, adaptive=adaptive), guidance=guidance)
    assert method(**batch, beta=6.0).loss.item() == pytest.approx(expected(batch, sample), rel=1e-5)


def test_cktat_reports_both_terms_before_beta(methods, batch):
    method = methods.CKTAT(CKTATLoss(None, tau=2.0, adaptive=True), guidance=False)
    terms = method(**batch, beta=6.0)
    guidance = expected(batch, lambda c, a, t, y: kl(softmax(t / 2.0), softmax(a)))
    consistency = expected(batch, lambda c, a, t, y: kl(softmax(c), softmax(a)))
    assert terms.guidance.item() == pytest.approx(guidance, rel=1e-5)
    assert terms.consistency.item() == pytest.approx(consistency, rel=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_cktat_detaches_the_clean_prediction_as_its_criterion_says(methods, batch, detach):
    clean = batch["clean_logits"].requires_grad_()
    batch["adv_logits"].requires_grad_()
    method = methods.CKTAT(CKTATLoss(None, detach_clean=detach))
    method(**batch, beta=6.0).loss.backward()
    assert (clean.grad is None) == detach


def test_losses_of_half_precision_logits_are_float32(methods, batch):
    half = {name: value.half() if value.is_floating_point() else value for name, value in batch.items()}
    for method in (methods.TRADES(), methods.PGDAT(), methods.Clean(), methods.CKTAT(CKTATLoss(None, adaptive=True))):
        assert method(**half, beta=6.0).loss.dtype == torch.float32


def test_trades_attack_starts_beside_the_image_and_the_others_anywhere(methods):
    x = torch.rand(100, 3, 4, 4)
    trades = methods.TRADES()
    assert trades.objective == "kl"
    assert (trades.attack_start(x) - x).std().item() == pytest.approx(0.001, rel=0.1)
    for method in (methods.PGDAT(), methods.CKTAT(CKTATLoss(None, adaptive=True))):
        assert method.objective == "ce"
        assert method.attack_start(x) is None
