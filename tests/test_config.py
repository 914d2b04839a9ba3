import ast
import dataclasses
import os

import pytest

from models.scales import DEFAULT_SCHEDULE
from tests.conftest import ROOT
from utils.config import sampling as config_sampling
from utils.config import tokenizer as config_tokenizer
from utils.config import training as config_module
from utils.config.sampling import EvalConfig, SampleConfig
from utils.config.tokenizer import TokenizerTrainConfig
from utils.config.training import TrainConfig
from utils.data.code_cache import CacheFlags
from utils.data.datasets import StepSampler
from utils.runtime.flags import RETIRED, SYNONYMS, Parser, parse, translate


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
    (["--training_mode=sf_hybrid", "--sf_hybrid_from=17"], "leaves no scale self-fed: the finest side is 16"),
    (["--training_mode=sf_hybrid", "--pn=1_2_8", "--schedule=fixed", "--sf_hybrid_from=9"], "leaves no scale self-fed"),
    (["--training_mode=sf_full", "--pn=8", "--schedule=fixed"], "--pn has one only"),
    (["--training_mode=sf_full", "--sf_hybrid_from=4"], "--sf_hybrid_from has no effect"),
    (["--training_mode=teacher_forcing", "--rollout=sample"], "--rollout has no effect"),
    (["--ssr=last", "--ssr_steps=2"], "--ssr_steps has no effect without --ssr all"),
    (["--csf_ramp=2"], "--csf_ramp is no flag here"),
    (["--ssr=random"], "--ssr"),
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


SUGGESTED = [
    (TrainConfig, "--learning_rate", "did you mean --lr?"),
    (TrainConfig, "--batch_size", "did you mean --bs?"),
    (TrainConfig, "--output_path", "did you mean --out_dir?"),
    (TrainConfig, "--var_ckpt", "did you mean --init_ckpt?"),
    (TrainConfig, "--infer_patch_nums", "did you mean --pn?"),
    (TrainConfig, "--csf_wieght", "did you mean --csf_weight?"),
    (TrainConfig, "--datapath", "did you mean --data_path?"),
    (SampleConfig, "--output_path", "did you mean --out?"),
    (SampleConfig, "--batch_size", "did you mean --batch?"),
    (SampleConfig, "--guidance_scale", "did you mean --cfg?"),
    (EvalConfig, "--learning_rate", "--learning_rate is no flag here (--help"),  # nothing here means that
    (TrainConfig, "--xyzzy", "--xyzzy is no flag here (--help"),
]


@pytest.mark.parametrize(("kind", "flag", "said"), SUGGESTED)
def test_an_unknown_flag_suggests_ours(kind, flag, said, capsys):
    for words in ([flag, "1"], [f"{flag}=1"]):
        with pytest.raises(SystemExit):
            parse(kind, words)
        (line,) = capsys.readouterr().err.splitlines()  # one line, no usage
        assert said in line


def test_every_suggestion_is_a_flag_of_ours():
    known = set()
    for kind in (TrainConfig, TokenizerTrainConfig, SampleConfig, EvalConfig, CacheFlags):
        parser = Parser()
        parser.add_arguments(kind, dest="config")
        parser.parse_known_args([])  # dataclasses become flags here
        known |= set(parser._option_string_actions)
    assert {name for names in SYNONYMS.values() for name in names} <= known
    assert not set(RETIRED) & known


def test_released_evaluation_flags_are_ours():
    released = ["--var_ckpt=a.pth", "--batch_size=4", "--output_path=o", "--infer_patch_nums=1_2_3", "--maxpn=8"]
    found = parse(EvalConfig, [*released, "--depth=16"])
    assert found == parse(
        EvalConfig, ["--ckpt=a.pth", "--batch=4", "--out_dir=o", "--pn=1_2_3", "--max_pn=8", "--depth=16"]
    )


def test_tblr_says_that_lr_is_not_scaled(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--tblr=1e-4"])
    assert "--lr TBLR·BS/256" in capsys.readouterr().err


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
    inside = attributes_read(ROOT / "utils/config/training.py") | attributes_read(ROOT / "utils/config/sampling.py")
    by_property = {"pn", "exp_name", "out_dir"}  # .scales, .name, .directory
    swept = {"sweep_cfg", "sweep_top_k", "sweep_top_p"}  # .settings(), by their names
    assert by_property <= inside
    groups = {f.default_factory for c in (TrainConfig, TokenizerTrainConfig) for f in dataclasses.fields(c)}
    groups |= {SampleConfig, EvalConfig}
    unread = {f.name for g in groups for f in dataclasses.fields(g)} - outside - by_property - swept
    assert not unread, f"nothing reads {unread}: or a property does, then add them to by_property above"


@pytest.mark.parametrize("kind", [TrainConfig, TokenizerTrainConfig, CacheFlags, SampleConfig, EvalConfig])
def test_every_flag_says_what_it_means(kind):
    parser = Parser()
    parser.add_arguments(kind, dest="config")
    parser.parse_known_args([])  # dataclasses become flags here
    for action in parser._actions:
        said = (action.help or "").split("(default")[0].strip()
        assert len(said) > 5, f"{action.option_strings} has no help: is its definition on several lines?"
        assert "__TEMP__" not in said, action.option_strings


def test_configs_are_frozen():
    for name, thing in (vars(config_module) | vars(config_sampling) | vars(config_tokenizer)).items():
        if dataclasses.is_dataclass(thing) and isinstance(thing, type):
            assert thing.__dataclass_params__.frozen, name


# --------------------------------------------------------------------------------------------- numbers

CONFIGS = (TrainConfig, TokenizerTrainConfig, CacheFlags, SampleConfig, EvalConfig)


def leaves(kind):
    """Every field of a config's groups, with the value it has by default."""
    for f in dataclasses.fields(kind):
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(f.default_factory):
            yield from leaves(f.default_factory)
        else:
            yield f, f.default if f.default is not dataclasses.MISSING else f.default_factory()


KINDS = {"int": int, "float": float}
NUMBERS = [(kind, f.name, KINDS[f.type]) for kind in CONFIGS for f, _ in leaves(kind) if f.type in KINDS]
SWEEPS = [(EvalConfig, name, str) for name in ("sweep_cfg", "sweep_top_k", "sweep_top_p")]


@pytest.mark.parametrize(("kind", "name", "number"), NUMBERS + SWEEPS)
def test_numbers_are_numbers(kind, name, number, capsys):
    """nan, infinities, more than 64 bits, less than anything means: refused by name, for every numeric flag."""
    wrong = {
        float: ["nan", "inf", "-inf", "-1e9", "x"],
        int: [str(2**63), "-9", "1.5", "nan"],
        str: ["nan", "inf", "1,nan", "1,-inf", "-1", "1;2", "x", "1,,2"],  # of a sweep
    }
    for value in wrong[number]:
        with pytest.raises(SystemExit) as end:
            parse(kind, ["--out=x" if kind is CacheFlags else "--precision=auto", f"--{name}={value}"])
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert name in said or "--sigma" in said or (number is str and "a sweep is written like" in said), said
        assert len(said.splitlines()) == 1


def test_large_seeds_order_the_data():
    for seed in (0, 99_999_999_999_999, 2**63 - 1):
        order = StepSampler(50, seed, 10, 10, 0, 1, 0, 5)
        assert sorted(i for batch in order for _, i in batch) == list(range(50))


UNREAD = [
    (TrainConfig, ["--image_column=a"], "--image_column"),
    (TrainConfig, ["--supervision=image_pixels"], "--supervision latent or image"),
    (TrainConfig, ["--dataset=digits", "--label_column=a"], "--label_column"),
    (TrainConfig, ["--code_cache=codes", "--encode_tf32"], "--encode_tf32"),
    (TrainConfig, ["--noise=neighbour"], "--noise"),
    (TrainConfig, ["--ssr=last", "--pn=2_4_8", "--schedule=fixed"], "--ssr last feeds the class to side 1"),
    (TrainConfig, ["--model=var", "--schedule=fixed", "--csf_target=requantised", "--ssr_steps=2"], "--ssr_steps"),
    *(
        (TrainConfig, ["--training_mode=cca", "--init_ckpt=x", more], more.partition("=")[0])
        for more in ("--label_smoothing=0.1", "--scale_weights=equal", "--reset_class_embedding=true")
    ),
    (TrainConfig, ["--training_mode=noisy", "--noise_neighbours=3"], "--noise_neighbours"),
    (TrainConfig, ["--training_mode=noisy", "--noise_max=0", "--noise_per=image"], "--noise_per"),
    (TrainConfig, ["--training_mode=noisy", "--rollout=argmax"], "--rollout"),
    (TrainConfig, ["--training_mode=teacher_forcing", "--ssr_share=0.5"], "--ssr_share"),
    (EvalConfig, ["--ema_decay=0.9"], "--ema_decay"),
    (EvalConfig, ["--sweep_ema=0.9,0.99", "--use_ema"], "--use_ema"),
    (EvalConfig, ["--sweep_ema=0.9,x"], "--sweep_ema is written like"),
    (EvalConfig, ["--sweep_ema=0.9,1"], "between 0 and 1"),
    (EvalConfig, ["--samples=a", "--sweep_ema=0.9"], "--sweep_ema"),
    (TrainConfig, ["--ema", "0.9", "0.9"], "each decay once"),
    (EvalConfig, ["--guidance=none", "--cfg=3"], "--cfg"),
    (EvalConfig, ["--guidance=none", "--sweep_cfg=1,2"], "--sweep_cfg"),
    (EvalConfig, ["--samples=a", "--ckpt=b"], "--ckpt"),
    (EvalConfig, ["--samples=a", "--vae_ckpt=b"], "--vae_ckpt"),
    (EvalConfig, ["--samples=a", "--pn=1_2"], "--pn"),
    (EvalConfig, ["--samples=a", "--precision=bf16"], "--precision"),
    (EvalConfig, ["--samples=a", "--guidance=constant"], "--guidance"),
    (EvalConfig, ["--reconstruct=a", "--ckpt=b"], "--ckpt"),
    (EvalConfig, ["--reconstruct=a", "--reference=b"], "--reference"),
    (EvalConfig, ["--samples=a", "--make_reference=b", "--reference=c"], "--reference"),
    (EvalConfig, ["--samples=a", "--make_reference=b", "--split_size=9"], "--split_size"),
    (EvalConfig, ["--features=efficientnet_lite0", "--reference_sha256=b"], "--reference_sha256"),
    (EvalConfig, ["--features=efficientnet_lite0", "--pr_fp16=false"], "--pr_fp16"),
    (EvalConfig, ["--sweep_cfg=1,2", "--cfg=3"], "--cfg"),
    (EvalConfig, ["--sweep_top_k=1,2", "--top_k=3"], "--top_k"),
    (EvalConfig, ["--top_k=1", "--top_p=0.5"], "--top_p"),
    (EvalConfig, ["--top_p=1.5"], "--top_p"),
    (SampleConfig, ["--top_k=1", "--max_pn=8"], "--max_pn"),
    (EvalConfig, ["--samples=a", "--maxpn=8"], "--max_pn"),
    (SampleConfig, ["--guidance=none", "--cfg=3"], "--cfg"),
    (SampleConfig, ["--top_k=1", "--top_p=0.5"], "--top_p"),
    (SampleConfig, ["--image=a", "--outpaint=1"], "--outpaint"),
    (TrainConfig, ["--label_drop=0"], "--label_drop 0 never trains"),
    (TrainConfig, ["--label_drop=0", "--training_mode=sf_full"], "--label_drop 0 never trains"),
    (TrainConfig, ["--code_cache=c", "--augment=flip"], "--augment"),
    (TrainConfig, ["--code_cache=c", "--dataset=digits"], "--dataset"),
    (TrainConfig, ["--code_cache=c", "--data_path=d"], "--data_path"),
    (TrainConfig, ["--code_cache=c", "--on_bad_image=skip"], "--on_bad_image"),
    (TrainConfig, ["--csf_weight=0", "--ssr=last"], "--ssr"),
    (TrainConfig, ["--csf_weight=0", "--rollout=sample"], "--rollout"),
    (TrainConfig, ["--rollout=sample", "--sf_top_k=1", "--sf_top_p=0.5"], "--sf_top_p"),
    (TrainConfig, ["--vis_num_samples=0", "--vis_every=5"], "--vis_every"),
    (TrainConfig, ["--vis_num_samples=0", "--vis_cfg_scale=1"], "--vis_cfg_scale"),
    (TrainConfig, ["--eval_images=0", "--eval_every=5"], "--eval_every"),
    (TokenizerTrainConfig, ["--eval_images=0", "--eval_every=5"], "--eval_every"),
    (CacheFlags, ["--out=c", "--verify=true", "--crops=3"], "--crops"),
    (CacheFlags, ["--out=c", "--verify=true", "--data_path=d"], "--data_path"),
]


@pytest.mark.parametrize(("kind", "flags", "named"), UNREAD)
def test_a_flag_that_nothing_reads_is_an_error(kind, flags, named, capsys):
    with pytest.raises(SystemExit) as end:
        parse(kind, flags)
    assert end.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (TrainConfig, ["--label_drop=0", "--rollout=argmax"]),
        (TrainConfig, ["--label_drop=0", "--training_mode=teacher_forcing"]),
        (TrainConfig, ["--label_drop=0", "--csf_weight=0"]),
        (TrainConfig, ["--code_cache=c", "--workers=3"]),
        (EvalConfig, ["--samples=a", "--seed=3"]),  # of the images' order
        (EvalConfig, ["--top_k=1"]),
        (CacheFlags, ["--out=c", "--verify=true"]),
    ],
)
def test_a_flag_that_is_read_is_none(kind, flags):
    parse(kind, flags)


def test_help_shows_a_percent_sign_as_it_stands(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"])
    assert "flat for 5 % of" in " ".join(capsys.readouterr().out.split())
