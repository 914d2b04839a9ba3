import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from models.flexvar import FlexVAR, FlexVARConfig
from models.flowar import FlowAR
from models.generators import TOKENIZERS
from models.weights import load_flexvar, load_tokenizer, save_weights
from tests.conftest import ROOT, calls_of, run
from utils.config.sampling import EvalConfig
from utils.config.tokenizer import TokenizerTrainConfig
from utils.config.training import TrainConfig
from utils.runtime.checkpoint import newest_checkpoint
from utils.runtime.files import read_json
from utils.runtime.flags import parse

RELEASED = {16: 179, 20: 249, 24: 349}  # depth → epochs
VAR_RECIPE = {  # epochs, peak learning rate, warm-up, final rate, weight decay at first and at last, clipping
    16: (200, 3e-4, 0.02, 0.1, 0.05, -1, 2),
    20: (250, 3e-4, 0.02, 0.1, 0.05, -1, 2),
    24: (350, 2.4e-4, 0.02, 0.01, 0.05, -1, 2),
    30: (350, 3.2e-4, 0.02, 0.01, 0.05, 0.08, 2),
}
TRAIN_SCRIPTS = sorted(p.name for p in (ROOT / "scripts").glob("train_*_d*.sh"))


@pytest.mark.parametrize("script", TRAIN_SCRIPTS)
def test_each_script_is_the_recipe_of_its_depth(script, spy):
    run("bash", f"scripts/{script}", "--data_path", "x y", "--bs=8", PYTHON=str(spy), NPROC="1")
    probe, check, train = calls_of(spy)
    assert probe[0] == "-c"
    assert check == [*train, "--check"]
    assert train[0] == "train.py"
    config = parse(TrainConfig, train[1:])
    depth = int(re.search(r"_d(\d+)", script)[1])
    assert config.model.depth == depth
    assert config.data.data_path == "x y"
    assert config.optim.bs == 8  # the user's flags come last
    assert config.model.alng == {24: 1e-4, 30: 1e-5}.get(depth, 1e-3)
    is_var = "_VAR_" in script
    assert config.model.model == ("var" if is_var else "flexvar")
    assert config.data.augment == ("var" if is_var else "crop")
    assert config.model.vae_ckpt == f"pretrained/{'vae_ch160v4096z32' if is_var else 'FlexVAE'}.pth"
    if "SAR" in script:
        epochs = RELEASED.get(depth)
        flexvar = f"pretrained/FlexVARd{depth}-epo{epochs}.pth" if epochs else ""
        assert config.model.init_ckpt == (f"pretrained/var_d{depth}.pth" if is_var else flexvar)
        assert config.sar.rollout == ("argmax" if "argmax" in script else "cfg")
        defaults = TrainConfig()
        assert config.optim == type(defaults.optim)(bs=8)
        if "argmax" not in script:
            assert config.sar == defaults.sar
    else:
        assert config.sar.training_mode == "teacher_forcing"
    if script.startswith("train_VAR"):
        optim = config.optim
        assert (optim.ep, optim.lr, optim.wp, optim.wpe, optim.twd, optim.twde, optim.tclip) == VAR_RECIPE[depth]


FLOWAR = {"S": (6, 768, 2, 1024, False), "B": (12, 768, 2, 1024, False)}
FLOWAR |= {"L": (8, 1024, 12, 1024, True), "H": (15, 1536, 12, 1536, True)}
FLOWAR_SETTINGS = {"S": (4.3, 25, 0.9), "B": (4.3, 25, 0.9), "L": (2.4, 25, 0.9), "H": (2.4, 50, 0.7)}


def test_a_code_cache_brings_its_own_crops(spy):
    run("bash", "scripts/train_VAR_d16.sh", "--code_cache", "x y", PYTHON=str(spy), NPROC="1")
    assert parse(TrainConfig, calls_of(spy)[-1][1:]).speed.code_cache == "x y"


def test_flowar_b_is_trained_by_its_recipe(spy):
    run("bash", "scripts/train_FlowAR_B.sh", "--data_path", "x y", "--ep=50", PYTHON=str(spy), NPROC="1")
    config = parse(TrainConfig, calls_of(spy)[-1][1:])
    model, optim = config.model, config.optim
    assert (model.depth, model.width, model.flow_depth, model.flow_width, model.flow_cross) == FLOWAR["B"]
    assert model.scales.sides == (1, 2, 4, 8, 16)
    assert (optim.ep, optim.bs, optim.lr, optim.lr_decay, optim.twd, optim.tclip) == (50, 2048, 4e-4, "cosine", 0.02, 3)
    assert (optim.wp, optim.lr * optim.wpe, optim.ema) == (0.25, 1e-5, (0.9999,))
    assert config.data.augment == "flowar"


@pytest.mark.parametrize("size", FLOWAR)
def test_flowar_is_judged_with_its_published_settings(size, spy):
    script, more = f"scripts/eval_FlowAR_{size}.sh", []
    if size == "B":  # not released
        refused = run("bash", script, "--num_samples=2", PYTHON=str(spy), NPROC="1", check=False)
        assert (refused.returncode, "name --ckpt RUN" in refused.stderr) == (1, True)
        more = ["--ckpt", "out/FlowAR-B"]
    run("bash", script, "--num_samples=2", *more, PYTHON=str(spy), NPROC="1")
    config = parse(EvalConfig, calls_of(spy)[-1][1:])
    assert (config.cfg, config.flow_steps, config.guidance_interval) == FLOWAR_SETTINGS[size]
    assert config.vae_ckpt == ""  # a run's own, or the released one
    assert size == "B" or config.ckpt == f"pretrained/FlowAR-{size}.pth"
    config.check_model("FlowAR", FlowAR.reads)  # nothing of the protocol is in its way


def test_tokenizer_scripts_are_what_they_say(spy):
    """ImageNet's: the released sizes, which are the defaults. The small one: 32 pixels, factor 4, 512 codes."""
    found = {}
    for script in ("train_tokenizer.sh", "train_tokenizer_small.sh", "train_tokenizer_VAR.sh"):
        run("bash", f"scripts/{script}", "--data_path", "x y", PYTHON=str(spy), NPROC="1")
        _, check, train = calls_of(spy)[-3:]
        assert check == [*train, "--check"]
        assert train[0] == "train_tokenizer.py"
        found[script] = parse(TokenizerTrainConfig, train[1:])
    large, small, residual = found.values()
    assert TOKENIZERS["residual"].from_flags(residual.model) == TOKENIZERS["residual"]()
    assert replace(residual, model=large.model, run=large.run) == large
    assert large.model == TokenizerTrainConfig().model
    assert (large.loss.perceptual, large.loss.disc_weight, large.loss.commitment) == ("lpips", 0.5, 0.25)
    assert 2 ** (len(small.model.width_mult) - 1) * small.model.scales.sides[-1] == small.model.image_size == 32
    assert small.model.codebook_size == 512
    assert small.loss.perceptual == "none"  # needs no download


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("eval_*_d*.sh")))
def test_each_evaluation_script_judges_the_model_it_names(script, spy):
    run("bash", f"scripts/{script}", "--num_samples=2", PYTHON=str(spy), NPROC="1")
    command = calls_of(spy)[-1]
    assert command[0] == "evaluate.py"
    config = parse(EvalConfig, command[1:])
    model, depth = re.fullmatch(r"eval_(SAR|FlexVAR|VAR)_d(\d+)\.sh", script).groups()
    assert config.vae_ckpt == ""  # a run's own, or the released one
    if model == "VAR":
        assert config.ckpt == f"pretrained/var_d{depth}.pth"
        assert (config.cfg, config.guidance, config.top_k, config.top_p) == (1.5, "ramp", 900, 0.96)
        return
    if int(depth) in RELEASED:
        assert config.ckpt == f"pretrained/{model}d{depth}-epo{RELEASED[int(depth)]}.pth"
        assert config.cfg == {"16": 2.2, "20": 2.6, "24": 3.3}[depth]
    assert (config.guidance, config.top_k, config.top_p) == ("ramp", 900, 0.95)
    assert config.num_samples == 2


def test_512_pixels_are_judged_against_their_own_reference(spy):
    run("bash", "scripts/eval_FlexVAR_512.sh", PYTHON=str(spy), NPROC="1")
    run("bash", "scripts/eval_VAR_d36.sh", PYTHON=str(spy), NPROC="1")
    found = [parse(EvalConfig, command[1:]) for command in calls_of(spy) if command[0] == "evaluate.py"]
    assert [c.reference for c in found] == ["imagenet512"] * 2
    assert [c.ckpt for c in found] == ["pretrained/FlexVARd24-epo349.pth", "pretrained/var_d36.pth"]
    assert found[0].pn.endswith("_32")  # of FlexVAE's factor 16: 512


def test_ranks_and_nodes_come_from_the_environment(spy):
    env = {"PYTHON": str(spy), "NPROC": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    run("bash", "scripts/train_SAR_d16.sh", **env)
    launched = " ".join(calls_of(spy)[-1])
    assert launched.startswith(
        "-m torch.distributed.run --nnodes 2 --nproc_per_node 4 --node_rank 1 --master_addr 10.0.0.1 "
        "--master_port 29500 train.py"
    )
    del env["MASTER_ADDR"]
    done = run("bash", "scripts/train_SAR_d16.sh", check=False, MASTER_ADDR="", **env)
    assert done.returncode == 1
    assert "MASTER_ADDR" in done.stderr


def test_gpus_are_counted(spy, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/usr/bin/env bash\nprintf "GPU 0: a\\nGPU 1: b\\nGPU 2: c\\n"\n')
    smi.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    run("bash", "scripts/train_SAR_d16.sh", PYTHON=str(spy), PATH=path)
    assert "--nproc_per_node 3 --standalone" in " ".join(calls_of(spy)[-1])
    run("bash", "scripts/train_SAR_d16.sh", PYTHON=str(spy), PATH=path, CUDA_VISIBLE_DEVICES="0,2")
    assert "--nproc_per_node 2 --standalone" in " ".join(calls_of(spy)[-1])
    run("bash", "scripts/train_SAR_d16.sh", PYTHON=str(spy), PATH=path, CUDA_VISIBLE_DEVICES="")
    assert calls_of(spy)[-1][0] == "train.py"
    for said, count in {"-1": 0, "NoDevFiles": 0, "GPU-1a,MIG-2b": 2, "0,-1,2": 1}.items():
        code = f'source "{ROOT}/scripts/lib.sh"; count_gpus'
        assert run("bash", "-c", code, CUDA_VISIBLE_DEVICES=said).stdout == f"{count}\n"


def test_a_check_starts_no_launcher(spy):
    run("bash", "scripts/train_SAR_d16.sh", "--check", PYTHON=str(spy), NPROC="2")
    assert [call[0] for call in calls_of(spy)] == ["-c", "train.py"]


def test_torchrun_passes_on_what_asks_to_save(tmp_path):
    """SIGUSR1 is not among those that it knows by itself."""
    said = tmp_path / "python"
    said.write_text('#!/usr/bin/env bash\necho "$PET_SIGNALS_TO_HANDLE"\n')
    said.chmod(0o755)
    out = run("bash", "-c", f'source "{ROOT}/scripts/lib.sh"; launch x.py', PYTHON=str(said), NPROC="2").stdout
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(out.strip().split(","))


@pytest.mark.parametrize("script", ["train_SAR_d16", "eval_VAR_d16", "train_FlowAR_B", "eval_FlowAR_S"])
def test_blocks_are_compiled_where_that_pays(script, spy, tmp_path):
    def compiled(path: str, *more: str) -> bool:
        run("bash", f"scripts/{script}.sh", *more, PYTHON=str(spy), PATH=path)
        command = calls_of(spy)[-1]
        kind = EvalConfig if script.startswith("eval") else TrainConfig
        config = parse(kind, command[command.index("evaluate.py" if kind is EvalConfig else "train.py") + 1 :])
        return config.compile if kind is EvalConfig else config.speed.compile

    tools = tmp_path / "tools"  # of a machine without GPU and compiler
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "tr", "grep", "nproc", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    assert not compiled(str(tools))
    smi = tools / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\necho GPU 0: a\n")
    smi.chmod(0o755)
    assert not compiled(str(tools))  # torch.compile needs a C compiler
    (tools / "cc").symlink_to(shutil.which("true"))
    assert compiled(str(tools)) is ("FlowAR" not in script)
    assert not compiled(str(tools), "--nocompile")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["--vae_ckpt=nowhere/vae.pth"], "no weight file nowhere/vae.pth"),
        (["--init_ckpt=nowhere/d16.pth"], "no weight file nowhere/d16.pth"),
        (["--data_path=nowhere/imagenet"], "no directory nowhere/imagenet/train"),
        (["--no_such_flag"], "--no_such_flag"),
    ],
)
def test_what_is_missing_is_one_line_before_torchrun_starts(missing, message, small_vae_file, tmp_path):
    (tmp_path / "train").mkdir()
    present = [f"--vae_ckpt={small_vae_file}", f"--init_ckpt={small_vae_file}", f"--data_path={tmp_path}"]
    done = run("bash", "scripts/train_SAR_d16.sh", *present, *missing, check=False, PYTHON=sys.executable, NPROC="2")
    assert done.returncode != 0
    assert message in done.stderr.strip().splitlines()[-1]
    assert "torch.distributed" not in done.stderr


def images(root):
    """A few JPEGs in two classes."""
    for name, colour in [("n01", (200, 30, 30)), ("n02", (30, 30, 200))]:
        (root / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (300 + 20 * i, 280), colour).save(root / "train" / name / f"{i}.JPEG")


def test_train_script_runs_on_two_processes_with_spaces_in_its_paths(flags, small_vae_file, tmp_path):
    root = tmp_path / "ein Ördner"
    images(root)
    save_weights(FlexVAR(FlexVARConfig(2, 64, 10, 32, 8)), root / "flexvar.safetensors")
    small = [f for f in flags if not f.startswith(("--dataset", "--out_dir", "--bs"))]
    more = [f"--data_path={root}", f"--out_dir={root / 'run'}", f"--init_ckpt={root / 'flexvar.safetensors'}"]
    run("bash", "scripts/train_SAR_d16.sh", *small, *more, "--bs=2", "--max_steps=2", PYTHON=sys.executable, NPROC="2")
    assert newest_checkpoint(root / "run").name == "step_0000002"
    assert load_flexvar(root / "run").config.depth == 2


@pytest.mark.slow
def test_full_size_files_in_the_released_format(tmp_path):
    """Two SAR-d16 steps on a CPU; about 5 GB of memory and some minutes."""
    import torch

    from models.vqvae import VQVAE

    images(tmp_path)
    torch.save({"model": VQVAE().state_dict()}, tmp_path / "FlexVAE.pth")
    weights = {**FlexVAR().state_dict(), "attn_bias_for_masking": torch.zeros(1, 1, 680, 680)}
    torch.save(weights, tmp_path / "FlexVARd16.pth")
    assert load_tokenizer(tmp_path / "FlexVAE.pth").config.factor == 16
    files = [f"--vae_ckpt={tmp_path / 'FlexVAE.pth'}", f"--init_ckpt={tmp_path / 'FlexVARd16.pth'}"]
    more = [
        f"--data_path={tmp_path}",
        f"--out_dir={tmp_path / 'run'}",
        "--bs=2",
        "--max_steps=2",
        "--vis_num_samples=1",
    ]
    run("bash", "scripts/train_SAR_d16.sh", *files, *more, PYTHON=sys.executable, OMP_NUM_THREADS="2")
    assert newest_checkpoint(tmp_path / "run").name == "step_0000002"


def judged(script: str, out, *more) -> dict:
    """Runs an evaluation script offline, for a few images."""
    few = ["--num_samples=1", "--num_classes_eval=4", "--features=efficientnet_lite0", f"--out_dir={out}"]
    run("bash", f"scripts/{script}", *few, *more, PYTHON=sys.executable, OMP_NUM_THREADS="2", NPROC="1")
    return read_json(out / "report.json")


@pytest.mark.slow
def test_full_size_var_in_the_released_format(tmp_path):
    """Two SAR steps on VAR-d16 and four images, on a CPU, with files made by the recipe; some minutes."""
    import torch

    from models.residual_vqvae import ResidualVQVAE
    from models.var import VAR
    from tests import recipes

    images(tmp_path)
    vae, model = recipes.fill(ResidualVQVAE(), 1, recipes.var_value), recipes.fill(VAR(), 2, recipes.var_value)
    torch.save(vae.state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    torch.save({**model.state_dict(), "attn_bias_for_masking": torch.zeros(1, 1, 680, 680)}, tmp_path / "var_d16.pth")
    del vae, model
    files = [f"--vae_ckpt={tmp_path / 'vae_ch160v4096z32.pth'}"]
    more = [f"--init_ckpt={tmp_path / 'var_d16.pth'}", f"--data_path={tmp_path}", f"--out_dir={tmp_path / 'run'}"]
    more += ["--bs=2", "--max_steps=2", "--vis_num_samples=0", "--logger_type=none"]
    run("bash", "scripts/train_SAR_VAR_d16.sh", *files, *more, PYTHON=sys.executable, OMP_NUM_THREADS="2", NPROC="1")
    assert newest_checkpoint(tmp_path / "run").name == "step_0000002"
    report = judged("eval_VAR_d16.sh", tmp_path / "e", *files, "--ckpt", tmp_path / "var_d16.pth")
    assert report["settings"]["scales"] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    assert (report["settings"]["cfg"], report["settings"]["top_p"]) == (1.5, 0.96)


@pytest.mark.slow
def test_full_size_flowar_in_the_released_format(tmp_path):
    """Two steps of FlowAR-B from images, two from the cache, and four images of FlowAR-S, on a CPU; some minutes."""
    import torch

    from models.flowar import FlowAR, FlowARConfig
    from models.kl_vae import KLAutoencoder
    from tests import recipes

    images(tmp_path)
    vae = recipes.fill(KLAutoencoder(), 1, recipes.flowar_value)
    torch.save({"model": vae.state_dict()}, tmp_path / "kl16.ckpt")
    model = recipes.fill(FlowAR(FlowARConfig(6, 768)), 2, recipes.flowar_value)
    torch.save({k: t for k, t in model.state_dict().items() if k != "layout"}, tmp_path / "FlowAR-S.pth")
    del vae, model
    files, data = [f"--vae_ckpt={tmp_path / 'kl16.ckpt'}"], f"--data_path={tmp_path}"
    env = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "2", "NPROC": "1"}
    codes = [*files, data, "--augment=flowar", f"--out={tmp_path / 'codes'}", "--image_size=256", "--crops=2"]
    run("bash", "scripts/cache_codes.sh", *codes, "--pn=1_2_4_8_16", "--workers=0", **env)
    for name, of in {"images": data, "cache": f"--code_cache={tmp_path / 'codes'}"}.items():
        more = [*files, of, f"--out_dir={tmp_path / name}", "--bs=2", "--max_steps=2", "--vis_num_samples=0"]
        run("bash", "scripts/train_FlowAR_B.sh", *more, "--logger_type=none", **env)
        assert newest_checkpoint(tmp_path / name).name == "step_0000002"
    report = judged("eval_FlowAR_S.sh", tmp_path / "e", *files, "--ckpt", tmp_path / "FlowAR-S.pth")
    assert (report["settings"]["cfg"], report["settings"]["flow_steps"]) == (4.3, 25)


@pytest.mark.parametrize(
    ("training", "requeued"), [("sleep 60 > /dev/null & wait", True), ("exit 0", False), ("exit 1", False)]
)
def test_slurm_queues_a_stopped_run_again(training, requeued, tmp_path):
    """Only a run that was asked to stop. Stand-ins for Slurm's commands: its srun kills at SIGTERM."""
    for name, body in {
        "srun": f'shift\ntrap \'kill -9 "$task"\' TERM\nSLURM_NODEID=0 "$@" & task=$!\n'
        f'echo $task > "{tmp_path}/task"\nwait $task',
        "scancel": f'echo "$@" >> "{tmp_path}/calls"\nkill -TERM $(cat "{tmp_path}/task")',
        "scontrol": f'[ "$1" = show ] && echo node1\necho "$@" >> "{tmp_path}/calls"',
        "training.sh": 'trap "echo saved; exit 143" TERM\necho "$NNODES $NODE_RANK $MASTER_ADDR $*"\n' + training,
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    process = subprocess.Popen(
        ["bash", ROOT / "scripts/train_SAR.sbatch", tmp_path / "training.sh", "--data_path", "x y"],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "1 0 node1 --data_path x y\n"
    if requeued:
        process.send_signal(signal.SIGUSR1)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == (143 if requeued else int(training[-1]))
    assert ("saved" in rest) == requeued
    assert ("--signal=TERM 7" in (tmp_path / "calls").read_text()) == requeued
    assert ("requeue 7" in (tmp_path / "calls").read_text()) == requeued


@pytest.mark.parametrize("program", ["train", "train_tokenizer", "evaluate"])
def test_threads_that_wait_do_not_spin(program):
    """OpenMP reads its environment when torch is imported: it must be set before, unless the user has set it."""
    code = f"import os, sys\nsys.modules['torch'] = None\ntry: import {program}\nexcept ImportError: pass\n"
    code += "print(os.environ['OMP_WAIT_POLICY'])"
    for given, found in (("", "passive"), ("active", "active")):
        env = {"OMP_WAIT_POLICY": given} if given else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("OMP_WAIT_POLICY", raising=False)
            assert run(sys.executable, "-c", code, **env).stdout.strip() == found


def test_launched_runs_have_threads_that_do_not_spin(tmp_path):
    shown = tmp_path / "python"
    shown.write_text('#!/usr/bin/env bash\necho "policy ${OMP_WAIT_POLICY:-none}"\n')
    shown.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_WAIT_POLICY", raising=False)
        said = run("bash", "scripts/train_SAR_d16.sh", PYTHON=str(shown), NPROC="1").stdout
    assert said.splitlines()[-1] == "policy passive"
