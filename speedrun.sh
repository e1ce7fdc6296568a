#!/usr/bin/env bash
# From nothing to a trained model, graded, in one command. Run it again after an interruption: what is done is skipped.
#
#     bash speedrun.sh                            # looks at the machine, says what it will do, does it
#     WANDB_RUN=name bash speedrun.sh             # with wandb
#     SPEEDRUN_PROFILE=d26 bash speedrun.sh       # small, d20, d26 or d32 instead of what fits the machine
#     SPEEDRUN_TEXT="notes/ log.txt.gz" bash speedrun.sh     # your own text instead of FineWeb-Edu or the small world
#
# All settings: .venv/bin/python -m scripts.speedrun --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
SECONDS=0
bash dev/setup.sh
exec .venv/bin/python -m scripts.speedrun --setup-seconds="$SECONDS"
