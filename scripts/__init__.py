"""The commands."""

import os

# OpenMP threads that wait sleep instead of spinning: beside any other busy program, training on a CPU is then four times as fast
# (dev/LOG.md). OpenMP reads this once, when torch is imported, so it stands here, before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
