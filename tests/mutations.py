"""Break single lines of the package, and see which test fails.

    python -m tests.mutations                 # all, in about five minutes
    python -m tests.mutations lamb clip       # whose file or line contains one of these

The repository stays as it is: every line is broken in a copy of it, in which the tests that stand beside the
line run until one fails. Ends with 1 if no test failed for a broken line, or if a line is not there any more.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "lightning_logs", "logs")


class Mutation(NamedTuple):
    """A line as it is and as it would be wrong, and what pytest is called with to find that out."""

    file: str
    right: str
    wrong: str
    tests: str


MUTATIONS = (
    # Trust ratios: eps, the zero rule, the lower bound.
    Mutation(
        "optim/trust_ratio.py",
        " ratio = trust_coefficient * weight_norm / (denominator + eps)",
        " ratio = trust_coefficient * weight_norm / denominator",
        "tests/optim/test_trust_ratio.py",
    ),
    Mutation(
        "optim/trust_ratio.py",
        "return (weight_norm == 0) | (denominator == 0)",
        "return denominator == 0",
        "tests/optim/test_trust_ratio.py",
    ),
    Mutation(
        "optim/trust_ratio.py",
        "min(max(ratio, low), high)",
        "min(ratio, high)",
        "tests/optim/test_fused.py -k 'unfused and torch and LAMB'",
    ),
    # Norms of long layers on the CPU, and the clip over all gradients.
    Mutation(
        "sharding/norms.py",
        "torch.linalg.vector_norm(flat[-rest:], dtype=dtype)",
        "torch.linalg.vector_norm(flat[:rest], dtype=dtype)",
        "tests/sharding/test_norms.py",
    ),
    Mutation(
        "optim/distributed_norms.py",
        "(max_grad_norm / norm).clamp(max=1)",
        "max_grad_norm / norm",
        "tests/optim/test_parity.py -k 'each_option and max_grad_norm and not triton'",
    ),
    # Factors of LARS and LAMB.
    Mutation(
        "optim/lars.py",
        "1.0 if is_first else 1 - h.dampening",
        "1.0",
        "tests/optim/test_parity.py -k 'each_option and dampening and not triton'",
    ),
    Mutation(
        "optim/algorithm.py",
        'values[names.index("weight_decay")] = 0.0',
        "pass",
        "tests/optim/test_parity.py -k 'each_option and decoupled and not triton'",
    ),
    Mutation(
        "optim/lamb.py",
        "one_minus_power(beta2, t)",
        "one_minus_power(beta1, t)",
        "tests/optim/test_parity.py -k 'lamb_follows and each_option'",
    ),
    Mutation(
        "optim/lamb.py",
        "1 - beta1 if h.grad_averaging else 1.0",
        "1 - beta1",
        "tests/optim/test_parity.py -k 'grad_averaging and not triton'",
    ),
    # Kernels: factors on the CPU; masks, chunks, sums and factors in Triton.
    Mutation(
        "optim/backends/cpu_sgd.py",
        "in_v / (1 - decay_of_step)",
        "in_v",
        "tests/optim/test_fused.py -k papers_step",
    ),
    Mutation(
        "optim/backends/cpu_sgd.py",
        "scaled_decay + decay / scale",
        "scaled_decay + decay",
        "tests/optim/test_fused.py -k 'unfused and NovoGrad'",
    ),
    Mutation(
        "optim/batches.py",
        "_MAX_BATCH_ELEMENTS_IN_KERNEL if keeps_directions else math.inf",
        "math.inf",
        "tests/optim/test_batches.py",
    ),
    Mutation(
        "optim/backends/cpu_adam.py",
        "if decay == 0:  # 0 * w is not 0 where w is not finite",
        "if decay == 1:",
        "tests/optim/test_fused.py -k 'weight_that_is_not_finite'",
    ),
    Mutation(
        "optim/backends/triton_walk.py",
        "x = tl.load(pointer, mask=mask, other=0.0)",
        "x = tl.load(pointer, mask=mask, other=1.0)",
        "tests/optim/test_fused.py -k 'unfused and triton'",
    ),
    Mutation(
        "optim/backends/triton_ratio.py",
        "chunk = begin + number * chunks_at_once + tl.arange(0, chunks_at_once)",
        "chunk = begin + tl.arange(0, chunks_at_once)",
        "tests/optim/test_fused.py -k 'unfused and triton'",
    ),
    Mutation(
        "optim/backends/triton_table.py",
        "count = (size + CHUNK - 1) // CHUNK",
        "count = size // CHUNK",
        "tests/optim/test_triton.py tests/optim/test_fused.py -k 'table or triton'",
    ),
    Mutation(
        "optim/backends/triton_walk.py",
        "w * (1 - rate_of_all * weight_decay)",
        "w * (1 - weight_decay)",
        "tests/optim/test_fused.py -k 'unfused and triton and LAMB'",
    ),
    # Steps that look only at what may have changed.
    Mutation(
        "optim/plan.py",
        "if list(map(Tensor.data_ptr, modified)) != self._addresses:",
        "if False:",
        "tests/optim/test_plan.py",
    ),
    # Checkpoints and state in 8 bits.
    Mutation(
        "optim/state/group_matching.py",
        '("params", "param_names", "name", "fused")',
        '("params", "param_names", "name")',
        "tests/optim/test_checkpoint.py tests/optim/test_fused.py -k 'checkpoint and not triton'",
    ),
    Mutation(
        "optim/state/checkpoint.py",
        "dtype = torch.promote_types(p.dtype, torch.float32)",
        "dtype = p.dtype",
        "tests/optim/test_checkpoint.py",
    ),
    Mutation(
        "optim/state/torchao.py",
        'return key != "exp_avg_sq"',
        "return True",
        "tests/optim/test_eight_bit.py -k dequantized_state",
    ),
    # Groups.
    Mutation(
        "groups/param_groups.py",
        'EXCLUDED = {"layer_adaptation": False, "weight_decay": 0.0}',
        'EXCLUDED = {"layer_adaptation": False}',
        "tests/groups/test_param_groups.py",
    ),
    Mutation(
        "groups/introspection.py",
        "elif is_bias and exclude_bias:",
        "elif is_bias:",
        "tests/groups/test_param_groups.py",
    ),
    # The batch size, what a rate makes of it, and the counting of steps.
    Mutation(
        "learning_rate/batch_scaling.py",
        '"sqrt": 0.5, "adam_sqrt"',
        '"sqrt": 0.25, "adam_sqrt"',
        "tests/learning_rate/test_batch_scaling.py tests/callbacks/test_batch_size_scaling.py",
    ),
    Mutation(
        "trainer/batch_size.py",
        "return per_device * data_parallel_replicas(trainer) * accumulated_batches(trainer)",
        "return per_device * data_parallel_replicas(trainer)",
        "tests/trainer/test_batch_size.py",
    ),
    Mutation(
        "trainer/accumulation.py",
        "return (index - self.first) % int(self)",
        "return index % int(self)",
        "tests/callbacks/test_batch_size_schedule.py -k mean",
    ),
    Mutation(
        "callbacks/batch_size_schedule.py",
        "(self._is_lost or batch_idx >= self._accumulated.end)",
        "batch_idx >= self._accumulated.end",
        "tests/callbacks/test_batch_size_schedule_resume.py",
    ),
    Mutation(
        "learning_rate/batch_schedule.py",
        "if reached and position - self._since >= every:",
        "if reached:",
        "tests/callbacks/test_batch_size_schedule_noise_scale.py",
    ),
    Mutation(
        "learning_rate/optimizer_steps.py",
        "if self._has_gradients and not self._is_skipped and not self._is_counted:",
        "if not self._is_skipped and not self._is_counted:",
        "tests/learning_rate/test_optimizer_steps.py",
    ),
    Mutation(
        "learning_rate/curves.py",
        "math.sqrt(warmup_steps / max(step, warmup_steps))",
        "math.sqrt(warmup_steps / (1 + max(step, warmup_steps)))",
        "tests/learning_rate/test_warmup_decay.py -k inverse",
    ),
    # What is measured and clipped while training.
    Mutation(
        "trust_ratios/step_norms.py",
        "torch.where(has_rate, change / gradients, 0.0)",
        "torch.where(has_rate, gradients / change, 0.0)",
        "tests/callbacks/test_trust_ratio_monitor_without_ratios.py -k effective",
    ),
    Mutation(
        "gradients/percentile_clipping.py",
        "return torch.where(is_clipped, thresholds / norms, 1.0)",
        "return torch.where(is_clipped, norms / thresholds, 1.0)",
        "tests/callbacks/test_percentile_gradient_clipping.py -k 'not processes'",
    ),
    Mutation(
        "gradients/noise_scale.py",
        "(1 / small_batch - 1 / big_batch)\n    squared_gradient",
        "(1 / small_batch + 1 / big_batch)\n    squared_gradient",
        "tests/gradients/test_noise_scale.py",
    ),
    Mutation(
        "batch_norm.py",
        "variance = all_reduce(squares + count * (mean - pooled).square()) / (total - 1)",
        "variance = all_reduce(squares + count * (mean - pooled).square()) / total",
        "tests/callbacks/test_precise_batch_norm.py -k 'not process'",
    ),
    # What a short run tells, and leaves as it was.
    Mutation(
        "advice/batch_sizes.py",
        "return (1 + critical / batch_size) / (1 + critical / base_batch_size)",
        "return (1 + batch_size / critical) / (1 + base_batch_size / critical)",
        "tests/advice/test_report.py",
    ),
    Mutation(
        "advice/state_memory.py",
        '"LAMB8bit": 2 * lars_8bit + steps + 2 * maps,',
        '"LAMB8bit": 2 * lars_8bit + steps + maps,',
        "tests/advice/test_groups.py -k memory",
    ),
    Mutation(
        "trainer/trial_run.py",
        "    with _random_state_kept(), nullcontext()",
        "    with nullcontext(), nullcontext()",
        "tests/advice/test_advise.py -k 'leaves or failed'",
    ),
    Mutation(
        "trainer/trial_run.py",
        'trained = _copy(model, "model", memo) if train_copy else model',
        "trained = model",
        "tests/advice/test_advise.py -k 'leaves or failed'",
    ),
    Mutation(
        "run_report/heatmap.py",
        r'.replace("<", "\\u003c")',
        "",
        "tests/run_report/test_run_report.py -k markup",
    ),
)


def fallen(copy: Path, mutation: Mutation) -> str | None:
    """Break the line in the copy and return the first test that fails, None if all pass.

    Raises:
        LookupError: If the line is not there, or not once.
    """
    file = copy / "lightning_lars" / mutation.file
    text = file.read_text()
    if text.count(mutation.right) != 1:
        raise LookupError(f"is there {text.count(mutation.right)} times")
    file.write_text(text.replace(mutation.right, mutation.wrong))
    options = "-q -x -p no:cacheprovider -p no:randomly -m 'not slow'"
    try:
        ran = subprocess.run(
            f"{sys.executable} -m pytest {options} {mutation.tests}",
            shell=True,
            cwd=copy,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        file.write_text(text)
    if ran.returncode == 0:
        return None
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if ran.returncode != 1 or not lines:
        raise LookupError(f"could not be tested:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return lines[0].split(" - ")[0]


def main(words: list[str]) -> int:
    """Break every line that one of the words is in, and return how many were not found out."""
    chosen = [
        each for each in MUTATIONS if not words or any(word in each.file + each.right for word in words)
    ]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for mutation in chosen:
            started = time.monotonic()
            print(f"{mutation.file}: {mutation.right}\n  {mutation.wrong}", flush=True)
            try:
                test = fallen(copy, mutation)
            except LookupError as error:
                test, message = None, f"the line {error}"
            else:
                message = test or "NO TEST FALLS"
            missed += test is None
            print(f"  -> {message} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} broken lines were found out")
    return missed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
