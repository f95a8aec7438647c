"""The parts that your project has already, in small: images, attack, clean teacher, student and its optimizer."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EPS, STEP, STEPS = 0.2, 0.05, 10


def network() -> nn.Sequential:
    """Return a fresh network for images of 8 x 8 pixels."""
    stem = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    block = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    return nn.Sequential(*stem, *block, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return adversarial images: PGD on the cross-entropy, with BatchNorm in eval mode."""
    model.eval()
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + STEP * gradient.sign()
        x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    model.train()
    return x_adv


def report(model: nn.Module) -> None:
    """Print the accuracy on held-out images."""
    model.cpu()
    x_adv = attack(model, *test)
    model.eval()
    clean, robust = ((model(x).argmax(1) == test[1]).float().mean().item() for x in (test[0], x_adv))
    print(f"clean {clean:.1%}, under PGD {robust:.1%}")


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
test = images[-300:], labels[-300:]
loader = DataLoader(TensorDataset(images[:-300], labels[:-300]), 64, shuffle=True)
teacher, student = network(), network()
optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
adam = torch.optim.Adam(teacher.parameters())
for _ in range(5):
    for x, y in loader:
        adam.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        adam.step()
