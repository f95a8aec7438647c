"""The criterion: the loss together with the frozen teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cktat_loss import _checks, _teacher, functional
from cktat_loss.functional import BackendName, CKTATTerms, Reduction


class CKTATLoss(nn.Module):
    r"""Clean-teacher guidance plus consistency: the loss of CKTAT, Eq. 17 of arXiv 2504.00038.

    $$
    L = \frac{1}{N} \sum_i \mathrm{KL}(\mathrm{softmax}(T(x_i) / \tau) \,\|\, \mathrm{softmax}(S(x_i')))
        + \beta_i \, \mathrm{KL}(\mathrm{softmax}(S(x_i)) \,\|\, \mathrm{softmax}(S(x_i')))
    $$

    The criterion takes logits and touches neither the student nor the optimizer. Its teacher is frozen: a deep copy
    made here, run in eval mode and without gradients whatever happens to the original or to ``criterion.train()``. It
    is not among the criterion's parameters, buffers or state_dict, and moves with ``criterion.to(...)``.

    So a module that holds both the teacher and its criterion restores the teacher by ``load_state_dict``, but not the
    criterion's copy of it. Load the teacher's weights first and make the criterion then.

    Args:
        teacher: the clean model ``T``, any module from inputs to logits (N, C); wrappers (DDP, DataParallel,
            torch.compile, AveragedModel) are taken off. None if every call passes ``teacher_logits``.
        tau: temperature, > 0; divides the teacher's logits only. Can be assigned during training.
        beta: weight of the consistency term, finite, >= 0. Can be assigned during training.
        adaptive: weigh each sample by ``beta * softmax(S(x'))[y]``, with ``y`` in every call. Our recipe, not the
            paper's: use it with ``detach_clean=True`` and tau 2 (see ``adaptive_beta``).
        reduction: "mean" over the batch, "sum", or "none".
        detach_clean: stop the gradient through the clean logits (see the README on collapse).
        copy_teacher: False shares the teacher as passed, for compiled, sharded or very large ones. Then do not train
            it, change it in place or pass the student itself: the criterion sees every change. ``criterion.to(...)``
            moves the shared object. Pass it in eval mode: of one in train mode each call switches the mode and puts
            it back, which is not safe from several threads.
        backend: "auto", "triton" or "torch".

    Shape:
        clean_logits, adv_logits, teacher_logits: (N, C), floating. x: whatever the teacher takes. y: (N,), integer.
        Loss: a scalar, or (N,) for "none"; float32, or float64 where any logits are.

    Raises:
        TypeError: an argument of the wrong type; the message names it, what came and what was wanted.
        ValueError: a wrong value, likewise.
        RuntimeError: ``backend="triton"`` where it cannot run.

    Examples:
        >>> import torch
        >>> from cktat_loss import CKTATLoss, warm_start
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> report = warm_start(student, teacher)
        >>> criterion = CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> x_adv = x + 0.1 * torch.randn(8, 4).sign()
        >>> loss = criterion(clean_logits=student(x), adv_logits=student(x_adv), x=x, y=y)
        >>> loss.backward()
    """

    tau: float
    beta: float
    adaptive: bool
    reduction: Reduction
    detach_clean: bool
    backend: BackendName

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
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module or None, got {_checks.describe(teacher)}")
        self.tau, self.beta, self.adaptive = tau, beta, adaptive
        self.reduction, self.detach_clean, self.backend = reduction, detach_clean, backend
        copied = _checks.flag("copy_teacher", copy_teacher)
        if teacher is not None:
            teacher = _teacher.freeze(teacher, copied=copied)
        # Past nn.Module's own bookkeeping: what it registers, it trains, saves and counts as parameters.
        self.__dict__["_teacher"] = teacher

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher: the copy, or with ``copy_teacher=False`` the object that was passed."""
        return self.__dict__["_teacher"]  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        # Here, since nn.Module would take a module or a parameter for a child to train before anyone could refuse it.
        if name == "teacher":
            raise AttributeError("teacher cannot be assigned: make a new criterion")
        if name in ("adaptive", "detach_clean"):
            value = _checks.flag(name, value)
        elif name in ("tau", "beta", "reduction", "backend"):
            value = getattr(_checks, name)(value)
        super().__setattr__(name, value)

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
    ) -> Tensor | tuple[Tensor, CKTATTerms]:
        """The loss of a batch.

        Args:
            clean_logits: student on clean inputs, (N, C).
            adv_logits: student on adversarial inputs, (N, C).
            x: the clean inputs, on which the teacher is run. Either this,
            teacher_logits: or the teacher's logits on them, (N, C), undivided by tau; detached.
            y: labels, (N,), integer: with ``adaptive=True``, and only then.
            beta: this call's beta, in place of the criterion's: a number or, unless adaptive, a tensor of weights,
                0-d or (N,).
            return_terms: return the pair ``(loss, CKTATTerms(guidance, consistency))``; the terms are (N,), detached.
        """
        if self.adaptive and y is None:
            raise ValueError("y must be given in every call of a criterion with adaptive=True, got None")
        if y is not None and not self.adaptive:
            raise ValueError(f"y must be None unless the criterion has adaptive=True, got {_checks.describe(y)}")
        return functional.cktat_loss(  # type: ignore[call-overload,no-any-return]  # knows no plain bool
            clean_logits,
            adv_logits,
            self._teacher_logits(x, teacher_logits),
            self.tau,
            self.beta if beta is None else beta,
            y=y,
            reduction=self.reduction,
            detach_clean=self.detach_clean,
            return_terms=return_terms,
            backend=self.backend,
        )

    def terms(
        self, clean_logits: Tensor, adv_logits: Tensor, x: Any = None, *, teacher_logits: Tensor | None = None
    ) -> CKTATTerms:
        """``CKTATTerms(guidance, consistency)``, each (N,), with gradients, before beta and the reduction.

        Args:
            clean_logits: student on clean inputs, (N, C).
            adv_logits: student on adversarial inputs, (N, C).
            x: the clean inputs, or
            teacher_logits: the teacher's logits on them, (N, C).
        """
        return functional.cktat_terms(
            clean_logits,
            adv_logits,
            self._teacher_logits(x, teacher_logits),
            self.tau,
            detach_clean=self.detach_clean,
            backend=self.backend,
        )

    def _teacher_logits(self, x: Any, teacher_logits: Tensor | None) -> Tensor:
        if (x is None) == (teacher_logits is None):
            got = "neither" if x is None else "both"
            raise ValueError(f"exactly one of x and teacher_logits must be given, got {got}")
        if teacher_logits is not None:
            return teacher_logits
        if self.teacher is None:
            raise ValueError("x was given, but the criterion has no teacher: pass teacher_logits, or make it with one")
        logits: Tensor = _teacher.run(self.teacher, x)
        _checks.tensor("teacher(x)", logits)
        return logits

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CKTATLoss:
        """Move the criterion and its teacher: ``.to()``, ``.half()`` and ``.to_empty()`` all call this method."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and self.teacher is not None:
            _teacher.move(self.teacher, fn)
        return self

    def extra_repr(self) -> str:
        teacher = None if self.teacher is None else type(self.teacher).__name__
        shown = ("tau", "beta", "adaptive", "reduction", "detach_clean", "backend")
        return ", ".join([f"teacher={teacher}", *(f"{name}={getattr(self, name)!r}" for name in shown)])
