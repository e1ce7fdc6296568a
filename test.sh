#!/usr/bin/env bash
# Set-up, then all checks: ruff, the crates' own tests, pytest in one process a core. Arguments go to pytest:
#
#     bash test.sh
#     bash test.sh -k tokenizer
#     bash test.sh --slow
#     bash test.sh -n 4            # pytest in four processes; -n 0: in a single one, as a debugger needs
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh test.sh
set -uo pipefail
file=$0
while [ -L "$file" ]; do # a link to this file
    link=$(readlink "$file")
    case $link in /*) file=$link ;; *) file=$(dirname "$file")/$link ;; esac
done
cd "$(dirname "$file")" || exit 1
bash dev/setup.sh || exit 1
# shellcheck source=/dev/null
. .venv/.nanochat-rust

cores=$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
workers=$cores
[ "$workers" -le 8 ] || workers=8 # each holds about 1 GB
threads=$((cores / workers / 2)) # small tensors, and tests that start several ranks: more threads are slower
[ "$threads" -ge 1 ] || threads=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
export PYO3_PYTHON="$PWD/.venv/bin/python"
failed=""
log=.cache/setup/pytest.log

echo "== ruff"
.venv/bin/python -m ruff check . || failed="$failed ruff,"

echo "== cargo test"
# in release mode it shares what the set-up has built
for crate in rustbpe cpukernels; do
    (cd $crate && cargo test -q --release --locked) || failed="$failed cargo test ($crate),"
done

echo "== pytest"
color=no
[ ! -t 1 ] || color=yes
.venv/bin/python -m pytest -q --color=$color -n "$workers" --dist worksteal ${1+"$@"} 2>&1 | tee "$log" || failed="$failed pytest,"

if [ -n "$failed" ]; then
    echo "test.sh: failed:${failed%,}"
    tail -n 1 "$log"
    exit 1
fi
