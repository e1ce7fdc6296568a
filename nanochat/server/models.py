"""Which models a server can be asked for: the stages that were trained, and the folder or hub repository it was started with.

Runs in a worker, where PyTorch is. A model's id is its stage ("sft"), a stage and tag where there are several ("sft/d12"), the name of a
folder, or "owner/name" of the hub. Clients can ask for these alone, never for a path.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nanochat.checkpoint import checkpoint_dir, latest_step
from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.server.worker import ModelInfo, WorkerConfig
from nanochat.stages import STAGES, Stage, stage_of_folder


def find_models(config: WorkerConfig) -> list[ModelInfo]:
    """The models there are, the one the server was started with first. Raises UserError where that one is not there."""
    found = [_default(config)]
    for stage in STAGES.values():
        for id, folder in _of_stage(stage.name, config.model_tag):
            with suppress(UserError, OSError, ValueError, KeyError):
                info = _info(id, folder, None, stage)
                if all(other.id != id and (other.folder, other.step) != (info.folder, info.step) for other in found):
                    found.append(info)
    return found


def _default(config: WorkerConfig) -> ModelInfo:
    """The model that the server was started with."""
    id = source = config.source
    if source not in STAGES:
        if Path(source).expanduser().is_dir():
            id = Path(source).expanduser().resolve().name
        else:
            from nanochat.llm import from_hub
            source = str(from_hub(source, None))
    folder = checkpoint_dir(source, config.model_tag or None)
    stage = STAGES.get(source) or stage_of_folder(folder.resolve().parts)
    return _info(id, folder, None if config.step < 0 else config.step, stage, default=True)


def _of_stage(stage: str, tag: str) -> Iterator[tuple[str, Path]]:
    """(id, folder) of the models of a stage: that of the tag, or else the one a command would take, and the other tags."""
    try:
        chosen = checkpoint_dir(stage, tag or None)
    except UserError:
        return
    yield stage, chosen
    for folder in sorted((base_dir() / STAGES[stage].folder).glob("*")):
        if folder.is_dir() and folder != chosen:
            yield f"{stage}/{folder.name}", folder


def _info(id: str, folder: Path, step: int | None, stage: Stage | None, default: bool = False) -> ModelInfo:
    """What there is to know of a model without reading its weights. Raises UserError."""
    step = latest_step(folder) if step is None else step
    path = folder / f"meta_{step or 0:06d}.json"
    if step is None or not path.is_file():
        raise UserError(f"no usable checkpoint {'' if step is None else f'of step {step} '}in {folder}")
    meta = json.loads(path.read_text(encoding="utf-8"))
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.pkl"))
    description = f"{folder.name}, step {step}" + (f": {stage.page}" if stage else "")
    return ModelInfo(id, str(folder), step, int(meta["model_config"]["sequence_len"]), str(folder if own else base_dir() / "tokenizer"),
                     stage != STAGES["base"], int(path.stat().st_mtime), description, default)
