"""CKTAT in your own loop on Accelerate, on any number of devices: pip install accelerate."""

import torch
from accelerate import Accelerator
from yours import attack, loader, optimizer, report, student, teacher

from cktat_loss import CKTATLoss, warm_start

accelerator = Accelerator()  # mixed_precision="bf16", ...; started by `accelerate launch`
warm_start(student, teacher)
criterion = CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)
criterion.to(accelerator.device)  # not prepared, because it is not trained
wrapped, optimizer, loader = accelerator.prepare(student, optimizer, loader)

for _ in range(3):
    for x, y in loader:
        x_adv = attack(student, x, y)  # the bare student has the same weights; the attack exchanges no gradients
        clean_logits, adv_logits = wrapped(torch.cat([x, x_adv])).chunk(2)
        loss = criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
report(student)
