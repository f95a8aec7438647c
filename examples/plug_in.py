"""The CKTAT criterion with other people's attacks and loops: torchattacks, ART, Lightning and Lightning Fabric.

Three attacks and three loops, to copy from. Any attack goes into any loop; make it when the student is on its device. A
loop trains for one pass over its data and returns the loss of every step. The criterion is our recipe,
`CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from pgd import eval_mode, pgd
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cktat_loss import CKTATLoss

Attack = Callable[[Tensor, Tensor], Tensor]  # images (N, C, H, W) in [0, 1] and classes (N,) to adversarial images
Batches = Iterable[tuple[Tensor, Tensor]]  # images and classes, on the student's device
EPS, STEPS = 8 / 255, 10  # each step eps/4, as everywhere in the field


def own_pgd(student: nn.Module, *, eps: float = EPS) -> Attack:
    """PGD from pgd.py."""
    return partial(pgd, student, eps=eps, step=eps / 4, steps=STEPS)


def torchattacks_pgd(student: nn.Module, *, eps: float = EPS) -> Attack:
    """PGD from torchattacks."""
    from torchattacks import PGD  # pip install torchattacks

    theirs = PGD(student, eps=eps, alpha=eps / 4, steps=STEPS)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        # It puts the whole student back into train mode, frozen BatchNorms too; eval_mode remembers each module's.
        with eval_mode(student):
            return theirs(x, y)

    return attack


def art_pgd(student: nn.Module, *, shape: tuple[int, int, int], classes: int, eps: float = EPS) -> Attack:
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
    theirs = ProjectedGradientDescentPyTorch(
        classifier, eps=eps, eps_step=eps / 4, max_iter=STEPS, num_random_init=1, batch_size=1024, verbose=False
    )

    def attack(x: Tensor, y: Tensor) -> Tensor:
        with eval_mode(student):  # it leaves the student in eval mode
            return torch.from_numpy(theirs.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)

    return attack


def loss_of(student: nn.Module, criterion: CKTATLoss, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """What all loops minimise. One forward for both halves: the BatchNorms see them together."""
    clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
    return criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y)


def train(
    student: nn.Module, criterion: CKTATLoss, optimizer: Optimizer, batches: Batches, attack: Attack
) -> list[float]:
    """Plain PyTorch."""
    losses = []
    for x, y in batches:
        x_adv = attack(x, y)
        loss = loss_of(student, criterion, x, x_adv, y)
        optimizer.zero_grad()  # after the attack: ART's leaves gradients of its own in the parameters
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_with_fabric(
    student: nn.Module, criterion: CKTATLoss, optimizer: Optimizer, batches: Batches, attack: Attack
) -> list[float]:
    """A loop of one's own on Lightning Fabric, for any number of devices."""
    from lightning.fabric import Fabric  # pip install lightning

    fabric = Fabric()
    fabric.launch()
    wrapped, optimizer = fabric.setup(student, optimizer)  # the attack runs the student itself, which moves along
    criterion.to(fabric.device)  # the teacher: fabric.setup is for what is trained
    losses = []
    for x, y in batches:
        x, y = fabric.to_device((x, y))
        loss = loss_of(wrapped, criterion, x, attack(x, y), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_with_lightning(
    student: nn.Module,
    teacher: nn.Module,
    loader: DataLoader[tuple[Tensor, Tensor]],
    attack: Attack,
    *,
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
            # Both are in the checkpoint. The teacher is not trained, and DDP waits for every gradient asked for.
            self.student, self.teacher = student, teacher.requires_grad_(False)
            self.losses: list[float] = []

        def on_train_start(self) -> None:
            # The criterion copies the teacher. Made in __init__, it would keep the weights from before the checkpoint
            # was loaded; here they are the checkpoint's. In a plain loop likewise: first teacher.load_state_dict(...).
            self.criterion = CKTATLoss(self.teacher, tau=2.0, adaptive=True, detach_clean=True)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            loss = loss_of(self.student, self.criterion, x, attack(x, y), y)
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
