"""Find the models that clients can ask for: the trained stages, and the model the server was started with.

It runs in a worker, because it imports PyTorch. A model's id is its stage ("sft"), its stage and tag if there are
several ("sft/d12"), the name of a folder, or "owner/name" of the hub. Clients can ask only for these ids, never for a
path.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nanochat.checkpoint import latest_step, load_checkpoint, nothing_found
from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.loading import checkpoint_dir, from_hub
from nanochat.server.messages import ModelInfo, WorkerConfig
from nanochat.stages import STAGES, Stage, stage_of_folder


def find_models(config: WorkerConfig) -> list[ModelInfo]:
    """Return all models, the one the server was started with first. Raises UserError if that one does not exist."""
    found = [_default(config)]
    for stage in STAGES.values():
        for id, folder in _of_stage(stage.name, config.model_tag):
            with suppress(UserError, OSError, ValueError, KeyError):
                info = _info(id, folder, None, stage)
                if all(other.id != id and (other.folder, other.step) != (info.folder, info.step) for other in found):
                    found.append(info)
    return found


def _default(config: WorkerConfig) -> ModelInfo:
    """Return the model that the server was started with. Raises UserError."""
    id = source = config.source
    if source not in STAGES:
        if Path(source).expanduser().is_dir():
            id = Path(source).expanduser().resolve().name
        else:
            source = str(from_hub(source, None))
    folder = checkpoint_dir(source, config.model_tag or None)
    stage = STAGES.get(source) or stage_of_folder(folder.resolve().parts)
    return _info(id, folder, None if config.step < 0 else config.step, stage, default=True)


def _of_stage(stage: str, tag: str) -> Iterator[tuple[str, Path]]:
    """Yield (id, folder) of a stage's models: first the one that commands take with this tag, then the others."""
    try:
        chosen = checkpoint_dir(stage, tag or None)
    except UserError:
        return
    yield stage, chosen
    for folder in sorted((base_dir() / STAGES[stage].folder).glob("*")):
        if folder.is_dir() and folder != chosen:
            yield f"{stage}/{folder.name}", folder


def _info(id: str, folder: Path, step: int | None, stage: Stage | None, default: bool = False) -> ModelInfo:
    """Describe a model. Raises UserError if it has no usable checkpoint.

    The newest checkpoint of the default model, which is loaded next, is chosen by reading all of it. Of the others this
    reads no weights, so that a list of models takes no time; one that is found damaged when it is loaded is passed over
    from then on.
    """
    if step is None and (step := latest_step(folder, optimizer=False, verify=default)) is None:
        raise UserError(nothing_found(folder))
    meta, path = load_checkpoint(folder, step, weights=False).meta, folder / f"meta_{step:06d}.json"
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.pkl"))
    description = f"{folder.name}, step {step}" + (f": {stage.page}" if stage else "")
    return ModelInfo(id, str(folder), step, context_length=int(meta["model_config"]["sequence_len"]),
                     tokenizer=str(folder if own else base_dir() / "tokenizer"), chat=stage != STAGES["base"],
                     created=int(path.stat().st_mtime), description=description, default=default)
