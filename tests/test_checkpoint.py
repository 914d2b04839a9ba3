import errno
import json
import os
import shutil
import threading
from functools import partial
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from models import FlexVAR
from models.weights import find_weights, load_flexvar
from tests.conftest import ALONE, config_of, fill, tool
from train import build
from utils.runtime.checkpoint import (
    EMA,
    MANIFEST,
    MODEL,
    STATE,
    Checkpoints,
    RunState,
    SaveError,
    check_export,
    main,
    newest_checkpoint,
    read_checkpoint,
    read_manifest,
    verify,
)
from utils.runtime.files import digest, read_tensors, seal

ABOUT = {"config": {}, "invariants": {}, "micro_batch": 1}


@pytest.fixture
def write(model, tmp_path):
    """Writes checkpoints of some steps to tmp_path, and waits for them."""

    def write(*steps, keep=2, kept=(), ema=None):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        found = Checkpoints(tmp_path, keep)
        models = {MODEL: model.state_dict(), **({EMA: ema.state_dict()} if ema else {})}
        for step in steps:
            found.submit(RunState(step, optimizer.state_dict(), {}), models, ABOUT, step in kept)
        found.finish()
        found.close()
        return found

    return write


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_what_is_written_is_read_back(model, write, tmp_path):
    ema = fill(FlexVAR(model.config), 5)
    write(30, ema=ema)
    newest = newest_checkpoint(tmp_path)
    assert newest.name == "step_0000030"
    assert find_weights(tmp_path) == find_weights(newest) == newest / MODEL
    assert find_weights(tmp_path, EMA) == newest / EMA
    state, weights = read_checkpoint(newest)
    assert state.step == 30
    assert all(torch.equal(weights[MODEL][name], x) for name, x in model.state_dict().items())
    assert all(torch.equal(weights[EMA][name], x) for name, x in ema.state_dict().items())


def test_the_newest_stay_and_those_to_be_kept(write, tmp_path):
    write(1, 2, 3, 4, 30, kept=(2,))
    assert names(tmp_path) == ["step_0000002", "step_0000004", "step_0000030"]


def test_training_may_go_on_while_a_checkpoint_is_written(flags, tmp_path, monkeypatch):
    """The tensors are those of the moment of `save`, which does not wait for the disk."""
    trainer = build(config_of(flags, "--ema=0.9"), ALONE)
    batches, gate, writing = iter(trainer.loader()), threading.Event(), trainer.checkpoints.write
    monkeypatch.setattr(trainer.checkpoints, "write", lambda *a: (gate.wait(20), writing(*a)))
    trainer.train_step(batches)
    moments = {i: s["exp_avg"].clone() for i, s in enumerate(trainer.optimizer.state.values())}
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.save()
    trainer.train_step(batches)
    assert not trainer.checkpoints.job.done()
    gate.set()
    trainer.checkpoints.finish()
    state, weights = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert not torch.equal(trainer.model.head.weight, before["head.weight"])
    assert all(torch.equal(weights[MODEL][name], x) for name, x in before.items())
    assert all(torch.equal(state.optimizer["state"][i]["exp_avg"], x) for i, x in moments.items())


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "missing":
        return file.unlink()
    if how == "flipped":
        data[len(data) // 2] ^= 1
    end = {"empty": 0, "half": len(data) // 2, "short": -2, "flipped": None}[how]
    return file.write_bytes(data[:end])


@pytest.mark.parametrize("how", ["missing", "empty", "half", "short", "flipped"])
@pytest.mark.parametrize("name", [MODEL, STATE, MANIFEST])
def test_damage_is_found_and_the_one_before_is_taken(name, how, write, tmp_path, capsys):
    write(1, 2)
    damage(tmp_path / "checkpoints/step_0000002" / name, how)
    assert newest_checkpoint(tmp_path).name == "step_0000001"
    assert f"step_0000002/{name}" in capsys.readouterr().err
    assert find_weights(tmp_path).parent.name == ("step_0000002" if name == STATE else "step_0000001")


def test_when_all_are_damaged_nothing_starts_anew_by_itself(write, tmp_path):
    write(1)
    damage(tmp_path / "checkpoints/step_0000001" / MODEL, "half")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        newest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged|bytes"):
        find_weights(tmp_path / "checkpoints/step_0000001")


def test_a_damaged_one_is_out_of_the_way_after_a_resume(flags, tmp_path, capsys):
    """Else the next save would take it for the newest, and remove the good one."""
    more = [*flags, "--save_every_steps=1", "--keep=3"]
    build(config_of(more), ALONE).fit()
    damage(tmp_path / "run/checkpoints/step_0000003" / MODEL, "flipped")
    again = build(config_of(more, "--keep=1", "--max_steps=4"), ALONE)
    assert again.step == 2
    assert "passed over" in capsys.readouterr().err
    assert names(tmp_path / "run") == ["damaged_step_0000003", "step_0000001", "step_0000002"]
    again.fit()
    assert names(tmp_path / "run") == ["damaged_step_0000003", "step_0000004"]


def test_other_versions_and_altered_manifests_are_named(write, tmp_path):
    path = write(1).path(1)
    good = read_manifest(path)
    for content, message in [
        ({**seal(good), "step": 9}, "SHA-256 is another"),
        (seal({**good, "version": 0}), "of version 0"),
        ([], "no JSON object"),
    ]:
        (path / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            verify(path)


def test_what_is_not_finite_is_named_and_not_written(model, tmp_path):
    found = Checkpoints(tmp_path, 2)
    model.class_emb.weight.data[3, 5] = torch.nan  # a row that a step may never read
    found.submit(RunState(7, {}, {}), {MODEL: model.state_dict()}, ABOUT, False)
    with pytest.raises(FloatingPointError, match=r"model.safetensors/class_emb.weight is not finite at step 7"):
        found.finish()
    optimizer = {"state": {0: {"exp_avg": torch.tensor([1.0, torch.inf])}}}
    found.submit(RunState(8, optimizer, {}), {}, ABOUT, False)
    with pytest.raises(FloatingPointError, match=r"state\.pt/state/0/exp_avg"):
        found.finish()
    assert not list(tmp_path.rglob("step_*"))


def test_a_failed_write_is_reported_once_and_leaves_nothing(write, tmp_path, monkeypatch):
    found = write(1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    found = Checkpoints(tmp_path, 2)
    found.submit(RunState(2, {}, {}), {MODEL: {"a": torch.ones(2)}}, ABOUT, False)
    with pytest.raises(SaveError, match=r"cannot save step 2 in .*No space left on device; .* earlier ones are whole"):
        found.finish()
    found.check()
    assert names(tmp_path) == ["step_0000001"]


def test_what_nobody_can_read_is_not_deleted(write, tmp_path):
    """It may be one that was to be kept."""
    write(1)
    (tmp_path / "checkpoints/step_0000001" / MANIFEST).write_text("?")
    write(2, 3, keep=1)
    assert names(tmp_path) == ["step_0000001", "step_0000003"]


def test_leftovers_of_a_killed_run_go_with_the_next_save(write, tmp_path):
    for left in (".partial_0000003", ".discarded_step_0000001"):
        (tmp_path / "checkpoints" / left).mkdir(parents=True)
        (tmp_path / "checkpoints" / left / "x").write_text("half")
    write(4)
    assert names(tmp_path) == ["step_0000004"]


def test_no_entry_executes_a_pickle_in_a_checkpoint(flags, write, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    build(config_of(flags), ALONE).fit()
    path = newest_checkpoint(tmp_path / "run")
    torch.save({"step": 3, "optimizer": Bomb(), "scaler": {}}, path / STATE)
    manifest = read_manifest(path)
    manifest["files"][STATE] = {"bytes": (path / STATE).stat().st_size, "sha256": digest(path / STATE)}
    (path / MANIFEST).write_text(json.dumps(seal(manifest)))  # as an attacker would
    with pytest.raises(ValueError, match=r"state\.pt .*code to be run, which is refused"):
        build(config_of(flags), ALONE)
    assert not (tmp_path / "executed").exists()


def test_list_verify_and_export(model, write, tmp_path):
    write(1, 2, kept=(1,), ema=fill(FlexVAR(model.config), 5))
    listed = tool(main, "list", tmp_path)[1].splitlines()
    assert [("whole" in line, "kept" in line) for line in listed] == [(True, True), (True, False)]
    assert tool(main, "export", tmp_path, tmp_path / "out.pth")[0] == 0
    assert torch.load(tmp_path / "out.pth", weights_only=True).keys() == {"model"}
    exported = load_flexvar(tmp_path / "out.pth")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in exported.state_dict().items())
    tool(main, "export", tmp_path, tmp_path / "ema.safetensors", "--ema")
    assert not torch.equal(load_flexvar(tmp_path / "ema.safetensors").head.weight, model.head.weight)
    status, _, err = tool(main, "export", tmp_path, tmp_path / "x.pth", "--ema", "0.9")
    assert (status, "no moving average of 0.9 is kept, but of: none" in err) == (1, True)
    damage(tmp_path / "checkpoints/step_0000002" / MODEL, "flipped")
    status, out, _ = tool(main, "verify", tmp_path)
    assert status == 1
    assert "DAMAGED" in out.splitlines()[1]
    status, _, err = tool(main, "export", tmp_path, tmp_path / "out.txt")
    assert status == 1
    assert "error: export writes .pth or .safetensors" in err
    assert "holds no checkpoint" in tool(main, "list", tmp_path / "nothing")[2]


def test_a_shared_file_of_another_run_is_not_taken_for_weights(write, tmp_path):
    write(1)
    shutil.copy(tmp_path / "checkpoints/step_0000001" / MODEL, tmp_path / "kept.safetensors")
    save_file({"head.weight": torch.full((2, 2), torch.nan)}, tmp_path / "nan.safetensors")
    load_flexvar(tmp_path / "kept.safetensors")
    with pytest.raises(ValueError, match="is not a transformer"):
        load_flexvar(tmp_path / "nan.safetensors")


def test_each_average_is_exported_by_its_decay(flags, tmp_path):
    trainer = build(config_of(flags, "--ema", "0.5", "0.99", f"--out_dir={tmp_path / 'run'}"), ALONE)
    trainer.fit()
    for named, file in (("0.5", EMA), ("0.990", "ema_0.99.safetensors")):
        tool(main, "export", tmp_path / "run", tmp_path / "out.safetensors", "--ema", named, check=True)
        wanted = read_tensors(newest_checkpoint(tmp_path / "run") / file)
        found = read_tensors(tmp_path / "out.safetensors")
        assert all(torch.equal(found[name], x) for name, x in wanted.items())
    for named, said in (("0.9", "kept, but of: 0.5, 0.99"), ("first", "--ema takes the decay")):
        assert said in tool(main, "export", tmp_path / "run", tmp_path / "out.safetensors", "--ema", named)[2]


def test_what_a_weight_file_cannot_hold_is_not_exported():
    check_export({"beside_weights": {}}, "run")
    check_export({}, "run")  # of a checkpoint from before
    with pytest.raises(ValueError, match=r"scaling 0\.2, .*python -m models\.pipeline --ckpt run --out DIR"):
        check_export({"beside_weights": {"scaling": 0.2}}, "run")


def test_what_cannot_be_removed_ends_nothing(write, tmp_path):
    """A checkpoint that was moved away, with a link in its place; then one that the system does not let go."""
    root = tmp_path / "checkpoints"
    write(1, 2)
    (root / "step_0000001").rename(tmp_path / "elsewhere")
    (root / "step_0000001").symlink_to(tmp_path / "elsewhere")
    write(3)
    assert not (root / "step_0000001").exists()
    assert (tmp_path / "elsewhere/manifest.json").is_file()
    with patch("os.replace", side_effect=partial(stubborn, os.replace)):
        write(4)
    assert newest_checkpoint(tmp_path).name == "step_0000004"
    write(5)
    assert names(tmp_path) == ["step_0000004", "step_0000005"]


def stubborn(replace, source, target):
    """`os.replace` of a file system that keeps what shall be discarded."""
    if ".discarded_" in str(target):
        raise OSError(errno.EBUSY, "Device or resource busy", str(source))
    replace(source, target)
