"""The old place of `python -m utils.data check DIR`, now `python -m utils.data.check DIR`."""

import sys

from utils.data.check import main
from utils.runtime.entry import notice

notice("python -m utils.data check is python -m utils.data.check now")
sys.argv[1:] = [word for i, word in enumerate(sys.argv[1:]) if i or word != "check"]
main()
