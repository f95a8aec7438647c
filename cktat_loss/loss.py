"""The criterion: the loss with its frozen teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cktat_loss import _checks, _teacher, functional
from cktat_loss.functional import BackendName, CKTATTerms, Reduction


class CKTATLoss(nn.Module):
    r"""Guidance by a clean teacher plus consistency: the loss of CKTAT, Eq. 17 of arXiv 2504.00038.

    $$
    L = \frac{1}{N} \sum_i \left[ \mathrm{KL}(\mathrm{softmax}(T(x_i) / \tau) \,\|\, \mathrm{softmax}(S(x_i')))
        + \beta \, \mathrm{KL}(\mathrm{softmax}(S(x_i)) \,\|\, \mathrm{softmax}(S(x_i'))) \right]
    $$

    The criterion takes logits. It changes neither the student nor the optimizer.

    The teacher is frozen. The criterion makes a deep copy and runs it in eval mode, without gradients. Neither training
    the original nor ``criterion.train()`` changes the copy. It is not among the criterion's parameters, buffers or
    state_dict, but ``criterion.to(...)`` moves it. The loss with ``x`` is the loss with ``teacher_logits=teacher(x)``,
    and ``x`` is passed to the teacher as it is.

    The criterion's state_dict does not hold the teacher. If a module holds both the teacher and the criterion,
    ``load_state_dict`` restores the teacher but not the criterion's copy. Load the teacher's weights first and make the
    criterion then.

    Args:
        teacher: the clean model ``T``, any module from inputs to logits, (N, C). Wrappers without hooks (DDP,
            DataParallel, torch.compile, AveragedModel) are taken off before copying. TorchScript is refused. None if
            every call passes ``teacher_logits``.
        tau: the temperature, > 0. It divides the teacher's logits only. Can be assigned during training.
        beta: the weight of the consistency term, finite and >= 0. Can be assigned during training.
        adaptive: multiply beta by ``softmax(S(x'))[y]`` per sample. Every call then needs ``y``. This is our recipe,
            not the paper's: use it with ``detach_clean=True`` and ``tau=2``.
        reduction: "mean" over the batch, "sum", or "none".
        detach_clean: stop the gradient through the clean logits (see the README on collapse).
        copy_teacher: False shares the teacher object, for compiled, sharded or very large ones. The criterion then sees
            every change: do not train the teacher, change it in place or pass the student itself.
            ``criterion.to(...)`` moves the shared object. Pass it in eval mode. If it is in train mode, every call
            switches it to eval mode and back, which is not thread-safe.
        backend: "auto", "triton" or "torch".

    Shape:
        clean_logits, adv_logits, teacher_logits: (N, C), floating. x: whatever the teacher takes. y: (N,), integer.
        Loss: (), or (N,) for "none", in float32, or in float64 if any of the logits are.

    Raises:
        TypeError: an argument of the wrong type. The message names it, what came and what was wanted.
        ValueError: a wrong value; or a teacher that has no values yet, that cannot be copied, that is a graph exported
            in train mode, or that has a hook or function whose closure holds a module (a copy would call the original).
        RuntimeError: ``backend="triton"`` if the kernels cannot run.

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
        # Bypass nn.Module.__setattr__: a registered submodule would be trained, saved and counted as parameters.
        self.__dict__["_teacher"] = teacher

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher: the copy, or the object that was passed if ``copy_teacher=False``."""
        return self.__dict__["_teacher"]  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        # Validate before nn.Module.__setattr__, which would register a Module or Parameter as a trainable child.
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
        """Compute the loss of a batch. Pass exactly one of ``x`` and ``teacher_logits``.

        Args:
            clean_logits: the student's logits on clean inputs, (N, C).
            adv_logits: the student's logits on adversarial inputs, (N, C).
            x: the clean inputs. The teacher is run on them.
            teacher_logits: the teacher's logits on the clean inputs, (N, C), not divided by tau. They are detached.
            y: labels, (N,), integer. Required with ``adaptive=True``, an error without.
            beta: replaces the criterion's beta in this call. A number, or without ``adaptive`` also a tensor, () or
                (N,).
            return_terms: return the pair ``(loss, CKTATTerms(guidance, consistency))``. The terms are (N,), detached.
        """
        if self.adaptive and y is None:
            raise ValueError("y must be given in every call of a criterion with adaptive=True, got None")
        if y is not None and not self.adaptive:
            raise ValueError(f"y must be None unless the criterion has adaptive=True, got {_checks.describe(y)}")
        return functional.cktat_loss(  # type: ignore[call-overload,no-any-return]  # overloads take literal bools
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
        """Compute both terms, each (N,), with gradients, before beta and the reduction.

        Args:
            clean_logits: the student's logits on clean inputs, (N, C).
            adv_logits: the student's logits on adversarial inputs, (N, C).
            x: the clean inputs. Pass exactly one of ``x`` and ``teacher_logits``.
            teacher_logits: the teacher's logits on the clean inputs, (N, C).
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
