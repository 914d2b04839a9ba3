"""Model cards: what a pipeline is, on what it was trained and how, and what it was measured to do.

    python -m models.card --ckpt out/SAR-d16 --report out/eval_SAR_d16/report.json --out README.md

`SARPipeline.save_pretrained` and `push_to_hub` write one by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from models.run_record import RunRecord
from utils.reporting.tables import markdown
from utils.runtime.checkpoint import MANIFEST, last_invariants, reached, step_of
from utils.runtime.entry import check_output_file, entry
from utils.runtime.files import read_json
from utils.runtime.flags import Parser

PAPERS = {"VAR": "arXiv 2404.02905", "FlowAR": "arXiv 2412.15205"}
# Repository of released files → licence of its weights, where that is known here.
LICENCES = {"FoundationVision/var": "mit", "OliverRen/FlowAR": "apache-2.0"}
# Flags of a recipe that a reader wants to know, where they were given.
RECIPE = (
    "training_mode", "dataset", "bs", "ep", "steps", "lr", "lr_decay", "wp", "wpe", "twd", "tclip", "ema", "precision",
    "label_drop", "augment", "supervision", "csf_weight", "ssr", "rollout", "csf_target", "sf_cfg_scale", "sf_top_k",
    "sf_top_p", "rollout_steps", "seed",
)  # fmt: skip
OF_SAR = RECIPE[RECIPE.index("csf_weight") : RECIPE.index("seed")]  # nothing to say of teacher forcing


EXAMPLE = """```python
from models import SARPipeline  # of an installed copy: from sar.models

pipeline = SARPipeline.from_pretrained("THIS REPOSITORY")
pipeline([0], n=4, seed=0)[0].save("picture.png")
```"""


@dataclass(frozen=True)
class Origin:
    """Source of a pipeline's weights."""

    ckpt: str = ""  # as it was named
    base: str = ""  # what training started from
    recipe: dict[str, Any] = field(default_factory=dict)  # flag → value
    trained: str = ""  # how far

    @classmethod
    def of(cls, ckpt: str | Path, run: RunRecord | None) -> Origin:
        """The origin of weights that were named so, and belong to a run or to none."""
        if run is None:
            return cls(ckpt=Path(ckpt).name)
        groups = [group for group in run.content.values() if isinstance(group, dict)]
        flags = {name: value for group in groups for name, value in group.items()}
        recipe = {name: flags[name] for name in RECIPE if name in flags and flags[name] not in ("", None)}
        if recipe.get("training_mode") == "teacher_forcing":
            recipe = {name: value for name, value in recipe.items() if name not in OF_SAR}
        return cls(Path(ckpt).name, run.content["model"].get("init_ckpt", ""), recipe, trained(run, Path(ckpt)))


def trained(run: RunRecord, ckpt: Path) -> str:
    """A line on steps and images: of a checkpoint, where one of its files or it itself is named, else of the run."""
    named = next((place for place in (ckpt, ckpt.parent) if (place / MANIFEST).is_file()), None)
    images, step = last_invariants(run.directory).get("images"), step_of(named) if named else reached(run.directory)
    return f"{step:,} steps" + (f", on {images:,} images" if images else "")


def released_repository(name: str) -> str:
    """The Hub repository of a released file; empty for others."""
    from pretrained.download import FILES

    return FILES.get(Path(name).name, "")


def licence_of(origin: Origin) -> str:
    """The licence of the weights, as far as that of their base tells; "other" where nobody has said."""
    repository = released_repository(origin.base) or released_repository(origin.ckpt)
    return LICENCES.get(repository, "other")


def card(described: str, name: str, origin: Origin, report: dict | None = None) -> ModelCard:
    """A model card.

    Args:
        described: a line on the model, as `SARPipeline.describe` gives it.
        name: of its generator's class.
        report: an evaluation's report.json.
    """
    base = released_repository(origin.base) or released_repository(origin.ckpt)
    mode = origin.recipe.get("training_mode")
    released = bool(released_repository(origin.ckpt)) and origin.ckpt.startswith("SAR")
    is_sar = mode == "csfl" if mode else released  # out/SAR is a run's directory like any other
    about = ModelCardData(
        license=licence_of(origin), library_name="sar", pipeline_tag="unconditional-image-generation",
        tags=["sar" if is_sar else name.lower(), "image-generation", "autoregressive"],
        base_model=base or None,
    )  # fmt: skip
    paper = f" ({PAPERS[name]})" if name in PAPERS else ""
    method = " trained by Self-Autoregressive Refinement (arXiv 2512.06421)" if is_sar else ""
    lines = [f"# {'SAR' if is_sar else name}", "", f"{described}.", "", f"{name}{paper}{method}.", "", EXAMPLE, ""]
    if licence_of(origin) == "other":
        whose = f"what they started from is licensed as {base} says" if base else "name it before you share them"
        lines += [f"The licence of these weights was not said: {whose}.", ""]
    if origin.base or origin.trained:
        start = f"From `{Path(origin.base).name}`" + (f" of {base}" if base else "") if origin.base else "From scratch"
        lines += ["## Training", "", f"{start}, {origin.trained}.", ""]
        lines += [markdown(["flag", "value"], [[f"`--{k}`", str(v)] for k, v in origin.recipe.items()]), ""]
    if report is not None:
        lines += ["## Evaluation", "", *evaluation(report), ""]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n")


def evaluation(report: dict) -> list[str]:
    """The metrics of a report, and how they were measured."""
    metrics = [
        [k, str(v) if isinstance(v, int) else f"{v:.4g}"] for k, v in report.items() if isinstance(v, int | float)
    ]
    reference = Path(report.get("reference", "")).name
    settings = {**report.get("settings", {}), "reference": reference}
    wanted = ("guidance", "cfg", "top_k", "top_p", "classes", "images_per_class", "reference", "precision")
    said = ", ".join(f"{name} {settings[name]}" for name in wanted if settings.get(name) not in (None, ""))
    lines = [markdown(["metric", "value"], metrics), "", said]
    if report.get("features") != "inception":
        lines += ["", f"In features of {report.get('features')}: none of these is an FID."]
    return lines


@entry
def main() -> None:
    from models.pipeline import open_pipeline

    parser = Parser(__doc__, prog="python -m models.card")
    parser.add_argument("--ckpt", required=True, help="a run's directory, a weight file, a pipeline")
    parser.add_argument("--report", type=Path, help="report.json of its evaluation")
    parser.add_argument("--out", default="README.md", help="file to write")
    args = parser.parse_args()
    pipeline = open_pipeline(args.ckpt)
    out = check_output_file(args.out, "--out")
    report = read_json(args.report) if args.report else None
    out.write_text(str(pipeline.card(report)), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
