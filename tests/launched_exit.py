"""A program for tests/test_launcher.py: ends with the exit code that its argument says."""

import sys

if __name__ == "__main__":
    sys.exit(int(sys.argv[-1]))
