"""Threads that wait sleep instead of spinning. To be imported before torch, whose OpenMP reads the environment once.

With more threads than free cores (another job, several ranks) those that spin keep the others from working.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
