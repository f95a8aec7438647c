"""The CKTAT loss for adversarial training (arXiv 2504.00038)."""

from importlib.util import find_spec

if find_spec("cktat_loss.kernels") is None:  # cktat_loss/kernels is a symbolic link, which not every copy keeps.
    raise ImportError(
        f"{__path__[0]} has no package kernels. In the repository it is a symbolic link to ../kernels, which a clone "
        "or zip without symbolic links loses. Install the repository (pip install -e .), or make the link."
    )

from cktat_loss import functional
from cktat_loss._warm_start import WarmStartReport, warm_start
from cktat_loss.functional import CKTATTerms, adaptive_beta
from cktat_loss.loss import CKTATLoss

__version__ = "0.3.0"

__all__ = [
    "CKTATLoss",
    "CKTATTerms",
    "WarmStartReport",
    "__version__",
    "adaptive_beta",
    "functional",
    "warm_start",
]
