import pickle
import zipfile
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from models import VQVAE, FlexVAR, FlexVARConfig, SARPipeline, VQVAEConfig, build_vae_var
from models.pipeline import open_pipeline
from models.weights import digest_of, load_flexvar, load_strictly, load_tokenizer
from tests.conftest import ALONE, config_of, fill
from train import build
from train_tokenizer import build as build_tokenizer
from utils.config.tokenizer import TokenizerTrainConfig
from utils.runtime.flags import parse


def containers(weights, tmp_path):
    """The same weights in every layout that is read."""
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"model": weights}, tmp_path / "model.pth")
    training = {"epoch": 1, "iter": 2, "trainer": {"var_wo_ddp": weights, "other": 1}, "args": {"depth": 2}}
    torch.save(training, tmp_path / "training.pth")
    save_file(weights, tmp_path / "ours.safetensors")
    return [tmp_path / name for name in ("bare.pth", "model.pth", "training.pth", "ours.safetensors")]


def test_every_container_gives_the_same_transformer(model, tmp_path):
    weights = {**model.state_dict(), "attn_bias_for_masking": torch.zeros(1, 1, 5, 5)}  # of any size: ignored
    for path in containers(weights, tmp_path):
        loaded = load_flexvar(path)
        assert loaded.config.depth == 2
        assert loaded.config.width == 128
        assert (loaded.config.num_classes, loaded.config.codebook_size, loaded.config.codebook_dim) == (10, 128, 32)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])


def test_every_container_gives_the_same_tokenizer(vae, tmp_path):
    for path in containers(vae.state_dict(), tmp_path):
        loaded = load_tokenizer(path)
        assert loaded.config == vae.config
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(loaded.codebook, vae.codebook)


def test_a_tokenizer_of_other_sizes_loads_as_it_is(tmp_path):
    """LlamaGen's container and codebook; the code cache holds codes as 16 bits."""
    config = VQVAEConfig(32, (1, 1), res_blocks=1, z_channels=32, codebook_size=16384, codebook_dim=8)
    other = fill(VQVAE(config), 7)
    torch.save({"model": other.state_dict(), "optimizer": {}, "steps": 3}, tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt")
    assert loaded.config == config
    latent = torch.randn(2, 8, 4, 4)
    assert torch.equal(loaded.codes(latent, 3), other.codes(latent, 3))
    assert loaded.codes(torch.randn(8, 8, 16, 16), 16).max() > 8912


def broken(weights, how):
    weights = dict(weights)
    if how == "half":
        return dict(list(weights.items())[: len(weights) // 2])
    if how == "extra":
        return {**weights, "surplus.weight": torch.zeros(2)}
    if how == "prefixed":
        return {f"module.{name}": tensor for name, tensor in weights.items()}
    return {**weights, "head.weight": torch.zeros(128, 64)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half", "missing: "),
        ("extra", "unexpected: surplus.weight"),
        ("prefixed", "unexpected: module."),
        ("shape", r"another shape: head.weight \(128, 64\) in the file, \(128, 128\) here"),
    ],
)
def test_what_differs_is_listed_and_nothing_is_loaded(model, how, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_strictly(model, broken(model.state_dict(), how), "some.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_depth_is_refused(model):
    deeper = FlexVAR(FlexVARConfig(depth=3, width=128, num_classes=10, codebook_size=128))
    with pytest.raises(ValueError, match=r"missing: blocks\.2\."):
        load_strictly(deeper, model.state_dict(), "d2.pth")


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("load", [load_flexvar, load_tokenizer])
def test_files_that_are_something_else_are_named_and_run_nothing(load, model, vae, tmp_path):
    torch.save({"model": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pth")
    (tmp_path / "bomb2.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save(model.state_dict(), tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    for name in ("bomb.pth", "bomb2.pth", "text.pth", "empty.safetensors", "cut.pth", "other.pth"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    wrong_kind = vae if load is load_flexvar else model
    torch.save(wrong_kind.state_dict(), tmp_path / "kind.pth")
    with pytest.raises(ValueError, match="is not a"):
        load(tmp_path / "kind.pth")
    with pytest.raises(ValueError, match="no weight file"):
        load(tmp_path / "absent.pth")


def test_no_entry_point_executes_a_pickle(flags, small_vae_file, tmp_path):
    mark = tmp_path / "executed"
    torch.save({"model": Bomb(mark)}, bomb := tmp_path / "bomb.pth")
    entries = [
        lambda: build_vae_var(vae_ckpt=bomb),
        lambda: SARPipeline.from_files(bomb, bomb),
        lambda: open_pipeline(str(bomb), str(small_vae_file)),
        lambda: build(config_of(flags, f"--vae_ckpt={bomb}"), ALONE),
        lambda: build(config_of(flags, f"--init_ckpt={bomb}"), ALONE),
    ]
    for entry in entries:
        with pytest.raises(ValueError, match=r"bomb\.pth"):
            entry()
    assert not mark.exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_on_all_keys_are_taken_off(prefix, model, tmp_path):
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    for path in containers(weights, tmp_path):
        assert torch.equal(load_flexvar(path).head.weight, model.head.weight)
    name = next(iter(weights))
    some = {(k if k == name else k.removeprefix(prefix)): v for k, v in weights.items()}
    with pytest.raises(ValueError, match=r"unexpected|has no"):
        load_flexvar(containers(some, tmp_path)[0])


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ""])
def test_the_content_says_what_a_file_is_not_its_suffix(suffix, model, tmp_path):
    for path in containers(model.state_dict(), tmp_path):
        renamed = path.rename(tmp_path / f"renamed{suffix}")
        assert load_flexvar(renamed).config.depth == 2


def test_flags_beside_the_weights_do_no_harm(model, tmp_path):
    torch.save({"model": model.state_dict(), "args": Namespace(depth=2, lr=1e-4)}, tmp_path / "x.pth")
    assert load_flexvar(tmp_path / "x.pth").config.depth == 2


def test_of_a_training_checkpoint_with_an_average_the_average_is_read(model, tmp_path, capsys):
    average = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    torch.save({"model": model.state_dict(), "model_ema": average, "epoch": 3}, tmp_path / "x.pth")
    assert torch.equal(load_flexvar(tmp_path / "x.pth").head.weight, model.head.weight + 1)
    assert "model_ema" in capsys.readouterr().err


class Other:
    """A stranger's object in a checkpoint."""


def cut(path, share, tmp_path):
    whole = path.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    return tmp_path / "cut"


STRANGE = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "Git LFS pointer.*git lfs pull"),
    "page": (b"<!doctype html><html>404</html>", "web page.*fetch the file itself again"),
    "page2": (b"\n\n  <HTML><body>quota</body>", "web page"),
    "xml": (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "json": (b'{"error":"Repository not found"}', "JSON text"),
    "empty": (b"", "it is empty"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "gzip archive: unpack"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "7z archive: unpack"),
    "rar": (b"Rar!\x1a\x07" + bytes(50), "RAR archive: unpack"),
    "hdf": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "gguf": (b"GGUF" + bytes(50), "GGUF"),
    "npy": (b"\x93NUMPY" + bytes(50), "NumPy"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "picture"),
    "text": (b"hello there, this is no weight file", "it is no weight file"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", STRANGE)
def test_a_file_that_is_no_weight_file_is_called_what_it_is(name, suffix, tmp_path):
    content, said = STRANGE[name]
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x{suffix} .*({said})"):
        load_flexvar(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_half_a_download_is_called_so(share, model, tmp_path):
    for path in containers(model.state_dict(), tmp_path):
        with pytest.raises(ValueError, match=r"beginning of|cut off"):
            load_flexvar(cut(path, share, tmp_path))


def test_other_archives_and_objects_are_named(model, tmp_path):
    with zipfile.ZipFile(tmp_path / "some.pth", "w") as archive:
        archive.writestr("weights/model.pth", "x")
    with pytest.raises(ValueError, match=r"zip archive \(of weights/model\.pth\).*unpack"):
        load_flexvar(tmp_path / "some.pth")
    torch.save({"model": model.state_dict(), "config": Other()}, tmp_path / "object.pth")
    with pytest.raises(ValueError, match=r"object of tests\.test_weights\.Other.*save its state dict alone"):
        load_flexvar(tmp_path / "object.pth")


def test_a_tokenizer_run_gives_its_moving_average_and_says_so(tiny_run, capsys):
    run, trainer = tiny_run
    found = load_tokenizer(run)
    said = capsys.readouterr().err
    assert "moving average" in said
    assert "step_0000002/model.safetensors" in said  # where the weights themselves are
    for name, tensor in trainer.ema_model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    plain = load_tokenizer(run / "checkpoints/step_0000002/model.safetensors")
    assert capsys.readouterr().err == ""
    assert digest_of(plain) == digest_of(trainer.model) != digest_of(found)
    assert digest_of(load_tokenizer(run / "checkpoints/step_0000002")) == digest_of(found)


@pytest.fixture
def tiny_run(tmp_path):
    """A tokenizer's run of two steps with a moving average."""
    flags = ["--dataset=digits", "--workers=0", "--image_size=16", "--pn=1_2_4", "--base_width=32", "--bs=4"]
    flags += ["--codebook_size=32", "--width_mult", "1", "1", "1", "--res_blocks=1", "--z_channels=32", "--ema=0.5"]
    flags += ["--codebook_dim=8", "--lr=1e-2", "--steps=2", "--eval_images=0", "--vis_num_samples=0"]
    trainer = build_tokenizer(parse(TokenizerTrainConfig, [*flags, f"--out_dir={tmp_path / 'run'}"]), ALONE)
    trainer.fit()
    return tmp_path / "run", trainer
