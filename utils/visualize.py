"""The old place of `python -m utils.visualize`, now `python -m experiments.figures`."""

from experiments.figures import main
from utils.runtime.entry import notice

if __name__ == "__main__":
    notice("python -m utils.visualize is python -m experiments.figures now")
    main()
