"""The old place of `python -m utils.checkpoint`, now `python -m utils.runtime.checkpoint`."""

from utils.runtime.checkpoint import main
from utils.runtime.entry import notice

if __name__ == "__main__":
    notice("python -m utils.checkpoint is python -m utils.runtime.checkpoint now")
    main()
