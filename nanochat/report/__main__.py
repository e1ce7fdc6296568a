"""python -m nanochat.report generate|reset"""

from nanochat.cli import run_main
from nanochat.report.card import main

if __name__ == "__main__":
    run_main(main)
