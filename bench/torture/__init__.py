"""Break the real commands in every way that happens to people, and tell whether anything was lost or subtly changed.

    python -m bench.torture --minutes=5 --seed=1           # a sample of every fault; ends within that time
    python -m bench.torture --hours=8 --only=kills,flips   # a night of some of them
    python -m bench.torture --list                         # the faults, one a line

__main__.py holds the table of the faults and the flags. A fault is a function that makes a folder of its own, runs
real commands on a tiny model in it, breaks something at a moment that its seed chooses, lets the same commands go on,
and compares the end with that of a run that nobody disturbed: weights, optimizer state, position in the data and
every record of the log, bit for bit.

processes.py starts and ends the commands; lab.py makes the folders and the undisturbed runs; judge.py compares.
"""

import time

BEGAN = time.monotonic()  # before PyTorch is imported, which can take many seconds of the time that was given
