"""Where `python -m utils.checkpoint` was: it is `python -m utils.runtime.checkpoint` now."""

from utils.runtime.checkpoint import main
from utils.runtime.entry import notice

if __name__ == "__main__":
    notice("python -m utils.checkpoint is python -m utils.runtime.checkpoint now")
    main()
