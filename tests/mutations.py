"""Break the library in named ways, and see the one test fail that is there for it: ``python tests/mutations.py``.

Each mutation is made in a scratch copy by exact replacement of text that must occur once. First, all of the named
tests must pass in a copy that is whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
COPIED = ("cktat_loss", "kernels", "tests", "pyproject.toml")


class Mutation(NamedTuple):
    name: str
    module: str
    old: str
    new: str
    test: str

    @property
    def mode(self) -> tuple[str, ...]:
        """How pytest runs the test."""
        return ("-m", "interpreter") if "kernels" in self.name else ()


ACCURACY = "test_accuracy.py::test_loss_and_gradients"
FROZEN = "test_teacher_is_frozen.py"
TILES = "test_tiles.py::test_few_classes"
ODD = "test_tiles.py::test_rows_of_odd_length_start_anywhere"
ONCE = "test_traffic.py::test_each_element_once"
WRAPPERS = "test_warm_start_wrappers.py"

MUTATIONS = [
    # The formula.
    Mutation("tau dropped", "closed_form", "(teacher.double() / tau,", "(teacher.double(),", ACCURACY),
    Mutation(
        "terms left in float64",
        "ops",
        "CKTATTerms(guidance.to(dtype), consistency.to(dtype))",
        "CKTATTerms(guidance, consistency)",
        "test_extreme_logits.py::test_results_of_saturated_rows_are_in_the_dtype_of_all_others",
    ),
    Mutation("tau dropped, few calls", "closed_form", "x[0].div_(tau)\n    p =", "x[0].div_(1)\n    p =", ACCURACY),
    Mutation(
        "tau dropped, without branches",
        "closed_form",
        "x[0].div_(tau)\n    log_p =",
        "x[0].div_(1)\n    log_p =",
        ACCURACY,
    ),
    Mutation(
        "expm1 dropped, few calls",
        "closed_form",
        "d.neg().expm1_().add_(d)",
        "d.clone()",
        "test_small_kl.py::test_small",
    ),
    Mutation("tau dropped, single precision", "closed_form", "x /= tau", "x /= 1", ACCURACY),
    Mutation("tau dropped, in graphs", "divergence", "shifted if tau is None else shifted / tau", "shifted", ACCURACY),
    Mutation("tau divides the student", "closed_form", "/ tau, clean, adv", "/ tau, clean / tau, adv / tau", ACCURACY),
    Mutation(
        "guidance reversed",
        "closed_form",
        "kl = (p * d).add_(",
        "kl = (torch.stack((-p[2], p[1], p[2])) * d).add_(",
        ACCURACY,
    ),
    Mutation(
        "consistency reversed",
        "closed_form",
        "kl = (p * d).add_(",
        "kl = (torch.stack((p[0], -p[2], p[2])) * d).add_(",
        ACCURACY,
    ),
    Mutation(
        "guidance reversed, in graphs",
        "divergence",
        "kl_divergence(log_softmax(teacher.to(dtype), tau), log_a)",
        "kl_divergence(log_a, log_softmax(teacher.to(dtype), tau))",
        ACCURACY,
    ),
    Mutation(
        "consistency reversed, in graphs",
        "divergence",
        "kl_divergence(log_softmax(clean.to(dtype)), log_a)",
        "kl_divergence(log_a, log_softmax(clean.to(dtype)))",
        ACCURACY,
    ),
    Mutation("sign of d_clean", "closed_form", ".mul_(p_c)\n", ".mul_(-p_c)\n", ACCURACY),
    Mutation("beta not in d_adv", "closed_form", "sub_(p_c, alpha=w2)", "sub_(p_c)", ACCURACY),
    Mutation(
        "sample weights not in d_adv",
        "closed_form",
        "d_adv.addcmul_(p_c, w2, value=-1)",
        "d_adv.sub_(p_c)",
        "test_beta.py::test_weights",
    ),
    # Beta.
    Mutation(
        "beta ignored",
        "ops",
        "terms.guidance + beta *",
        "terms.guidance +",
        "test_criterion.py::test_terms_are_the_two_summands",
    ),
    Mutation(
        "beta of a call ignored",
        "loss",
        "self._beta if beta is None else beta",
        "self._beta",
        "test_criterion.py::test_a_beta_of_one_call",
    ),
    Mutation(
        "beta tensor ignored",
        "checks",
        "    return value\n\n\ndef grad_scale",
        "    return 6.0\n\n\ndef grad_scale",
        "test_criterion.py::test_a_tensor_of_betas",
    ),
    Mutation(
        "sample weights averaged",
        "checks",
        "    return value\n\n\ndef grad_scale",
        "    return value.mean()\n\n\ndef grad_scale",
        "test_beta.py::test_a_weight_per_sample_weighs_its_own_sample",
    ),
    Mutation(
        "adaptive_beta not detached",
        "schedules",
        "adv_logits.detach().softmax",
        "adv_logits.softmax",
        "test_beta.py::test_adaptive_beta",
    ),
    # Reductions.
    Mutation(
        "mean over N * C",
        "ops",
        "return _reduce(out, beta, reduction, clean, adv, teacher)\n",
        "return _reduce(out, beta, reduction, clean, adv, teacher) / clean.shape[1]\n",
        "test_properties.py::test_three_forms_agree",
    ),
    Mutation(
        "gradient of a mean over N * C",
        "ops",
        "upstream / max(1, clean.shape[0])",
        "upstream / max(1, clean.numel())",
        "test_gradient_flow.py::test_upstream_gradient",
    ),
    Mutation(
        "sum instead of mean",
        "ops",
        'rows.mean() if reduction == "mean"',
        'rows.sum() if reduction == "mean"',
        "test_reductions.py::test_reductions_of_the_same_rows",
    ),
    Mutation(
        "gradient of a sum instead of a mean",
        "ops",
        "upstream / max(1, clean.shape[0])",
        "upstream / 1",
        "test_gradient_flow.py::test_upstream_gradient",
    ),
    Mutation(
        "gradients of rows divided by N",
        "ops",
        "upstream = upstream.unsqueeze(1)",
        "upstream = upstream.unsqueeze(1) / clean.shape[0]",
        "test_properties.py::test_any_upstream_gradient",
    ),
    # Numbers.
    Mutation(
        "mask ignored",
        "closed_form",
        "if math.isnan(kl.sum().item()):",
        "if False:",
        "test_masks.py::test_masks_that_leave_an_answer",
    ),
    Mutation(
        "mask ignored, single precision",
        "closed_form",
        "if math.isnan(lowest):",
        "if False:",
        "test_masks.py::test_masks_that_leave_an_answer",
    ),
    Mutation(
        "mask ignored, in graphs",
        "divergence",
        "torch.where(p > 0, log_p - log_q, 1.0)",
        "log_p - log_q",
        "test_masks.py::test_masks_that_leave_an_answer",
    ),
    Mutation(
        "mask ignored, without branches",
        "closed_form",
        ".masked_fill_(targets == 0, 1.0)",
        "",
        "test_masks.py::test_masks_that_leave_an_answer",
    ),
    Mutation(
        "mask ignored, gradients in graphs",
        "divergence",
        "torch.where(p_c > 0, log_c - log_a, 0.0)",
        "log_c - log_a",
        "test_masks.py::test_masks_compiled",
    ),
    Mutation(
        "mean not taken off, gradients in graphs",
        "divergence",
        "(d - (p_c * d).sum(-1, keepdim=True))",
        "d",
        "test_accuracy.py::test_compiled",
    ),
    Mutation(
        "small-KL series dropped",
        "divergence",
        "return torch.where(d.abs() < SERIES_BELOW, small_kl_elements(p, d), plain)",
        "return plain",
        "test_small_kl.py::test_small",
    ),
    Mutation(
        "small-KL series cut short",
        "divergence",
        "(c0 + d * (c1 + d * (c2 + d * (c3 + d * c4))))",
        "c0",
        "test_small_kl.py::test_from_tiny_to_ordinary",
    ),
    Mutation(
        "small-KL series cut short, in place",
        "closed_form",
        "for coefficient in reversed(lower):",
        "for coefficient in lower[:1]:",
        "test_small_kl.py::test_from_tiny_to_ordinary",
    ),
    Mutation(
        "rows not their own, small KLs",
        "closed_form",
        "p_a.index_select(0, rows)",
        "p_a[: len(rows)]",
        "test_small_kl.py::test_small_rows_among_others",
    ),
    Mutation(
        "small KLs summed plainly",
        "closed_form",
        "PLAIN_SUM_DOWN_TO = 0.02",
        "PLAIN_SUM_DOWN_TO = 0.0",
        "test_small_kl.py::test_small",
    ),
    Mutation(
        "negative KL let through",
        "closed_form",
        "kl.clamp(min=0).unbind()",
        "kl.unbind()",
        "test_small_kl.py::test_never_negative_in_float64",
    ),
    Mutation(
        "half precision not upcast, few calls",
        "closed_form",
        "(teacher, clean, adv)).float()",
        "(teacher, clean, adv))",
        ACCURACY,
    ),
    Mutation(
        "half precision not upcast, single precision", "closed_form", "x = logits.float()", "x = logits", ACCURACY
    ),
    Mutation(
        "half precision not upcast, in graphs",
        "divergence",
        "    log_a = log_softmax(adv.to(dtype))",
        "    log_a = log_softmax(adv)",
        ACCURACY,
    ),
    Mutation(
        "gradients in graphs from half precision",
        "divergence",
        "log_softmax(clean.to(dtype)), log_softmax(adv.to(dtype))",
        "log_softmax(clean), log_softmax(adv)",
        "test_accuracy.py::test_compiled",
    ),
    Mutation(
        "gradients cast before scaling",
        "ops",
        "gradient.mul_(scale).to(logits.dtype)",
        "gradient.to(logits.dtype).mul_(scale)",
        "test_gradient_flow.py::test_float16_gradients_survive_loss_scaling",
    ),
    # Autograd.
    Mutation(
        "detach_clean lost",
        "functional",
        "clean = clean_logits.detach() if detach_clean else clean_logits\n    return ops.cktat_loss(",
        "clean = clean_logits\n    return ops.cktat_loss(",
        "test_criterion.py::test_detach_clean_stops_the_clean_gradient_and_nothing_else",
    ),
    Mutation(
        "teacher_logits not detached",
        "functional",
        "ops.cktat_loss(clean, adv_logits, teacher_logits.detach(),",
        "ops.cktat_loss(clean, adv_logits, teacher_logits,",
        "test_transforms.py::test_grad",
    ),
    Mutation(
        "consumed gradients used again",
        "ops",
        "(d_clean, d_adv), ctx.gradients = ctx.gradients, None",
        "d_clean, d_adv = ctx.gradients",
        "test_gradient_flow.py::test_backward_twice",
    ),
    Mutation(
        "second derivatives cut off",
        "ops",
        "if torch.is_grad_enabled() or _traced(upstream):",
        "if _traced(upstream):",
        "test_second_derivatives.py::test_loss",
    ),
    Mutation(
        "second derivatives of the terms cut off",
        "ops",
        "if torch.is_grad_enabled() or _traced(w_guidance, w_consistency):",
        "if _traced(w_guidance, w_consistency):",
        "test_second_derivatives.py::test_terms",
    ),
    Mutation(
        "a graph branches on data",
        "ops",
        "type(clean) in kernels.PLAIN and not _traced()",
        "type(clean) in kernels.PLAIN",
        "test_compile.py::test_loss_and_grads_is_one_graph",
    ),
    Mutation(
        "graphs keep what the backward pass could make",
        "ops",
        "CKTATTerms(*_InGraph.apply(clean, adv, teacher, tau))",
        "CKTATTerms(*divergence.terms(clean, adv, teacher, tau))",
        "test_compile.py::test_nothing_is_kept_for_the_backward_pass_but_the_logits",
    ),
    Mutation(
        "weights swapped, gradients in graphs",
        "ops",
        "ctx.tau, w_guidance, w_consistency), None",
        "ctx.tau, w_consistency, w_guidance), None",
        "test_compile.py::test_any_upstream_gradients_of_the_terms",
    ),
    # The teacher.
    Mutation(
        "teacher in train mode",
        "loss",
        "        m.training = False",
        "        m.training = True",
        f"{FROZEN}::test_train_mode_reaches_nothing",
    ),
    Mutation(
        "modes not restored",
        "loss",
        "            m.training = True",
        "            pass",
        f"{FROZEN}::test_a_shared_teacher_is_the_object_passed",
    ),
    Mutation(
        "teacher under grad",
        "loss",
        "with torch.no_grad(), _eval_mode(teacher):",
        "with _eval_mode(teacher):",
        f"{FROZEN}::test_it_runs_in_eval_mode_without_gradients",
    ),
    Mutation(
        "teacher not copied",
        "loss",
        "copy.deepcopy(unwrap(teacher))",
        "unwrap(teacher)",
        f"{FROZEN}::test_training_the_original_changes_nothing",
    ),
    Mutation(
        "teacher not unwrapped",
        "loss",
        "copy.deepcopy(unwrap(teacher))",
        "copy.deepcopy(teacher)",
        f"{FROZEN}::test_wrappers_are_taken_off",
    ),
    Mutation(
        "copy left thawed",
        "loss",
        "return teacher.eval().requires_grad_(False)",
        "return teacher",
        f"{FROZEN}::test_criterion_train_leaves_the_copy_in_eval_mode",
    ),
    Mutation(
        "teacher left behind",
        "loss",
        "self.teacher._apply(fn, recurse)",
        "pass",
        f"{FROZEN}::test_casting_the_criterion_casts_it",
    ),
    Mutation(
        "x not cast",
        "loss",
        "return x.to(tensor.dtype)",
        "return x",
        f"{FROZEN}::test_floating_inputs_are_cast_to_the_teachers_dtype",
    ),
    # Warm start.
    Mutation(
        "`module.` not stripped",
        "state_dicts",
        "if by_name or isinstance(owner, WRAPPERS):",
        "if False:",
        f"{WRAPPERS}::test_every_nesting_of_models_with_names_like_a_wrappers",
    ),
    Mutation(
        "`_orig_mod` not stripped",
        "state_dicts",
        'case ["_orig_mod."]:',
        "case []:",
        f"{WRAPPERS}::test_every_nesting_of_models_with_names_like_a_wrappers",
    ),
    Mutation(
        "partial copy before the error",
        "transfer",
        "    if (strict or not copied) and (",
        "    [targets[name].data.copy_(value) for name, value in values.values()]\n    if (strict or not copied) and (",
        "test_warm_start.py::test_strict_lists_every_misfit_and_writes_nothing",
    ),
    # Checks.
    Mutation(
        "shapes not checked", "checks", "if x.shape != clean.shape:", "if False:", "test_bad_input.py::test_refused"
    ),
    Mutation(
        "tau not checked",
        "checks",
        "if not SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32:",
        "if False:",
        "test_criterion.py::test_bad_schedules_are_refused",
    ),
    Mutation(
        "beta not checked",
        "checks",
        "if not 0 <= value <= LARGEST_FLOAT32:",
        "if False:",
        "test_criterion.py::test_bad_schedules_are_refused",
    ),
    # The Triton kernels, in the interpreter.
    Mutation("tau dropped, kernels", "kernels/row_math", "tl.maximum(1.0 / tau,", "tl.maximum(1.0,", TILES),
    Mutation(
        "series dropped, kernels",
        "kernels/row_math",
        "tl.where(tl.abs(d) < SERIES_BELOW, p * (d * d) * series, tl.fma(p, d, q - p))",
        "tl.fma(p, d, q - p)",
        "test_small_kl.py::test_small",
    ),
    Mutation("consistency not subtracted, kernels", "kernels/row_math", "(d_c - spread(consistency))", "d_c", TILES),
    Mutation("beta left out of one pass, kernels", "kernels/rows", "w_k = w_g * beta", "w_k = w_g", TILES),
    Mutation("columns past the row, kernels", "kernels/rows", "& (cols < C)", "& (cols < C + 1)", ONCE),
    Mutation("rows past the batch, kernels", "kernels/rows", "inside = rows < n", "inside = rows < n + 1", ONCE),
    Mutation(
        "edges shifted, kernels", "kernels/streaming", "head + length + lane - 8", "head + length + lane - 7", ODD
    ),
    Mutation(
        "between chunks left out, kernels",
        "kernels/streaming",
        "guidance = guidance_between + row_sum(",
        "guidance = row_sum(",
        "test_tiles.py::test_chunks",
    ),
    Mutation(
        "a masked chunk's maximum, kernels",
        "kernels/streaming",
        "x -= spread(tl.where(max_c == NEG_INF, 0.0, max_c))",
        "x -= spread(max_c)",
        "test_masks.py::test_masks_that_leave_an_answer",
    ),
    Mutation(
        "strides ignored, kernels",
        "kernels/launch",
        "contiguous = self.n <= 1 or all(",
        "contiguous = True or all(",
        "test_traffic.py::test_strides_are_read_where_they_lie",
    ),
    Mutation(
        "upstream gradient ignored, kernels",
        "ops",
        "ctx.tau, state, upstream, upstream,",
        "ctx.tau, state, 1.0, 1.0,",
        "test_gradient_flow.py::test_backward_twice",
    ),
    Mutation(
        "operator's weights swapped, kernels",
        "operators",
        "gradients(*ctx.saved_tensors, w_guidance, w_consistency, *needed)",
        "gradients(*ctx.saved_tensors, w_consistency, w_guidance, *needed)",
        "test_triton_interpreter.py::test_compiled_as_operators",
    ),
]


@contextmanager
def scratch_copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, target, symlinks=True, ignore=ignored)
            else:
                shutil.copy(source, target)
        yield Path(folder)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in the copy, which comes before any installed library. Arguments: options, and tests by file and name."""
    where = f"import cktat_loss; assert cktat_loss.__file__.startswith({str(folder)!r}), cktat_loss.__file__"
    code = f"import sys, pytest; {where}; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-x", "-q", "-p", "no:cacheprovider", "--tb=line", "--show-capture=no")
    arguments = tuple(f"tests/{one}" if "::" in one else one for one in arguments)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *options, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def broken(source: str, mutation: Mutation) -> str:
    found = source.count(mutation.old)
    if found != 1:
        sys.exit(f"{mutation.name}: {mutation.module}.py must contain {mutation.old!r} once, but has it {found} times")
    return source.replace(mutation.old, mutation.new)


def outcome(mutation: Mutation) -> str:
    with scratch_copy() as folder:
        path = folder / "cktat_loss" / f"{mutation.module}.py"
        path.write_text(broken(path.read_text(), mutation))
        done = run(folder, *mutation.mode, mutation.test)
    if done.returncode == 1 and " failed" in done.stdout:
        return "caught"
    # Anything but passed or failed, such as a syntax error, says nothing about the test.
    return "SURVIVED" if done.returncode == 0 else f"ERROR\n{done.stdout}{done.stderr}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time")
    parser.add_argument("-k", metavar="WORD", default="", help="only mutations with this in their name")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.k in mutation.name]

    if not chosen:
        parser.error(f"no mutation has {options.k!r} in its name")
    start = time.monotonic()
    for mutation in chosen:
        broken((ROOT / "cktat_loss" / f"{mutation.module}.py").read_text(), mutation)
    for mode in {mutation.mode for mutation in chosen}:
        with scratch_copy() as folder:
            whole = run(folder, *mode, *dict.fromkeys(m.test for m in chosen if m.mode == mode))
        if whole.returncode != 0:
            print(whole.stdout, whole.stderr, "The tests named must exist, and pass while nothing is broken.", sep="\n")
            return 1

    names, tests = max(len(m.name) for m in chosen), max(len(m.test) for m in chosen)
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, result in zip(chosen, pool.map(outcome, chosen), strict=True):
            survivors += result != "caught"
            print(f"{mutation.name:{names}}  {mutation.test:{tests}}  {result}", flush=True)
    print(f"{len(chosen)} mutations, {survivors} not caught, {time.monotonic() - start:.0f} s")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
