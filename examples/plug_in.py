"""The CKTAT criterion with other people's attacks and loops: torchattacks, ART, Lightning and Lightning Fabric.

A function each, to copy from. Each trains for one pass over its data and returns the loss of every step. Attack and
loop are independent: any of these attacks goes into any of these loops.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from pgd import eval_mode, pgd
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cktat_loss import CKTATLoss, adaptive_beta

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, C, H, W) in [0, 1], classes (N,), on the student's device
EPS, STEPS = 8 / 255, 10  # each step eps/4, as everywhere in the field


def loss_of(student: nn.Module, criterion: CKTATLoss, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """What all of them minimise. One forward for both halves: the BatchNorms see them together."""
    clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
    beta = adaptive_beta(adv_logits, y, beta=6.0)
    return criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, beta=beta)


def with_torchattacks(
    student: nn.Module, criterion: CKTATLoss, optimizer: torch.optim.Optimizer, batches: Batches, *, eps: float = EPS
) -> list[float]:
    """PGD from torchattacks."""
    with _extra("torchattacks"):
        from torchattacks import PGD
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
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    shape: tuple[int, int, int],
    classes: int,
    eps: float = EPS,
) -> list[float]:
    """PGD from the Adversarial Robustness Toolbox. `shape` is (C, H, W).

    It works on NumPy arrays and draws from NumPy's generator: torch.manual_seed does not repeat it.
    """
    with _extra("art"):
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
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
    student: nn.Module, criterion: CKTATLoss, loader: DataLoader[tuple[Tensor, Tensor]], *, eps: float = EPS
) -> list[float]:
    """A LightningModule. The teacher moves along with it, yet is neither trained nor saved in its checkpoints.

    A DataLoader it has to be: Lightning takes a list for a list of loaders.
    """
    with _extra("lightning"):
        from lightning import LightningModule, Trainer

    class CKTAT(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.criterion = student, criterion
            self.losses: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            x_adv = pgd(self.student, x, y, eps=eps, step=eps / 4, steps=STEPS)
            loss = loss_of(self.student, self.criterion, x, x_adv, y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    module = CKTAT()
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, loader)
    return module.losses


def with_fabric(
    student: nn.Module, criterion: CKTATLoss, optimizer: torch.optim.Optimizer, batches: Batches, *, eps: float = EPS
) -> list[float]:
    """A loop of one's own on Lightning Fabric, for any number of devices and any precision."""
    with _extra("lightning"):
        from lightning.fabric import Fabric
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


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a missing package into a sentence that names the extra with it."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is missing: pip install 'cktat-loss[{name}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
