"""docs/flags.md below its mark: every flag of every program, its default and meaning, as `--help` says them.

python -m experiments.flags_page          # writes it anew; a test compares
"""

from __future__ import annotations

from pathlib import Path

from utils.config.sampling import EvalConfig, SampleConfig
from utils.config.tokenizer import TokenizerTrainConfig
from utils.config.training import TrainConfig
from utils.data.code_cache import CacheFlags
from utils.reporting.tables import markdown
from utils.runtime.entry import entry
from utils.runtime.flags import Parser

PAGE = Path(__file__).resolve().parents[1] / "docs/flags.md"
MARK = "<!-- what follows is written by python -m experiments.flags_page -->\n"
PROGRAMS = {
    "train.py": TrainConfig,
    "train_tokenizer.py": TokenizerTrainConfig,
    "scripts/cache_codes.sh": CacheFlags,
    "sample.py": SampleConfig,
    "evaluate.py, scripts/eval_*.sh": EvalConfig,
}


def flags_of(config: type) -> str:
    """A table of a program's flags."""
    parser = Parser()
    parser.add_arguments(config, dest="config")
    parser.parse_known_args([])  # dataclasses become flags here
    rows = []
    for action in parser._actions:
        names = [name for name in action.option_strings if name not in getattr(action, "negative_option_strings", ())]
        if "--help" in names or not names:
            continue
        ours = min(names, key=lambda name: name != f"--{action.dest.rpartition('.')[2]}")
        others = [name for name in names if name != ours]
        default = action.default
        shown = (
            "" if default in ("", ()) else " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        )
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        meaning = " ".join((action.help or "").split()).replace(" (default: %(default)s)", "").replace("|", "\\|")
        also = f" (also {', '.join(f'`{name}`' for name in others)})" if others else ""
        rows.append([f"`{ours}`{also}", shown, meaning + choices])
    return markdown(["flag", "default", "meaning"], rows)


def generated() -> str:
    """The part of the page that follows the mark."""
    return "".join(f"\n## {name}\n\n{flags_of(config)}\n" for name, config in PROGRAMS.items())


@entry
def main() -> None:
    Parser(__doc__, prog="python -m experiments.flags_page").parse_args()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(MARK) + len(MARK)] + generated(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
