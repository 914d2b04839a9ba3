import ast
import dataclasses
import os

import pytest

from models.scales import DEFAULT_SCHEDULE
from tests.conftest import ROOT
from utils import config as config_module
from utils import config_sampling, config_tokenizer
from utils.config import TrainConfig
from utils.config_sampling import EvalConfig, SampleConfig
from utils.config_tokenizer import TokenizerTrainConfig
from utils.flags import RETIRED, parse, translate


def test_released_names_and_both_spellings():
    config = parse(
        TrainConfig,
        ["--dataset=digits", "--continue_training_ckpt", "a.pth", "--sigma=0.5", "--fp16", "2", "--bs=4",
         "--ep", "3", "--twd=0.1", "--tclip", "1", "--alng=1e-4", "--wpe", "0.5", "--workers=2", "--seed", "7",
         "--vis_num_samples=3", "--vis_cfg_scale", "2", "--training_mode=csfl", "--exp_name", "x", "--depth=20",
         "--vae_ckpt", "v.pth", "--pn=1_2_16"],
    )  # fmt: skip
    assert config.model.init_ckpt == "a.pth"
    assert config.sar.csf_weight == 0.5
    assert config.optim.precision == "bf16"
    assert (config.optim.bs, config.optim.ep, config.run.seed, config.model.depth) == (4, 3.0, 7, 20)
    assert config.model.scales.sides == (1, 2, 16)
    assert parse(TrainConfig, ["--dataset", "digits", "--fp16=1"]).optim.precision == "fp16"


def test_defaults_are_the_paper_recipe():
    config = TrainConfig()
    assert (config.optim.ep, config.optim.bs, config.optim.lr, config.optim.wp, config.optim.wpe) == (
        10,
        768,
        1e-4,
        0,
        1,
    )
    assert (config.optim.tclip, config.optim.twd, config.model.label_drop) == (2.0, 0.05, 0.1)
    sar = config.sar
    assert (sar.training_mode, sar.csf_weight, sar.ssr, sar.rollout) == ("csfl", 0.01, "all", "cfg")
    assert (sar.sf_cfg_scale, sar.sf_top_k, sar.sf_top_p, sar.csf_target) == (2.5, 900, 0.95, "teacher")
    assert config.model.scales == DEFAULT_SCHEDULE


WRONG = [
    (["--no_such_flag=1"], "--no_such_flag"),
    (["--dep", "16"], "--dep"),  # no abbreviations
    (["--training_mode=sar"], "--training_mode"),
    (["--rollout=gumbel"], "--rollout"),
    (["--ssr=first"], "--ssr"),
    (["--csf_target=student"], "--csf_target"),
    (["--precision=fp8"], "--precision"),
    (["--logger_type=mlflow"], "--logger_type"),
    (["--schedule=random"], "--schedule"),
    (["--dataset=imagenet"], "--dataset"),
    (["--bs=0"], "--bs"),
    (["--bs=many"], "--bs"),
    (["--ep=0"], "--ep"),
    (["--lr=-1"], "--lr"),
    (["--label_drop=1"], "--label_drop"),
    (["--sf_top_p=1.5"], "--sf_top_p"),
    (["--ema=1"], "--ema"),
    (["--fp16=3"], "--fp16"),
    (["--pn=1_2_8"], "--schedule fixed"),
    (["--pn=2_1"], "must grow"),
    (["--vis_ema=true"], "--vis_ema has no effect without --ema"),
    (["--rollout=argmax", "--sf_top_k=5"], "--sf_top_k has no effect without --rollout sample or cfg"),
    (["--rollout=sample", "--sf_cfg_scale=3"], "--sf_cfg_scale has no effect"),
    (["--training_mode=teacher_forcing", "--ssr=last"], "--ssr has no effect without --training_mode csfl"),
    (["--training_mode=sf_full", "--csf_weight=1"], "--csf_weight has no effect without --training_mode csfl"),
    (["--training_mode=sf_full", "--sf_hybrid_from=4"], "--sf_hybrid_from has no effect"),
    (["--training_mode=teacher_forcing", "--rollout=sample"], "--rollout has no effect"),
    (["--ssr=last", "--ssr_steps=2"], "--ssr_steps has no effect without --ssr all"),
    (["--csf_ramp=2"], "--csf_ramp"),
    (["--wandb_notes=x"], "--wandb_notes has no effect without --logger_type wandb"),
    (["--max_skipped=3"], "--max_skipped has no effect without --on_nonfinite skip"),
    (["--on_nonfinite=ignore"], "--on_nonfinite"),
    (["--on_bad_image=ignore"], "--on_bad_image"),
    (["--bad_image_limit=0.1"], "--bad_image_limit has no effect without --on_bad_image skip"),
    (["--dataset=digits", "--on_bad_image=skip"], "--on_bad_image has no effect without --dataset folder"),
    (["--timeout_minutes=0"], "--timeout_minutes"),
    (["--save_every_minutes=-1"], "--save_every_minutes"),
    (["--keep=0"], "--keep"),
    (["--steps=5", "--ep=3"], "--steps 5 and --ep 3 are two lengths"),
    (["--model=hybrid"], "--model hybrid goes with --schedule fixed"),
    (["--first_side=2"], "--first_side has no effect without --model hybrid"),
    (["--reset_class_embedding=true"], "--reset_class_embedding has no effect without --init_ckpt"),
    *[([flag, "1"], flag) for flag in RETIRED],
]
WRONG_FOR_TOKENIZERS = [
    (["--perceptual=vgg"], "--perceptual"),
    (["--perceptual_weights=x"], "--perceptual_weights has no effect without --perceptual lpips"),
    (["--disc_start=5"], "--disc_start has no effect without --disc_weight"),
    (["--disc_weight=1", "--disc_width=20"], "--disc_width must be a multiple of 16"),
    (["--disc_weight=1", "--precision=fp16"], "--disc_weight does not go with --precision fp16"),
    (["--l2=0"], "--l1 and --l2 are both 0"),
    (["--usage_every=0"], "--usage_every"),
    (["--depth=3"], "--depth"),
]


@pytest.mark.parametrize(
    ("kind", "flags", "named"),
    [(TrainConfig, *wrong) for wrong in WRONG] + [(TokenizerTrainConfig, *wrong) for wrong in WRONG_FOR_TOKENIZERS],
)
def test_a_wrong_flag_exits_with_2_and_is_named(kind, flags, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(kind, flags)
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err


def test_tblr_says_that_lr_is_not_scaled(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--tblr=1e-4"])
    assert "not" in (err := capsys.readouterr().err)
    assert "--lr" in err


@pytest.mark.parametrize("spelling", [["--wandb_api_key", "s3cret"], ["--wandb_api_key=s3cret"]])
def test_a_secret_goes_to_the_environment_only(spelling, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert translate([*spelling, "--bs=4"]) == ["--bs=4"]
    assert os.environ.pop("WANDB_API_KEY") == "s3cret"
    config = parse(TrainConfig, ["--dataset=digits", *spelling])
    assert "s3cret" not in str(config)
    assert os.environ.pop("WANDB_API_KEY") == "s3cret"


def attributes_read(path):
    """Every `.name` and every literal string in a source file."""
    tree = ast.parse(path.read_text())
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def test_every_field_is_read_by_something():
    sources = [p for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(p.relative_to(ROOT).parts)]
    outside = set().union(*(attributes_read(p) for p in sources if not p.name.startswith("config")))
    inside = attributes_read(ROOT / "utils/config.py") | attributes_read(ROOT / "utils/config_sampling.py")
    by_property = {"pn", "out_dir", "sweep_cfg", "sweep_top_k", "sweep_top_p"}  # .scales, .directory, .settings()
    assert by_property <= inside
    groups = {f.default_factory for c in (TrainConfig, TokenizerTrainConfig) for f in dataclasses.fields(c)}
    groups |= {SampleConfig, EvalConfig}
    unread = {f.name for g in groups for f in dataclasses.fields(g)} - outside - by_property
    assert not unread


def test_configs_are_frozen():
    for name, thing in (vars(config_module) | vars(config_sampling) | vars(config_tokenizer)).items():
        if dataclasses.is_dataclass(thing) and isinstance(thing, type):
            assert thing.__dataclass_params__.frozen, name
