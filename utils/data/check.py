"""Read every image of a data set, before days of training do: python -m utils.data.check DIR"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from utils.data.hub import NO_CLASSES, HubImages, is_hub, splits_of
from utils.runtime.entry import entry
from utils.runtime.flags import Parser
from utils.runtime.image_files import BadImage, ClassFolders, name_left_out, problem


def scan(folder: Path) -> int:
    """Read every image below FOLDER/<class>/, say what is wrong and how many there are. Returns the bad ones."""
    source = ClassFolders(folder)
    paths = [path for path, _ in source.samples]
    with ProcessPoolExecutor() as pool:
        found = list(tqdm(pool.map(problem, paths, chunksize=16), total=len(paths), desc=str(folder), unit="image"))
    bad = [line for line in found if line]
    sizes = Counter(label for _, label in source.samples).values()
    kinds = ", ".join(f"{n} {suffix}" for suffix, n in source.others.most_common(5))
    notes = [name_left_out(source.left_out), f"no images, by their names: {kinds}" if kinds else ""]
    for line in [*bad, *filter(None, notes)]:
        print(line)
    classes = f"{len(sizes)} classes of {min(sizes)}…{max(sizes)}"
    print(f"{folder}: {len(paths)} images, {len(bad)} bad, {source.others.total()} other files; {classes}")
    return len(bad)


def scan_hub(name: str) -> int:
    """`scan` of every split of a Hub data set, or of one written by save_to_disk."""
    bad = 0
    for split, opened in splits_of(name).items():
        source = HubImages(opened(), f"{name}@{split}", label_column=NO_CLASSES)

        def problem_of(index: int, source: HubImages = source) -> str:
            try:
                source.picture(index)
            except BadImage as error:
                return str(error)
            return ""

        with ThreadPoolExecutor() as pool:
            found = list(tqdm(pool.map(problem_of, range(len(source))), total=len(source), desc=split, unit="image"))
        lines = [line for line in found if line]
        print("\n".join([*lines, f"{name}@{split}: {len(source)} images, {len(lines)} bad"]))
        bad += len(lines)
    return bad


@entry
def main() -> None:
    """Read every image of a data set: python -m utils.data.check DIR (with train/ and val/, or class folders; or what
    save_to_disk wrote), or hub:NAME."""
    parser = Parser(main.__doc__, prog="python -m utils.data.check")
    parser.add_argument("directory")
    named = parser.parse_args().directory
    if is_hub(named):
        if scan_hub(named.removeprefix("hub:")):
            raise SystemExit(1)
        return
    root = Path(named)
    folders = [root / split for split in ("train", "val") if (root / split).is_dir()] or [root]
    if sum([scan(folder) for folder in folders]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
