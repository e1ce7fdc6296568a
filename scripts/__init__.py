"""The commands."""

import os

# OpenMP threads that wait spin for a moment only, then sleep. With libgomp's own setting, training on a CPU beside any
# other busy program is three to four times slower; alone it is as fast (dev/LOG.md). Read once, when torch is imported:
# so it stands here, before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
