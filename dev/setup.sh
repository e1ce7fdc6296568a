#!/usr/bin/env bash
# Install everything the project needs in .venv. speedrun.sh and test.sh call this script. To run it yourself:
#
#     bash dev/setup.sh
#
# The machine needs Python 3.10 to 3.14 and a C compiler. The rest is found or downloaded: uv, a Rust toolchain, exactly
# the packages of requirements.lock, and our own crates, rustbpe and cpukernels, built here in release mode. A second
# run takes well under a second.
#
# With an NVIDIA GPU, the Python must have its header, Python.h, and the build of torch must fit driver and GPU: without
# a suitable Python, uv fetches one; where the pinned torch does not fit, the newest build that does is taken.
#
#     NANOCHAT_PYTHON=/path/to/python    the Python to use, instead of the first suitable one
#     NANOCHAT_TORCH=cu126|cpu|...       another build of torch than the one that is chosen: a value of
#                                        `uv pip install --torch-backend`. Remembered in .venv;
#                                        NANOCHAT_TORCH=pinned returns to the pinned build.
#     NANOCHAT_SKIP_CHECKS=1             do not check the free disk space, the NVIDIA driver and Python.h
#
# Must run with bash 3.2, the version that macOS has.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh dev/setup.sh
set -euo pipefail
trap 'exit 130' INT

case ${1:-} in
    '') ;;
    -h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *)
        echo "error: the set-up takes no arguments, such as $1; settings stand before it, as in" \
            "NANOCHAT_TORCH=cpu bash dev/setup.sh" >&2
        exit 2 ;;
esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"
HOME=${HOME:-$ROOT/.cache}
CARGO_BIN=${CARGO_HOME:-$HOME/.cargo}/bin
TOOLS=$ROOT/.cache/setup           # the lock, a private uv, the built wheel, the log of the last failure
PYTHON=.venv/bin/python
PACKAGES_STAMP=.venv/.nanochat-packages
CRATES="rustbpe cpukernels"        # a folder and a Python module each
CRATES_STAMP=.venv/.nanochat-crates
TORCH_CHOICE=.venv/.nanochat-torch
UV_OLDEST=0.8
NETWORK_ERRORS='dns error|resolve host|name resolution|connection (refused|reset|failed)|connect error'
NETWORK_ERRORS+='|error sending request|timed out|network is unreachable|no route to host|failed to fetch'
NETWORK_ERRORS+='|failed to download|could not connect|tunnel'

say() { printf 'set-up: %s\n' "$*"; }
die() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# at_least 1.95.0 1.83: true if the first version is the second or newer
at_least() {
    awk -v a="$1" -v b="$2" 'BEGIN { split(a, x, /[^0-9]+/); split(b, y, /[^0-9]+/)
        for (i = 1; i <= 3; i++) if (x[i] + 0 != y[i] + 0) exit (x[i] + 0 < y[i] + 0) }'
}

sha256() {
    if have sha256sum; then sha256sum; elif have shasum; then shasum -a 256; else openssl dgst -sha256 -r; fi |
        cut -d' ' -f1
}

no_network() {
    die "no network: $1 could not be fetched. Check the connection (behind a proxy: HTTPS_PROXY) and run this again;" \
        "what is fetched is kept."
}

# attempt WHAT COMMAND...: run the command; if it fails, say why in one line. (uv and cargo retry on their own.)
attempt() {
    local what=$1 log=$TOOLS/failed.log
    shift
    "$@" 2>&1 | tee "$log" && return
    if grep -qiE 'no space left|disk quota' "$log"; then
        die "the disk became full while $what. Free about $(need_gb) GB and run this again;" \
            "it continues where it stopped."
    elif grep -qi 'hash mismatch' "$log"; then
        die "$what: a downloaded file does not match its hash in requirements.lock, so it was not installed." \
            "Perhaps a mirror or proxy changed it."
    elif grep -qi 'no wheels with a matching' "$log"; then
        die "$what: a pinned package has no build for this system. Builds exist for Linux with glibc 2.28 or newer" \
            "(x86_64, aarch64) and macOS 14 or newer on Apple silicon."
    elif grep -qiE "$NETWORK_ERRORS" "$log"; then
        no_network "something needed for $what"
    fi
    die "$what failed; the reason is above and in $log."
}

fetch() { # fetch URL FILE
    if have curl; then curl --proto '=https' -fsSL --retry 2 "$1" -o "$2"
    elif have wget; then wget -q "$1" -O "$2"
    else return 1; fi
}

# ---- what is installed, and is it up to date?

packages_key() { # includes the folder: programs in .venv/bin contain its path, so a moved project needs a new .venv
    printf 'lock %s\ntorch %s\nfolder %s\n' "$(sha256 <requirements.lock)" "$TORCH" "$ROOT"
}

crates_key() {
    # shellcheck disable=SC2086 # names without spaces
    find $CRATES -name target -prune -o -type f ! -name '*.so' ! -name '*.pyc' -print | LC_ALL=C sort |
        while IFS= read -r f; do printf '%s\n' "$f"; cat "$f"; done | sha256
}

# -I: isolated; otherwise Python would import the folders rustbpe/ and cpukernels/ here as the packages
has_torch() {
    "$PYTHON" -I -c 'import importlib.util as u; raise SystemExit(u.find_spec("torch") is None)' 2>/dev/null
}

packages_ready() {
    [ "$(cat "$PACKAGES_STAMP" 2>/dev/null)" = "$(packages_key)" ] &&
        python_fits "$PYTHON" && wanted_python && has_torch && suits_gpu "$PYTHON"
}

crates_import() { "$PYTHON" -I -c 'from rustbpe import Tokenizer; from cpukernels import runs_on'; }

crates_ready() { [ "$(cat "$CRATES_STAMP" 2>/dev/null)" = "$(crates_key)" ] && crates_import 2>/dev/null; }

# ---- Python

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# requirements.lock has wheels for 3.10 to 3.14
python_fits() { local v; v=$(version_of "$1") && at_least "$v" 3.10 && ! at_least "$v" 3.15; }

wanted_python() { # true if .venv has the Python version that NANOCHAT_PYTHON asks for
    [ -z "${NANOCHAT_PYTHON:-}" ] || [ "$(version_of "$NANOCHAT_PYTHON")" = "$(version_of "$PYTHON")" ]
}

# Triton compiles a small program against Python.h before it starts its first kernel, also our own ones.
has_header() {
    "$1" -I -c 'import os, sysconfig as s; raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
        2>/dev/null
}

suits_gpu() { ! careful || has_header "$1" || ! gpu_here; }

# no_header PYTHON REST...: die because it has no Python.h
no_header() {
    local python=$1 version
    version=$(version_of "$python" | cut -d. -f1,2)
    shift
    die "there is a GPU here, and $python has no Python.h, which Triton needs for every kernel:" \
        "apt-get install python$version-dev (dnf install python$version-devel)$*"
}

find_python() { # sets BASE_PYTHON, and FETCH_PYTHON=1 if uv must fetch one because this one has no Python.h
    local name path found="" bare=""
    FETCH_PYTHON=""
    if [ -n "${NANOCHAT_PYTHON:-}" ]; then
        found=$(version_of "$NANOCHAT_PYTHON") || found="not a Python that runs"
        python_fits "$NANOCHAT_PYTHON" ||
            die "NANOCHAT_PYTHON=$NANOCHAT_PYTHON is $found; Python 3.10 to 3.14 is needed."
        suits_gpu "$NANOCHAT_PYTHON" || no_header "$NANOCHAT_PYTHON" ", or unset NANOCHAT_PYTHON."
        BASE_PYTHON=$NANOCHAT_PYTHON
        return
    fi
    for name in python3.13 python3.12 python3.11 python3.10 python3 python3.14 python; do
        for path in "$(command -v $name || true)" "$HOME/.local/bin/$name"; do
            [ -x "$path" ] || continue
            if ! python_fits "$path"; then
                found="$found $name=$(version_of "$path" || echo broken)"
            elif suits_gpu "$path"; then
                BASE_PYTHON=$path
                return
            else
                bare=${bare:-$path}
            fi
        done
    done
    if find_uv && path=$("$UV" python find --no-python-downloads '>=3.10,<3.15' 2>/dev/null) &&
        python_fits "$path" && suits_gpu "$path"; then
        BASE_PYTHON=$path
        return
    fi
    if [ -n "$bare" ]; then
        BASE_PYTHON=$bare
        FETCH_PYTHON=1
        return
    fi
    die "no Python 3.10 to 3.14 (found:${found:- none}). Install one (apt-get install python3," \
        "brew install python@3.13, or uv python install 3.13)," \
        "or name one: NANOCHAT_PYTHON=/path/to/python bash dev/setup.sh"
}

fetch_python() { # sets BASE_PYTHON to a Python of uv's, which brings Python.h
    local path
    say "no Python here has Python.h, which Triton needs on a GPU: fetching one (uv python install 3.12)"
    "$UV" python install -q 3.12 >"$TOOLS/failed.log" 2>&1 || true
    if path=$("$UV" python find --managed-python 3.12 2>>"$TOOLS/failed.log") && python_fits "$path" &&
        has_header "$path"; then
        BASE_PYTHON=$path
    else
        no_header "$BASE_PYTHON" ", or name a Python that has it: NANOCHAT_PYTHON=/path/to/python. (uv could not" \
            "fetch one; details in $TOOLS/failed.log.)"
    fi
}

# ---- uv

find_uv() { # sets UV
    local path
    for path in "$(command -v uv || true)" "$HOME/.local/bin/uv" "$CARGO_BIN/uv" "$TOOLS/uv/bin/uv"; do
        if [ -x "$path" ] && at_least "$("$path" --version 2>/dev/null | cut -d' ' -f2)" "$UV_OLDEST"; then
            UV=$path
            return
        fi
    done
    return 1
}

get_uv() { # tries venv and pip, then pip alone (Debian packages them separately), then uv's own installer
    local log=$TOOLS/failed.log
    find_uv && return
    say "fetching uv into .cache/setup/uv"
    rm -rf "$TOOLS/uv"
    { "$BASE_PYTHON" -m venv "$TOOLS/uv" && "$TOOLS/uv/bin/python" -m pip install -q "uv>=$UV_OLDEST"; } >"$log" 2>&1 ||
        { rm -rf "$TOOLS/uv" &&
            "$BASE_PYTHON" -m pip install -q --target "$TOOLS/uv" "uv>=$UV_OLDEST"; } >>"$log" 2>&1 ||
        { fetch https://astral.sh/uv/install.sh "$TOOLS/uv.sh" &&
            UV_UNMANAGED_INSTALL="$TOOLS/uv/bin" sh "$TOOLS/uv.sh"; } >>"$log" 2>&1 ||
        true
    find_uv || no_network "uv (tried pip, then astral.sh; details in $log), which you can also install by hand,"
}

# ---- compiler and Rust

check_compiler() { # links a program: rustc calls `cc` to link, which fails if headers or the C library are missing
    local name
    for name in cc gcc clang; do
        have $name || continue
        printf 'int main(void) { return 0; }\n' >"$TOOLS/link.c"
        if $name "$TOOLS/link.c" -o "$TOOLS/link.out" >"$TOOLS/failed.log" 2>&1; then
            rm -f "$TOOLS"/link.*
            [ $name = cc ] || export RUSTFLAGS="${RUSTFLAGS:-} -Clinker=$name"
            return
        fi
    done
    die "no working C compiler (cc, gcc or clang), which is needed to build $CRATES: apt-get install build-essential," \
        "dnf install gcc, or xcode-select --install."
}

check_gpu_compiler() { # Triton takes $CC, else gcc, else clang, at run time; it does not look for `cc`
    local name=${CC:-}
    gpu_here || return 0
    if [ -z "$name" ]; then if have gcc; then name=gcc; else name=clang; fi; fi
    printf 'int f(void) { return 0; }\n' >"$TOOLS/link.c"
    if ! $name -shared -fPIC "$TOOLS/link.c" -o "$TOOLS/link.out" >"$TOOLS/failed.log" 2>&1; then
        die "there is a GPU here, and $name, with which Triton builds what every kernel needs, does not work or is" \
            "missing: apt-get install gcc, or name a C compiler in the environment: CC=cc."
    fi
    rm -f "$TOOLS"/link.*
}

# good_rust FOLDER: true if rustc and cargo in the folder ("": on PATH) are new enough for the crates. Sets CARGO_DIR.
good_rust() {
    local dir=${1:-$(dirname "$(command -v rustc || echo /nonexistent/rustc)")} version
    [ -x "$dir/cargo" ] || return
    version=$(cd rustbpe && PATH="$dir:$PATH" "$dir/rustc" --version 2>/dev/null | cut -d' ' -f2)
    at_least "$version" "$RUST_OLDEST" && CARGO_DIR=$dir
}

get_rust() {
    local rustup offered
    RUST_OLDEST=$(sed -n 's/^rust-version *= *"\(.*\)".*/\1/p' rustbpe/Cargo.toml)
    RUST_OLDEST=${RUST_OLDEST:-1.83}
    good_rust "" && return
    good_rust "$CARGO_BIN" && return
    rustup=$(command -v rustup || echo "$CARGO_BIN/rustup")
    if [ -x "$rustup" ]; then # its default toolchain is missing or too old: use stable, and do not change the default
        export RUSTUP_TOOLCHAIN=stable
        good_rust "$(dirname "$rustup")" && return
        say "fetching the stable Rust toolchain (rustup)"
        "$rustup" toolchain install stable --profile minimal --no-self-update >"$TOOLS/failed.log" 2>&1 || true
        good_rust "$(dirname "$rustup")" && return
        unset RUSTUP_TOOLCHAIN
    else
        say "fetching a Rust toolchain into ${CARGO_HOME:-$HOME/.cargo} (rustup, minimal profile, about 600 MB)"
        if fetch https://sh.rustup.rs "$TOOLS/rustup.sh" 2>"$TOOLS/failed.log" ||
            fetch https://static.rust-lang.org/rustup/rustup-init.sh "$TOOLS/rustup.sh" 2>>"$TOOLS/failed.log"; then
            RUSTUP_INIT_SKIP_PATH_CHECK=yes sh "$TOOLS/rustup.sh" -y -q --profile minimal --no-modify-path \
                --default-toolchain stable >>"$TOOLS/failed.log" 2>&1 || true
        fi
        good_rust "$CARGO_BIN" && return
    fi
    if have apt-get && [ "$(id -u)" = 0 ]; then
        apt-get update -qq >>"$TOOLS/failed.log" 2>&1 || true
        offered=$(apt-cache policy rustc 2>/dev/null | sed -n 's/^ *Candidate: //p')
        if at_least "${offered:-0}" "$RUST_OLDEST"; then
            say "fetching rustc $offered with apt-get"
            apt-get install -y -qq --no-install-recommends rustc cargo >>"$TOOLS/failed.log" 2>&1 || true
            good_rust "" && return
        fi
    fi
    die "no Rust $RUST_OLDEST or newer, and none could be fetched (details in $TOOLS/failed.log)." \
        "With a network: curl https://sh.rustup.rs -sSf | sh -s -- -y, then run this again."
}

# ---- disk space and driver

need_gb() { # torch for Linux includes CUDA; if a torch is installed, an update replaces only a part
    if [ "$(uname -s)" = Linux ] && [ "$TORCH" != cpu ] && ! has_torch; then echo 7; else echo 2; fi
}

check_disk() { # uv unpacks into its cache and links from there; with the cache on another disk, both hold everything
    local cache place free
    cache=$("$UV" cache dir 2>/dev/null || echo "$ROOT")
    while [ ! -d "$cache" ]; do cache=$(dirname "$cache"); done
    for place in "$ROOT" "$cache"; do
        free=$(df -Pk "$place" | awk 'NR == 2 { print int($4 / 1000000) }')
        [ "${free:-99}" -ge "$(need_gb)" ] ||
            die "too little disk space: $place has $free GB free and the packages need about $(need_gb) GB." \
                "Free some space, move uv's cache (UV_CACHE_DIR), or use torch without CUDA (NANOCHAT_TORCH=cpu, 2 GB)."
    done
}

# ---- GPU and torch

careful() { [ "${NANOCHAT_SKIP_CHECKS:-}" != 1 ]; }

GPU_DRIVER=unknown
gpu_here() { # true if nvidia-smi lists a GPU; sets GPU_DRIVER ("" without a GPU), once
    if [ "$GPU_DRIVER" = unknown ]; then
        GPU_DRIVER=""
        if have nvidia-smi; then
            GPU_DRIVER=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p) || true
            case $GPU_DRIVER in
                [0-9]*) ;;
                *) GPU_DRIVER=""; say "nvidia-smi is installed but lists no GPU: continuing without a GPU" ;;
            esac
        fi
    fi
    [ -n "$GPU_DRIVER" ]
}

# Builds of torch, by what NVIDIA says of minor versions (a CUDA release runs on each driver of its major version) and
# by the architectures each is built for:
#     pinned   CUDA 13           driver 580   compute capability 7.5 and newer
#     cu126    torch up to 2.14  driver 525   5.0 to 9.0
#     cu128    torch up to 2.11  driver 525   7.5 to 12.0
fit_torch() { # sets TORCH to the newest build that fits driver and GPUs, and TORCH_WHY where that is not the pinned one
    local all oldest newest
    TORCH=pinned
    all=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9]' | sort -t. -k1n -k2n) ||
        true
    oldest=$(printf '%s\n' "$all" | sed -n 1p)
    newest=$(printf '%s\n' "$all" | sed -n '$p')
    TORCH_WHY=""
    if ! at_least "${oldest:-7.5}" 7.5; then
        TORCH_WHY="a GPU here has compute capability $oldest and the pinned torch (CUDA 13) needs 7.5 or newer"
    elif ! at_least "$GPU_DRIVER" 580; then
        TORCH_WHY="the NVIDIA driver is $GPU_DRIVER and the pinned torch (CUDA 13) needs 580 or newer"
    else
        return 0
    fi
    at_least "$GPU_DRIVER" 525 ||
        die "the NVIDIA driver is $GPU_DRIVER; even torch for CUDA 12 needs 525 or newer. Upgrade the driver, or" \
            "NANOCHAT_TORCH=cpu bash dev/setup.sh installs torch without CUDA."
    if ! at_least "${newest:-9.0}" 10.0; then
        TORCH=cu126
    elif at_least "$oldest" 7.5; then
        TORCH=cu128
    else
        die "the GPUs here have compute capabilities from $oldest to $newest, and no build of torch has both. Choose:" \
            "NANOCHAT_TORCH=cu126 bash dev/setup.sh for the older ones, NANOCHAT_TORCH=cu130 for the newer."
    fi
    at_least "${oldest:-7.5}" 5.0 ||
        die "$TORCH_WHY; torch for CUDA 12 needs 5.0. NANOCHAT_TORCH=cpu bash dev/setup.sh installs torch without CUDA."
}

choose_torch() { # sets TORCH and TORCH_SAVED, the line that remembers it: "auto cu126" where the driver decided
    TORCH_SAVED=${NANOCHAT_TORCH:-$(cat "$TORCH_CHOICE" 2>/dev/null || echo pinned)}
    TORCH=${TORCH_SAVED#auto }
    case $TORCH_SAVED in
        auto\ *) if careful && gpu_here; then fit_torch; fi ;; # the driver may be a newer one now
    esac
}

check_driver() { # where nobody has chosen a build, let the driver decide
    case $TORCH_SAVED in pinned | auto\ *) ;; *) return ;; esac
    if ! gpu_here; then return; fi
    fit_torch
    TORCH_SAVED=$TORCH
    if [ "$TORCH" != pinned ]; then
        [ "${NANOCHAT_TORCH:-}" != pinned ] ||
            die "$TORCH_WHY. Without NANOCHAT_TORCH, set-up takes $TORCH, which fits; or upgrade the driver."
        TORCH_SAVED="auto $TORCH"
        say "$TORCH_WHY: torch is the newest build that fits, $TORCH. After an upgrade of the driver, run this again." \
            "(NANOCHAT_TORCH=cpu|cu126|... chooses another one.)"
    fi
}

# ---- the two steps

install_packages() {
    local key filtered
    key=$(packages_key)
    rm -f "$PACKAGES_STAMP" "$CRATES_STAMP" # so that an interrupted installation counts as not done
    if [ "$(need_gb)" = 7 ]; then
        say "installing the packages of requirements.lock: 3 GB to fetch, 5.6 GB on disk" \
            "(torch for Linux includes CUDA, with or without a GPU)"
    else
        say "installing the packages of requirements.lock"
    fi
    if ! python_fits "$PYTHON" || ! wanted_python || ! suits_gpu "$PYTHON" || ! grep -qsF "$ROOT/.venv" .venv/bin/activate; then
        attempt "making .venv" "$UV" venv -q --clear --python "$BASE_PYTHON" .venv
    fi
    printf '%s\n' "$TORCH_SAVED" >"$TORCH_CHOICE"
    # --no-build: a package without a wheel for this Python fails at once, instead of compiling for an hour
    if [ "$TORCH" = pinned ]; then
        attempt "installing the packages" "$UV" pip sync --python "$PYTHON" --require-hashes --no-build \
            requirements.lock
    else
        filtered=$TOOLS/requirements-without-torch.lock
        awk '/^[a-z]/ { keep = !/^(torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z-]*)==/ } keep' \
            requirements.lock >"$filtered"
        attempt "installing the packages" "$UV" pip sync --python "$PYTHON" --require-hashes --no-build "$filtered"
        attempt "installing torch ($TORCH)" "$UV" pip install --python "$PYTHON" --no-build \
            --torch-backend "$TORCH" "torch>=2.11"
    fi
    printf '%s\n' "$key" >"$PACKAGES_STAMP"
}

install_crates() {
    local key crate locked
    key=$(crates_key)
    rm -f "$CRATES_STAMP"
    rm -rf "$TOOLS/wheels"
    export PATH="$CARGO_DIR:$PATH"
    for crate in $CRATES; do
        say "building $crate (Rust, release mode)"
        locked=""
        [ ! -f "$crate/Cargo.lock" ] || locked=--locked
        # shellcheck disable=SC2086 # $locked is one flag or nothing
        attempt "building $crate" "$PYTHON" -m maturin build -q --release $locked --manifest-path "$crate/Cargo.toml" \
            --interpreter "$PYTHON" --out "$TOOLS/wheels"
    done
    attempt "installing $CRATES" "$UV" pip install -q --python "$PYTHON" --no-deps --no-index --reinstall \
        "$TOOLS"/wheels/*.whl
    crates_import || die "$CRATES were built but cannot be imported; see above."
    # test.sh reads this file, so that `cargo test` uses the same compiler
    {
        # shellcheck disable=SC2016 # $PATH is expanded by the shell that reads the file
        printf 'export PATH=%q:$PATH\n' "$CARGO_DIR"
        [ -z "${RUSTUP_TOOLCHAIN:-}" ] || printf 'export RUSTUP_TOOLCHAIN=%q\n' "$RUSTUP_TOOLCHAIN"
        [ -z "${RUSTFLAGS:-}" ] || printf 'export RUSTFLAGS=%q\n' "$RUSTFLAGS"
    } >.venv/.nanochat-rust
    printf '%s\n' "$key" >"$CRATES_STAMP"
}

for crate in $CRATES; do
    [ -f "$crate/Cargo.toml" ] ||
        die "$crate/Cargo.toml is missing: this copy of the project is incomplete. Clone it again."
done
choose_torch
if packages_ready && crates_ready; then
    say "ready (.venv)"
    exit
fi

mkdir -p "$TOOLS"
if have flock; then # of two set-ups at once, the second waits and then finds the work done
    exec 9>"$TOOLS/lock"
    flock -n 9 || { say "another set-up is running here; waiting for it"; flock 9; choose_torch; }
fi
todo=""
if ! packages_ready; then todo="packages crates"; elif ! crates_ready; then todo=crates; fi
wants() { case $todo in *$1*) ;; *) return 1 ;; esac; }

# first all checks, then all work that takes long
if wants packages; then find_python; else BASE_PYTHON=$PYTHON; fi
if wants crates; then check_compiler; fi
if wants packages && careful; then check_gpu_compiler; check_driver; fi
if [ -n "$todo" ]; then get_uv; fi
if wants packages && [ -n "$FETCH_PYTHON" ]; then fetch_python; fi
if wants packages && careful; then check_disk; fi
if wants crates; then get_rust; fi
if wants packages; then install_packages; fi
if wants crates; then install_crates; fi
torch_version=$("$PYTHON" -I -c 'from importlib.metadata import version; print(version("torch"))') || true
say "ready: .venv with Python $(version_of "$PYTHON"), torch $torch_version"
