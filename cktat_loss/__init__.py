"""The CKTAT loss for adversarial training (arXiv 2504.00038)."""

from cktat_loss import functional
from cktat_loss._warm_start import WarmStartReport, warm_start
from cktat_loss.functional import CKTATTerms, adaptive_beta
from cktat_loss.loss import CKTATLoss

__version__ = "0.2.0"

__all__ = [
    "CKTATLoss",
    "CKTATTerms",
    "WarmStartReport",
    "__version__",
    "adaptive_beta",
    "functional",
    "warm_start",
]
