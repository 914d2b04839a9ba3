"""Where `python -m utils.code_cache` was: it is `python -m utils.data.code_cache` now."""

from utils.data.code_cache import main
from utils.runtime.entry import notice

if __name__ == "__main__":
    notice("python -m utils.code_cache is python -m utils.data.code_cache now")
    main()
