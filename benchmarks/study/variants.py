"""What the study trains with beside the methods of examples/methods.py: controls, and remedies that were tried."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from methods import CKTAT, TRADES, Terms
from pgd import Objective
from torch import Tensor


@dataclass(frozen=True)
class ChangedCKTAT(CKTAT):
    """CKTAT with changes, each off by default."""

    one_hot: bool = False  # the labels take the teacher's place, as predictions of probability one
    # Divide the loss of each sample by 1 + beta_i, so that beta says where to go and not how fast. With S(x) detached,
    # both terms together are (1 + beta_i) times the KL from one mixture of their targets.
    normalized: bool = False
    mixing: bool = True  # False leaves the consistency term out and keeps its weight: (1 + beta_i) times the guidance
    shared: bool = False  # without mixing too, compute S(x): BatchNorm sees clean and adversarial images together
    of_batch: bool = False  # every sample has its batch's mean of beta_i: steps change as they do, no sample goes first
    mean_1: bool = False  # divide a batch's loss by the mean of 1 + beta_i: samples differ in weight, no step is longer
    clean_guidance: float = 0.0  # weight of KL(softmax(T(x)/tau) || softmax(S(x))): the teacher anchors S(x) too
    clean_label: float = 0.0  # weight of the cross-entropy CE(S(x), y): the labels anchor S(x)
    label: float = 0.0  # weight of the cross-entropy CE(S(x'), y): the teacher's mistakes are not all that is learned
    logit_penalty: float = 0.0  # weight of the mean square of S(x'), against logits so large that gradients vanish
    objective: Objective = "ce"  # what the training attack maximises

    @property
    def clean_forward(self) -> bool:
        """Whether S(x) is computed, which BatchNorm sees too."""
        return self.mixing or self.shared or self.clean_guidance > 0 or self.clean_label > 0

    def __call__(
        self, *, clean_logits: Tensor | None, adv_logits: Tensor, teacher_logits: Tensor, y: Tensor, beta: float
    ) -> Terms:
        if self.one_hot:
            # At any tau: the other classes' logits are far enough below to have probability zero.
            teacher_logits = torch.zeros_like(adv_logits, dtype=torch.float32).scatter(1, y[:, None], 1e6)
        terms = partial(self.criterion.terms, teacher_logits=teacher_logits)
        clean_or_adv = adv_logits if clean_logits is None else clean_logits  # without S(x) its term goes unused
        guidance, consistency = terms(clean_logits=clean_or_adv, adv_logits=adv_logits)
        weights = self.weights(adv_logits, y, beta)
        if self.of_batch:
            weights = weights.mean()
        per_sample = guidance + weights * (consistency if self.mixing else guidance)
        if self.normalized:
            per_sample = per_sample / (1 + weights)
        if self.mean_1:
            per_sample = per_sample / (1 + weights).mean()
        if self.clean_guidance:
            on_clean, _ = terms(clean_logits=clean_logits, adv_logits=clean_logits)
            per_sample = per_sample + self.clean_guidance * on_clean
        if self.clean_label:
            per_sample = per_sample + self.clean_label * F.cross_entropy(clean_logits.float(), y, reduction="none")
        if self.label:
            per_sample = per_sample + self.label * F.cross_entropy(adv_logits.float(), y, reduction="none")
        if self.logit_penalty:
            per_sample = per_sample + self.logit_penalty * adv_logits.float().square().mean(1)
        return Terms(per_sample.mean(), guidance.detach().mean(), consistency.detach().mean())


@dataclass(frozen=True)
class ChangedTRADES(TRADES):
    """TRADES with CKTAT's recipe, as far as it is asked for."""

    detach_clean: bool = False  # no gradient through S(x) in the KL
    objective: Objective = "kl"  # what the training attack maximises; "ce" starts anywhere in the eps-ball

    def attack_start(self, x: Tensor) -> Tensor | None:
        return super().attack_start(x) if self.objective == "kl" else None

    def __call__(
        self, *, clean_logits: Tensor, adv_logits: Tensor, teacher_logits: None, y: Tensor, beta: float
    ) -> Terms:
        clean, adv = clean_logits.float(), adv_logits.float().log_softmax(1)
        target = (clean.detach() if self.detach_clean else clean).log_softmax(1)
        consistency = F.kl_div(adv, target, reduction="batchmean", log_target=True)
        return Terms(F.cross_entropy(clean, y) + beta * consistency, consistency=consistency.detach())
