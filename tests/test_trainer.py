import json
import math
import os
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models.pipeline import open_pipeline
from models.scales import draw_schedule
from models.weights import save_weights
from sar_trainer import SARTrainer
from tests.conftest import ALONE, config_of, fill, on_ranks, run, tool, tool_on_ranks, torchrun
from train import build, main
from trainer import Trainer
from utils.data import sources
from utils.data.datasets import CodeBatch, encode_batch, open_dataset
from utils.runtime.checkpoint import newest_checkpoint
from utils.runtime.distributed import ranks
from utils.runtime.files import read_json, write_sealed
from utils.training.loop import Loop

TF = "--training_mode=teacher_forcing"
CPU = torch.device("cpu")


def weights_of(directory):
    return load_file(newest_checkpoint(directory) / "model.safetensors")


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_loss_by_the_obvious_formula(flags, vae, model, expected, schedule):
    config = config_of(flags, TF, "--pn=1_2_3_4")
    trainer = Trainer(config, model, vae, open_dataset(config.data, 64, 0, "train"), None, ALONE)
    tokens = expected["vae.codes"]
    model.eval()
    codes = dict(zip(schedule.sides, schedule.split(tokens), strict=True))
    _, metrics = trainer.compute_loss(CodeBatch(expected["labels"], codes), schedule)
    logits = expected["teacher.logits"]
    nll = [[-logits[b, t].log_softmax(-1)[tokens[b, t]].item() for t in range(30)] for b in range(2)]
    assert metrics["loss"].item() == pytest.approx(sum(map(sum, nll)) / 60, rel=1e-5)
    assert metrics["loss_side/1"].item() == pytest.approx(sum(row[0] for row in nll) / 2, rel=1e-5)
    assert metrics["loss_side/2"].item() == pytest.approx(sum(sum(row[1:5]) for row in nll) / 8, rel=1e-5)
    hits = (logits.argmax(-1) == tokens)[:, 14:].float().mean().item()
    assert metrics["accuracy_side/4"].item() == pytest.approx(hits)


def test_a_run_learns_and_writes_what_it_promises(flags, tmp_path):
    trainer = build(config_of(flags, TF, "--max_steps=30", "--log_every=10", "--ema=0.9"), ALONE)
    assert type(trainer) is Trainer
    trainer.fit()
    lines = lines_of(tmp_path / "run")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert math.log(32) > losses[0] > losses[1] > losses[2]
    assert {"train/loss_side/4", "train/accuracy_side/4", "train/images_per_second", "train/gradient_norm"} <= set(
        lines[0]
    )
    assert any("val/loss_side/2" in line for line in lines)
    assert (tmp_path / "run/samples/step_0000030.png").stat().st_size > 100
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert {p.name for p in checkpoint.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "state.pt",
        "manifest.json",
    }
    averaged = load_file(checkpoint / "ema.safetensors")
    assert not torch.equal(averaged["head.weight"], weights_of(tmp_path / "run")["head.weight"])


def test_held_out_loss_is_the_mean_over_the_held_out_images(flags):
    trainer = build(config_of(flags, TF, "--eval_images=13", "--bs=4"), ALONE)
    found = trainer.validate()
    schedule = trainer.config.model.scales
    # Evenly over the split: of folders in order, the first images would all be of the first class.
    places = [i * len(trainer.val_set) // 13 for i in range(13)]
    assert places[-1] > 0.9 * len(trainer.val_set) - 1
    images, labels = zip(*(trainer.val_set[0, i] for i in places), strict=True)
    batch = encode_batch(trainer.vae, torch.stack(images), torch.tensor(labels), schedule)
    with torch.no_grad():
        trainer.model.eval()
        wanted, _ = trainer.compute_loss(batch, schedule)
    assert found["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert set(found) == {"loss", *(f"{k}_side/{s}" for k in ("loss", "accuracy") for s in (1, 2, 4))}


def test_class_dropout_draws_the_null_class_at_its_rate(flags):
    trainer = build(config_of(flags, TF, "--label_drop=0.3"), ALONE)
    torch.manual_seed(0)
    dropped = trainer.drop_classes(torch.ones(10_000, dtype=torch.long))
    assert set(dropped.tolist()) == {1, 10}
    assert (dropped == 10).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_schedule_is_drawn_a_step_or_fixed(flags):
    fixed = build(config_of(flags, TF), ALONE)
    assert fixed.schedule().sides == (1, 2, 4)
    drawn = config_of(flags, TF, "--schedule=flexvar", "--pn=1_2_3_4_5_6_8_10_13_16", "--seed=4", "--vis_num_samples=0")
    trainer = build(drawn, ALONE)
    for step in (0, 1, 7):
        trainer.step = step
        assert trainer.schedule() == draw_schedule(4, step)


@pytest.mark.parametrize("mode", [TF, "--training_mode=csfl"])
def test_two_ranks_equal_one_rank_with_two_accumulation_steps(mode, flags, tmp_path):
    """With teacher forcing as users start it: plain `python train.py`, and torchrun."""
    common = [*flags, mode, "--micro_batch=4", "--label_drop=0.5"]
    one, two = ([*common, f"--out_dir={tmp_path / name}"] for name in ("one", "two"))
    if mode == TF:
        run(sys.executable, "train.py", *one)
        torchrun(2, "train.py", *two)
    else:
        tool(main, *one, check=True)
        tool_on_ranks(2, main, *two)
    assert_same(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"), tolerance=2e-6)
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"train/images_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


def test_resume_is_exact(flags, tmp_path):
    common = [*flags, "--csf_weight=0.5", "--ema=0.9", "--wpe=0.1", "--max_steps=5"]
    whole = build(config_of(common, f"--out_dir={tmp_path / 'whole'}"), ALONE)
    whole.fit()
    pieces = [*common, f"--out_dir={tmp_path / 'pieces'}"]
    build(config_of(pieces, "--max_steps=2"), ALONE).fit()
    second = build(config_of(pieces), ALONE)
    second.fit()
    assert second.step == 5
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "pieces"))
    ema = [load_file(newest_checkpoint(tmp_path / d) / "ema.safetensors") for d in ("whole", "pieces")]
    assert_same(*ema)
    steps = [line["step"] for line in lines_of(tmp_path / "pieces") if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5]
    wanted, found = (
        [line["train/loss"] for line in lines_of(tmp_path / d) if "train/loss" in line] for d in ("whole", "pieces")
    )
    assert wanted == found
    build(config_of(pieces), ALONE).fit()  # a finished run starts, finds nothing to do, and ends


def test_a_changed_setting_is_shown_on_resume(flags):
    tool(main, *flags, "--max_steps=1", check=True)
    _, _, said = tool(main, *flags, "--max_steps=2", "--lr=0.5", check=True)
    shown = [line for line in said.splitlines() if line.startswith("resumed with another setting")]
    assert shown == [f"resumed with another setting: --{c}" for c in ("max_steps 1 → 2", "lr 0.01 → 0.5")]


def test_resume_takes_the_commands_weight_decay(flags, tmp_path):
    build(config_of(flags, TF, "--max_steps=1"), ALONE).fit()
    again = build(config_of(flags, TF, "--twd=0.3"), ALONE)
    assert again.step == 1
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.3, 0]


def test_moving_average_by_its_definition(flags):
    trainer = build(config_of(flags, TF, "--ema=0.75"), ALONE)
    before = trainer.model.head.bias.detach().clone()
    with torch.no_grad():
        trainer.model.head.bias += 1
    trainer.averages["ema.safetensors"].update(trainer.model)
    assert torch.allclose(trainer.ema_model.head.bias, before + 0.25)
    assert not any(p.requires_grad for p in trainer.ema_model.parameters())


def test_initial_weights_come_from_the_checkpoint(flags, tmp_path):
    build(config_of(flags, TF), ALONE).fit()
    again = config_of(flags, f"--init_ckpt={tmp_path / 'run'}", f"--out_dir={tmp_path / 'next'}")
    trainer = build(again, ALONE)
    assert isinstance(trainer, SARTrainer)
    assert trainer.step == 0
    assert_same(trainer.model.state_dict(), weights_of(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"missing: blocks\.2"):
        build(config_of(flags, f"--init_ckpt={tmp_path / 'run'}", "--depth=3", f"--out_dir={tmp_path / 'x'}"), ALONE)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision, flags, tmp_path):
    trainer = build(config_of(flags, f"--precision={precision}", "--max_steps=12"), ALONE)
    trainer.fit()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    losses = [line["train/loss"] for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_gradients_are_clipped_and_their_norm_is_logged(flags, tmp_path):
    trainer = build(config_of(flags, TF, "--tclip=1e-3", "--max_steps=1"), ALONE)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-2, fused=True)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit()
    moved = torch.stack([(a - b).norm() for a, b in zip(before, trainer.model.parameters(), strict=True)]).norm()
    assert moved.item() == pytest.approx(1e-3 * trainer.optimizer.param_groups[0]["lr"], rel=1e-3)
    assert lines_of(tmp_path / "run")[0]["train/gradient_norm"] > 1e-2


def test_wrong_batch_and_classes_are_named(flags):
    with pytest.raises(ValueError, match="--bs 8 is not --micro_batch 3"):
        build(config_of(flags, TF, "--micro_batch=3"), ALONE)
    with pytest.raises(ValueError, match="10 classes, the model only 4"):
        build(config_of(flags, TF, "--num_classes=4"), ALONE)


def test_weights_are_taken_over_to_other_classes(flags, tmp_path):
    """--reset_class_embedding: everything but the classes' own rows, which are drawn as from scratch."""
    old = build(config_of([*flags, "--num_classes=30"], TF, f"--out_dir={tmp_path / 'old'}"), ALONE).model
    save_weights(fill(old, 3), tmp_path / "old.safetensors")
    init = f"--init_ckpt={tmp_path / 'old.safetensors'}"
    assert build(config_of(flags, TF, init), ALONE).model.config.num_classes == 30
    model = build(config_of(flags, TF, init, "--reset_class_embedding=true"), ALONE).model
    assert model.config.num_classes == 10
    scratch = build(config_of(flags, TF), ALONE).model
    assert torch.equal(model.class_emb.weight[:10], scratch.class_emb.weight[:10])
    assert torch.equal(model.class_emb.weight[10], old.class_emb.weight[30])  # the unconditional class
    others = {name: x for name, x in model.state_dict().items() if name != "class_emb.weight"}
    assert all(torch.equal(x, old.state_dict()[name]) for name, x in others.items())


def test_a_run_can_be_measured_in_steps(flags):
    trainer = build(config_of(flags, TF, "--steps=7", "--max_steps=0"), ALONE)
    assert (trainer.total_steps, trainer.stop_step) == (7, 7)
    with pytest.raises(SystemExit):
        config_of(flags, TF, "--steps=7", "--ep=3")


def test_errors_of_a_user_are_one_line(flags):
    done = run(sys.executable, "train.py", *flags, "--vae_ckpt=nowhere.pth", check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: no weight file nowhere.pth")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fails", ["validate", "picture"])
def test_a_failure_after_the_last_step_costs_nothing(fails, flags, tmp_path, monkeypatch):
    """The checkpoint is written first; the same command makes up for what is owed, once."""
    wanted = build(config_of(flags, f"--out_dir={tmp_path / 'wanted'}"), ALONE)
    wanted.fit()

    def failing(self):
        raise RuntimeError("a failure")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer if fails == "picture" else Loop, fails, failing)
        trainer = build(config_of(flags), ALONE)
        with pytest.raises(RuntimeError, match="a failure"):
            trainer.fit()
    assert newest_checkpoint(tmp_path / "run").name == "step_0000003"
    for _ in range(2):  # the second time there is nothing left to do
        build(config_of(flags), ALONE).fit()
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [line["val/loss"] for line in lines if "val/loss" in line] == [wanted_loss(tmp_path / "wanted")]
        assert (tmp_path / "run/samples/step_0000003.png").is_file()


def wanted_loss(directory):
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"]


def test_held_out_losses_of_data_without_any_are_refused(flags, tmp_path):
    for i in range(9):
        path = tmp_path / f"data/train/a/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(path)
    flags = [*(f for f in flags if not f.startswith("--dataset")), f"--data_path={tmp_path / 'data'}"]
    with pytest.raises(ValueError, match="--eval_every has no effect: the data have no val/"):
        build(config_of(flags, "--eval_every=2"), ALONE)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_does_not_write_into_its_data(split, flags, tmp_path):
    for part in ("train", "val"):
        path = tmp_path / f"data/{part}/a/0.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    flags = [*(f for f in flags if not f.startswith(("--dataset", "--out_dir"))), f"--data_path={tmp_path / 'data'}"]
    with pytest.raises(ValueError, match="whose images it would join"):
        build(config_of(flags, f"--out_dir={tmp_path / 'data' / split / 'run'}"), ALONE)


def test_several_averages_are_kept_resumed_and_opened_by_their_decay(flags, tmp_path):
    common = [*flags, TF, "--ema", "0.5", "0.9", "--lr=1e-2", "--logger_type=none"]
    for name, stops in (("whole", [4]), ("pieces", [2, 4])):
        for stop in stops:
            build(config_of(common, f"--max_steps={stop}", f"--out_dir={tmp_path / name}"), ALONE).fit()
    whole, pieces = (newest_checkpoint(tmp_path / name) for name in ("whole", "pieces"))
    files = ("model.safetensors", "ema.safetensors", "ema_0.9.safetensors")
    weights = [load_file(whole / name) for name in files]
    for name, wanted in zip(files, weights, strict=True):
        assert_same(load_file(pieces / name), wanted)
    apart = [sum((w[n] - weights[0][n]).abs().sum().item() for n in weights[0]) for w in weights]
    assert 0 == apart[0] < apart[1] < apart[2]  # the longer the average, the further it lags
    for decay, wanted in ((0.0, weights[1]), (0.5, weights[1]), (0.9, weights[2])):
        opened = open_pipeline(str(tmp_path / "whole"), use_ema=True, ema_decay=decay).model.state_dict()
        assert torch.equal(opened["head.weight"], wanted["head.weight"])
    with pytest.raises(ValueError, match=r"keeps no moving average of 0\.99, but of 0\.5, 0\.9"):
        open_pipeline(str(tmp_path / "whole"), use_ema=True, ema_decay=0.99)
    one = [f for f in common if f not in ("0.5", "0.9", "--ema")]
    shutil.copytree(tmp_path / "whole", tmp_path / "swapped")
    for name, decays in (("whole", ("0.5", "0.9")), ("swapped", ("0.9", "0.5"))):  # an average is known by its decay
        build(config_of(one, "--ema", *decays, "--max_steps=5", f"--out_dir={tmp_path / name}"), ALONE).fit()
    whole, swapped = (newest_checkpoint(tmp_path / name) for name in ("whole", "swapped"))
    for here, there in (("ema.safetensors", "ema_0.5.safetensors"), ("ema_0.9.safetensors", "ema.safetensors")):
        assert_same(load_file(swapped / there), load_file(whole / here))
    build(config_of(one, "--ema=0.5", "--max_steps=5", f"--out_dir={tmp_path / 'pieces'}"), ALONE).fit()
    last = newest_checkpoint(tmp_path / "pieces")
    assert {p.name for p in last.glob("ema*")} == {"ema.safetensors"}
    manifest = read_json(last / "manifest.json")
    assert manifest["config"]["optim"]["ema"] == [0.5]


def test_a_run_of_before_with_one_decay_goes_on_without_a_change(flags, tmp_path, capsys):
    common = [*flags, TF, "--ema=0.5", "--logger_type=none"]
    build(config_of(common, "--max_steps=1"), ALONE).fit()
    path = newest_checkpoint(tmp_path / "run") / "manifest.json"
    content = {k: v for k, v in read_json(path).items() if k != "sha256"}
    content["config"]["optim"]["ema"] = 0.5
    write_sealed(path, content)
    capsys.readouterr()
    build(config_of(common, "--max_steps=2"), ALONE).fit()
    assert "--ema" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--seed": "RANK"}, "rank 1 differs from rank 0: --seed 0 → 1"),
        ({"--eval_images": "1"}, "--eval_every has no effect: 1 held-out images for 2 ranks"),
        ({"--workers": "RANK"}, ""),
        ({"data": "RANK"}, "rank 1 differs from rank 0: --images 1300 → 1299; --held_out 497 → 496"),
    ],
)
def test_ranks_that_differ_are_found_before_the_first_step(changed, said, flags, tmp_path, monkeypatch):
    """Nodes have their own copies of the data, and their own command lines."""

    def train():
        rank = os.environ["RANK"]
        more = [f"{name}={value.replace('RANK', rank)}" for name, value in changed.items() if name.startswith("--")]
        if "data" in changed:
            whole = sources.digits
            monkeypatch.setattr(sources, "digits", lambda training: whole(training)[int(rank) :])
        with ranks() as me:
            build(config_of(flags, TF, "--eval_every=2", *more), me).fit()

    if not said:
        on_ranks(2, train)
        assert lines_of(tmp_path / "run")
        return
    with pytest.raises(AssertionError) as failed:
        on_ranks(2, train)
    assert said in str(failed.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()
