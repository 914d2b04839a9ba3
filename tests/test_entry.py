"""Every door: what README names answers --help, refuses what it does not know, and a user's mistake is one line."""

import errno
import importlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT, calls_of, run, tool
from utils.runtime.distributed import check_launch, ranks
from utils.runtime.entry import check_output_directory, check_output_file, entry, make_output_safe, refuse_inside

# Every entry; a new one goes here, too.
ENTRIES = [
    *("train", "train_tokenizer", "sample", "evaluate", "pretrained.download", "models.pipeline"),
    *("utils.data.code_cache", "utils.data.check", "utils.runtime.checkpoint", "utils.evaluations.c2i.setup"),
    *("experiments.figures", "experiments.flags_page"),
    *("experiments.quickstart", "experiments.study_cifar10", "experiments.study_digits", "experiments.study_hybrid"),
    *("experiments.report_cifar10", "experiments.study_table1", "utils.tokenizer.scaling", "utils.training.estimate"),
    *("benchmarks.attention", "benchmarks.data", "benchmarks.sample", "benchmarks.train_step"),
    *("benchmarks.compare", "benchmarks.gpu", "demo", "models.card"),
]


def main_of(name):
    return importlib.import_module(name).main


def test_every_command_of_the_documents_is_an_entry():
    text = "".join(p.read_text() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    named = {a or b.replace("/", ".") for a, b in re.findall(r"\bpython (?:-m ([\w.]+)|([\w/]+)\.py)", text)}
    assert "evaluate" in named
    assert named - {"venv", "pip", "tests.faults.mutations", "tests.parity"} <= set(ENTRIES)
    with_main = [p for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(p.relative_to(ROOT).parts)]
    with_main = [p for p in with_main if "\nif __name__ ==" in p.read_text()]
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in with_main}
    assert found == set(ENTRIES), f"new, or gone: {found ^ set(ENTRIES)}. Put ENTRIES above right"


def test_how_to_extend_names_what_is_there():
    """Every file of the page exists, and holds the names that the page says are in it."""
    page = (ROOT / "docs/extending.md").read_text()
    files = set(re.findall(r"`([\w/]+\.(?:py|sh))`", page))
    files = {f if "/" in f or (ROOT / f).is_file() else f"utils/config/{f}" for f in files}
    text = {f: (ROOT / f).read_text() for f in files}
    names = re.findall(r"`([A-Za-z_]\w+)`", page)
    assert len(names) > 15
    for name in set(names) - {"main", "nan"}:
        assert any(re.search(rf"\b{name}\b", t) for t in text.values()), name


@pytest.mark.parametrize("name", ENTRIES)
def test_each_entry_helps_and_refuses_an_unknown_flag_by_name(name):
    status, out, err = tool(main_of(name), "--help")
    assert status == 0, err
    assert "usage: " in out
    for words in (["--no_such_flag=3"], ["--no_such_flag"], ["--workers_", "3"]):
        status, _, err = tool(main_of(name), *words)
        assert status == 2
        assert words[0].partition("=")[0] in err
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["train.py", "pretrained/download.py"])
def test_help_is_printed_where_the_terminal_has_no_signs_for_it(name):
    poor = {"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "usage" in run(sys.executable, name, "--help", **poor).stdout


SCRIPTS = sorted(p.name for p in (ROOT / "scripts").iterdir() if p.suffix in (".sh", ".sbatch"))
SOURCED = {"lib.sh", "recipes.sh", "train_common.sh", "eval_common.sh"}


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in SOURCED])
def test_each_script_helps_once_whatever_it_launches_and_through_a_link(script, spy, tmp_path):
    link = tmp_path / "a link"
    link.symlink_to(ROOT / "scripts" / script)
    done = subprocess.run(
        ["bash", link, "--help"], cwd=tmp_path, env={**os.environ, "PYTHON": str(spy), "NPROC": "2"}, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = [" ".join(call) for call in calls_of(spy)]
    helped = [call for call in calls if "--help" in call]
    assert len(helped) == (0 if script in ("setup.sh", "test.sh", "train_SAR.sbatch") else 1)
    assert not any("torch.distributed" in call or "--check" in call for call in calls)
    assert helped or len(done.stdout) > 50


def test_unknown_arguments_of_scripts_without_an_entry_are_refused():
    done = run("bash", "scripts/setup.sh", "--no_such", check=False)
    assert done.returncode == 2
    assert "--no_such" in done.stderr


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        *(({"NPROC": n}, "NPROC") for n in ("0", "2x", "-1", "1.5", "", " ", "99999999")),
        *(({"NNODES": n, "MASTER_ADDR": "a"}, "NNODES") for n in ("0", "two", "-2")),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "x"}, "NODE_RANK"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"NNODES": "2", "MASTER_ADDR": ""}, "MASTER_ADDR"),
    ],
)
def test_wrong_launches_are_one_line(environment, named, spy):
    done = run("bash", "scripts/cache_codes.sh", check=False, PYTHON=str(spy), **environment)
    if environment == {"NPROC": ""}:  # as good as not set
        assert done.returncode == 0
        return
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{named}.*\n", done.stderr)
    assert not (spy.parent / "calls").exists()


@pytest.fixture
def busy_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield str(server.getsockname()[1])


def test_a_port_in_use_is_one_line(busy_port, spy, monkeypatch):
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": busy_port}
    done = run("bash", "scripts/cache_codes.sh", check=False, PYTHON=str(spy), **nodes)
    assert done.returncode == 1
    assert f"port {busy_port} is in use" in done.stderr
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": busy_port}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("utils.runtime.distributed.die_with_parent", lambda: None)
    with pytest.raises(ValueError, match=f"cannot meet at 127.0.0.1:{busy_port}"), ranks():
        pass


def test_a_network_interface_that_is_not_there_is_one_line():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code = "from utils.runtime.distributed import ranks\nfrom utils.runtime.entry import entry\n"
    code += "@entry\ndef main():\n    with ranks(): pass\nmain()"
    done = run(sys.executable, "-c", code, check=False, GLOO_SOCKET_IFNAME="nosuch", **alone)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert "no network interface named nosuch: set GLOO_SOCKET_IFNAME to one of " in line
    assert "lo" in line


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1234", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        *(({k: v for k, v in WHOLE.items() if k != name}, name) for name in WHOLE if name != "LOCAL_RANK"),
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing beside RANK"),
        ({"LOCAL_RANK": "0"}, "RANK"),
        ({**WHOLE, "RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({**WHOLE, "RANK": "x"}, "RANK"),
        ({**WHOLE, "RANK": "-1"}, "RANK"),
        ({**WHOLE, "MASTER_PORT": "0"}, "MASTER_PORT"),
        ({**WHOLE, "LOCAL_RANK": "first"}, "LOCAL_RANK"),
    ],
)
def test_incomplete_launcher_variables_are_named(environment, named, monkeypatch):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    check_launch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        check_launch()


# ------------------------------------------------------------------------------------------- the door itself


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("the value 3 is wrong"), "the value 3 is wrong"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.pth"), "x.pth: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError("no space"), "no space"),
        (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "no"), "codec can't encode"),
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried (a smaller --micro"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_1(error, said, monkeypatch):
    def main():
        raise error

    monkeypatch.delenv("RANK", raising=False)
    status, _, err = tool(entry(main))
    assert status == 1
    assert err.startswith("error: ")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    monkeypatch.setenv("RANK", "3")
    assert tool(entry(main))[2].startswith("error (rank 3): ")
    monkeypatch.setenv("SAR_TRACEBACK", "1")
    with pytest.raises(type(error)):
        tool(entry(main))


def test_faults_of_the_program_keep_their_traceback_and_ctrl_c_its_status():
    def wrong():
        raise TypeError("a fault")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(TypeError, match="a fault"):
        tool(entry(wrong))
    status, _, err = tool(entry(interrupted))
    assert status == 130
    assert err.strip() == "interrupted"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("text", ["3 × 4 … 5 –", "\udce9mu", "狐"])
def test_nothing_that_is_printed_fails_on_a_terminal(encoding, text, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    make_output_safe()
    print(text, flush=True)
    assert stream.buffer.getvalue()


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file/below/more", "/proc/none"):
        with pytest.raises(ValueError, match=r"--out .*(file|none)"):
            check_output_directory(wrong, "--out")
    for wrong in (tmp_path, tmp_path / "file/x.png", "/proc/none/x.png"):
        with pytest.raises(ValueError, match="--out"):
            check_output_file(wrong, "--out")
    assert check_output_file(tmp_path / "new/x.png").parent.is_dir()
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for inside in ("images", "images/out", "link/out"):
        with pytest.raises(ValueError, match="whose images it would join"):
            refuse_inside(tmp_path / inside, "--out_dir", tmp_path / "images", "")
    refuse_inside(tmp_path / "images2", "--out_dir", tmp_path / "images", tmp_path / "absent", "")


def refused_out(command, at):
    status, _, err = tool(main_of(command[0]), *command[1:])
    assert status == 1, err
    assert str(at) in err.strip().splitlines()[-1]
    assert err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "name", ["evaluate", "sample", "files", "pipeline", "visualize", "quickstart", "cache", "train"]
)
def test_an_output_that_is_a_file_is_one_line(name, saved, real, small_vae_file, flags, tmp_path):
    at = tmp_path / "file"
    at.touch()
    train = [f for f in flags if not f.startswith("--out_dir")]
    refused_out(
        {
            "evaluate": ["evaluate", "--samples", real, "--features=efficientnet_lite0", "--out_dir", at],
            "sample": ["sample", "--ckpt", saved, "--classes=0", "--out", at / "x.png"],
            "files": ["sample", "--ckpt", saved, "--classes=0", "--out", tmp_path / "x.png", "--files", at],
            "pipeline": ["models.pipeline", "--ckpt", saved, "--out", at],
            "visualize": ["experiments.figures", "training-curves", "--runs", tmp_path, "--out", at / "x.png"],
            "quickstart": ["experiments.quickstart", "--out", at],
            "cache": [
                "utils.data.code_cache",
                "--dataset=digits",
                "--vae_ckpt",
                small_vae_file,
                "--image_size=16",
                "--out",
                at,
            ],
            "train": ["train", *train, f"--out_dir={at}"],
        }[name],
        at,
    )


def test_workers_end_before_the_real_error_is_the_last_thing_printed(flags, tmp_path):
    """An error that nobody handles, with loader workers alive, once hung for 20 seconds and ended on another line."""
    script = tmp_path / "boom.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom trainer import Trainer\n"
        "inner = Trainer.micro_loss\n"
        "def boom(self, *a):\n    if self.step < 2: return inner(self, *a)\n"
        "    print(time.monotonic(), flush=True); raise RuntimeError('the real error')\n"
        "Trainer.micro_loss = boom\ntrain.main()\n"
    )
    done = run(sys.executable, script, *flags, "--workers=2", check=False)
    assert time.monotonic() - float(done.stdout.split()[-1]) < 15
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "RuntimeError: the real error"


def interrupt(command, times, out):
    """Ctrl-C as a terminal sends it, to the whole group, once the run logs: status and output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    while process.poll() is None and "ETA" not in (out / "log").read_text():
        time.sleep(0.1)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    return process.wait(60), (out / "log").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_and_says_so(processes, flags, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "train.py", *flags, "--max_steps=100000"]
    status, said = interrupt([*command, "--ep=100000", "--vis_num_samples=0", "--logger_type=none"], 1, tmp_path)
    assert status == (130 if processes == 1 else 1)  # torchrun's own status
    assert "interrupted: saves at the end of this step" in said
    step = int(re.search(r"stopped by signal 2, saved step (\d+): the same command goes on", said)[1])
    assert (tmp_path / f"run/checkpoints/step_{step:07d}/manifest.json").is_file()
