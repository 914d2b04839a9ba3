"""Two results of a benchmark side by side, with ratios: a regression is seen.

    python -m benchmarks.gpu --out out/before …; python -m benchmarks.gpu --out out/after …
    python -m benchmarks.compare out/before/gpu.json out/after/gpu.json
    python -m benchmarks.compare before.txt after.txt      # what the other benchmarks printed: their last line is JSON

Status 1 when a number is worse by more than --tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path

from utils.reporting.tables import markdown
from utils.runtime.entry import entry, notice
from utils.runtime.flags import Parser

# Columns of which more is better, and those of which less is; others only say what was measured.
MORE = ("images/s", "examples/s", "TFLOP/s", "MFU", "speed-up", "share of products' speed", "codes equal", "agrees")
LESS = ("ms", "s", "h", "G", "GB", "GiB", "s/image", "G/image", "graphs", "waits")  # the first or last word
KEYS = ("depth", "batch", "tokens", "L", "rows", "source", "workers", "precision", "logits' deviation")


def read(path: Path) -> tuple[dict, dict[str, dict]]:
    """Machine, and rows by name, of a benchmark's JSON or of what it printed. Raises ValueError for anything else."""
    text = path.read_text(encoding="utf-8").strip()
    for part in (text, text.splitlines()[-1] if text else ""):
        try:
            found = json.loads(part)
            break
        except ValueError:
            continue
    else:
        raise ValueError(f"{path} is no benchmark's JSON, nor ends with a line of it")
    if not isinstance(found, dict) or "rows" not in found:
        raise ValueError(f"{path} holds no benchmark's rows")
    rows = found["rows"]
    if isinstance(rows, list):
        rows = {", ".join(f"{k} {row[k]}" for k in KEYS if k in row) or str(i): row for i, row in enumerate(rows)}
    return found.get("machine", {}), rows


def direction(column: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    if any(name in column for name in MORE):
        return 1
    if column in KEYS or "floor" in column or "estimated" in column:
        return 0
    words = column.replace(",", " ").split()
    return -1 if words[0] in LESS or words[-1] in LESS or "error" in words else 0


def compare(before: dict[str, dict], after: dict[str, dict], tolerance: float) -> tuple[list[list[str]], list[str]]:
    """Cells of a table, and the numbers that are worse by more than `tolerance` (0.05: a twentieth)."""
    cells, worse = [], []
    for name, row in before.items():
        if "error" in after.get(name, {}) and "error" not in row:
            worse.append(f"{name}: {after[name]['error']}")
        for column, old in row.items():
            new, sign = after.get(name, {}).get(column), direction(column)
            numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (old, new))
            if not sign or not numbers:
                continue
            ratio = new / old if old else (1.0 if new == old else float("inf"))
            cells.append([name, column, f"{old:.4g}", f"{new:.4g}", f"{ratio:.3f}"])
            worse_by = ratio if sign < 0 else 1 / ratio if ratio else float("inf")
            if worse_by > 1 + tolerance:
                worse.append(f"{name}, {column}: {ratio:.3f} times")
    return cells, worse


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.compare")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05)
    args = parser.parse_args()
    (machine, before), (other, after) = read(args.before), read(args.after)
    if machine != other:
        notice(f"measured on different machines: {machine} and {other}")
    cells, worse = compare(before, after, args.tolerance)
    if not cells and not worse:
        raise ValueError(f"{args.before} and {args.after} have no row in common")
    print(markdown(["row", "number", "before", "after", "ratio"], cells))
    if worse:
        print("\nworse:\n  " + "\n  ".join(worse))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
