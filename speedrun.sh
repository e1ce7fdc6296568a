#!/usr/bin/env bash
# From nothing to a trained model, graded, in one command. Run it again after an interruption: what is done is skipped.
#
#     bash speedrun.sh                            # looks at the machine, says what it will do, does it
#     bash speedrun.sh --dry-run                  # says what it would do, and prints the commands
#     WANDB_RUN=name bash speedrun.sh             # with wandb
#     SPEEDRUN_PROFILE=d26 bash speedrun.sh       # small, or d12 to d32, instead of what fits the machine
#     SPEEDRUN_TEXT="notes/ log.txt.gz" bash speedrun.sh     # your own text
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash speedrun.sh   # on host0, and with NODE_RANK=1 on the other machine
#     sbatch --nodes=4 dev/slurm.sh               # on a SLURM cluster
#
# All settings: .venv/bin/python -m scripts.speedrun --help
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh speedrun.sh
set -euo pipefail
file=$0
while [ -L "$file" ]; do # a link to this file
    link=$(readlink "$file")
    case $link in /*) file=$link ;; *) file=$(dirname "$file")/$link ;; esac
done

folder=$(dirname "$file")

# What was typed is looked at before anything is set up.
for argument in "$@"; do
    case $argument in
        --dry-run | --dry_run)
            [ -x "$folder/.venv/bin/python" ] || echo "note: to look at this machine, --dry-run needs the set-up, which" \
                "installs into .venv; nothing else is done" ;;
        -h | --help)
            [ ! -x "$folder/.venv/bin/python" ] || { cd "$folder" && exec .venv/bin/python -m scripts.speedrun --help; }
            sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$file" # not set up yet: the comment above
            exit 0 ;;
        [A-Z]*=*)
            echo "error: $argument: settings stand before the command, as in SPEEDRUN_PROFILE=d26 bash speedrun.sh;" \
                "the arguments are --dry-run and --help" >&2
            exit 2 ;;
        *)
            echo "error: $argument is no argument of speedrun.sh: there is --dry-run and --help; settings stand before" \
                "the command, as in SPEEDRUN_PROFILE=d26 bash speedrun.sh" >&2
            exit 2 ;;
    esac
done

# Paths in settings are those of the folder where this was typed.
export NANOCHAT_CALLED_FROM=$PWD
for name in NANOCHAT_BASE_DIR NANOCHAT_TASK_DATA; do
    case ${!name:-} in '' | /* | '~'*) ;; *) export "$name=$PWD/${!name}" ;; esac
done
cd "$folder"
SECONDS=0

# The set-up runs in a process group of its own: a signal that reaches this shell alone ends all of it.
stop() {
    [ -z "${!:-}" ] || { kill "-$1" -- "-$!" 2>/dev/null || true; wait "$!" || true; }
    exit $((128 + $1))
}
for number in 1 2 15; do # HUP, INT, TERM; before anything is started, so that none is missed
    # shellcheck disable=SC2064 # $number of now
    trap "stop $number" $number
done
set -m
bash dev/setup.sh &
set +m
while kill -0 $! 2>/dev/null; do # `wait` alone may miss a signal that comes as it begins
    sleep 0.2
done
wait $! || exit $?
trap - HUP INT TERM
exec .venv/bin/python -m scripts.speedrun --setup-seconds="$SECONDS" "$@"
