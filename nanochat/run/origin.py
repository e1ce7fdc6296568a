"""What a run starts from: its own checkpoint, a model of an earlier stage, or nothing; and what has changed since."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint import (
    Checkpoint,
    Corrupt,
    latest_step,
    load_checkpoint,
    load_on_ranks,
    load_to_resume,
    steps_in,
)
from nanochat.checks import conversation_files, need_writable
from nanochat.dataloader import merged
from nanochat.distributed import Ranks, dtype_of_run, on_main
from nanochat.errors import UserError
from nanochat.files import aside_of, base_dir, lock_folder
from nanochat.gpt import GPT
from nanochat.loading import load_model, model_and_tokenizer, on_ranks
from nanochat.logs import log_path, read_log
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.run.flags import ChatStageFlags, TrainingFlags
from nanochat.saving import copy_to_machines
from nanochat.stages import STAGES, Stage


@dataclass(frozen=True)
class Origin:
    """What a run starts from: its own last checkpoint, a model of an earlier stage, or a new model.

    stage: that the run belongs to. folder: of its checkpoints, named after the model's tag.
    step: optimizer steps of this stage that are done; 0 for a new run.
    model: on the device. tokenizer: its own. meta: of the checkpoint the model was loaded from; empty for a new model.
    loaded: which checkpoint that is and why, in words.
    provenance: meta fields of every checkpoint the run writes ("data", "from" and "chat_data" where it began from a
        checkpoint, and "identity", the digests of its data).
    lock: on rank 0, of `lock_run`: no other run writes to the folder as long as it is open.
    resumed: the checkpoint to go on from, with the optimizer state until that is loaded; None for a new run.
    fresh: move what is in the folder aside before the run begins.
    """

    stage: Stage
    folder: Path
    step: int
    model: GPT
    tokenizer: Any
    meta: dict[str, Any]
    loaded: str
    provenance: dict[str, Any]
    lock: ExitStack | None = None
    resumed: Checkpoint | None = None
    fresh: bool = False


@dataclass(frozen=True)
class ChatDataChoice:
    """What a chat stage learns from.

    source: "hub", "small-world" or "basics". seed: the small world's. extra: files of the user's own conversations.
    """

    source: str
    seed: int
    extra: list[Path]


def checkpoint_to_resume(folder: Path, config: Any, ranks: Ranks) -> Checkpoint | None:
    """Return the checkpoint from which a run in `folder` goes on, None for a new run. Collective.

    config: --fresh: it is a new one in any case, and `open_run` moves the folder aside, when nothing can be wrong any
    more. See `load_to_resume` for the rest; machines without a copy get one, but in a dry run.
    """
    if config.fresh:
        return None
    if not config.dry_run:
        copy_to_machines(folder, None, ranks)
    return load_to_resume(folder, ranks, device=ranks.device)


def claim(folder: Path, config: Any, ranks: Ranks) -> ExitStack | None:
    """Lock the folder of a run, and see that it can be written. Collective; a dry run changes nothing.

    Raises UserError where another run has it, or it cannot be written to.
    """
    on_main(f"looking at {folder}", lambda: need_writable(folder), ranks)
    return None if config.dry_run else lock_run(folder, ranks)


def lock_run(folder: Path, ranks: Ranks) -> ExitStack | None:
    """Keep other runs from writing to a folder of checkpoints, as long as the returned stack is open. Collective.

    It counts on all machines that see the folder. Raises UserError where another run holds it.
    """
    locks = []
    way_out = ("Two runs cannot write to one folder: wait until it ends, or stop it with {kill} (it saves first); "
               "another --model-tag trains beside it.")
    on_main(f"locking {folder}",
            lambda: locks.append(lock_folder(folder, f"{folder} is in use by a run", way_out)), ranks)
    return locks[0] if locks else None


def move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run, if there is one, to a name with the time, and print it."""
    if folder.exists():
        aside = aside_of(folder)
        folder.rename(aside)
        print(f"the run in {folder} was moved to {aside}")


def start_from_checkpoint(stage: Stage, source: str, config: ChatStageFlags, ranks: Ranks) -> Origin:
    """Load the model that a chat stage starts from: the stage's own last checkpoint, else that of the stage `source`.

    Raises:
        UserError: there is none that can be used, or the run to resume began from another model than `source` holds.
    """
    parent_folder, _ = on_ranks(source, config.model_tag or None, None if config.model_step < 0 else config.model_step,
                                ranks)
    tag = parent_folder.name
    folder = base_dir() / stage.folder / tag
    file = claim(folder, config, ranks)
    parent_step = None if config.model_step < 0 else config.model_step
    resumed = checkpoint_to_resume(folder, config, ranks)
    if resumed is None:
        model, tokenizer, meta = load_model(source, ranks.device, model_tag=tag, step=parent_step, ranks=ranks)
        begun_from = _described(source, meta)
    else:
        model, tokenizer, meta = model_and_tokenizer(resumed, "as asked")
        resumed.model_state = {}  # the optimizer gives the weights other memory
        begun_from = on_main(f"looking what {folder} began from",
                             lambda: _origin_of(resumed, source, parent_folder, parent_step), ranks)
    model.compute_dtype = dtype_of_run(ranks, meta.get("compute_dtype") if resumed else None)
    return Origin(stage=stage, folder=folder, step=resumed.step if resumed else 0, model=model, tokenizer=tokenizer,
                  meta=meta, loaded=meta["loaded"], lock=file, resumed=resumed, fresh=config.fresh,
                  provenance={"data": meta.get("data"), "from": begun_from,
                              "chat_data": chat_data_choice(config, meta).source})


def _origin_of(resumed: Checkpoint, source: str, folder: Path, step: int | None) -> dict[str, Any]:
    """Return what the run to resume began from, as `_described` says it.

    Args:
        resumed: the checkpoint to go on from.
        source, folder, step: the stage to start from, its folder and the step that is asked for.

    Raises:
        UserError: the folder holds another model now.
    """
    said = resumed.meta.get("from")
    with suppress(Corrupt):
        now = _described(source, load_checkpoint(folder, step, weights=False).meta)
        if said in (None, now):
            return now
    whole = latest_step(folder, optimizer=False) if step is None else step
    damaged = said and (said["step"] in steps_in(folder) or (folder / f"model_{said['step']:06d}.pt").exists())
    if step is None and (whole is None or damaged and whole < said["step"]):
        return said  # of what it began from; the run itself is whole
    now = _described(source, load_checkpoint(folder, whole, weights=False).meta)
    if said not in (None, now):  # else a newer one is damaged
        raise UserError(f"{resumed.folder} was trained from another model than {folder} holds now (step "
                        f"{said['step']} then, {now['step']} now, or other weights of that step). --fresh moves it "
                        "aside and trains anew.")
    return now


def _described(stage: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Return what tells a checkpoint from others: its stage, step and the SHA-256 of its weights as the meta says."""
    files = meta.get("files") or {}
    weights = next((about["sha256"] for name, about in files.items() if name.startswith("model_")), None)
    return {"stage": stage, "step": meta["step"], "weights": weights}


def chat_data_choice(config: ChatStageFlags, meta: dict[str, Any]) -> ChatDataChoice:
    """Return what a chat stage learns from; with --data=auto what goes with the model of this meta."""
    return ChatDataChoice(chat_data_of(meta) if config.data == "auto" else config.data,
                          (meta.get("data") or {}).get("seed", 0), conversation_files(config.conversations))


def chat_data_of(meta: dict[str, Any]) -> str:
    """Return the chat data that goes with the model of this meta: that of its chat stage, else of its base model."""
    text = (meta.get("data") or {}).get("source")
    return meta.get("chat_data") or ("small-world" if text == "small-world" else "hub")


def tokens_of_row(config: Any, model: GPT) -> int:
    """Return the tokens of a training row: --max-seq-len where it is set, else the model's own."""
    asked = getattr(config, "max_seq_len", -1)
    return asked if asked > 0 else model.config.sequence_len


def is_trained(origin: Origin, num_iterations: int, ranks: Ranks) -> bool:
    """Return whether the run has already come to its end, and print that. Collective.

    A run that was stopped or killed after its last step, before it had evaluated, saved and recorded its end, has not.

    Raises UserError where it has not, and cannot go on, since its optimizer state is gone.
    """
    if origin.step == num_iterations and on_main("reading the log", lambda: lacks_end(origin), ranks):
        return False
    if origin.step < num_iterations:
        if origin.resumed is not None and origin.resumed.optimizer_state is None:
            raise cannot_resume(origin.folder, origin.resumed.no_optimizer)
        return False
    if ranks.is_main:
        print(f"{origin.folder} is trained: step {origin.step} of {num_iterations}. Nothing to do; --fresh trains it "
              "anew.")
    return True


def lacks_end(origin: Origin) -> bool:
    """Return whether the log has steps of the run after the last record of an end, and the run can still go on to it.

    False where there is no log.
    """
    if origin.resumed is None or origin.resumed.optimizer_state is None:
        return False
    rows = read_log(log_path(origin.stage.name, origin.folder.name))
    last = next((row["kind"] for row in reversed(rows) if row.get("kind") in ("train", "rl", "done")), "done")
    return last != "done"


def cannot_resume(folder: Path, why: str) -> UserError:
    """Return the error that a checkpoint cannot be trained on, with the way out."""
    return UserError(f"{folder} cannot be trained on: {why.rstrip('.')}. --fresh moves it aside and trains anew; "
                     "another --model-tag leaves it where it is.")


def loader_state(origin: Origin) -> dict | None:
    """Return the PackedLoader state to resume from, None for a new run. Raises UserError where it is gone."""
    if not origin.step:
        return None
    state = origin.meta.get("loader")
    if not state:
        raise cannot_resume(origin.folder, "it does not say how far its data was read")
    return merged(state) if isinstance(state, list) else state  # a list: one state a rank, as earlier versions saved


def steps_state(origin: Origin) -> dict | None:
    """Return the ConversationSteps state to resume from; None for a new run, and of an earlier version."""
    return origin.meta.get("loader") if origin.step else None


def make_optimizer(origin: Origin, config: TrainingFlags, ranks: Ranks, lr_factor: float = 1.0,
                   decay_factor: float = 1.0) -> MuonAdamW:
    """Return the model's optimizer, with its state where the run resumes, which is then dropped from `origin`.

    With the flag --warm-start, a new run begins with the state of the model it starts from. Collective.

    lr_factor, decay_factor: of all learning rates and of Muon's weight decay, beside what the flags say.

    Raises UserError where the state is gone.
    """
    groups = config.groups(lr_factor * getattr(config, "init_lr_frac", 1.0), decay_factor)
    optimizer = MuonAdamW(parameter_groups(origin.model, groups), ranks, origin.model.compute_dtype,
                          reduce_dtype=getattr(torch, config.reduce_dtype))
    if origin.resumed is not None:
        if origin.resumed.optimizer_state is None:
            raise cannot_resume(origin.folder, origin.resumed.no_optimizer)
        optimizer.load_state_dict(origin.resumed.optimizer_state)
        origin.resumed.optimizer_state = None
        if ranks.is_main:
            print_changes(origin.meta.get("user_config", {}), config, origin)
            print_new_sums(config, origin, ranks)
    elif getattr(config, "warm_start", False):
        said = warm_start(optimizer, origin, ranks)
        if ranks.is_main:
            print(said)
    return optimizer


def warm_start(optimizer: MuonAdamW, origin: Origin, ranks: Ranks) -> str:
    """Give the optimizer the state of the checkpoint that a new run begins from, and return in words what there was.
    Collective."""
    begun = origin.provenance["from"]
    folder = base_dir() / STAGES[begun["stage"]].folder / origin.folder.name
    try:
        before = load_on_ranks(folder, begun["step"], ranks, weights=False, optimizer=True, mapped=True)
        state, why = before.optimizer_state, before.no_optimizer
    except UserError as error:  # the model was loaded; only its optimizer state cannot be
        state, why = None, str(error)
    if state is None:
        return f"note: the optimizer begins without momenta: {why.rstrip('.')}"
    cold = optimizer.warm_start(state)
    count = sum(len(bucket.names) for bucket in optimizer.buckets)
    if not cold:
        return f"the optimizer begins with the momenta of step {begun['step']} of {folder}"
    return (f"note: the optimizer begins with the momenta of step {begun['step']} of {folder}, but {len(cold)} of "
            f"{count} parameters without all of theirs, such as {cold[0]}: they were trained in another way there")


def print_changes(before: dict[str, Any], config: Any, origin: Origin) -> None:
    """Print the settings that differ from those the run to resume was saved with (its user_config).

    One that is None now follows from others.
    """
    changed = [f"{name} {before[name]} → {getattr(config, name)}" for name in origin.stage.settings
               if name in before and getattr(config, name, None) not in (None, before[name])]
    if changed:
        print(f"note: resuming with other settings than the run in {origin.folder} began with: {', '.join(changed)}")


def print_new_sums(config: Any, origin: Origin, ranks: Ranks) -> None:
    """Print that a resumed run is not bit-equal to an unbroken one, where its ranks or micro-batches are others."""
    meta, loader = origin.meta, origin.meta.get("loader")
    before, now = meta.get("world_size"), ranks.world_size
    rows, own = meta.get("device_batch_size"), config.device_batch_size
    changed = [f"{old} → {new} {noun}" for old, new, noun in ((before, now, "processes"), (rows, own, "rows a device"))
               if old not in (None, new)]
    if isinstance(loader, list) and len(loader) > 1:
        print(f"note: {origin.folder} was saved before rows had one order for all processes: the documents still to "
              "come are the same, packed into other rows")
    elif changed:
        print(f"note: {', '.join(changed)}: the run goes on with the very next rows, but its sums are taken in another "
              "order: it is the unbroken run up to rounding, no longer bit for bit")
