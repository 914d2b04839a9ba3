"""The plan of the study on CIFAR-10: how much of everything, which variants, which claims."""

from __future__ import annotations

from dataclasses import dataclass

PN, SIDE, CLASSES = "1_2_3_4_6_8", 32, 10
CHOOSING, JUDGING = 1000, 0  # evaluation seeds: the guidance is chosen with the first, numbers come from the second
OFFLINE = "efficientnet_lite2"  # the tokenizer was trained in Lite0's features: the judge is another network
BOUNDS = ("training photographs", "reconstructed training photographs", "reconstructed held-out photographs")


@dataclass(frozen=True)
class Size:
    """Amounts of everything."""

    tokenizer: tuple[str, ...]
    model: tuple[str, ...]
    base: tuple[str, ...]  # teacher forcing to a plateau
    further: int  # steps of every variant
    lr: float  # of those, constant: where the base's schedule ends
    seeds: int
    samples: int  # judged images of each class
    choosing: int  # images of each class to choose the guidance with
    real: int  # held-out images of the reference
    guidances: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)  # ramp
    crops: int = 2  # of the code cache; CIFAR-10's views are an image and its mirror image


# An L2 loss blurs: reconstructions then are most of the distance to photographs. The perceptual and the adversarial
# term keep what the judge sees.
SMALL_TOKENIZER = (
    *("--base_width=32", "--width_mult", "1", "2", "2", "--res_blocks=1", "--z_channels=64"),
    *("--codebook_size=512", "--codebook_dim=16", "--lr=1e-3", "--wpe=0.1"),
    *("--perceptual=efficientnet_lite0", "--disc_weight=0.1", "--disc_width=32", "--disc_layers=2"),
)
SIZES = {
    "smoke": Size(
        (*SMALL_TOKENIZER, "--bs=16", "--steps=4", "--disc_start=2"), ("--depth=1", "--width=64", "--bs=16"),
        ("--lr=1e-3", "--steps=3"), 2, 3e-4, 2, 1, 1, 40, (0.0, 1.0), crops=1,
    ),
    "cpu": Size(
        (*SMALL_TOKENIZER, "--bs=32", "--steps=2000", "--disc_start=1000", "--usage_every=50"),
        ("--depth=4", "--width=128", "--bs=64"),
        ("--lr=2e-3", "--wp=0.05", "--wpe=0.1", "--steps=5000"), 150, 2e-4, 3, 70, 20, 5000,
        (2.0, 4.0, 6.0, 9.0),  # around the best one of the base, by 200 images of seed 2000, before any variant was run
    ),
    "gpu": Size(
        (*SMALL_TOKENIZER, "--bs=128", "--steps=10000", "--disc_start=3000"), ("--depth=8", "--width=512", "--bs=256"),
        ("--lr=6e-4", "--wp=0.05", "--wpe=0.1", "--steps=10000"), 500, 6e-5, 3, 500, 100, 10000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to go on from the base."""

    flags: tuple[str, ...]
    steps: int = 1  # times the steps of the others
    lr: int = 1  # times their learning rate


SAR, ALL = "--training_mode=csfl", ("--sf_top_k=0", "--sf_top_p=0")
FORCED, GUIDED = ("--training_mode=teacher_forcing",), (SAR, "--rollout=cfg", *ALL)
DRAWN = ("--rollout=sample", *ALL)
NOISY = "--training_mode=noisy"
MAIN = {
    "TF continued": Variant(FORCED),
    "SAR argmax": Variant((SAR, "--rollout=argmax")),
    "SAR sampled": Variant((SAR, *DRAWN)),
    "SAR guided": Variant(GUIDED),
    "noisy context": Variant((NOISY,)),
    "TF continued, twice the steps": Variant(FORCED, steps=2),  # about the time of an SAR run
}
# Rivals and single changes, stated before any result was known. One seed each.
OTHERS = {
    **{f"SAR guided, γ {gamma}": Variant((*GUIDED, f"--csf_weight={gamma}")) for gamma in (0.03, 0.003)},
    "SAR guided, soft target": Variant((*GUIDED, "--csf_target=teacher_soft")),
    "SAR guided, two rollouts": Variant((*GUIDED, "--ssr_steps=2")),
    "noisy context, neighbours": Variant((NOISY, "--noise=neighbour")),
    "noisy context, per image": Variant((NOISY, "--noise_per=image", "--noise_max=0.5")),
    # Two passes, the second with half of the tokens the model's own: both as much as teacher forcing.
    "scheduled sampling": Variant(
        (SAR, *DRAWN, "--csf_target=ground_truth", "--ssr_share=0.5", "--csf_weight=1"),
    ),
    "TF, scales weighted alike": Variant((*FORCED, "--scale_weights=equal")),
    "TF, label smoothing 0.1": Variant((*FORCED, "--label_smoothing=0.1")),
    "SF hybrid@6": Variant(("--training_mode=sf_hybrid", "--sf_hybrid_from=6", *DRAWN)),
    "SF hybrid@8": Variant(("--training_mode=sf_hybrid", "--sf_hybrid_from=8", *DRAWN)),
    "contrastive alignment": Variant(("--training_mode=cca",)),
}
# Of the first version of the study: run by name only.
EARLIER = {
    "SF full": Variant(("--training_mode=sf_full", *DRAWN)),
    "SF alternate": Variant(("--training_mode=sf_alternate", *DRAWN)),
    "SF interleave": Variant(("--training_mode=sf_interleave", *DRAWN)),
    **{f"SAR guided, γ {gamma}": Variant((*GUIDED, f"--csf_weight={gamma}")) for gamma in (0.1, 1)},
    "SAR guided, ground-truth target": Variant((*GUIDED, "--csf_target=ground_truth")),
    "SAR guided, last transition": Variant((*GUIDED, "--ssr=last")),
    "SAR guided, top-p 0.95": Variant((SAR, "--rollout=cfg", "--sf_top_k=0", "--sf_top_p=0.95")),
    "TF continued, lr × 3": Variant(FORCED, lr=3),
    "SAR guided, lr × 3": Variant(GUIDED, lr=3),
}
VARIANTS = {**MAIN, **OTHERS, **EARLIER}

# What the paper says, and what its rivals do, as "the first one's distance is below the second one's". Stated before
# any result was known.
CLAIMS = {
    "SAR beats equally many further teacher-forcing steps (Tables 4, 5)": ("SAR guided", "TF continued"),
    "SAR beats twice as many teacher-forcing steps, of about its time": ("SAR guided", "TF continued, twice the steps"),
    "argmax SAR beats equally many teacher-forcing steps (Table 5)": ("SAR argmax", "TF continued"),
    "sampled SAR beats equally many teacher-forcing steps (Table 5)": ("SAR sampled", "TF continued"),
    "guided rollouts beat argmax (Table 5)": ("SAR guided", "SAR argmax"),
    "guided rollouts beat sampled ones (Table 5)": ("SAR guided", "SAR sampled"),
    "noise on the context beats equally many teacher-forcing steps": ("noisy context", "TF continued"),
    "SAR beats noise on the context": ("SAR guided", "noisy context"),
}
