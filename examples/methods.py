"""Training methods, each as what it attacks with and the loss of a batch.

Logits are (N, C), of the student on clean images x (`clean_logits`), on adversarial images x' (`adv_logits`) and of
the frozen teacher on clean images (`teacher_logits`). Losses are float32 under autocast too.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pgd import Objective
from torch import Tensor

from cktat_loss import CKTATLoss, adaptive_beta


class Terms(NamedTuple):
    """The mean loss of a batch, to go backward from; and its terms before beta, detached, where it has them."""

    loss: Tensor
    guidance: Tensor | None = None
    consistency: Tensor | None = None


class Method:
    """What train.py trains with. A method of your own inherits from it; from CKTAT if it needs the teacher's logits."""

    # What the training attack maximises, a function as staticmethod(function); None: there is no attack.
    objective: ClassVar[Objective | None] = "ce"
    clean_forward: ClassVar[bool] = True  # whether the loss needs S(x)

    def attack_start(self, x: Tensor) -> Tensor | None:
        """Images to begin the attack at; None: anywhere in the eps-ball."""
        return None

    def __call__(
        self,
        *,
        clean_logits: Tensor | None,
        adv_logits: Tensor | None,
        teacher_logits: Tensor | None,
        y: Tensor,
        beta: float,
    ) -> Terms:
        """The loss of a batch, from the logits that the method asks for; the others are None."""
        raise NotImplementedError


@dataclass(frozen=True)
class CKTAT(Method):
    """mean_i [ KL(softmax(T(x)/tau) || softmax S(x')) + beta_i * KL(softmax S(x) || softmax S(x')) ].

    Eq. 17 of arXiv 2504.00038, with beta_i in the place of beta.

    Args:
        criterion: holds the frozen teacher, tau, whether S(x) is detached in the second term, and whether beta_i is
            beta * softmax(S(x'))[y], our recipe, or beta for every sample, the paper's.
        guidance: False leaves the first term out of the loss, an ablation; it is reported all the same.
    """

    criterion: CKTATLoss
    guidance: bool = True

    def __call__(
        self, *, clean_logits: Tensor, adv_logits: Tensor, teacher_logits: Tensor, y: Tensor, beta: float
    ) -> Terms:
        logits = {"clean_logits": clean_logits, "adv_logits": adv_logits, "teacher_logits": teacher_logits}
        if self.guidance:
            labels = y if self.criterion.adaptive else None
            loss, terms = self.criterion(**logits, y=labels, beta=beta, return_terms=True)
        else:
            terms = self.criterion.terms(**logits)
            loss = (self.weights(adv_logits, y, beta) * terms.consistency).mean()
        return Terms(loss, terms.guidance.detach().mean(), terms.consistency.detach().mean())

    def weights(self, adv_logits: Tensor, y: Tensor, beta: float) -> Tensor | float:
        """Of the consistency term: (N,), or one for all."""
        return adaptive_beta(adv_logits, y, beta=beta) if self.criterion.adaptive else beta


class TRADES(Method):
    """CE(S(x), y) + beta * KL(softmax S(x) || softmax S(x')), means over the batch.

    Zhang et al. 2019 (arXiv 1901.08573). Its attack maximises the KL, from where its authors' code begins.
    """

    objective = "kl"

    def attack_start(self, x: Tensor) -> Tensor | None:
        """Next to x, where the KL is 0 and has no gradient."""
        return x + 0.001 * torch.randn_like(x)

    def __call__(self, *, clean_logits: Tensor, adv_logits: Tensor, y: Tensor, beta: float, **_: object) -> Terms:
        clean, adv = clean_logits.float(), adv_logits.float()
        consistency = F.kl_div(adv.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        return Terms(F.cross_entropy(clean, y) + beta * consistency, consistency=consistency.detach())


class PGDAT(Method):
    """CE(S(x'), y), mean over the batch; S(x) is not computed. Madry et al. 2018 (arXiv 1706.06083)."""

    clean_forward = False

    def __call__(self, *, adv_logits: Tensor, y: Tensor, **_: object) -> Terms:
        return Terms(F.cross_entropy(adv_logits.float(), y))


class Clean(Method):
    """CE(S(x), y), mean over the batch: no attack. It trains the teacher."""

    objective = None

    def __call__(self, *, clean_logits: Tensor, y: Tensor, **_: object) -> Terms:
        return Terms(F.cross_entropy(clean_logits.float(), y))
