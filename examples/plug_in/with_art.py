"""CKTAT with an attack of the Adversarial Robustness Toolbox: pip install adversarial-robustness-toolbox."""

import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from yours import EPS, STEP, STEPS, loader, optimizer, report, student, teacher

from cktat_loss import CKTATLoss, warm_start

warm_start(student, teacher)
criterion = CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)

device = "cpu" if next(student.parameters()).device.type == "cpu" else "gpu"  # else ART moves the student
classifier = PyTorchClassifier(student, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), device_type=device)
ball = {"eps": EPS, "eps_step": STEP, "max_iter": STEPS, "num_random_init": 1}
pgd = ProjectedGradientDescentPyTorch(classifier, **ball, batch_size=1024, verbose=False)

for _ in range(3):
    for x, y in loader:
        student.eval()
        x_adv = torch.from_numpy(pgd.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)  # draws from NumPy's generator
        student.train()
        clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
        loss = criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y)
        optimizer.zero_grad()  # after the attack, which leaves its gradients in the parameters
        loss.backward()
        optimizer.step()
report(student)
