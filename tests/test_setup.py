"""dev/setup.sh, test.sh and requirements.lock. The scripts run with a PATH of stand-ins, to reach every message."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
REAL = ("bash sh awk sed grep cat cut sort find dirname mkdir rm mv tee id sha256sum shasum openssl cp touch sleep "
        "tail env ls flock").split()
CRATES = ["rustbpe", "cpukernels"]

# What the stand-in uv puts at .venv/bin/python: answers set-up's questions from files beside it.
VENV_PYTHON = """#!/bin/sh
here=$(dirname "$0")/..
case "$*" in
    *find_spec*) [ -f "$here/torch" ] ;;
    *"from rustbpe"*"from cpukernels"*) [ -f "$here/rustbpe" ] && [ -f "$here/cpukernels" ] ;;
    *maturin*) [ ! -f fail_build ] || { cat fail_build >&2; exit 1; }
        while [ "$1" != --manifest-path ]; do shift; done; crate=${2%/Cargo.toml}
        while [ "$1" != --out ]; do shift; done
        mkdir -p "$2"; echo > "$2/$crate-0.1.0.whl"; echo "maturin $crate" >> calls ;;
    *importlib.metadata*) echo 2.15.0 ;;
    *sched_getaffinity*) echo 2 ;;
    *"-m ruff"*) [ ! -f fail_ruff ] ;;
    *"-m pytest"*) echo "== 3 passed in 1.00s =="; echo "pytest $OMP_NUM_THREADS $*" >> calls; [ ! -f fail_pytest ] ;;
    *version_info*) echo 3.12.1 ;;
esac
"""
UV = """#!/bin/sh
case "$*" in
    --version) echo "uv ${UV_FAKE:-9.9.9} (fake)"; exit ;;
    "cache dir") pwd; exit ;;
    "python find"*) exit 1 ;;
esac
echo "uv $*" >> calls
[ ! -f fail_uv ] || { cat fail_uv >&2; exit 1; }
case "$*" in
    venv*) rm -rf .venv; mkdir -p .venv/bin; cp venv_python .venv/bin/python
        echo "VIRTUAL_ENV=$PWD/.venv" > .venv/bin/activate ;;
    *"pip sync"*) sleep ${UV_SLEEP:-0}; rm -f .venv/rustbpe .venv/cpukernels; touch .venv/torch ;;
    *--torch-backend*) touch .venv/torch ;;
    *whl*) for wheel in "$@"; do
        case $wheel in *-0.1.0.whl) wheel=${wheel##*/}; touch ".venv/${wheel%-0.1.0.whl}" ;; esac; done ;;
esac
"""


class Project:
    """A copy of the project's skeleton, and a PATH of stand-ins for a machine that has everything."""

    def __init__(self, folder: Path):
        self.root = folder / "project"
        self.bin = folder / "bin"
        self.home = folder / "home"
        for path in (self.root / "dev", self.root / "rustbpe/src", self.root / "cpukernels/src", self.bin, self.home):
            path.mkdir(parents=True)
        for name in ("dev/setup.sh", "test.sh"):
            shutil.copy(ROOT / name, self.root / name)
        self.write("requirements.lock",
                   "numpy==2 \\\n    --hash=sha256:aa\ntorch==2.15 ; python_full_version >= '3.11' \\\n"
                   "    --hash=sha256:bb\nnvidia-nccl-cu13==2 \\\n    --hash=sha256:cc\n")
        for crate in CRATES:
            self.write(f"{crate}/Cargo.toml", f'[package]\nname = "{crate}"\nrust-version = "1.74"\n')
            self.write(f"{crate}/src/lib.rs", "// 1\n")
        self.write("venv_python", VENV_PYTHON).chmod(0o755)
        for name in REAL:
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)
        self.fake("uname", "echo Linux")
        self.fake("cc", "exit 0")
        self.fake("rustc", "echo 'rustc 1.95.0 (fake)'")
        self.fake("cargo", 'echo "cargo $*" >> ../calls; [ ! -f ../fail_cargo ]')
        self.fake("python3", "echo 3.12.1")
        self.disk(100)
        (self.bin / "uv").write_text(UV)
        (self.bin / "uv").chmod(0o755)

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text)
        return path

    def fake(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def disk(self, gigabytes: int) -> None:
        self.fake("df", f"echo head; echo 'disk 1 1 {gigabytes * 1000000} 1% /'")

    def gpu(self, driver: str, capability: str = "9.0") -> None:
        self.fake("gcc", "exit 0")
        self.fake("nvidia-smi", f'case "$*" in *driver*) echo "{driver}" ;; *) echo "{capability}" ;; esac')

    def start(self, script: str = "dev/setup.sh", *arguments: str, **environment: str) -> subprocess.Popen:
        env = {"PATH": str(self.bin), "HOME": str(self.home), **environment}
        return subprocess.Popen([self.bin / "bash", self.root / script, *arguments], env=env, cwd=self.home, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self) -> list[str]:
        """What was asked of uv, maturin, cargo and pytest since the last look."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def succeeds(self, **environment: str) -> str:
        code, output = self.run(**environment)
        assert code == 0, output
        return output

    def refuses(self, *words: str, **environment: str) -> str:
        """Ends with one clear line of set-up that has all the words in it."""
        code, output = self.run(**environment)
        last = output.splitlines()[-1]
        assert code == 1 and last.startswith("set-up: "), output
        for word in words:
            assert word in last, f"{word!r} is not in {last!r}"
        return output


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def test_first_run_installs_and_the_second_does_nothing(project):
    assert "torch 2.15.0" in project.succeeds()
    first = project.calls()
    assert any(c.startswith("uv venv") for c in first) and {"maturin rustbpe", "maturin cpukernels"} <= set(first)
    sync = next(c for c in first if "pip sync" in c)
    assert "--require-hashes" in sync and "--no-build" in sync and sync.endswith("requirements.lock")
    assert any("--no-deps --no-index" in c and c.endswith(".whl") for c in first)
    assert project.succeeds() == "set-up: ready (.venv)\n"
    assert project.calls() == []


def test_interrupted_installation_is_finished_by_the_next_run(project):
    project.write("fail_uv", "killed\n")
    project.refuses("failed")
    (project.root / "fail_uv").unlink()
    project.write("fail_build", "error: expected `;`\n")
    project.refuses("building rustbpe failed")
    assert any("pip sync" in c for c in project.calls())
    (project.root / "fail_build").unlink()
    project.succeeds()
    calls = project.calls()
    assert "maturin rustbpe" in calls and not any("pip sync" in c for c in calls)  # the packages were done


def test_half_done_update_is_not_taken_for_the_state_before_it(project):
    project.succeeds()
    before = (project.root / "requirements.lock").read_text()
    project.write("requirements.lock", "numpy==3 \\\n    --hash=sha256:dd\n")
    project.write("fail_uv", "killed\n")
    project.refuses("failed")
    (project.root / "fail_uv").unlink()
    project.write("requirements.lock", before)
    project.calls()
    project.succeeds()
    assert any("pip sync" in c for c in project.calls())


@pytest.mark.parametrize("crate", CRATES)
def test_changed_crate_rebuilds_the_crates_alone(project, crate):
    project.succeeds()
    project.calls()
    project.write(f"{crate}/src/lib.rs", "// 2\n")
    project.succeeds()
    calls = project.calls()
    assert f"maturin {crate}" in calls and not any("pip sync" in c for c in calls)


def test_changed_lock_installs_again_and_keeps_the_crates(project):
    project.succeeds()
    project.calls()
    project.write("requirements.lock", "numpy==3 \\\n    --hash=sha256:dd\n")
    project.succeeds()
    calls = project.calls()
    assert any("pip sync" in c for c in calls) and not any("uv venv" in c for c in calls)
    assert all((project.root / ".venv" / crate).exists() for crate in CRATES)


def test_package_that_vanished_is_installed_again(project):
    project.succeeds()
    for crate in CRATES:
        (project.root / ".venv" / crate).unlink()
        project.succeeds()
        assert (project.root / ".venv" / crate).exists()
    (project.root / ".venv/torch").unlink()
    project.succeeds()
    assert (project.root / ".venv/torch").exists()


def test_moved_folder_gets_a_new_venv(project):
    project.succeeds()
    project.calls()
    project.root = project.root.rename(project.root.with_name("else where"))
    project.succeeds()
    assert any("uv venv" in c for c in project.calls())


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock here")
def test_two_set_ups_at_once_do_the_work_once(project):
    started = [project.start(UV_SLEEP="1") for _ in range(2)]
    outputs = [p.communicate(timeout=60)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], outputs
    assert sum("pip sync" in c for c in project.calls()) == 1
    assert any("waiting" in o for o in outputs)


def test_missing_compiler_is_said_before_anything_is_fetched(project):
    project.fake("cc", "echo 'cannot find crt1.o' >&2; exit 1")
    project.refuses("C compiler", "build-essential", "xcode-select")
    assert project.calls() == []


def test_gcc_alone_is_made_the_linker(project):
    (project.bin / "cc").unlink()
    project.fake("gcc", "exit 0")
    project.succeeds()
    assert "linker=gcc" in (project.root / ".venv/.nanochat-rust").read_text()


@pytest.mark.parametrize("version", ["3.9.18", "3.15.0", "2.7.18"])
def test_unfit_python_is_named(project, version):
    project.fake("python3", f"echo {version}")
    project.refuses("no Python 3.10 to 3.14", f"python3={version}", "NANOCHAT_PYTHON")
    assert project.calls() == []


def test_newest_fitting_python_is_taken(project):
    project.fake("python3.13", "exit 127")  # a shim with nothing behind it
    project.fake("python3.12", "echo 3.12.9")
    project.succeeds()
    assert any(c.startswith("uv venv") and "/python3.12 " in c for c in project.calls())


def test_named_python_replaces_another_one(project):
    project.succeeds()
    project.calls()
    project.fake("mine", "echo 3.11.4")
    project.succeeds(NANOCHAT_PYTHON=str(project.bin / "mine"))
    assert any("uv venv" in c and "/mine " in c for c in project.calls())
    project.fake("mine", "echo 3.8.1")
    project.refuses("3.8.1", "3.10 to 3.14", NANOCHAT_PYTHON=str(project.bin / "mine"))


@pytest.mark.parametrize("words, message", [
    ("error: Failed to fetch: `x`\n  cause: dns error", "no network"),
    ("Hash mismatch for `torch==2.15`", "its hash"),
    ("failed to write: No space left on device (os error 28)", "disk became full"),
    ("torch has no wheels with a matching platform tag", "glibc 2.28"),
    ("something unheard of", "failed; the reason is above"),
])
def test_failed_installation_gets_its_reason(project, words, message):
    project.write("fail_uv", words + "\n")
    project.refuses(message)


def test_no_network_for_the_crate(project):
    project.write("fail_build", "Could not resolve host: example\n")
    project.refuses("no network", "building rustbpe")


def test_no_network_for_uv(project):
    (project.bin / "uv").unlink()
    project.refuses("no network", "uv")


def test_old_uv_is_not_used(project):
    project.refuses("no network", "uv", UV_FAKE="0.1.24")
    assert project.calls() == []


def test_old_rust_without_network_is_said(project):
    project.fake("rustc", "echo 'rustc 1.63.0'")
    project.refuses("no Rust 1.74 or newer", "rustup")
    assert not any("pip sync" in c for c in project.calls())


def test_rustup_with_an_old_default_uses_its_stable(project):
    project.fake("rustc", '[ "$RUSTUP_TOOLCHAIN" = stable ] && echo "rustc 1.95.0" || echo "rustc 1.60.0"')
    project.fake("rustup", "exit 0")
    project.succeeds()
    assert "RUSTUP_TOOLCHAIN=stable" in (project.root / ".venv/.nanochat-rust").read_text()


@pytest.mark.parametrize("crate", CRATES)
def test_missing_crate_is_said(project, crate):
    shutil.rmtree(project.root / crate)
    project.refuses(f"{crate}/Cargo.toml is missing")


def test_crates_ask_for_one_rust():
    """dev/setup.sh looks at the first one's."""
    manifests = [tomllib.loads((ROOT / crate / "Cargo.toml").read_text()) for crate in CRATES]
    assert len({manifest["package"]["rust-version"] for manifest in manifests}) == 1


def test_small_disk_is_said_before_anything_is_fetched(project):
    project.disk(5)
    project.refuses("too little disk", "5 GB", "7 GB", "NANOCHAT_TORCH=cpu")
    assert not any("pip sync" in c for c in project.calls())
    project.succeeds(NANOCHAT_SKIP_CHECKS="1")
    project.write("requirements.lock", "numpy==3 \\\n    --hash=sha256:dd\n")
    project.succeeds()  # torch is there: an update takes less
    project.disk(1)
    project.write("requirements.lock", "numpy==4 \\\n    --hash=sha256:ee\n")
    project.refuses("too little disk", "2 GB")


@pytest.mark.parametrize("driver, capability, build", [
    ("550.54.15", "9.0", "cu126"), ("525.60.13", "8.0", "cu126"), ("580.65.06", "7.0", "cu126"),
    ("535.1", "5.0", "cu126"),
    ("580.65.06", "9.0\n6.1\n9.0", "cu126"), ("575.57.08", "12.0", "cu128"), ("570.86.10", "10.0\n9.0", "cu128"),
])
def test_a_driver_or_gpu_too_old_for_the_pinned_torch_gets_the_newest_build_that_fits(project, driver, capability,
                                                                                     build):
    project.gpu(driver, capability)
    output = project.succeeds()
    assert f"the newest build that fits, {build}" in output and "NANOCHAT_TORCH" in output
    assert any(f"--torch-backend {build} torch>=" in call for call in project.calls())
    assert project.succeeds() == "set-up: ready (.venv)\n" and project.calls() == []


@pytest.mark.parametrize("driver, capability", [("580.65.06", "7.5"), ("580.65.06", "12.0\n9.0"), ("610.1", "9.0"),
                                                ("580.65.06", "[N/A]")])
def test_a_new_driver_gets_the_pinned_torch(project, driver, capability):
    project.gpu(driver, capability)
    assert "newest build" not in project.succeeds()
    assert not any("--torch-backend" in call for call in project.calls())


def test_after_an_upgrade_of_the_driver_the_pinned_torch_comes_by_itself(project):
    project.gpu("550.54.15")
    project.succeeds()
    project.calls()
    project.gpu("580.65.06")
    project.succeeds()
    calls = project.calls()
    assert any("pip sync" in call for call in calls) and not any("--torch-backend" in call for call in calls)
    project.gpu("550.54.15")
    assert project.succeeds() == "set-up: ready (.venv)\n"  # it is installed; nothing asks the driver any more


def test_where_no_build_fits_the_ways_out_are_said_before_anything_is_fetched(project):
    for driver, capability, words in [("470.1", "8.0", ["470.1", "525", "NANOCHAT_TORCH=cpu"]),
                                      ("550.54.15", "3.5", ["3.5", "NANOCHAT_TORCH=cpu"]),
                                      ("580.65.06", "7.0\n12.0", ["from 7.0 to 12.0", "NANOCHAT_TORCH=cu126"])]:
        project.gpu(driver, capability)
        project.refuses(*words)
    assert project.calls() == []


def test_a_choice_of_the_user_wins_over_the_drivers(project):
    project.gpu("550.54.15")
    assert "newest build" not in project.succeeds(NANOCHAT_TORCH="cpu")
    assert any("--torch-backend cpu" in call for call in project.calls())
    project.refuses("driver is 550.54.15", "580", "Without NANOCHAT_TORCH", NANOCHAT_TORCH="pinned")
    project.succeeds(NANOCHAT_TORCH="pinned", NANOCHAT_SKIP_CHECKS="1")
    assert not any("--torch-backend" in call for call in project.calls())


# ---- what Triton needs on a GPU

BARE = 'case "$*" in *Python.h*) exit 1 ;; *) echo 3.11.4 ;; esac'  # a Python without its header


def test_without_a_gpu_no_header_is_needed(project):
    project.fake("python3", BARE)
    project.succeeds()


def test_a_python_with_its_header_is_preferred_on_a_gpu(project):
    project.gpu("580.65.06")
    project.fake("python3.13", BARE)
    project.succeeds()
    assert any("/python3 " in call for call in project.calls() if call.startswith("uv venv"))


def test_a_missing_header_makes_uv_fetch_a_python(project):
    project.gpu("580.65.06")
    project.fake("python3", BARE)
    project.fake("managed", "echo 3.12.9")
    fetched = '    "python find --managed-python"*) [ -f fetched ] && echo "$(dirname "$0")/managed"; exit ;;\n'
    project.fake("uv", UV.replace('    "python find"*', fetched + '    "python find"*')
                 .replace('case "$*" in\n    venv*', 'case "$*" in "python install"*) touch fetched ;;\n    venv*'))
    assert "fetching one" in project.succeeds()
    assert any("/managed " in call for call in project.calls() if call.startswith("uv venv"))


def test_a_header_that_cannot_be_had_is_an_error_before_anything_long(project):
    project.gpu("580.65.06")
    project.fake("python3", BARE)
    project.refuses("Python.h", "apt-get install python3.11-dev", "NANOCHAT_PYTHON=")
    assert not any("pip sync" in call or "venv" in call for call in project.calls())
    project.fake("mine", BARE)
    project.refuses("mine has no Python.h", "python3.11-dev", "unset NANOCHAT_PYTHON",
                    NANOCHAT_PYTHON=str(project.bin / "mine"))
    project.succeeds(NANOCHAT_SKIP_CHECKS="1")


def test_a_venv_without_the_header_is_made_anew_on_a_gpu(project):
    project.write("venv_python", VENV_PYTHON.replace('case "$*" in', 'case "$*" in *Python.h*) [ -f good ] ;;', 1))
    project.succeeds()
    assert project.succeeds() == "set-up: ready (.venv)\n"
    project.calls()
    project.gpu("580.65.06")
    project.succeeds()
    assert any(call.startswith("uv venv") for call in project.calls())


def test_triton_needs_a_compiler_of_its_own_names(project):
    project.gpu("580.65.06")
    (project.bin / "gcc").unlink()
    project.refuses("Triton", "apt-get install gcc", "CC=cc")
    assert project.calls() == []
    project.succeeds(CC="cc")


def test_driver_without_a_gpu_is_no_hindrance(project):
    project.gpu("NVIDIA-SMI has failed because it could not communicate with the driver")
    assert "continuing without a GPU" in project.succeeds()


def test_other_torch_is_installed_and_remembered(project):
    project.gpu("550.54.15")
    project.succeeds(NANOCHAT_TORCH="cu126")
    calls = project.calls()
    assert any("--torch-backend cu126 torch>=" in c for c in calls)
    kept = (project.root / ".cache/setup/requirements-without-torch.lock").read_text()
    assert kept == "numpy==2 \\\n    --hash=sha256:aa\n"
    assert project.succeeds() == "set-up: ready (.venv)\n"  # no variable: what was chosen stays
    project.write("requirements.lock", "numpy==3 \\\n    --hash=sha256:dd\n")
    project.succeeds()
    assert any("--torch-backend cu126" in c for c in project.calls())
    project.gpu("580.65.06")
    project.succeeds(NANOCHAT_TORCH="pinned")
    assert not any("--torch-backend" in c for c in project.calls())


def test_test_sh_passes_arguments_on_and_ends_with_pytests_last_line(project):
    code, output = project.run("test.sh", "-k", "two words")
    assert code == 0 and output.splitlines()[-1] == "== 3 passed in 1.00s =="
    calls = project.calls()
    assert any(c.startswith("pytest 1 ") and "-n 2" in c and c.endswith("-k two words") for c in calls)  # two cores
    assert sum(c.startswith("cargo test") for c in calls) == len(CRATES)


@pytest.mark.parametrize("stage", ["ruff", "cargo", "pytest"])
def test_test_sh_fails_where_one_stage_fails_and_runs_the_others(project, stage):
    project.write(f"fail_{stage}", "")
    code, output = project.run("test.sh")
    assert code == 1 and f"test.sh: failed: {stage}" in output
    assert output.splitlines()[-1] == "== 3 passed in 1.00s =="


def test_ci_runs_test_sh(project):
    (project.root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", project.root / ".ci/run")
    assert os.access(ROOT / ".ci/run", os.X_OK)
    code, output = project.run(".ci/run")
    assert code == 0 and output.splitlines()[-1] == "== 3 passed in 1.00s =="


# ---- the lock, and what the repository may not hold


def test_lock_pins_every_package_by_hash_and_names_no_address():
    blocks = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().rstrip())
    for block in blocks:
        assert re.match(r"[a-z0-9-]+==[^ ]+( ; .+?)? \\\n", block), block.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]
    assert "://" not in "".join(blocks)


def test_lock_holds_what_pyproject_asks_for_and_none_of_our_crates():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    names = {re.match(r"[A-Za-z0-9_-]+", w).group().lower().replace("_", "-") for w in wanted}
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.M))
    assert names <= locked, f"make requirements.lock again: {names - locked} is not in it"
    assert not set(CRATES) & (locked | names)


def tracked(*arguments: str) -> list[str]:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if result.returncode > 1 or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


def test_no_committed_file_names_a_package_registry():
    # in pieces, or this file would be the first to name them
    hosts = ["py" + "pi.org", "python" + "hosted.org", "crates" + ".io/api", "static." + "crates.io",
             "index." + "crates.io",
             "registry." + "npmjs", "deb." + "debian.org"]
    patterns = [part for host in hosts for part in ("-e", host)]
    assert tracked("grep", "--cached", "-nIF", *patterns) == []


def test_uv_lock_is_not_tracked():
    assert tracked("ls-files", "uv.lock") == []
    assert "uv.lock" in (ROOT / ".gitignore").read_text().split()
