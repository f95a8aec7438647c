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
    test: str
    old: str
    new: str
    mode: tuple[str, ...] = ()  # how pytest runs the test


ACCURACY = "test_accuracy.py::test_loss_and_gradients"
FROZEN = "test_teacher_is_frozen.py"
HELD = "test_held_gradients.py"
IN_USE = "test_kernels_in_use.py"
MASKS = "test_masks.py::test_masks_that_leave_an_answer"
MOVES = "test_traffic.py::test_moves"
ODD = "test_tiles.py::test_rows_of_odd_length_start_anywhere"
TILES = "test_tiles.py::test_few_classes"
WEIGHTS = "test_sample_weights.py"
WRAPPERS = "test_warm_start_wrappers.py"

# fmt: off
TORCH = [
    # The formula.
    Mutation("tau dropped", "_cpu", ACCURACY, "x /= tau", "x /= 1"),
    Mutation("tau dropped, few calls", "_cpu", ACCURACY, "x[0].div_(tau)", "x[0].div_(1)"),
    Mutation("tau dropped, plain", "_plain", ACCURACY, "shifted if tau is None else shifted / tau", "shifted"),
    Mutation("tau divides the student", "_plain", ACCURACY,
             "log_softmax(clean.to(dtype)), log_a)", "log_softmax(clean.to(dtype), tau), log_a)"),
    Mutation("terms swapped, few calls", "_cpu", ACCURACY,
             "guidance, consistency = kl.clamp_", "consistency, guidance = kl.clamp_"),
    Mutation("expm1 dropped, few calls", "_cpu", "test_small_kl.py::test_small",
             "d.neg().expm1_().add_(d)", "d.clone()"),
    Mutation("guidance reversed", "_plain", ACCURACY,
             "kl_divergence(log_softmax(teacher.to(dtype), tau), log_a)",
             "kl_divergence(log_a, log_softmax(teacher.to(dtype), tau))"),
    Mutation("consistency reversed", "_plain", ACCURACY,
             "kl_divergence(log_softmax(clean.to(dtype)), log_a)",
             "kl_divergence(log_a, log_softmax(clean.to(dtype)))"),
    Mutation("sign of d_clean", "_cpu", ACCURACY, ".mul_(p_c).mul_(w_c)", ".mul_(-p_c).mul_(w_c)"),
    Mutation("beta not in d_adv", "_cpu", ACCURACY, "p_a.sub_(p_c, alpha=w_c)", "p_a.sub_(p_c)"),
    Mutation("mean not taken off d_clean", "_plain", ACCURACY, "(d - (p_c * d).sum(-1, keepdim=True))", "d"),
    # Weights of the samples.
    Mutation("sample weights not in d_adv", "_cpu", f"{WEIGHTS}::test_a_tensor_of_any_floating_dtype",
             "p_a.addcmul_(p_c, w_c, value=-1)", "p_a.sub_(p_c)"),
    Mutation("beta ignored", "_plain", "test_criterion.py::test_terms_are_the_two_summands",
             "rows = guidance + beta *", "rows = guidance +"),
    Mutation("beta of a call ignored", "loss", "test_criterion.py::test_a_beta_of_one_call",
             "self.beta if beta is None else beta", "self.beta"),
    Mutation("a call's scale of labels ignored", "loss",
             "test_criterion.py::test_labels_follow_the_criterions_beta_and_a_calls_is_its_scale",
             "self.beta if beta is None else beta", "self.beta"),
    Mutation("labels lost", "loss", "test_criterion.py::test_labels_weigh_the_samples", "y=y,", "y=None,"),
    Mutation("labels not asked for", "loss", "test_criterion.py::test_labels_where_they_are_due_and_only_there",
             "if self.adaptive and y is None:", "if False:"),
    Mutation("labels taken by any criterion", "loss",
             "test_criterion.py::test_labels_where_they_are_due_and_only_there",
             "if y is not None and not self.adaptive:", "if False:"),
    Mutation("label off by one", "_plain", f"{WEIGHTS}::test_labels",
             "y.clamp(0, classes - 1)", "(y + 1).clamp(0, classes - 1)"),
    Mutation("a label that is no class weighs", "_plain", f"{WEIGHTS}::test_elsewhere_it_gives_nan_compiled",
             "torch.where((y >= 0) & (y < classes), p, torch.nan)", "p"),
    Mutation("labels that are no class let through", "_checks",
             f"{WEIGHTS}::test_a_label_that_is_no_class_is_refused_on_the_cpu",
             "if lowest < 0 or highest >= of.shape[1]:", "if False:"),
    Mutation("weights carry a gradient", "_plain",
             "test_transforms.py::test_no_gradient_flows_through_the_labels_weights_or_the_terms",
             "problem.adv.detach().to(dtype)", "problem.adv.to(dtype)"),
    Mutation("adaptive_beta not detached", "functional", f"{WEIGHTS}::test_adaptive_beta",
             "adv_logits.detach().softmax", "adv_logits.softmax"),
    # Reductions.
    Mutation("sum instead of mean", "_plain", "test_reductions.py::test_reductions_of_the_same_rows",
             'rows.mean() if reduction == "mean"', 'rows.sum() if reduction == "mean"'),
    Mutation("gradient of a mean over N * C", "_plain", f"{HELD}::test_any_upstream_gradient",
             "max(1, problem.adv.shape[0])", "max(1, problem.adv.numel())"),
    # Numbers.
    Mutation("mask ignored", "_cpu", MASKS, "if math.isnan(lowest):", "if False:"),
    Mutation("mask ignored, few calls", "_cpu", MASKS, "if not math.isfinite(kl.sum().item()):", "if False:"),
    Mutation("mask ignored, plain", "_plain", MASKS, "torch.where(p > 0, log_p - log_q, 1.0)", "log_p - log_q"),
    Mutation("mask ignored, plain gradients", "_plain", MASKS,
             "torch.where(p_c > 0, log_c - log_a, 0.0)", "log_c - log_a"),
    Mutation("small-KL series dropped", "_plain", "test_small_kl.py::test_small",
             "return torch.where(d.abs() < SERIES_BELOW, series, plain)", "return plain"),
    Mutation("small-KL series cut short", "_plain", "test_small_kl.py::test_from_tiny_to_ordinary",
             "(c0 + d * (c1 + d * (c2 + d * (c3 + d * c4))))", "c0"),
    Mutation("small-KL series cut short, in place", "_cpu", "test_small_kl.py::test_from_tiny_to_ordinary",
             "for coefficient in reversed(lower):", "for coefficient in lower[:1]:"),
    Mutation("rows not their own, small KLs", "_cpu", "test_small_kl.py::test_small_rows_among_others",
             "p_a.index_select(0, rows)", "p_a[: len(rows)]"),
    Mutation("small KLs summed plainly", "_cpu", "test_small_kl.py::test_small",
             "PLAIN_SUM_DOWN_TO = 0.02", "PLAIN_SUM_DOWN_TO = 0.0"),
    Mutation("negative KL let through", "_plain", "test_small_kl.py::test_never_negative_in_float64",
             "return kl - kl.detach().clamp(max=0)", "return kl"),
    Mutation("half precision not upcast", "_cpu", ACCURACY, "x = logits.float()", "x = logits"),
    Mutation("half precision not upcast, few calls", "_cpu", ACCURACY,
             "(teacher, clean, adv)).float()", "(teacher, clean, adv))"),
    Mutation("half precision not upcast, plain", "_plain", ACCURACY,
             "    log_a = log_softmax(adv.to(dtype))", "    log_a = log_softmax(adv)"),
    Mutation("gradients cast before scaling", "_cpu", f"{HELD}::test_float16_gradients_survive_loss_scaling",
             "        _weighted_(d_adv, w_guidance)\n    return",
             "        d_adv = d_adv.to(problem.adv.dtype).float()\n        _weighted_(d_adv, w_guidance)\n    return"),
    # Autograd.
    Mutation("detach_clean lost", "functional",
             "test_criterion.py::test_detach_clean_stops_the_clean_gradient_and_nothing_else",
             "clean = clean_logits.detach() if detach_clean else clean_logits\n"
             "    problem = Problem(clean, adv_logits, teacher_logits, tau, beta",
             "clean = clean_logits\n    problem = Problem(clean, adv_logits, teacher_logits, tau, beta"),
    Mutation("teacher_logits not detached", "_autograd",
             "test_gradient_flow.py::test_the_teachers_own_graph_is_left_alone",
             "problem = problem._replace(teacher=problem.teacher.detach())", "pass"),
    Mutation("held gradients used again", "_autograd", f"{HELD}::test_passes_over_a_retained_graph_add_up",
             "held, ctx.held = ctx.held, None", "held = ctx.held"),
    Mutation("changes in place go unnoticed", "_autograd",
             "test_gradient_flow.py::test_a_change_in_place_before_backward_is_noticed",
             "ctx.save_for_backward(clean, adv, teacher, saved_beta, y)",
             "ctx.save_for_backward(clean, adv.detach().clone(), teacher, saved_beta, y)"),
    Mutation("inference tensors saved", "_autograd", "test_gradient_flow.py::test_inference_tensors_simply_work",
             "return x.clone() if x.is_inference() else x", "return x"),
    Mutation("returned terms have a gradient", "_autograd", "test_criterion.py::test_terms_returned_with_the_loss",
             "ctx.mark_non_differentiable(out.guidance, out.consistency)", "pass"),
    Mutation("returned terms have a gradient, plain", "_plain", "test_compile.py::test_terms_come_with_the_loss",
             "Pass(loss, guidance.detach(), consistency.detach())", "Pass(loss, guidance, consistency)"),
    # In float32: the plain ops of float64 can be differentiated once more as they are.
    Mutation("second derivatives cut off", "_autograd", "test_second_derivatives.py::test_hessian",
             "        torch.is_grad_enabled()\n        or", "        False\n        or"),
    Mutation("clean and adv not told apart", "_autograd",
             "test_gradient_flow.py::test_adversarial_logits_that_depend_on_clean_ones",
             "problem.clean.view_as(problem.clean), problem.adv.view_as(problem.adv)", "problem.clean, problem.adv"),
    Mutation("graphs keep what the backward pass could make", "_autograd",
             "test_compile.py::test_nothing_is_kept_for_the_backward_pass_but_the_logits",
             "_InGraph.apply(clean, adv, teacher.detach(), tau)",
             "_plain.terms(clean, adv, teacher.detach(), tau)"),
    Mutation("weights swapped in a graph", "_autograd",
             "test_compile.py::test_a_step_is_one_graph_with_the_eager_gradients",
             "ctx.tau, w_guidance, w_consistency)", "ctx.tau, w_consistency, w_guidance)"),
    # The teacher.
    Mutation("teacher in train mode", "loss", f"{FROZEN}::test_train_mode_reaches_nothing",
             "            module.training = False", "            module.training = True"),
    Mutation("modes not restored", "loss", f"{FROZEN}::test_a_shared_teacher_is_the_object_passed",
             "                module.training = True", "                pass"),
    Mutation("teacher under grad", "loss", f"{FROZEN}::test_it_runs_in_eval_mode_without_gradients",
             "with torch.no_grad():", "with torch.enable_grad():"),
    Mutation("teacher not copied", "loss", f"{FROZEN}::test_training_the_original_changes_nothing",
             "copy.deepcopy(unwrap(teacher))", "unwrap(teacher)"),
    Mutation("teacher not unwrapped", "loss", f"{FROZEN}::test_wrappers_are_taken_off",
             "copy.deepcopy(unwrap(teacher))", "copy.deepcopy(teacher)"),
    Mutation("copy left thawed", "loss", f"{FROZEN}::test_criterion_train_leaves_the_copy_in_eval_mode",
             "return teacher.eval().requires_grad_(False)", "return teacher"),
    Mutation("teacher left behind", "loss", f"{FROZEN}::test_casting_the_criterion_casts_it",
             "self.teacher._apply(fn, recurse)", "pass"),
    Mutation("x not cast", "loss", f"{FROZEN}::test_floating_inputs_are_cast_to_the_teachers_dtype",
             "return x.to(tensor.dtype)", "return x"),
    # Warm start.
    Mutation("`module.` not stripped", "_state_dicts",
             f"{WRAPPERS}::test_every_nesting_of_models_with_names_like_a_wrappers",
             "if by_name or isinstance(owner, WRAPPERS):", "if False:"),
    Mutation("`_orig_mod` not stripped", "_state_dicts",
             f"{WRAPPERS}::test_every_nesting_of_models_with_names_like_a_wrappers",
             'case ["_orig_mod."]:', "case []:"),
    Mutation("partial copy before the error", "_warm_start",
             "test_warm_start.py::test_strict_lists_every_misfit_and_writes_nothing",
             "    if (strict or not copied) and (",
             "    [targets[name].data.copy_(value) for name, value in values.values()]\n"
             "    if (strict or not copied) and ("),
    # Checks.
    Mutation("shapes not checked", "_checks", "test_bad_input.py::test_refused", "if x.shape != shape:", "if False:"),
    Mutation("tau not checked", "_checks", "test_criterion.py::test_bad_schedules_are_refused",
             "if not HALF_OF_THE_SMALLEST_FLOAT32 < value <= LARGEST_FLOAT32:", "if False:"),
    Mutation("beta not checked", "_checks", "test_criterion.py::test_bad_schedules_are_refused",
             "if not 0 <= value <= LARGEST_FLOAT32:", "if False:"),
    Mutation("a parameter for tau", "loss", "test_criterion.py::test_bad_schedules_are_refused",
             "value = getattr(_checks, name)(value)", "pass"),
]
# fmt: on

# The Triton kernels.
# fmt: off
KERNELS = [
    Mutation("tau dropped", "kernels/row_math", TILES,
             "1.0 / tl.full((), tau, tl.float32)", "tl.full((), 1.0, tl.float32)"),
    Mutation("series dropped", "kernels/row_math", "test_small_kl.py::test_small",
             "tl.where(tl.abs(d) < 0.25, p * (d * d) * series, tl.fma(p, d, q - p))", "tl.fma(p, d, q - p)"),
    Mutation("consistency not subtracted", "kernels/row_math", TILES, "(d_c - spread(consistency))", "d_c"),
    Mutation("beta left out of the gradients", "kernels/rows", TILES, "w_c * weight\n        )", "w_c\n        )"),
    Mutation("label off by one", "kernels/rows", TILES, "cols == spread(y)", "cols == spread(y + 1)"),
    Mutation("label off by one, streaming", "kernels/streaming", f"{WEIGHTS}::test_labels",
             "adv_ptr - head + y,", "adv_ptr - head + y + 1,"),
    Mutation("a label that is no class reads on", "kernels/streaming",
             "test_traffic.py::test_a_label_that_is_no_class_reads_nobody_elses_memory",
             "adv_ptr - head + y, mask=exists)", "adv_ptr - head + y)"),
    Mutation("a label that is no class weighs nothing", "kernels/rows",
             f"{WEIGHTS}::test_elsewhere_it_gives_nan_for_its_row_alone",
             'float("nan"))', "0.0)"),
    Mutation("columns past the row", "kernels/rows", MOVES, "& (cols < C)", "& (cols < C + 1)"),
    Mutation("rows past the batch", "kernels/rows", MOVES, "inside = rows < n", "inside = rows < n + 1"),
    Mutation("edges shifted", "kernels/streaming", ODD, "length + lane - 8)", "length + lane - 7)"),
    Mutation("between chunks left out", "kernels/streaming", "test_tiles.py::test_rows_in_chunks",
             "guidance = guidance_between + row_sum(", "guidance = row_sum("),
    Mutation("a masked chunk's maximum", "kernels/streaming", MASKS,
             'c -= spread(tl.where(top_c == float("-inf"), 0.0, top_c))', "c -= spread(top_c)"),
    Mutation("strides ignored", "kernels/launch", "test_traffic.py::test_strides_are_read_where_they_lie",
             "if n > 1 else (classes, classes, classes)", "if n < 1 else (classes, classes, classes)"),
    # Gradients that are held.
    Mutation("done at any upstream", "kernels/rows", f"{HELD}::test_any_upstream_gradient",
             "if tl.load(w_guidance) == 1.0:", "if tl.load(w_guidance) != 0.0:"),
    Mutation("done at any upstream, streaming", "kernels/streaming",
             f"{IN_USE}::test_at_another_upstream_they_are_computed_anew_into_the_same_memory",
             "if tl.load(w_guidance) == 1.0:", "if tl.load(w_guidance) != 0.0:"),
    Mutation("never done", "kernels/launch", f"{IN_USE}::test_at_upstream_one_the_held_gradients_are_the_result",
             "problem.reduction, outputs, are_held)", "problem.reduction, outputs, False)"),
    Mutation("done where nothing was held", "kernels/launch", f"{HELD}::test_any_upstream_gradient",
             "problem.reduction, outputs, are_held)", "problem.reduction, outputs, True)"),
    Mutation("upstream gradient ignored", "kernels/rows", f"{HELD}::test_any_upstream_gradient",
             "per_row(w_guidance, GUIDANCE_STRIDE, rows, inside) * scale", "1.0 * scale"),
    Mutation("held gradients used again", "_autograd", f"{HELD}::test_no_pass_writes_into_another_ones_result",
             "held, ctx.held = ctx.held, None", "held = ctx.held"),
    Mutation("float16 not lazy", "kernels/launch",
             f"{IN_USE}::test_gradients_that_would_not_be_right_yet_wait_for_the_backward_pass",
             "and not half else", "else"),
    Mutation("float16 lazy for nothing", "kernels/launch",
             f"{IN_USE}::test_float16_logits_that_need_no_gradient_make_nobody_wait",
             "(needed[0] and clean.dtype == torch.float16)", "clean.dtype == torch.float16"),
    Mutation("rows not lazy", "kernels/launch",
             f"{IN_USE}::test_gradients_that_would_not_be_right_yet_wait_for_the_backward_pass",
             'reduction in ("mean", "sum")', 'reduction != "terms"'),
    Mutation("gradients of terms swapped", "kernels/launch",
             "test_properties.py::test_any_upstream_gradients_of_the_terms",
             "pointer_c, w_guidance, w_consistency, None", "pointer_c, w_consistency, w_guidance, None"),
]
# fmt: on
MUTATIONS = [
    *TORCH,
    *(m._replace(name=f"kernels: {m.name}", mode=("-m", "interpreter")) for m in KERNELS),
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
