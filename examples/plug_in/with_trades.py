"""CKTAT in a TRADES loop: the attack stays, the loss is replaced. docs/migrate_from_trades.md explains each line."""

import torch
import torch.nn.functional as F
from yours import EPS, STEP, STEPS, loader, optimizer, report, student, teacher

from cktat_loss import CKTATLoss, warm_start

warm_start(student, teacher)
criterion = CKTATLoss(teacher, tau=2.0, beta=6.0, adaptive=True, detach_clean=True)

for _ in range(3):
    for x, y in loader:
        # TRADES' attack maximises KL(S(x) || S(x')), from beside x.
        student.eval()
        clean = student(x).detach().softmax(1)
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            kl = F.kl_div(student(x_adv).log_softmax(1), clean, reduction="sum")
            (gradient,) = torch.autograd.grad(kl, x_adv)
            x_adv = (x + (x_adv.detach() + STEP * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
        student.train()
        clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
        # TRADES' loss was F.cross_entropy(clean_logits, y) + beta * KL(S(x) || S(x')).
        loss = criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
report(student)
