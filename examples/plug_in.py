"""The CKTAT criterion with other people's attacks and loops: torchattacks, ART, Lightning and Lightning Fabric.

A function each, to copy from; each trains and returns the loss of every step. Any of the attacks goes into any of
the loops. The criterion is our recipe, `CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from pgd import eval_mode, pgd
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cktat_loss import CKTATLoss

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, C, H, W) in [0, 1], classes (N,), on the student's device
EPS, STEPS = 8 / 255, 10  # each step eps/4, as everywhere in the field


def loss_of(student: nn.Module, criterion: CKTATLoss, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """What all of them minimise. One forward for both halves: the BatchNorms see them together."""
    clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
    return criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y)


def with_torchattacks(
    student: nn.Module, criterion: CKTATLoss, optimizer: Optimizer, batches: Batches, *, eps: float = EPS
) -> list[float]:
    """PGD from torchattacks."""
    from torchattacks import PGD  # pip install torchattacks

    attack = PGD(student, eps=eps, alpha=eps / 4, steps=STEPS)
    losses = []
    for x, y in batches:
        # It puts the whole student back into train mode, frozen BatchNorms too; eval_mode remembers each module's.
        with eval_mode(student):
            x_adv = attack(x, y)
        loss = loss_of(student, criterion, x, x_adv, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_art(
    student: nn.Module,
    criterion: CKTATLoss,
    optimizer: Optimizer,
    batches: Batches,
    *,
    shape: tuple[int, int, int],
    classes: int,
    eps: float = EPS,
) -> list[float]:
    """PGD from the Adversarial Robustness Toolbox, for images of `shape` (C, H, W).

    It works on NumPy arrays and draws from NumPy's generator: torch.manual_seed does not repeat it.
    """
    from art.attacks.evasion import ProjectedGradientDescentPyTorch  # pip install adversarial-robustness-toolbox
    from art.estimators.classification import PyTorchClassifier

    # Left alone, it would move a student on the CPU to a GPU.
    device = "cpu" if next(student.parameters()).device.type == "cpu" else "gpu"
    classifier = PyTorchClassifier(
        student, nn.CrossEntropyLoss(), shape, classes, clip_values=(0.0, 1.0), device_type=device
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=eps, eps_step=eps / 4, max_iter=STEPS, num_random_init=1, batch_size=1024, verbose=False
    )
    losses = []
    for x, y in batches:
        with eval_mode(student):  # it leaves the student in eval mode
            x_adv = torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)
        loss = loss_of(student, criterion, x, x_adv, y)
        optimizer.zero_grad()  # after the attack, which leaves gradients of its own in the parameters
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_lightning(
    student: nn.Module,
    teacher: nn.Module,
    loader: DataLoader[tuple[Tensor, Tensor]],
    *,
    eps: float = EPS,
    epochs: int = 1,
    checkpoint: Path | None = None,
) -> list[float]:
    """A LightningModule. `checkpoint` is continued from, where the file is there, and written at the end.

    A DataLoader it has to be: Lightning takes a list for a list of loaders.
    """
    from lightning import LightningModule, Trainer  # pip install lightning

    class CKTAT(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            # Both in the checkpoint. A teacher that is not trained asks for no gradients, which DDP would wait for.
            self.student, self.teacher = student, teacher.requires_grad_(False)
            self.losses: list[float] = []

        def on_train_start(self) -> None:
            # The criterion copies the teacher. Made in __init__, it would keep the weights from before the checkpoint
            # was loaded; here, they are those of the checkpoint. The same holds for load_state_dict in a plain loop.
            self.criterion = CKTATLoss(self.teacher, tau=2.0, adaptive=True, detach_clean=True)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            x_adv = pgd(self.student, x, y, eps=eps, step=eps / 4, steps=STEPS)
            loss = loss_of(self.student, self.criterion, x, x_adv, y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Optimizer:
            return torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    module = CKTAT()
    trainer = Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, loader, ckpt_path=checkpoint if checkpoint and checkpoint.exists() else None)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return module.losses


def with_fabric(
    student: nn.Module, criterion: CKTATLoss, optimizer: Optimizer, batches: Batches, *, eps: float = EPS
) -> list[float]:
    """A loop of one's own on Lightning Fabric, for any number of devices."""
    from lightning.fabric import Fabric  # pip install lightning

    fabric = Fabric()
    fabric.launch()
    student, optimizer = fabric.setup(student, optimizer)
    criterion.to(fabric.device)  # the teacher: fabric.setup is for what is trained
    losses = []
    for x, y in batches:
        x, y = fabric.to_device((x, y))
        x_adv = pgd(student, x, y, eps=eps, step=eps / 4, steps=STEPS)
        loss = loss_of(student, criterion, x, x_adv, y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses
