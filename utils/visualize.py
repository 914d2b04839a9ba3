"""Where `python -m utils.visualize` was: it is `python -m experiments.figures` now."""

from experiments.figures import main
from utils.runtime.entry import notice

if __name__ == "__main__":
    notice("python -m utils.visualize is python -m experiments.figures now")
    main()
