"""The CKTAT loss for adversarial training (arXiv 2504.00038)."""

from cktat_loss import functional
from cktat_loss.loss import CKTATLoss
from cktat_loss.ops import CKTATTerms
from cktat_loss.schedules import adaptive_beta
from cktat_loss.transfer import WarmStartReport, warm_start

__version__ = "0.1.0"

__all__ = [
    "CKTATLoss",
    "CKTATTerms",
    "WarmStartReport",
    "__version__",
    "adaptive_beta",
    "functional",
    "warm_start",
]
