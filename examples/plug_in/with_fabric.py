"""CKTAT in your own loop on Lightning Fabric, on any number of devices: pip install lightning."""

import torch
from lightning.fabric import Fabric
from yours import attack, loader, optimizer, report, student, teacher

from cktat_loss import CKTATLoss, warm_start

fabric = Fabric()  # devices=4, precision="bf16-mixed", ...
fabric.launch()
warm_start(student, teacher)
criterion = CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)
criterion.to(fabric.device)  # not set up, because it is not trained
wrapped, optimizer = fabric.setup(student, optimizer)
loader = fabric.setup_dataloaders(loader)

for _ in range(3):
    for x, y in loader:
        x_adv = attack(student, x, y)  # the bare student has the same weights; the attack exchanges no gradients
        clean_logits, adv_logits = wrapped(torch.cat([x, x_adv])).chunk(2)
        loss = criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
report(student)
