"""CKTAT in a LightningModule: pip install lightning."""

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from yours import attack, loader, report, student, teacher

from cktat_loss import CKTATLoss, warm_start


class CKTAT(LightningModule):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        # Both are saved in checkpoints. The teacher needs no gradients: DDP would wait for them.
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def on_train_start(self) -> None:
        # Not in __init__: the criterion copies the teacher, whose weights a checkpoint may have brought since.
        self.criterion = CKTATLoss(self.teacher, tau=2.0, adaptive=True, detach_clean=True)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        x_adv = attack(self.student, x, y)
        clean_logits, adv_logits = self.student(torch.cat([x, x_adv])).chunk(2)
        loss, terms = self.criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y, return_terms=True)
        self.log_dict({"guidance": terms.guidance.mean(), "consistency": terms.consistency.mean()}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


warm_start(student, teacher)
module = CKTAT(student, teacher)
# fit(ckpt_path="last.ckpt") resumes a run.
Trainer(max_epochs=3, logger=False, enable_checkpointing=False).fit(module, loader)
report(module.student)
