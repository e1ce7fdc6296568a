"""From a name to a model: a stage ("sft"), a folder with a checkpoint, or a repository of the Hugging Face hub.

    model, tokenizer, meta = load_model("base", "cpu")             # float32 weights, to train
    model, tokenizer, meta = load_for_decoding("sft", device)      # weights in the dtype they are used in, to decode
    folder = from_hub("owner/name", revision=None)                 # a folder that both of them take
"""

import dataclasses
import json
import os
import re
from contextlib import nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint import Checkpoint, holds_checkpoints, load_on_ranks, nothing_found
from nanochat.distributed import Ranks, compute_dtype, on_main
from nanochat.engine.quantize import quantize as quantized
from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, in_words, lock, need_disk, to_json
from nanochat.gpt import GPT, GPTConfig, meta_model
from nanochat.kernels.choose import apply_wish, wish_of_environment
from nanochat.layers import join
from nanochat.logs import print_line
from nanochat.saving import copy_to_machines
from nanochat.stages import STAGES
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.transfer import TIMEOUT, Listed, NotFetched, ask_hub, fetch_file


def checkpoint_dir(source: str | Path, model_tag: str | None = None) -> Path:
    """Return the folder of a model's checkpoints: base_dir()/{base,mid,chatsft,chatrl}_checkpoints/<tag> for a stage.

    source: "base", "mid", "sft", "rl", or a folder. Without a tag, choose among the tags that hold a checkpoint: the
    only one, else the deepest dNN, else the one written last. Raises UserError where there is none.
    """
    return _choose_folder(source, model_tag)[0]


def _choose_folder(source: str | Path, model_tag: str | None) -> tuple[Path, str]:
    """Return the folder that `source` and `model_tag` mean, and the reason for this choice in words."""
    root = base_dir() / STAGES[source].folder if source in STAGES else Path(source).expanduser()
    if source not in STAGES and not root.is_dir():
        raise UserError(f"no folder {root}: a source is one of {', '.join(STAGES)}, or a folder with a checkpoint.")
    if model_tag:
        if Path(model_tag).name != model_tag:
            raise UserError(f"{model_tag!r} is not a model tag: it names one folder under {root}, such as d20.")
        return root / model_tag, "as asked"
    if source not in STAGES and holds_checkpoints(root):
        return root, "as asked"
    tags = [path for path in sorted(root.glob("*")) if holds_checkpoints(path)]
    if not tags:
        raise UserError(nothing_found(root / "<tag>" if root.is_dir() else root))
    if len(tags) == 1:
        return tags[0], "the only one there"
    depths = {int(path.name[1:]): path for path in tags if re.fullmatch(r"d\d+", path.name)}
    if depths:
        return depths[max(depths)], f"the deepest of {len(tags)} there"
    newest = max(tags, key=lambda path: max((meta.stat().st_mtime for meta in path.glob("meta_*")), default=0))
    return newest, f"the last written of {len(tags)} there"


def on_ranks(source: str | Path, model_tag: str | None, step: int | None, ranks: Ranks) -> tuple[Path, str]:
    """Return the folder that rank 0 chooses, and the reason, on all ranks, when all machines have its checkpoint.
    Collective."""
    folder, why = on_main("looking for a model", lambda: _choose_folder(source, model_tag), ranks)
    if source in STAGES:  # in the base folder of this machine
        folder = base_dir() / STAGES[source].folder / folder.name
    copy_to_machines(folder, step, ranks)
    return folder, why


def load_model(source: str | Path, device: str | torch.device, *, model_tag: str | None = None,
               step: int | None = None, ranks: Ranks | None = None) -> tuple[GPT, Any, dict[str, Any]]:
    """Load a model with its tokenizer, in eval mode and with float32 weights. NANOCHAT_KERNELS counts from now on.

    Args:
        source: "base", "mid", "sft", "rl", or a folder.
        device: where the weights go.
        model_tag: which model of the stage; see `checkpoint_dir` for what is taken without one.
        step: which checkpoint; None takes the newest one that is whole.
        ranks: where all ranks load the same model; one rank of each machine then verifies it. Collective.

    Returns:
        The model, in eval mode; the tokenizer in the checkpoint's folder, or where there is none the one of base_dir();
        and the meta dict with two more entries: "folder", and "loaded", a line that says which checkpoint was taken and
        why.

    Raises:
        UserError: there is no such checkpoint, or it does not fit the shape in its meta or the tokenizer.
    """
    apply_wish(wish_of_environment())
    folder, why = _choose_folder(source, model_tag) if ranks is None else on_ranks(source, model_tag, step, ranks)
    checkpoint = load_on_ranks(folder, step, ranks or Ranks(0, 0, 1, torch.device(device)), device=device)
    found = model_and_tokenizer(checkpoint, why)
    if (ranks is None or ranks.is_main) and (dead := dead_layers(found[0])):
        print_line(f"note: in {folder}, {dead}")
    return found


def model_and_tokenizer(checkpoint: Checkpoint, why: str) -> tuple[GPT, Any, dict[str, Any]]:
    """Make the model of a checkpoint and find its tokenizer. why: this checkpoint was taken, in words.

    Returns and raises what `load_model` does.
    """
    folder = checkpoint.folder
    meta = {**checkpoint.meta, "folder": str(folder), "loaded": f"step {checkpoint.step} of {folder} ({why})"}
    model = model_from_state(meta["model_config"], checkpoint.model_state, what=str(folder))

    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.pkl"))
    tokenizer = RustBPETokenizer.from_directory(str(folder)) if own else get_tokenizer()
    where = folder if own else base_dir() / "tokenizer"
    if meta.get("tokenizer") and meta["tokenizer"] != tokenizer.fingerprint():
        raise UserError(f"the tokenizer in {where} is not the one that the model in {folder} was trained with: the "
                        "same ids are other text. Put the model's own tokenizer there, or train the model anew.")
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise UserError(f"the model in {folder} has a vocabulary of {model.config.vocab_size}, the tokenizer in "
                        f"{where} one of {tokenizer.get_vocab_size()}: they do not belong together.")
    return model.eval(), tokenizer, meta


def dead_layers(model: GPT) -> str:
    """Return a sentence on the layers whose mixer adds nothing, and never will (`Mixer.is_dead`); "" if there is none.

    Taps of an SLC2 layer that begin at zero stay there: they and c_proj, which begins at zero too, have a gradient of
    zero for ever. The published code does not set them.
    """
    numbers = [i for i, block in enumerate(model.transformer.h) if block.attn.is_dead()]
    if not numbers:
        return ""
    return (f"{len(numbers)} of {len(model.transformer.h)} layers add nothing, since all taps of their convolution are "
            f"zero (largest |tap| 0) and stay so in training: {', '.join(map(str, numbers))}")


def load_for_decoding(source: str | Path, device: str | torch.device, *, model_tag: str | None = None,
                      step: int | None = None, quantize: str = "none", ranks: Ranks | None = None
                      ) -> tuple[GPT, Any, dict[str, Any]]:
    """Load a model as `load_model` does, and prepare it with `ready_to_decode`; it cannot be trained any more."""
    model, tokenizer, meta = load_model(source, device, model_tag=model_tag, step=step, ranks=ranks)
    return ready_to_decode(model, quantize), tokenizer, meta


@torch.no_grad()
def ready_to_decode(model: GPT, quantize: str = "none") -> GPT:
    """Prepare a float32 model, in place, for decoding and evaluation on its device, and return it.

    The weights are cast to the dtype they are used in (`compute_dtype` of the device), or to 8 bits with quantize
    "int8"; projections of the same input become one product. The model cannot be trained afterwards. Raises UserError
    for an unknown `quantize`.
    """
    model = quantized(model, quantize).eval().requires_grad_(False)
    model.compute_dtype = compute_dtype(model.device, training=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(model.compute_dtype)
    for block in model.transformer.h:
        if projections := block.attn.projections():
            join(projections)
    return model


def model_from_state(model_config: dict[str, Any], state: dict[str, Tensor], what: str = "the checkpoint") -> GPT:
    """Build the GPT of `model_config` around the tensors of `state`, which become its parameters without a copy.

    what: name of the checkpoint for messages. Raises UserError where config or state do not fit.
    """
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown := sorted(set(model_config) - known):
        raise UserError(f"{what}: model_config has {', '.join(unknown)}, which this version does not know. "
                        "The checkpoint is of another model, or of a newer version.")
    try:
        model = meta_model(GPTConfig(**model_config))  # no time is spent on weights that are replaced
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: its model_config makes no model: {error}") from error
    check_shapes(model, state, what)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def check_shapes(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raise UserError, naming the differences, unless `state` has exactly the names and shapes of the model's
    parameters."""
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


def from_hub(name: str, revision: str | None) -> Path:
    """Fetch a repository in the published format from the Hugging Face hub, and return its local folder.

    Each file is verified against the hub's checksum, and a download that was interrupted is resumed. Files that are in
    the cache of huggingface_hub are taken from there. Where the hub cannot be reached, what is complete here is used.

    Args:
        name: "owner/name".
        revision: a branch, tag or commit; None takes the main branch.

    Raises:
        UserError: it cannot be fetched.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise UserError(f"there is no folder {name}: a model is one of {', '.join(STAGES)}, a folder with a "
                        "checkpoint, or owner/name on the hub.")
    root = base_dir() / "hub" / name.replace("/", "--")
    try:
        commit, files = _files_on_hub(name, revision)
    except NotFetched as error:
        folder = (_last_from_hub(root, revision) or _in_hub_cache(name, revision)) if error.network else None
        if folder is None:
            raise UserError(f"{name} is no folder, and cannot be fetched from the hub at {_endpoint()}: {error}. Check "
                            "the name, the network, HF_ENDPOINT and, where it is private, HF_TOKEN; or fetch it on "
                            "another machine and give its folder.") from error
        print_line(f"note: the hub cannot be reached ({error}); using {name} as it is in {folder}")
        return folder
    if not any(path.endswith(".pt") for path in files):
        raise UserError(f"{name} on the hub holds no checkpoint: there is no model_NNNNNN.pt in it")
    folder = root / commit
    missing = {path: listed for path, listed in files.items() if listed.problem(folder / path)}
    if missing:
        with lock(root / "lock", f"{name} is fetched already", "Wait until that ends.") or nullcontext():
            _fetch_files(name, commit, missing, folder)
    if _revisions(root).get(revision or "main") != commit:
        with atomic_write(root / "revisions.json", "w") as file:
            file.write(to_json(_revisions(root) | {revision or "main": commit}, indent=1))
    return folder


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _files_on_hub(name: str, revision: str | None) -> tuple[str, dict[str, Listed]]:
    """Return the commit of a repository of the hub, and the files of it that a model needs. Raises NotFetched."""
    from huggingface_hub import HfApi
    api = HfApi(endpoint=_endpoint())

    def ask() -> tuple[str, dict[str, Listed]]:
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
        if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
            raise ValueError("no commit")
        return info.sha, {
            file.rfilename: Listed(file.size, *((file.lfs.sha256,) if file.lfs else ("", file.blob_id or "")))
            for file in info.siblings if file.rfilename.endswith((".pt", ".json", ".pkl"))
            and not file.rfilename.rpartition("/")[2].startswith("optim_")}

    return ask_hub(ask, f"{name} on the hub", print_line)


def _fetch_files(name: str, commit: str, missing: dict[str, Listed], folder: Path) -> None:
    """Bring files of a repository, from the cache of huggingface_hub or from the hub."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers
    for path in missing:
        parts = PurePosixPath(path).parts
        if PurePosixPath(path).is_absolute() or ".." in parts or any(":" in part or "\\" in part for part in parts):
            raise UserError(f"{name} is not fetched: its file {path!r} would be written outside of its folder")
    for path, listed in list(missing.items()):
        cached = try_to_load_from_cache(name, path, revision=commit)
        if isinstance(cached, str) and not listed.problem(Path(cached)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a cache on another disk is not linked to, but the file fetched
                (folder / path).unlink(missing_ok=True)
                os.link(os.path.realpath(cached), folder / path)
                missing = {other: about for other, about in missing.items() if other != path}
    need_disk(folder, sum(listed.size or 0 for listed in missing.values()), f"fetching {name}")
    for path, listed in missing.items():
        print_line(f"fetching {path} of {name}" + (f" ({in_words(listed.size)})" if listed.size else ""))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch_file(hf_hub_url(name, path, revision=commit, endpoint=_endpoint()), folder / path, listed,
                       say=print_line, headers=build_hf_headers())
        except NotFetched as error:
            raise UserError(f"{path} of {name} cannot be fetched from {_endpoint()}: {error}. The same command goes on "
                            "where it stopped.") from error


def _revisions(root: Path) -> dict[str, str]:
    """Return which commit each branch or tag was when it was fetched last."""
    try:
        found = json.loads((root / "revisions.json").read_text(encoding="utf-8"))
        return {name: commit for name, commit in found.items() if isinstance(commit, str)}
    except (OSError, ValueError, AttributeError):
        return {}


def _last_from_hub(root: Path, revision: str | None) -> Path | None:
    """Return the folder of a repository that was fetched completely before; None where there is none."""
    known = _revisions(root)
    commit = known.get(revision or "main", revision if revision in known.values() else None)
    return root / commit if commit and (root / commit).is_dir() else None


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """Return the folder of a repository in the cache of huggingface_hub; None where there is none."""
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # of many classes
        return None
    return folder if any(folder.glob("*.pt")) else None
