"""The old place of `python -m utils.code_cache`, now `python -m utils.data.code_cache`."""

from utils.data.code_cache import main
from utils.runtime.entry import notice

if __name__ == "__main__":
    notice("python -m utils.code_cache is python -m utils.data.code_cache now")
    main()
