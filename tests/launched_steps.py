"""A program for tests/test_launcher.py that runs under scripts.launch: it trains for ever and saves for ever."""

import os
import time

from nanochat.launcher import obey_owner, saving, stop_signals

if __name__ == "__main__":
    obey_owner()
    with stop_signals() as received:
        print("steps", flush=True)
        while not received:
            time.sleep(0.01)
        print("saving", os.getpid(), flush=True)
        with saving("step 7"):
            time.sleep(600)
        print("saved", flush=True)
