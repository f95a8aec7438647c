"""A module that holds the loss can be exported, and its gradient is the eager one."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from cktat_loss import CKTATLoss, functional

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Training(nn.Module):
    """A module with the loss inside, and a second loss without us, so that a gradient that is lost goes unnoticed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head, self.kind = nn.Linear(4, 3), kind
        self.criterion = CKTATLoss(
            nn.Linear(4, 3), 0.7, 5.3, adaptive=kind == "adaptive", detach_clean=kind == "detach"
        )

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        clean, adv = self.head(x), self.head(x_adv)
        others = clean.square().mean()
        if self.kind == "terms":
            guidance, consistency = self.criterion.terms(clean, adv, x)
            return others + (guidance + 2 * consistency).sum()
        if self.kind == "both":
            loss, terms = self.criterion(clean, adv, x, return_terms=True)
            return others + loss * terms.guidance.mean()
        return others + self.criterion(clean, adv, x, y=y if self.kind == "adaptive" else None)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["loss", "adaptive", "detach", "terms", "both"])
def test_the_gradient_of_an_exported_module(kind: str, strict: bool) -> None:
    module = Training(kind)
    batch = torch.randn(16, 4), torch.randn(16, 4), torch.randint(3, (16,))
    expected = torch.autograd.grad(module(*batch), [*module.head.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export's own
        try:
            exported = torch.export.export(module, batch, strict=strict).module()
        except KeyError:
            assert strict, "strict=False works in every version"
            assert TORCH < (2, 14), "older versions cannot export a module that is not registered, and say so"
            return
    parameters = dict(exported.named_parameters())
    gradients = torch.autograd.grad(exported(*batch), [parameters[f"head.{name}"] for name in ("weight", "bias")])
    torch.testing.assert_close(gradients, expected)


# The loss's clean, adversarial and teacher logits, of two tensors.
PICKS = [
    lambda r, other: (r, r, r),
    lambda r, other: (r, r, other),
    lambda r, other: (r, other, r),
    lambda r, other: (other, r, r),
    lambda r, other: (r, r.view_as(r), r.detach()),
]


@pytest.mark.parametrize("call", [functional.cktat_loss, lambda *args: sum(functional.cktat_terms(*args)).sum()])
def test_one_tensor_as_several_of_the_logits_compiles(call) -> None:
    torch.compiler.reset()
    r, other = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)

    def losses(r: Tensor, other: Tensor) -> list[Tensor]:
        return [call(*pick(r, other)) for pick in PICKS]

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(r, other), losses(r, other)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(sum(actual), r), torch.autograd.grad(sum(expected), r))
