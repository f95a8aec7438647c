"""The criterion: the loss together with the frozen teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cktat_loss import checks, functional
from cktat_loss.functional import Backend, Reduction
from cktat_loss.ops import CKTATTerms
from cktat_loss.wrappers import unwrap


class CKTATLoss(nn.Module):
    r"""Clean-teacher guidance plus consistency: the loss of CKTAT, Eq. 17 of arXiv 2504.00038.

    .. math::
        L = \frac{1}{N} \sum_i KL(softmax(T(x_i) / \tau) \| softmax(S(x_i')))
            + \beta \, KL(softmax(S(x_i)) \| softmax(S(x_i')))

    The criterion takes logits and touches neither the student nor the optimizer. Its teacher is frozen: a deep copy
    made here, run in eval mode and without gradients whatever happens to the original or to ``criterion.train()``. It
    is not among the criterion's parameters, buffers or state_dict, and moves with ``criterion.to(...)``.

    Args:
        teacher: the clean model ``T``, any module from inputs to logits (N, C); wrappers (DDP, DataParallel,
            torch.compile, AveragedModel) are taken off. None if every call passes ``teacher_logits``.
        tau: temperature, > 0; divides the teacher's logits only. Can be assigned during training.
        beta: weight of the consistency term, finite, >= 0. Can be assigned during training.
        reduction: "mean" over the batch, "sum", or "none".
        detach_clean: stop the gradient through the clean logits (see the README on collapse).
        copy_teacher: False shares the teacher as passed, for compiled, sharded or very large ones. Then do not train
            it, change it in place or pass the student itself: the criterion sees every change. ``criterion.to(...)``
            moves the shared object. It runs in eval mode all the same; its own mode is restored after each call.
        backend: "auto", "triton" or "torch".

    Shape:
        clean_logits, adv_logits, teacher_logits: (N, C), floating. x: whatever the teacher takes. Loss: a scalar, or
        (N,) for "none"; float32, or float64 where any logits are.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what came and what was wanted.
        RuntimeError: ``backend="triton"`` where it cannot run.

    Example:
        >>> import torch
        >>> from cktat_loss import CKTATLoss, warm_start
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> report = warm_start(student, teacher)
        >>> criterion = CKTATLoss(teacher, tau=5.0, beta=6.0)
        >>> x = torch.randn(8, 4)
        >>> x_adv = x + 0.1 * torch.randn(8, 4).sign()
        >>> loss = criterion(clean_logits=student(x), adv_logits=student(x_adv), x=x)
        >>> loss.backward()
    """

    reduction: Reduction
    backend: Backend
    detach_clean: bool

    def __init__(
        self,
        teacher: nn.Module | None,
        tau: float = 5.0,
        beta: float = 6.0,
        *,
        adaptive: bool = False,
        reduction: Reduction = "mean",
        detach_clean: bool = False,
        copy_teacher: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module or None, got {checks.describe(teacher)}")
        self.tau = tau
        self.beta = beta
        checks.reduction(reduction)
        checks.backend(backend)
        checks.flag("detach_clean", detach_clean)
        checks.flag("copy_teacher", copy_teacher)
        checks.flag("adaptive", adaptive)
        self.adaptive = adaptive
        self.reduction, self.backend, self.detach_clean = reduction, backend, detach_clean
        if teacher is not None and copy_teacher:
            teacher = _frozen_copy(teacher)
        # Past nn.Module's own bookkeeping: what it registers, it trains, saves and counts as parameters.
        self.__dict__["_teacher"] = teacher

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher: the copy, or with ``copy_teacher=False`` the object that was passed."""
        return self.__dict__["_teacher"]  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # nn.Module would take it for a child to train, beside the teacher in use
            raise AttributeError("teacher cannot be assigned: make a new criterion")
        super().__setattr__(name, value)

    @property
    def tau(self) -> float:
        """Temperature of the teacher, > 0."""
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        self._tau = checks.tau(value)

    @property
    def beta(self) -> float:
        """Weight of the consistency term, >= 0."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = checks.beta(value)

    def forward(
        self,
        clean_logits: Tensor,
        adv_logits: Tensor,
        x: Any = None,
        *,
        teacher_logits: Tensor | None = None,
        y: Tensor | None = None,
        beta: float | Tensor | None = None,
        return_terms: bool = False,
    ) -> Any:
        """The loss of a batch.

        Args:
            clean_logits: student on clean inputs, (N, C).
            adv_logits: student on adversarial inputs, (N, C).
            x: the clean inputs, on which the teacher is run. Either this,
            teacher_logits: or the teacher's logits on them, (N, C), undivided by tau; detached.
            beta: this call's beta, in place of the criterion's: a number, or a tensor of sample weights, 0-d or (N,),
                for instance from :func:`cktat_loss.adaptive_beta`.
        """
        if self.adaptive != (y is not None):
            raise ValueError("y must be given with adaptive=True, and only then")
        return functional.cktat_loss(
            clean_logits,
            adv_logits,
            self._teacher_logits(x, teacher_logits),
            self._tau,
            self._beta if beta is None else beta,
            y=y,
            reduction=self.reduction,
            detach_clean=self.detach_clean,
            return_terms=return_terms,
            backend=self.backend,
        )

    def terms(
        self, clean_logits: Tensor, adv_logits: Tensor, x: Any = None, *, teacher_logits: Tensor | None = None
    ) -> CKTATTerms:
        """``CKTATTerms(guidance, consistency)``, each (N,), before beta and the reduction. Args as for a call."""
        return functional.cktat_terms(
            clean_logits,
            adv_logits,
            self._teacher_logits(x, teacher_logits),
            self._tau,
            detach_clean=self.detach_clean,
            backend=self.backend,
        )

    def _teacher_logits(self, x: Any, teacher_logits: Tensor | None) -> Tensor:
        if (x is None) == (teacher_logits is None):
            got = "neither" if x is None else "both"
            raise ValueError(f"exactly one of x and teacher_logits must be given, got {got}")
        if teacher_logits is not None:
            return teacher_logits
        teacher = self.teacher
        if teacher is None:
            raise ValueError("x was given, but the criterion has no teacher: pass teacher_logits, or make it with one")
        with torch.no_grad(), _eval_mode(teacher):
            logits = teacher(_cast_like(x, teacher))
        if not isinstance(logits, Tensor):
            raise TypeError(f"teacher(x) must be a tensor of logits (N, C), got {type(logits).__name__}")
        return logits

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CKTATLoss:
        """What ``.to()``, ``.cuda()`` and ``.half()`` go through."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        teacher = None if self.teacher is None else type(self.teacher).__name__
        return (
            f"teacher={teacher}, tau={self.tau}, beta={self.beta}, reduction={self.reduction!r}, "
            f"detach_clean={self.detach_clean}, backend={self.backend!r}"
        )


def _frozen_copy(teacher: nn.Module) -> nn.Module:
    try:
        teacher = copy.deepcopy(unwrap(teacher))
    except Exception as error:
        raise ValueError(
            f"teacher ({type(teacher).__name__}) cannot be deep-copied: {error}. copy_teacher=False shares it instead"
        ) from error
    return teacher.eval().requires_grad_(False)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode again after."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _cast_like(x: Any, module: nn.Module) -> Any:
    """A floating ``x`` in the module's floating dtype; anything else as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return x.to(tensor.dtype)
    return x
