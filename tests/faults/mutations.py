"""Remove each safeguard in a copy of the project, and see that a test notices:  python -m tests.faults.mutations"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A safeguard, the text that is it, what stands there instead, and a test that must then fail."""

    name: str
    file: str
    text: str
    instead: str
    test: str


CHECKPOINT, KILL = "utils/runtime/checkpoint.py", "tests/faults/test_kill.py"
MUTATIONS = [
    Mutation(
        "nothing waits for the GPU",
        "models/sampling.py",
        ".to(device, non_blocking=True)",
        ".to(device)",
        "tests/test_gpu.py::test_sampling",
    ),
    Mutation(
        "the index of a tar that changed is made again",
        "utils/data/imagenet_tar.py",
        'if np.array_equal(found.get("stamp"), stamp):',
        "if True:",
        "tests/test_sources.py::test_the_index_is_made_once_and_again_when_the_tar_changes",
    ),
    Mutation(
        "written under a temporary name, then renamed",
        CHECKPOINT,
        'self.root / f".partial_{step:07d}"',
        "self.path(step)",
        f"{KILL}::test_killed_at_points_of_a_save",
    ),
    Mutation(
        "digest check",
        CHECKPOINT,
        'if digest(file) != described["sha256"]:',
        "if False:",
        "tests/test_checkpoint.py::test_damage_is_found_and_the_one_before_is_taken",
    ),
    Mutation(
        "the manifest's own digest",
        "utils/runtime/files.py",
        "if found != seal(content):",
        "if False:",
        "tests/test_checkpoint.py::test_other_versions_and_altered_manifests_are_named",
    ),
    Mutation(
        "fallback to an older checkpoint",
        CHECKPOINT,
        "    for path in reversed(found):",
        "    for path in found[-1:]:",
        "tests/faults/test_damage.py::test_some_damage",
    ),
    Mutation(
        "damaged checkpoints set aside",
        "utils/training/state.py",
        "self.checkpoints.set_aside(after=self.step)",
        "pass",
        "tests/test_checkpoint.py::test_a_damaged_one_is_out_of_the_way_after_a_resume",
    ),
    Mutation(
        "flushed to disk before the rename",
        "utils/runtime/files.py",
        "        flush(partial)\n",
        "",
        "tests/test_files.py::test_data_are_on_disk_before_the_name_is",
    ),
    Mutation(
        "finite check before the update",
        "utils/training/nan_guard.py",
        "bad = flags.any()",
        "bad = flags.any() & False",
        "tests/test_finite.py::test_it_stops_before_the_weights_change",
    ),
    Mutation(
        "finite check before the save",
        CHECKPOINT,
        '        check_finite({**models, STATE: state["optimizer"]}, step)\n',
        "",
        "tests/faults/test_numbers.py::test_a_weight_that_turns_nan_is_never_saved",
    ),
    Mutation(
        "agreement of the ranks",
        "utils/runtime/distributed.py",
        "            dist.all_reduce(numbers, dist.ReduceOp.MAX)\n",
        "            pass\n",
        "tests/faults/test_signals.py::test_a_signal_to_one_rank_stops_all",
    ),
    Mutation(
        "log lines that span a save",
        "utils/training/state.py",
        "        self.meter.restore(state.meter, self.ranks)\n",
        "",
        "tests/faults/test_damage.py::test_some_damage",
    ),
    Mutation(
        "lock on the run's directory",
        "utils/runtime/process.py",
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/faults/test_signals.py::test_a_second_start_is_refused",
    ),
    Mutation(
        "death with the launcher",
        "utils/runtime/distributed.py",
        "    die_with_parent()  #",
        "    pass  #",
        "tests/faults/test_signals.py::test_the_launcher_is_killed[0]",
    ),
    Mutation(
        "no code in weight files",
        "utils/runtime/files.py",
        "weights_only=True, mmap=mmap",
        "weights_only=False, mmap=mmap",
        "tests/faults/test_untrusted.py::test_no_entry_executes_a_pickle",
    ),
    Mutation(
        "the run's tokenizer compared",
        "models/run_record.py",
        'if self.tokenizer_sha256 in ("", sha256):',
        "if True:",
        "tests/test_run_record.py::test_a_tokenizer_that_was_swapped_is_refused_and_one_that_is_named_is_a_warning",
    ),
    Mutation(
        "hidden folders left out",
        "utils/runtime/image_files.py",
        'return name.startswith(".") or name == LEFT_OUT',
        "return False",
        "tests/test_image_files.py::test_all_see_the_same_files",
    ),
    Mutation(
        "a cache's images compared",
        "utils/data/code_cache.py",
        "if before != settings:",
        "if False:",
        "tests/test_code_cache.py::test_images_that_changed_under_the_same_names_are_noticed",
    ),
    Mutation(
        "numbers that are finite",
        "utils/runtime/flags.py",
        "isinstance(value, float) and not math.isfinite(value)",
        "False",
        "tests/test_config.py::test_numbers_are_numbers",
    ),
    Mutation(
        "size of archives",
        "utils/runtime/files.py",
        "        check_archive(path)\n",
        "",
        "tests/test_files.py::test_files_that_claim_more_than_they_hold_are_refused_before_memory_is_taken",
    ),
    Mutation(
        "ties of the residual convolutions in float64",
        "models/residual_pathway.py",
        "return min(range(PHIS), key=lambda j: abs(ticks[j] - place))",
        "return min(range(PHIS), key=lambda j: abs(j / 3 - place))",
        "tests/test_residual_pathway.py::test_ties_between_ticks_fall_as_released",
    ),
    Mutation(
        "the whole canvas as input",
        "models/residual_pathway.py",
        "            yield canvas + residual\n",
        "            yield residual\n",
        "tests/test_var.py::test_a_step_equals_the_plain_one_in_loss_and_gradient",
    ),
    Mutation(
        "times truncated in single precision",
        "models/flow_layers.py",
        "whole = (t.float() * 1000).long().float()",
        "whole = (t.double() * 1000).long().float()",
        "tests/test_flowar.py::test_times_are_truncated_in_single_precision",
    ),
    Mutation(
        "noise in the order of indices",
        "models/kl_vae.py",
        "    return torch.randn(x.shape, device=x.device)\n",
        "    return torch.randn_like(x)\n",
        "tests/test_kl_vae.py::test_noise_is_fresh_comes_before_resizing_and_depends_on_the_seed_alone",
    ),
    Mutation(
        "contrast: others' classes are pushed away",
        "contrastive_alignment.py",
        "surrogate = sign * total",
        "surrogate = total",
        "tests/test_rivals.py::test_the_contrastive_loss_and_its_gradient_are_the_papers",
    ),
    Mutation(
        "codes are enlarged in full precision",
        "models/scales.py",
        "    with torch.autocast(rows.device.type, enabled=False):\n        return bicubic",
        "    with torch.autocast(rows.device.type, enabled=True):\n        return bicubic",
        "tests/test_scales.py::test_codes_are_enlarged_in_full_precision_whatever_the_caller_works_in",
    ),
]


def caught(mutation: Mutation, copy: Path) -> bool:
    """Whether the test fails with the mutation (and only with it: the suite runs it without)."""
    file = copy / mutation.file
    whole = file.read_text(encoding="utf-8")
    assert whole.count(mutation.text) == 1, f"{mutation.name}: {mutation.text!r} is not once in {mutation.file}"
    file.write_text(whole.replace(mutation.text, mutation.instead), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-m", "faults or not faults", mutation.test]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode in (0, 1), done.stdout + done.stderr  # not: a test that does not exist
        return done.returncode == 1
    finally:
        file.write_text(whole, encoding="utf-8")


def main() -> int:
    """Print the table. Returns how many mutations went unnoticed."""
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__"))
        print("| without | noticed | by | seconds |\n|---|---|---|---|")
        for mutation in MUTATIONS:
            began = time.monotonic()
            noticed = caught(mutation, copy)
            missed += not noticed
            seconds = time.monotonic() - began
            print(f"| {mutation.name} | {'yes' if noticed else 'NO'} | `{mutation.test}` | {seconds:.0f} |", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
