"""Fetch released weights from the Hugging Face Hub into pretrained/, with progress; a broken download goes on.

python pretrained/download.py                    # lists what there is
python pretrained/download.py SARd16-epo179.pth FlexVAE.pth
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

if not __package__:  # run as a file: the project's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runtime.entry import entry
from utils.runtime.flags import Parser

FLEXVAR, SAR, VAR, FLOWAR = "jiaosiyu1999/FlexVAR", "ZGZzz/SAR", "FoundationVision/var", "OliverRen/FlowAR"
FILES = {
    "FlexVAE.pth": FLEXVAR,
    "FlexVARd16-epo179.pth": FLEXVAR,
    "FlexVARd20-epo249.pth": FLEXVAR,
    "FlexVARd24-epo349.pth": FLEXVAR,
    "SARd16-epo179.pth": SAR,
    "SARd20-epo249.pth": SAR,
    "SARd24-epo349.pth": SAR,
    "vae_ch160v4096z32.pth": VAR,
    **{f"var_d{depth}.pth": VAR for depth in (16, 20, 24, 30, 36)},
    **{f"FlowAR-{size}.pth": FLOWAR for size in "SLH"},
}
# SHA-256 of files that are known beside what the Hub says.
DIGESTS = {
    "FlowAR-S.pth": "70728d9d81b8023928cf9fd8daead4c007c5a0ce3f3201d0f3805bb9e42e0c34",
    "FlowAR-L.pth": "f63b1159b5dc0e1e7b017af51f7524e50fe3a743112e60d21184258f05a97565",
    "FlowAR-H.pth": "a413fc1b71f8e2948729f3ff70943d9bf09484dc2ca36de593487adcd2160af0",
}
# Of a checkout its own folder; of an installed copy one where the user is.
HERE = Path("pretrained").resolve() if (__package__ or "").startswith("sar.") else Path(__file__).resolve().parent


def download(name: str, directory: Path = HERE) -> Path:
    """Fetch one released file, unless it is there, and check it against the SHA-256 that the Hub gives for it.

    Raises ConnectionError when the Hub cannot be reached or what came is something else.
    """
    if name not in FILES:
        raise ValueError(f"{name} is no released file; there are {', '.join(FILES)}")
    target = directory / name
    if target.is_file():
        return target
    from huggingface_hub import hf_hub_download

    directory.mkdir(parents=True, exist_ok=True)
    unchecked = directory / ".unchecked"
    try:
        found = Path(hf_hub_download(FILES[name], name, local_dir=unchecked))
        wanted = DIGESTS.get(name) or published_digest(name)
    except Exception as error:  # of the Hub, of the net below it, of the disk: the file is not to be had this way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"could not fetch {name} from https://huggingface.co/{FILES[name]} ({reason}); "
            f"fetch it elsewhere and put it at {target}"
        ) from None
    with found.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wanted:
        found.unlink()
        raise ConnectionError(f"{name} came damaged, and was removed: its SHA-256 is {digest}, not {wanted}")
    found.replace(target)
    return target


def published_digest(name: str) -> str:
    """The SHA-256 of a released file, as the Hub gives it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(FILES[name], name)).etag or ""


def offer(path: str | Path) -> None:
    """Ask a person at a terminal whether to fetch a released file that is missing; ask nobody else."""
    path = Path(path)
    if path.name in FILES and path.parent.resolve() == HERE and not path.exists() and sys.stdin.isatty():
        answer = input(f"{path} is missing. Download it from https://huggingface.co/{FILES[path.name]}? [y/N] ")
        if answer.strip().lower() in ("y", "yes"):
            try:
                download(path.name)
            except ConnectionError as error:
                raise ValueError(str(error)) from None


@entry
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="*", help="names of released files")
    names = parser.parse_args().files
    if not names:
        for name, repository in FILES.items():
            print(f"{'here   ' if (HERE / name).is_file() else 'absent '} {name:24} {repository}")
    unknown = [name for name in names if name not in FILES]
    if unknown:  # before the first is fetched
        raise ValueError(f"{unknown[0]} is no released file; there are {', '.join(FILES)}")
    for name in names:
        print(download(name))


if __name__ == "__main__":
    main()
