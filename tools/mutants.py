"""Break the library in named ways, and see the named test of each way fail: ``python tools/mutants.py``.

A mutation replaces one expression or statement of one function. Both sides are compared as syntax trees, so layout and
comments do not matter. In ``old``, a name such as ``_A`` matches any expression, and stands for it in ``new``. Before
the library is broken, all named tests must pass.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    name: str
    scope: str  # module:function, module:class.method, or a module
    test: str
    old: str  # occurs once in the scope
    new: str
    backend: str = "torch"  # how pytest runs the test


ACCURACY = "test_accuracy.py::test_loss_and_gradients"
BAD_INPUT = "test_bad_input.py"
COPY = "test_teacher_deep_copy.py"
CRITERION = "test_criterion.py"
EXPORT = "test_export.py"
FILES = "test_warm_start_files.py"
FLOW = "test_gradient_flow.py"
FROZEN = "test_teacher_is_frozen.py"
HELD = "test_precomputed_gradients.py"
IN_USE = "test_kernels_in_use.py"
MASKS = "test_masks.py::test_masks_that_leave_an_answer"
MOVES = "test_traffic.py::test_moves"
ODD = "test_tiles.py::test_rows_of_odd_length_start_anywhere"
SCHEDULES = f"{CRITERION}::test_bad_schedules_are_refused"
SMALL = "test_small_kl.py"
TEACHER = "test_teacher_as_it_is.py"
TILES = "test_tiles.py::test_few_classes"
WARM = "test_warm_start.py"
WEIGHTS = "test_sample_weights.py"
WRAPPERS = "test_warm_start_wrappers.py"

# fmt: off
TORCH = [
    # The formula.
    ("tau dropped", "_cpu:_softmax", ACCURACY, "x /= tau", "x /= 1"),
    ("tau dropped, plain", "_plain:log_softmax", ACCURACY, "shifted / tau", "shifted"),
    ("tau divides the student, plain", "_plain:terms_forward", ACCURACY,
     "log_softmax(clean.to(dtype))", "log_softmax(clean.to(dtype), tau)"),
    ("guidance reversed, plain", "_plain:terms_forward", ACCURACY,
     "kl_divergence(log_softmax(_A, tau), _B)", "kl_divergence(_B, log_softmax(_A, tau))"),
    ("consistency reversed, plain", "_plain:terms_forward", ACCURACY,
     "kl_divergence(log_softmax(clean.to(dtype)), _B)", "kl_divergence(_B, log_softmax(clean.to(dtype)))"),
    ("sign of d_clean", "_cpu:_block", ACCURACY, "_A.mul_(p_c)", "_A.mul_(-p_c)"),
    ("beta not in d_adv", "_cpu:_block", ACCURACY, "p_a.sub_(p_c, alpha=w_c)", "p_a.sub_(p_c)"),
    ("mean not subtracted from d_clean, plain", "_plain:gradients", ACCURACY,
     "d - (p_c * d).sum(-1, keepdim=True)", "d"),
    # Weights of the samples.
    ("sample weights not in d_adv", "_cpu:_block", f"{WEIGHTS}::test_a_tensor_of_any_floating_dtype",
     "p_a.addcmul_(p_c, w_c, value=-1)", "p_a.sub_(p_c)"),
    ("beta ignored", "_plain:reduce", f"{CRITERION}::test_terms_are_the_two_summands",
     "weights * terms.consistency", "terms.consistency"),
    ("beta of a call ignored", "loss:CKTATLoss.forward", f"{CRITERION}::test_a_beta_of_one_call",
     "self.beta if beta is None else beta", "self.beta"),
    ("a call's scale of labels ignored", "loss:CKTATLoss.forward",
     f"{CRITERION}::test_labels_follow_the_criterions_beta_and_a_calls_is_its_scale",
     "self.beta if beta is None else beta", "self.beta"),
    ("labels lost", "functional:cktat_loss", f"{CRITERION}::test_labels_weigh_the_samples",
     "Weighting(beta, y, reduction)", "Weighting(beta, None, reduction)"),
    ("labels not required", "loss:CKTATLoss.forward",
     f"{CRITERION}::test_labels_where_they_are_due_and_only_there", "self.adaptive and y is None", "False"),
    ("labels taken by any criterion", "loss:CKTATLoss.forward",
     f"{CRITERION}::test_labels_where_they_are_due_and_only_there", "y is not None and not self.adaptive", "False"),
    ("label off by one", "_plain:label_weights", f"{WEIGHTS}::test_labels",
     "y.clamp(_A, _B)", "(y + 1).clamp(_A, _B)"),
    ("a label out of range weighs", "_plain:label_weights", f"{WEIGHTS}::test_elsewhere_it_gives_nan_compiled",
     "torch.where(_A, p, torch.nan)", "p"),
    ("labels out of range let through", "_checks:labels",
     f"{WEIGHTS}::test_a_label_that_is_no_class_is_refused_on_the_cpu", "lowest < 0 or _A", "False"),
    ("weights carry a gradient", "_plain:sample_weights",
     "test_transforms.py::test_no_gradient_flows_through_the_labels_weights_or_the_terms",
     "problem.adv.detach()", "problem.adv"),
    ("adaptive_beta not detached", "functional:adaptive_beta", f"{WEIGHTS}::test_adaptive_beta",
     "adv_logits.detach()", "adv_logits"),
    # Reductions.
    ("sum instead of mean", "_plain:reduce", "test_reductions.py::test_reductions_of_the_same_rows",
     "rows.mean()", "rows.sum()"),
    ("gradient of a mean over N * C", "_cpu:loss_backward", f"{HELD}::test_any_upstream_gradient",
     "problem.adv.shape[0]", "problem.adv.numel()"),
    ("gradient of a mean over N * C, plain", "_plain:loss_backward", f"{HELD}::test_any_upstream_gradient",
     "problem.adv.shape[0]", "problem.adv.numel()"),
    # Numbers.
    ("mask ignored", "_cpu:_divergence_", MASKS, "math.isnan(lowest)", "False"),
    ("mask ignored, plain", "_plain:kl_divergence", MASKS, "torch.where(_A > 0, _B, 1.0)", "_B"),
    ("mask ignored, plain gradients", "_plain:gradients", MASKS, "torch.where(_A > 0, _B, 0.0)", "_B"),
    ("series for small KLs dropped, plain", "_plain:kl_elements", f"{SMALL}::test_small",
     "torch.where(_A, series, direct)", "direct"),
    ("series cut short, plain", "_plain:kl_elements", f"{SMALL}::test_from_tiny_to_ordinary", "c0 + _A", "c0"),
    ("series cut short", "_cpu:_small_kl_", f"{SMALL}::test_from_tiny_to_ordinary", "reversed(lower)", "lower[:1]"),
    ("small KLs of other rows", "_cpu:_small_kl_", f"{SMALL}::test_small_rows_among_others",
     "p_a.index_select(0, rows)", "p_a[: len(rows)]"),
    ("small KLs summed directly", "_cpu", f"{SMALL}::test_small",
     "DIRECT_SUM_DOWN_TO = _A", "DIRECT_SUM_DOWN_TO = 0.0"),
    ("negative KL let through", "_plain:kl_divergence", f"{SMALL}::test_never_negative_in_float64",
     "return kl - _A", "return kl"),
    ("half precision not upcast", "_cpu:_softmax", ACCURACY, "logits.float()", "logits"),
    ("half precision not upcast, plain", "_plain:terms_forward", ACCURACY, "adv.to(dtype)", "adv"),
    ("gradients cast before scaling", "_cpu:loss_backward", f"{HELD}::test_float16_gradients_survive_loss_scaling",
     "_scale_rows_(d_adv, weight)", "_scale_rows_(d_adv.to(problem.adv.dtype).float(), weight)"),
    # Autograd.
    ("detach_clean lost", "functional:cktat_loss",
     f"{CRITERION}::test_detach_clean_stops_the_clean_gradient_and_nothing_else",
     "clean_logits.detach() if _A else clean_logits", "clean_logits"),
    ("teacher_logits not detached", "functional:cktat_loss", f"{FLOW}::test_the_teachers_own_graph_is_left_alone",
     "teacher_logits.detach()", "teacher_logits"),
    ("teacher_logits of terms not detached", "functional:cktat_terms",
     f"{FLOW}::test_the_teachers_own_graph_is_left_alone", "teacher_logits.detach()", "teacher_logits"),
    ("precomputed gradients used twice", "_autograd:_Loss.backward",
     f"{HELD}::test_passes_over_a_retained_graph_add_up",
     "precomputed, ctx.precomputed = ctx.precomputed, None", "precomputed = ctx.precomputed"),
    ("changes in place go unnoticed", "_autograd:_Loss.forward",
     f"{FLOW}::test_a_change_in_place_before_backward_is_noticed",
     "ctx.save_for_backward(clean, adv, _A, _B, _C)", "ctx.save_for_backward(clean, adv.clone(), _A, _B, _C)"),
    ("inference tensors saved", "_autograd:_savable", f"{FLOW}::test_inference_tensors_simply_work",
     "x.clone() if x.is_inference() else x", "x"),
    ("returned terms have a gradient", "_autograd:_Loss.forward", f"{CRITERION}::test_terms_returned_with_the_loss",
     "ctx.mark_non_differentiable(_A, _B)", "None"),
    ("returned terms have a gradient, plain", "_plain:combine", "test_compile.py::test_terms_come_with_the_loss",
     "terms.guidance.detach()", "terms.guidance"),
    ("second derivatives cut off", "_autograd:_is_differentiated", "test_second_derivatives.py::test_hessian",
     "torch.is_grad_enabled()", "False"),
    ("mapped gradients not seen", "_autograd:_is_differentiated",
     "test_transforms.py::test_many_upstream_gradients_at_once", "is_mapped(_A)", "False"),
    ("clean and adv not told apart", "_autograd:_as_views",
     f"{FLOW}::test_adversarial_logits_that_depend_on_clean_ones",
     "problem.clean.view_as(problem.clean)", "problem.clean"),
    ("gradients lost in an exported loss", "_autograd:loss", f"{EXPORT}::test_the_gradient_of_an_exported_module",
     "_derives_everything()", "is_transformed()"),
    ("gradients lost in exported terms", "_autograd:terms", f"{EXPORT}::test_the_gradient_of_an_exported_module",
     "_derives_everything()", "is_transformed()"),
    ("one tensor as two inputs in a graph", "_autograd:_terms_in_graph",
     f"{EXPORT}::test_one_tensor_as_several_of_the_logits_compiles",
     "problem.adv.view_as(problem.adv)", "problem.adv"),
    ("a graph saves what the backward pass could compute", "_autograd:loss",
     "test_compile.py::test_nothing_is_kept_for_the_backward_pass_but_the_logits",
     "_terms_in_graph(problem)", "_plain.terms_forward(problem)"),
    ("weights swapped in a graph", "_autograd:_TermsInGraph.backward",
     "test_compile.py::test_a_step_is_one_graph_with_the_eager_gradients",
     "_plain.gradients(problem, _A, _B)", "_plain.gradients(problem, _B, _A)"),
    # The teacher.
    ("teacher in train mode", "_teacher:run", f"{FROZEN}::test_train_mode_reaches_nothing",
     "module.training = False", "module.training = True"),
    ("modes not restored", "_teacher:run", f"{FROZEN}::test_a_shared_teacher_is_the_object_passed",
     "module.training = True", "pass"),
    ("teacher under grad", "_teacher:run", f"{FROZEN}::test_it_runs_in_eval_mode_without_gradients",
     "torch.no_grad()", "torch.enable_grad()"),
    ("hint on the dtype dropped", "_teacher:run", f"{TEACHER}::test_a_dtype_that_the_teacher_does_not_take",
     "(hint := _dtype_hint(teacher, x))", "(hint := None)"),
    ("hint on the dtype after any error", "_teacher:_dtype_hint",
     f"{TEACHER}::test_other_errors_of_the_teacher_stay_as_they_are", "x.dtype in _A", "False"),
    ("hint on the dtype of ids", "_teacher:_dtype_hint", f"{TEACHER}::test_no_hint_on_the_dtype_of_ids",
     "(*dtypes, torch.int32, torch.int64)", "dtypes"),
    ("teacher not copied", "_deep_copy:frozen_copy", f"{FROZEN}::test_training_the_original_changes_nothing",
     "copy.deepcopy(original)", "original"),
    ("wrappers not removed", "_teacher:freeze", f"{FROZEN}::test_wrappers_are_taken_off", "unwrap(teacher)", "teacher"),
    ("copy left thawed", "_deep_copy:frozen_copy", f"{FROZEN}::test_criterion_train_leaves_the_copy_in_eval_mode",
     "_A.eval().requires_grad_(False)", "_A"),
    ("wrapper with hooks removed", "_teacher:unwrap", f"{TEACHER}::test_nothing_that_a_wrapper_does_is_lost",
     "hooks(module)", "False"),
    ("wrapper of a subclass removed", "_teacher:unwrap", f"{TEACHER}::test_nothing_that_a_wrapper_does_is_lost",
     "type(module) in WRAPPERS", "isinstance(module, WRAPPERS)"),
    ("wrapper with a forward of its own removed", "_teacher:unwrap",
     f"{TEACHER}::test_nothing_that_a_wrapper_does_is_lost", "'forward' not in vars(module)", "True"),
    ("a delegating __getattr__ taken for a wrapper", "_teacher:unwrap",
     f"{TEACHER}::test_nothing_that_a_wrapper_does_is_lost",
     "is_compiled(module) and _A", "hasattr(module, '_orig_mod')"),
    ("closures not checked", "_deep_copy:_reference_that_stays",
     f"{COPY}::test_sharing_is_refused", "isinstance(thing, nn.Module) or _A", "False"),
    ("globals not checked", "_deep_copy:_held", f"{COPY}::test_a_function_with_a_global_module_is_refused",
     "function.__code__.co_names", "()"),
    ("shared memory of a copy let through", "_deep_copy:_check_copy",
     f"{COPY}::test_sharing_is_refused", "memory(tensor) in own", "id(tensor) in own"),
    ("lost attributes let through", "_deep_copy:_check_copy", f"{COPY}::test_losing_is_refused",
     "_lost_attributes(module, copies[name])", "set()"),
    ("own forward of a compiled wrapper lost", "_teacher:unwrap", f"{COPY}::test_losing_is_refused",
     "not has_own_forward(module)", "True"),
    ("default arguments not checked", "_deep_copy:_held",
     f"{COPY}::test_sharing_is_refused",
     "function.__defaults__ or ()", "()"),
    ("shared copy let through", "_deep_copy:_check_copy", f"{COPY}::test_sharing_is_refused",
     "made is original or shared", "False"),
    ("lost hooks let through", "_deep_copy:_check_copy", f"{COPY}::test_losing_hooks_is_refused",
     "_count_hooks(module) != _count_hooks(_A)", "False"),
    ("export in train mode let through", "_teacher:_check_runnable",
     f"{TEACHER}::test_a_module_exported_in_train_mode_is_refused",
     "(target := _train_mode_call(module))", "(target := None)"),
    ("dropout of an exported attention let through", "_teacher:_train_mode_call",
     f"{TEACHER}::test_a_module_exported_in_train_mode_is_refused", "dropout_rate > 0", "False"),
    ("TorchScript let through", "_teacher:_check_runnable", f"{TEACHER}::test_torchscript_is_refused",
     "isinstance(module, torch.jit.ScriptModule)", "False"),
    ("teacher without values let through", "_teacher:_check_runnable",
     f"{TEACHER}::test_a_teacher_without_values_is_refused", "tensor.is_meta", "False"),
    ("to_empty loses values", "_teacher:move", f"{TEACHER}::test_to_empty_keeps_the_teachers_values",
     "moved.copy_(tensor)", "None"),
    ("teacher left behind", "loss:CKTATLoss._apply", f"{FROZEN}::test_casting_the_criterion_casts_it",
     "_teacher.move(_A, _B)", "None"),
    # Warm start.
    ("`module.` not removed", "_state_dicts:_unwrapped",
     f"{WRAPPERS}::test_every_nesting_of_models_with_names_like_a_wrappers",
     "by_name or isinstance(owner, WRAPPERS)", "False"),
    ("`_orig_mod.` not removed", "_state_dicts:_unwrapped",
     f"{WRAPPERS}::test_every_nesting_of_models_with_names_like_a_wrappers", "return children['_orig_mod.']", "pass"),
    ("partial copy before the error", "_warm_start:warm_start",
     f"{WARM}::test_strict_lists_every_misfit_and_writes_nothing",
     "copied = _A", "copied = _A; [targets[first].data.copy_(value) for first, value in values.values()]"),
    ("elements written twice", "_warm_start:_check_writable", f"{WARM}::test_ties_by_another_view_are_refused",
     "(lost := _lost_write(writes))", "(lost := None)"),
    ("shared memory let through", "_warm_start:warm_start", f"{WARM}::test_a_shared_tensor_is_refused",
     "student is teacher or shared", "False"),
    ("a missing counter of BatchNorm refused", "_warm_start:warm_start",
     f"{WARM}::test_a_batchnorm_without_its_counter", "_is_optional(name, pairs)", "False"),
    ("a counter without statistics let through", "_warm_start:_is_optional",
     f"{WARM}::test_a_counter_is_only_spared_beside_statistics", "kind == _A and _B", "kind == _A"),
    ("checksums not verified", "_state_dicts:_damage", f"{FILES}::test_a_flipped_byte_in_a_zip_is_found",
     "archive.testzip() if _A else None", "None"),
    ("a false directory read", "_state_dicts:_damage", f"{FILES}::test_an_entry_marked_as_a_directory_is_found",
     "entry.external_attr & 16 and _A", "False"),
    ("absent checksums verified", "_state_dicts:_damage", f"{FILES}::test_a_zip_without_checksums_is_read",
     "archive.testzip() if _A else None", "archive.testzip()"),
    ("code of a file runs", "_state_dicts:_read",
     "test_warm_start_checkpoints.py::test_a_file_that_would_run_code_is_refused",
     "torch.load(path, map_location=_A, weights_only=True)", "torch.load(path, map_location=_A, weights_only=False)"),
    ("weights beside a set of weights left out", "_state_dicts:find_weights",
     "test_warm_start_checkpoints.py::test_weights_beside_a_set_of_weights_are_refused", "not beside", "True"),
    ("one of several sets of weights guessed", "_state_dicts:find_weights",
     "test_warm_start_checkpoints.py::test_several_sets_of_weights_are_never_guessed_between",
     "len(found) == 1 and _A", "found"),
    # Checks.
    ("shapes not checked", "_checks:logits", f"{BAD_INPUT}::test_refused", "x.shape != shape", "False"),
    ("tau not checked", "_checks:tau", SCHEDULES, "not _A < value <= _B", "False"),
    ("beta not checked", "_checks:beta", SCHEDULES, "not 0 <= value <= _A", "False"),
    ("a parameter for tau", "loss:CKTATLoss.__setattr__", SCHEDULES, "getattr(_checks, name)(value)", "value"),
    ("unrelated subclasses let through", "_checks:combinable", f"{BAD_INPUT}::test_unrelated_tensor_subclasses",
     "not issubclass(_A, _B) and not issubclass(_B, _A)", "False"),
    ("related subclasses refused", "_checks:combinable", f"{BAD_INPUT}::test_related_tensor_subclasses_and_parameters",
     "not issubclass(_A, _B) and not issubclass(_B, _A)", "True"),
    ("labels with sharded classes let through", "_checks:labels",
     "test_distributed.py::test_dtensor_logits_are_right_or_refused", "any(_A)", "False"),
]

# The Triton kernels.
KERNELS = [
    ("tau dropped", "row_math:rates", TILES, "1.0 / tl.full((), tau, tl.float32)", "tl.full((), 1.0, tl.float32)"),
    ("series for small KLs dropped", "row_math:kl_sum", f"{SMALL}::test_small",
     "tl.where(_A, p * (d * d) * series, _B)", "_B"),
    ("consistency not subtracted", "row_math:store_gradients", TILES, "d_c - spread(consistency)", "d_c"),
    ("beta left out of the gradients", "rows:rows_kernel", TILES, "w_c * weight", "w_c"),
    ("label off by one", "rows:rows_kernel", TILES, "cols == spread(y)", "cols == spread(y + 1)"),
    ("label off by one, streaming", "streaming:streaming_kernel", f"{WEIGHTS}::test_labels",
     "adv_ptr - head + y", "adv_ptr - head + y + 1"),
    ("a label out of range reads on", "streaming:streaming_kernel",
     "test_traffic.py::test_a_label_that_is_no_class_reads_nobody_elses_memory",
     "tl.load(_A, mask=in_range)", "tl.load(_A)"),
    ("a label out of range weighs nothing", "rows:rows_kernel",
     f"{WEIGHTS}::test_elsewhere_it_gives_nan_for_its_row_alone",
     "tl.where(in_range, _A, float('nan'))", "tl.where(in_range, _A, 0.0)"),
    ("columns beyond the row", "rows:rows_kernel", MOVES, "cols < C", "cols < C + 1"),
    ("rows beyond the batch", "rows:rows_kernel", MOVES, "rows < n", "rows < n + 1"),
    ("edges shifted", "streaming:edges", ODD, "length + lane - 8", "length + lane - 7"),
    ("KL between chunks left out", "streaming:merge_chunks", "test_tiles.py::test_rows_in_chunks",
     "guidance_between + _A", "_A"),
    ("maximum of a masked chunk", "streaming:add_chunk", MASKS,
     "c -= spread(tl.where(_A, 0.0, top_c))", "c -= spread(top_c)"),
    ("strides ignored", "launch:Arguments.__init__", "test_traffic.py::test_strides_are_read_where_they_lie",
     "_A if n > 1 else _B", "_B"),
    ("hooks of a profiler not called", "launch:Plan.launch", f"{IN_USE}::test_the_hooks_of_a_profiler_are_called",
     "_has_launch_hooks()", "False"),
    # Precomputed gradients.
    ("precomputed for any grad_output", "rows:rows_kernel", f"{HELD}::test_any_upstream_gradient",
     "tl.load(w_guidance) == 1.0", "tl.load(w_guidance) != 0.0"),
    ("precomputed for any grad_output, streaming", "streaming:streaming_kernel",
     f"{IN_USE}::test_at_another_upstream_they_are_computed_anew_into_the_same_memory",
     "tl.load(w_guidance) == 1.0", "tl.load(w_guidance) != 0.0"),
    ("never precomputed", "launch:loss_backward", f"{IN_USE}::test_at_upstream_one_the_held_gradients_are_the_result",
     "find_plan(*_A, outputs, is_precomputed)", "find_plan(*_A, outputs, False)"),
    ("always precomputed", "launch:loss_backward", f"{HELD}::test_any_upstream_gradient",
     "find_plan(*_A, outputs, is_precomputed)", "find_plan(*_A, outputs, True)"),
    ("grad_output ignored", "rows:rows_kernel", f"{HELD}::test_any_upstream_gradient",
     "per_row(w_guidance, GUIDANCE_STRIDE, rows, inside) * scale", "1.0 * scale"),
    ("precomputed gradients used twice", "_autograd:_Loss.backward",
     f"{HELD}::test_no_pass_writes_into_another_ones_result",
     "precomputed, ctx.precomputed = ctx.precomputed, None", "precomputed = ctx.precomputed"),
    ("float16 gradients precomputed", "launch:loss_forward",
     f"{IN_USE}::test_gradients_that_would_not_be_right_yet_wait_for_the_backward_pass",
     "has_float16 or not is_reduced", "not is_reduced"),
    ("float16 logits wait for nothing", "launch:loss_forward",
     f"{IN_USE}::test_float16_logits_that_need_no_gradient_make_nobody_wait",
     "needs.clean and clean.dtype == torch.float16", "clean.dtype == torch.float16"),
    ("gradients of each row precomputed", "launch:loss_forward",
     f"{IN_USE}::test_gradients_that_would_not_be_right_yet_wait_for_the_backward_pass",
     "has_float16 or not is_reduced", "has_float16"),
    ("gradients of terms swapped", "launch:terms_backward",
     "test_properties.py::test_any_upstream_gradients_of_the_terms",
     "Arguments(problem, UNWEIGHTED, _A, _B)", "Arguments(problem, UNWEIGHTED, _B, _A)"),
]
# fmt: on
MUTATIONS = [Mutation(*fields) for fields in TORCH] + [
    Mutation(f"kernels: {name}", scope if scope.startswith("_") else f"kernels/{scope}", *others, backend="interpreter")
    for name, scope, *others in KERNELS
]


def mutated(mutation: Mutation) -> str:
    """Return the source of the mutation's module with the mutation. Raises ValueError if it does not fit."""
    tree = copy.deepcopy(_parsed(source_of(mutation)))
    scope: ast.AST = tree
    for name in filter(None, mutation.scope.partition(":")[2].split(".")):
        # The last one is no overload.
        scope = [node for node in scope.body if getattr(node, "name", None) == name][-1]  # type: ignore[attr-defined]
    old, new = ast.parse(mutation.old).body, ast.parse(mutation.new).body
    found = _replace(scope, old, new)
    if found != 1:
        raise ValueError(f"{mutation.name}: {mutation.scope} must have {mutation.old!r} once, but has it {found} times")
    return ast.unparse(ast.fix_missing_locations(tree))


def source_of(mutation: Mutation, root: Path = ROOT) -> Path:
    return root / "cktat_loss" / f"{mutation.scope.partition(':')[0]}.py"


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _replace(scope: ast.AST, old: list[ast.stmt], new: list[ast.stmt]) -> int:
    """Replace every match of a statement or expression in the scope. Return the number of matches."""
    expression = old[0].value if isinstance(old[0], ast.Expr) else None
    found = 0
    for node in list(ast.walk(scope)):
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for i, child in enumerate(children):
                bound: dict[str, ast.AST] = {}
                if not isinstance(child, ast.AST) or not _matches(expression or old[0], child, bound):
                    continue
                found += 1
                filled = [_Filled(bound).visit(copy.deepcopy(part)) for part in new]
                if expression is None:
                    value[i : i + 1] = filled
                elif isinstance(value, list):
                    value[i] = filled[0].value
                else:
                    setattr(node, field, filled[0].value)
    return found


def _matches(pattern: object, node: object, bound: dict[str, ast.AST]) -> bool:
    if isinstance(pattern, ast.Name) and _is_wildcard(pattern.id) and isinstance(node, ast.expr):
        return ast.dump(bound.setdefault(pattern.id, node)) == ast.dump(node)
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(_matches(p, n, bound) for p, n in zip(pattern, node, strict=True))
    if not isinstance(pattern, ast.AST):
        return pattern == node
    fields = [name for name in pattern._fields if name not in ("ctx", "kind", "type_comment")]
    return type(pattern) is type(node) and all(
        _matches(getattr(pattern, name, None), getattr(node, name, None), bound) for name in fields
    )


def _is_wildcard(name: str) -> bool:
    return len(name) == 2 and name[0] == "_" and name[1].isupper()


class _Filled(ast.NodeTransformer):
    """Put what the wildcards matched in their places."""

    def __init__(self, bound: dict[str, ast.AST]) -> None:
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return copy.deepcopy(self.bound[node.id]) if _is_wildcard(node.id) else node


def run_tests(folder: Path, backend: str, tests: Sequence[str]) -> int:
    """Run pytest in a copy of the library, in this process, and return its exit status."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import pytest

    import cktat_loss

    assert cktat_loss.__file__.startswith(str(folder)), cktat_loss.__file__
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "--show-capture=no")
    # A folder of its own for temporary files: pytest removes old ones of other processes that run beside it.
    places = (f"--backend={backend}", f"--basetemp={folder / 'temporary'}")
    return int(pytest.main([*options, *places, *(f"tests/{test}" for test in tests)]))


def forked(folder: Path, backend: str, tests: Sequence[str], mutation: Mutation | None = None) -> int:
    """Start a process that tests a copy of the library in ``folder``, with the mutation. Return its id."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        signal.alarm(900)
        for name in ("cktat_loss", "kernels", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "examples", "benchmarks")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutation is not None:
            source_of(mutation, folder).write_text(mutated(mutation))
        code = run_tests(folder, backend, tests)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def results(mutations: Sequence[Mutation], backend: str, jobs: int, scratch: Path) -> Iterator[tuple[Mutation, str]]:
    """Test the mutations, and yield each with "caught", "SURVIVED" or the output of an error, as they come."""
    waiting, running = list(enumerate(mutations)), {}
    while waiting or running:
        if waiting and len(running) < jobs:
            number, mutation = waiting.pop(0)
            folder = scratch / str(number)
            folder.mkdir()
            running[forked(folder, backend, [mutation.test], mutation)] = mutation, folder
            continue
        pid, status = os.wait()
        mutation, folder = running.pop(pid)
        log = (folder / "log").read_text() if (folder / "log").exists() else ""
        shutil.rmtree(folder)
        # A test fails, or crashes where a kernel writes outside its memory. A syntax error says nothing about the test.
        caught = (status == 1 << 8 and " failed" in log) or os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGABRT)
        yield mutation, "caught" if caught else "SURVIVED" if status == 0 else f"ERROR {status}\n{log}"


def run_group(mutations: Sequence[Mutation], backend: str, jobs: int) -> int:
    """Test the mutations of one backend in forks of a process that has imported torch and Triton."""
    if backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    import triton.language  # noqa: F401

    uncaught = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        scratch = Path(name)
        (whole := scratch / "whole").mkdir()
        _, status = os.waitpid(forked(whole, backend, list(dict.fromkeys(m.test for m in mutations))), 0)
        if status:
            print((whole / "log").read_text(), "The named tests must pass while nothing is broken.", sep="\n")
            return 1
        for mutation, result in results(mutations, backend, jobs, scratch):
            uncaught += result != "caught"
            print(f"{mutation.name:55}  {mutation.test:95}  {result}", flush=True)
    return uncaught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at a time (default: %(default)s)")
    parser.add_argument("-k", metavar="WORD", default="", help="only mutations with this in their name")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N mutations")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS[options.skip :] if options.k in mutation.name]
    if not chosen:
        parser.error(f"no mutation has {options.k!r} in its name")
    start, uncaught = time.monotonic(), 0
    for mutation in chosen:
        mutated(mutation)
    # A process of its own for each backend, because Triton decides once per process how kernels run.
    for backend in dict.fromkeys(mutation.backend for mutation in chosen):
        if (pid := os.fork()) == 0:
            code = 99
            try:
                code = min(run_group([m for m in chosen if m.backend == backend], backend, options.jobs), 98)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        uncaught += os.waitstatus_to_exitcode(status)
    print(f"{len(chosen)} mutations, {uncaught} not caught, {time.monotonic() - start:.0f} s")
    return int(uncaught != 0)


if __name__ == "__main__":
    sys.exit(main())
