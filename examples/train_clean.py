"""Phase 1 of CKTAT: train the teacher on clean images with cross-entropy.

    python examples/train_clean.py --download --arch wrn-34-10 --out out/teacher
    torchrun --nproc-per-node=4 examples/train_clean.py ...     (four GPUs, the images of a step split between them)

Phase 2 is `train_cktat.py --teacher out/teacher`.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from distributed import Ranks
from engine import Trainer, launch, new_model, open_data
from methods import Terms
from models import ARCHITECTURES
from options import Group, manual
from torch import Tensor
from training_options import add_data, add_hardware, add_optimisation, add_run, finish


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Train the teacher."""
    data = open_data(args, ranks)
    torch.manual_seed(args.seed)
    trainer = Trainer(new_model(args.arch, data), data, args, ranks)

    def step(x: Tensor, y: Tensor) -> Terms:
        with trainer.clock("student"):
            with trainer.autocast():
                loss = F.cross_entropy(trainer.network(x), y)
            trainer.update(loss)
        return Terms(loss)

    trainer.fit(step)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All options, checked."""
    parser = manual(__doc__)
    add_data(parser)
    Group(parser, "model").option("--arch", str, "resnet18", f"one of {', '.join(ARCHITECTURES)}", metavar="NAME")
    add_optimisation(parser, epochs=100, drops=(75, 90))
    add_hardware(parser)
    add_run(parser, out="out/teacher")
    return finish(parser, argv)


def main(argv: list[str] | None = None) -> int:
    return launch(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
