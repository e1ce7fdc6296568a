"""Checkpoints: written whole or not at all, verified when read, and readable whatever the number of ranks.

A checkpoint of step 500 is three files in one folder, named as the published ones are:

    model_000500.pt     the weights by name, float32
    optim_000500.pt     the optimizer's whole state, whatever the number of ranks that held it (where there is one)
    meta_000500.json    step, val_bpb, model_config, user_config, ...; and "files": name → size and sha256 of the two above

A checkpoint is valid if its meta is there and the files are those the meta says. Published ones have no "files": they are
taken if the model file is there and loads.

How a save survives a kill at any moment. Each file is written aside, synced and renamed (`atomic_write`), at first to its name
with `.new` behind it, the meta last: from the moment `meta_000500.json.new` stands, the checkpoint is committed, and readers look
at `X.new` before `X`. Then the names are changed one by one, the meta last again; a later save ends what a kill cut short. So a
checkpoint that is saved again is at every moment the old one or the new one. Deleting goes the other way: the meta is
renamed to `.gone`, then the files go, then the meta. One process writes to a folder at a time; any number read, and change nothing.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, free_name, need_disk, sweep, sync_folder, to_json
from nanochat.stages import STAGES, stage_of_folder

META = re.compile(r"meta_(\d{6}|[1-9]\d{6,})\.json(\.new)?")  # as %06d writes it

R = TypeVar("R")
log = logging.getLogger(__name__)


class Corrupt(UserError):
    """This checkpoint cannot be used; an older one may do."""


@dataclass
class Checkpoint:
    """One checkpoint in memory. `optimizer_state` is None if it was not asked for, or for the reason that `no_optimizer` says."""

    step: int
    model_state: dict[str, Tensor]
    meta: dict[str, Any]
    optimizer_state: dict | None = None
    no_optimizer: str = ""
    folder: Path = Path()


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def save_checkpoint(folder: str | Path, step: int, model_state: dict[str, Tensor], meta: dict[str, Any],
                    optimizer_state: dict | None = None, keep: int | None = None) -> None:
    """Write the checkpoint of `step` into `folder`. Rank 0 calls it.

    meta: JSON-able; holds "model_config" (a dict or the dataclass) and what else is to be known. `step` and "files" are added.
    keep: this is a periodical save; of the periodical ones up to this step only the newest `keep` stay. Saves without `keep`
    are never deleted, nor is anything that was not written here. A published checkpoint of the same step is set aside as `X.kept`.
    Raises UserError where the disk is full; what stood in the folder before is then untouched.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step must be at least 0 and keep at least 1, not {step} and {keep}")
    folder = Path(folder)
    weights = {name.removeprefix("_orig_mod."): _master(tensor) for name, tensor in model_state.items()}
    contents = {f"model_{step:06d}.pt": weights}
    if optimizer_state is not None:
        contents[f"optim_{step:06d}.pt"] = optimizer_state
    config = meta["model_config"]
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    config = {name: value for name, value in config.items() if value is not None}  # published code does not know such fields
    meta = {**meta, "step": step, "model_config": config, "files": {}, "periodical": keep is not None}

    if folder.is_dir():
        sweep(folder)
        _finish(folder)
    need_disk(folder, sum(_bytes_in(part) for part in contents.values()), f"the checkpoint of step {step}")
    try:
        for name, part in contents.items():
            meta["files"][name] = _write_tensors(folder / f"{name}.new", part)
        with atomic_write(folder / f"meta_{step:06d}.json.new", "w") as file:
            file.write(to_json(meta, indent=2))
    finally:
        _finish(folder)  # after an error: removes what was written so far
    if keep is not None:
        _delete_older(folder, step, keep)


def _write_tensors(path: Path, part: dict) -> dict[str, Any]:
    """Write one file of tensors; return its size in bytes and sha256."""
    with atomic_write(path) as file:
        hashed = _Hashed(file)
        try:
            torch.save(part, hashed)
        except RuntimeError:
            if hashed.error is not None:  # PyTorch hides a full disk behind an error of its own
                raise hashed.error from None
            raise
    return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


class _Hashed:
    """A file to write to that takes the SHA-256 of what passes."""

    def __init__(self, file: IO):
        self.file, self.size, self.digest, self.error = file, 0, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += len(data)
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _master(tensor: Tensor) -> Tensor:
    """A weight as it is filed: on the CPU, float32, alone in its storage (torch.save writes a view's whole storage)."""
    tensor = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _bytes_in(part: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(part, Tensor):
        return part.nbytes
    if isinstance(part, dict):
        return sum(map(_bytes_in, part.values()))
    return sum(map(_bytes_in, part)) if isinstance(part, list | tuple) else 0


def _finish(folder: Path) -> None:
    """End what a save or a deletion began: give committed files their names, remove those of deleted and of given up ones."""
    for gone in sorted(folder.glob("meta_*.json.gone")):
        for name in _files(gone):
            (folder / name).unlink(missing_ok=True)
        gone.unlink()
    for new in sorted(folder.glob("meta_*.json.new")):
        path = new.with_suffix("")
        files, old = _files(new), _files(path)
        if not files:
            _set_aside(new)
            continue
        for name in files:
            if (folder / f"{name}.new").exists():  # else it has its name already
                if name not in old:
                    _set_aside(folder / name)
                os.replace(folder / f"{name}.new", folder / name)
        if not old:
            _set_aside(path)
        for name in old - files:  # the old one's optimizer state
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        os.replace(new, path)
    for new in [*folder.glob("model_*.pt.new"), *folder.glob("optim_*.pt.new")]:  # never committed
        new.unlink()
    sync_folder(folder)


def _files(meta_path: Path) -> set[str]:
    """The names of the files that a meta file of ours lists; none if it is not there or not ours."""
    try:
        return set(_parse(meta_path).get("files", ()))
    except (FileNotFoundError, Corrupt):
        return set()


def _set_aside(path: Path) -> None:
    """Keep a file that is not ours, such as a published checkpoint's, under another name."""
    if path.exists():
        kept = free_name(path.with_name(f"{path.name}.kept"))
        os.replace(path, kept)
        log.warning("%s is in the way and was not written here; it is kept as %s", path, kept.name)


def _delete_older(folder: Path, step: int, keep: int) -> None:
    """Delete the periodical checkpoints of ours beyond the newest `keep` of those up to `step`."""
    ours = []
    for older in _steps(folder):
        if older <= step:
            with suppress(Corrupt):
                meta = _read_meta(folder, older)
                if meta.get("periodical") and "files" in meta:
                    _check_sizes(folder, meta)
                    ours.append(older)
    for older in ours[keep:]:
        path = folder / f"meta_{older:06d}.json"
        os.replace(path, path.with_suffix(".json.gone"))
    _finish(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Reading: a reader never changes anything

def latest_step(folder: str | Path) -> int | None:
    """Return the step of the newest valid checkpoint in `folder`, None if there is none.

    Here valid means that all files are there with their sizes; `load_checkpoint` checks every byte. One that is not is
    skipped with a warning.
    """
    try:
        return _steady(Path(folder), lambda: next(_valid(Path(folder), optimizer=True)))[0]
    except Corrupt:
        return None


def load_checkpoint(folder: str | Path, step: int | None = None, *, device: str | torch.device = "cpu",
                    optimizer: bool = False) -> Checkpoint:
    """Read and verify a checkpoint: that of `step`, or the newest valid one. Weights come in float32 on `device`.

    optimizer: read the optimizer's state too, to the CPU. A published checkpoint has none that we can use: it is then None.
    Without a step, a corrupt newest one is skipped with a warning. Raises UserError if nothing is left, or if that of `step` is
    missing or corrupt.
    """
    folder = Path(folder)

    def given() -> Checkpoint:
        return _load(folder, step, _read_meta(folder, step), device, optimizer)

    def newest() -> Checkpoint:
        for step, meta in _valid(folder, optimizer):
            try:
                return _load(folder, step, meta, device, optimizer)
            except Corrupt as error:
                log.warning("skipping the checkpoint of step %d: %s", step, error)
        raise Corrupt(_nothing_in(folder))

    if step is None:
        return _steady(folder, newest)
    if step not in _steps(folder):
        there = ", ".join(map(str, sorted(_steps(folder))))
        raise UserError(f"no checkpoint of step {step} in {folder}: "
                        + (f"there are those of {there}." if there else "there is none of any step."))
    return _steady(folder, given)


def _steady(folder: Path, read: Callable[[], R]) -> R:
    """Return read(). Where it finds nothing, but a checkpoint was saved or deleted meanwhile, it is called again."""
    def seen() -> set:
        return {(entry.name, entry.inode()) for entry in os.scandir(folder)} if folder.is_dir() else set()

    for _ in range(20):
        before = seen()
        try:
            return read()
        except (Corrupt, StopIteration) as error:
            if seen() == before:
                raise Corrupt(str(error)) from error
    raise Corrupt(f"{folder} changes faster than it can be read.")


def _load(folder: Path, step: int, meta: dict, device: str | torch.device, optimizer: bool) -> Checkpoint:
    model_name, optim_name = f"model_{step:06d}.pt", f"optim_{step:06d}.pt"
    loaded = Checkpoint(step, {}, meta, folder=folder)
    state = _read_tensors(folder, model_name, meta, device)
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise Corrupt(f"{folder / model_name} does not hold weights by name.")
    for name, tensor in state.items():
        loaded.model_state[name.removeprefix("_orig_mod.")] = tensor.float() if tensor.is_floating_point() else tensor
    if optimizer and "files" not in meta:
        loaded.no_optimizer = "the checkpoint is a published one, whose optimizer state is a single rank's part in another layout"
    elif optimizer and optim_name not in meta["files"]:
        loaded.no_optimizer = "the checkpoint was saved without"
    elif optimizer:
        loaded.optimizer_state = _read_tensors(folder, optim_name, meta, "cpu")
    return loaded


def _read_tensors(folder: Path, name: str, meta: dict, device: str | torch.device) -> dict:
    """Read one file of tensors, after checking it against the meta. Nothing but tensors and plain values is ever unpickled."""
    path = folder / name
    try:
        with _open(folder, name, meta) as file:
            if "files" in meta:
                digest = hashlib.sha256()
                while piece := file.read(1 << 22):
                    digest.update(piece)
                if digest.hexdigest() != meta["files"][name]["sha256"]:
                    raise Corrupt(f"{path} is damaged: its sha256 is not the one written in its meta file.")
                file.seek(0)
            part = torch.load(file, map_location=device, weights_only=True)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # on damaged or hostile files PyTorch raises a dozen kinds
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Corrupt(f"{path} cannot be read, it is damaged or no file of weights: {why}") from error
    if not isinstance(part, dict):
        raise Corrupt(f"{path} holds a {type(part).__name__}, where weights by name were expected.")
    return part


def _open(folder: Path, name: str, meta: dict) -> IO:
    """Open a file of a checkpoint; where its save has not ended yet, it may still be called `name`.new. Checks the size."""
    size = meta["files"][name]["size"] if "files" in meta else None
    ending = (folder / f"meta_{meta['step']:06d}.json.new").exists()
    for path in (folder / f"{name}.new", folder / name) if ending else (folder / name,):
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Corrupt(f"{path} cannot be read: {error.strerror}.") from error
        found = os.fstat(file.fileno()).st_size
        if found == size or (size is None and found):
            return file
        file.close()
    problem = f"is not {size} bytes long, as its meta file says" if size is not None else "is empty"
    raise Corrupt(f"{folder / name} {problem if (folder / name).exists() else 'is missing'}.")


def _valid(folder: Path, optimizer: bool) -> Iterator[tuple[int, dict]]:
    """Yield (step, meta) of the checkpoints in `folder` whose files are there in full length, newest first; warn of others.

    optimizer False: the model file is enough. People carry a model elsewhere without the optimizer's state.
    """
    for step in _steps(folder):
        try:
            meta = _read_meta(folder, step)
            _check_sizes(folder, meta, optimizer)
        except Corrupt as error:
            log.warning("skipping the checkpoint of step %d: %s", step, error)
        else:
            yield step, meta


def _check_sizes(folder: Path, meta: dict, optimizer: bool = True) -> None:
    """Raise Corrupt if a file of the checkpoint is missing or has another size."""
    for name in meta.get("files") or [f"model_{meta['step']:06d}.pt"]:
        if optimizer or name.startswith("model_"):
            _open(folder, name, meta).close()


def _steps(folder: Path) -> list[int]:
    """The steps that have a meta file, newest first."""
    names = (META.fullmatch(path.name) for path in folder.glob("meta_*"))
    return sorted({int(match[1]) for match in names if match}, reverse=True)


def _read_meta(folder: Path, step: int) -> dict[str, Any]:
    """The meta of a step: the one being committed where there is one. Raises Corrupt."""
    path = folder / f"meta_{step:06d}.json"
    for candidate in (path.with_suffix(".json.new"), path):
        with suppress(FileNotFoundError):
            return _parse(candidate)
    raise Corrupt(f"{path} is missing.")


def _parse(path: Path) -> dict[str, Any]:
    """Read and check a meta file. Raises FileNotFoundError, or Corrupt if it is not one."""
    step = path.name.split(".")[0].removeprefix("meta_")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        config, files = meta["model_config"], meta.get("files", {f"model_{step}.pt": {"size": 0, "sha256": ""}})
        sound = isinstance(config, dict) and f"model_{step}.pt" in files and all(
            name in (f"model_{step}.pt", f"optim_{step}.pt")  # nothing else is opened or deleted, whatever a meta file names
            and isinstance(said["size"], int) and isinstance(said["sha256"], str) for name, said in files.items())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise Corrupt(f"{path} is not the meta file of a checkpoint: no JSON object with model_config, and files that are its own.")
    return {**meta, "step": int(step)}


def _nothing_in(folder: Path) -> str:
    stage = stage_of_folder(folder.parts) or STAGES["base"]
    problem = "" if folder.is_dir() else ", there is no such folder"
    return (f"no usable checkpoint in {folder}{problem}: looked for meta_NNNNNN.json with its model_NNNNNN.pt. "
            f"Train one with `python -m {stage.script}` (or `bash speedrun.sh`), or set NANOCHAT_BASE_DIR to where yours are.")


# ---------------------------------------------------------------------------------------------------------------------
# From a name to a model

def checkpoint_dir(source: str, model_tag: str | None = None) -> Path:
    """Return the folder of a stage's checkpoints: base_dir()/{base,mid,chatsft,chatrl}_checkpoints/<tag>.

    Without a tag, of those that hold a checkpoint: the only one, else the deepest dNN, else the one last written. Raises UserError.
    """
    return _choose(source, model_tag)[0]


def _choose(source: str | Path, model_tag: str | None) -> tuple[Path, str]:
    """The folder of `source` (a stage, or a path) and `model_tag`, and why it is this one."""
    root = base_dir() / STAGES[source].folder if source in STAGES else Path(source).expanduser()
    if source not in STAGES and not root.is_dir():
        raise UserError(f"no folder {root}: a source is one of {', '.join(STAGES)}, or a folder with a checkpoint.")
    if model_tag:
        if Path(model_tag).name != model_tag:
            raise UserError(f"{model_tag!r} is not a model tag: it names one folder under {root}, such as d20.")
        return root / model_tag, "as asked"
    if source not in STAGES and _steps(root):
        return root, "as asked"
    tags = [path for path in sorted(root.glob("*")) if path.is_dir() and _steps(path)]
    if not tags:
        raise UserError(_nothing_in(root / "<tag>" if root.is_dir() else root))
    if len(tags) == 1:
        return tags[0], "the only one there"
    depths = {int(path.name[1:]): path for path in tags if re.fullmatch(r"d\d+", path.name)}
    if depths:
        return depths[max(depths)], f"the deepest of {len(tags)} there"
    newest = max(tags, key=lambda path: max(meta.stat().st_mtime for meta in path.glob("meta_*")))
    return newest, f"the last written of {len(tags)} there"


def load_model(source: str | Path, device: str | torch.device, *, model_tag: str | None = None,
               step: int | None = None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return (model in eval mode on `device`, float32; tokenizer; meta) of a checkpoint.

    source: "base", "mid", "sft", "rl", or a folder. The tokenizer is the one in the checkpoint's folder, else that of base_dir().
    meta has two entries more: "folder", and "loaded", a line that says what was taken and why.
    Raises UserError if there is none, or it does not fit the model's shape or the tokenizer.
    """
    from nanochat.tokenizer import tokenizer as tokenizers

    folder, why = _choose(source, model_tag)
    checkpoint = load_checkpoint(folder, step, device=device)
    meta = {**checkpoint.meta, "folder": str(folder), "loaded": f"step {checkpoint.step} of {folder} ({why})"}
    model = model_from_state(meta["model_config"], checkpoint.model_state, what=str(folder))

    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.pkl"))
    tokenizer = tokenizers.RustBPETokenizer.from_directory(str(folder)) if own else tokenizers.get_tokenizer()
    where = folder if own else base_dir() / "tokenizer"
    if meta.get("tokenizer") and meta["tokenizer"] != tokenizer.fingerprint():
        raise UserError(f"the tokenizer in {where} is not the one that the model in {folder} was trained with: its ids mean other text. "
                        "Put the model's own tokenizer there, or train the model anew.")
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise UserError(f"the model in {folder} has a vocabulary of {model.config.vocab_size}, the tokenizer in {where} one of "
                        f"{tokenizer.get_vocab_size()}: they do not belong together.")
    return model.eval(), tokenizer, meta


def model_from_state(model_config: dict[str, Any], state: dict[str, Tensor], what: str = "the checkpoint") -> nn.Module:
    """Build a GPT of `model_config` whose parameters are the tensors of `state` themselves. UserError where they do not fit."""
    from nanochat.gpt import GPT, GPTConfig

    known = {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown := sorted(set(model_config) - known):
        raise UserError(f"{what}: model_config has {', '.join(unknown)}, which this version does not know. "
                        "The checkpoint is of another model, or of a newer version.")
    try:
        with torch.device("meta"):  # no time is spent on weights that are replaced
            model = GPT(GPTConfig(**model_config))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: its model_config makes no model: {error}") from error
    fit(model, state, what)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def fit(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raise UserError, naming the differences, unless `state` has just the names and shapes of the model's parameters."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parts = []
    for problem, names in (
        ("missing", [name for name in wanted if name not in found]),
        ("not expected", [name for name in found if name not in wanted]),
        ("of another shape", [f"{name} {found[name]}, not {wanted[name]}" for name in wanted
                              if name in found and found[name] != wanted[name]]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{problem}: {'; '.join(names[:3])}{more}")
    if parts:
        raise UserError(f"{what} is a checkpoint of another shape than its model. {'. '.join(parts)}.")
