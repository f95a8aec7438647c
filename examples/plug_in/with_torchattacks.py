"""CKTAT with an attack of torchattacks: pip install torchattacks."""

import torch
from torchattacks import PGD
from yours import EPS, STEP, STEPS, loader, optimizer, report, student, teacher

from cktat_loss import CKTATLoss, warm_start

warm_start(student, teacher)
criterion = CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)
attack = PGD(student, eps=EPS, alpha=STEP, steps=STEPS)  # it puts the student into eval mode, and back into train mode

for _ in range(3):
    for x, y in loader:
        x_adv = attack(x, y)
        clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
        loss = criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
report(student)
