"""A run of any stage: what it starts from, what it does between its optimizer steps, and how it ends.

    origin = start_from_checkpoint(STAGES["mid"], "base", config, ranks)      # or the run's own checkpoint, to resume
    if is_trained(origin, num_iterations, ranks): return
    with loader, open_run(origin, config, ranks, num_iterations=num_iterations, loader=loader) as run:
        run.introduce(["200 steps of 2,048 tokens"])
        run.train(batches, plan, [PeriodicAction(config.eval_every, evaluate, at_zero=True)])
        run.finish("validation bpb 0.8")

The same command resumes a run where it stopped, bit for bit. Ctrl-C and SIGTERM save first. Checkpoints are written
beside training (nanochat/saving.py).
"""

from nanochat.run.flags import (
    ChatData,
    ChatStageFlags,
    RecipeName,
    TrainingFlags,
    choose_kernels,
    compile_wanted,
    fit_and_choose,
    keep_flag,
    launch,
    save_every_flag,
)
from nanochat.run.horizon import BaseRun, flags_of, horizon_of, model_shape, scaling_parameters
from nanochat.run.origin import (
    ChatDataChoice,
    Origin,
    chat_data_choice,
    chat_data_of,
    checkpoint_to_resume,
    claim,
    is_trained,
    loader_state,
    move_aside,
    start_from_checkpoint,
    steps_state,
    tokens_of_row,
)
from nanochat.run.stage_run import PeriodicAction, StageRun, is_due, open_run

__all__ = ["BaseRun", "ChatData", "ChatDataChoice", "ChatStageFlags", "Origin", "PeriodicAction", "RecipeName",
           "StageRun", "TrainingFlags", "chat_data_choice", "chat_data_of", "checkpoint_to_resume", "choose_kernels",
           "claim", "compile_wanted", "fit_and_choose", "flags_of", "horizon_of", "is_due", "is_trained", "keep_flag",
           "launch", "loader_state", "model_shape", "move_aside", "open_run", "save_every_flag", "scaling_parameters",
           "start_from_checkpoint", "steps_state", "tokens_of_row"]
