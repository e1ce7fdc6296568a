"""The table of the training stages. Everything that lists stages reads it; importing it costs nothing.

    STAGES["sft"].folder        # "chatsft_checkpoints"
    [stage.script for stage in CHAT_STAGES]

A new stage is one row here, its data in tasks/recipes.py, a script that runs it on nanochat/run/, and its tests.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    name: what commands call it (`-i sft`, `load_model("sft")`); its log is logs/<name>_<tag>.jsonl.
    noun: the stage in a sentence. script: the module that trains it.
    folder: of its checkpoints, under $NANOCHAT_BASE_DIR. page: what the web page says of a model of this stage.
    starts_from: the stages whose checkpoints it can start from, the usual one first; empty for the base model.
    sections: of the report, by the name of the log that fills each; the first is the training itself.
    column: of the report's summary. graded_by: the name of the log whose scores are in that column.
    settings: flags that change what is trained; a resumed run that has other values than before says so.
    """

    name: str
    noun: str
    script: str
    folder: str
    page: str
    starts_from: tuple[str, ...]
    sections: dict[str, str]
    column: str
    graded_by: str
    settings: tuple[str, ...]


CHAT_SETTINGS = ("data", "conversations", "seed", "num_iterations", "num_epochs", "max_seq_len", "packed",
                 "total_batch_size", "reference_batch",
                 "target_examples_per_step", "examples_per_step", "num_samples", "max_new_tokens", "temperature",
                 "top_k", "embedding_lr", "unembedding_lr", "matrix_lr", "init_lr_frac", "weight_decay", "matrix_decay",
                 "muon_extras", "optimizer", "grad_clip", "reduce_dtype", "warmdown_ratio")

STAGES = {stage.name: stage for stage in (
    Stage("base", "pretraining", "scripts.base_train", "base_checkpoints",
          page="continues text; has not learnt to chat",
          starts_from=(),
          sections={"base": "Base model", "base_loss": "Base model, loss", "base_eval": "Base model, evaluation"},
          column="BASE", graded_by="base_eval",
          settings=("total_batch_size", "embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay", "matrix_decay",
                    "muon_extras", "optimizer", "reference_batch", "reference_depth", "grad_clip", "reduce_dtype",
                    "warmup_ratio", "warmup_steps", "warmdown_ratio", "final_lr_frac", "momentum_start",
                    "momentum_peak", "momentum_steps", "momentum_end", "num_iterations", "target_flops",
                    "target_param_data_ratio", "ratio_of", "data_dir", "shards", "seed")),
    Stage("mid", "mid-training", "scripts.mid_train", "mid_checkpoints",
          page="has seen conversations and the calculator",
          starts_from=("base",),
          sections={"mid": "Midtraining", "chat_eval_mid": "Evaluation after midtraining"},
          column="MID", graded_by="chat_eval_mid", settings=CHAT_SETTINGS),
    Stage("sft", "fine-tuning", "scripts.chat_sft", "chatsft_checkpoints",
          page="fine-tuned on conversations",
          starts_from=("mid", "base"),
          sections={"sft": "SFT", "chat_eval_sft": "Evaluation after SFT"},
          column="SFT", graded_by="chat_eval_sft", settings=CHAT_SETTINGS),
    Stage("rl", "reinforcement learning", "scripts.chat_rl", "chatrl_checkpoints",
          page="fine-tuned, then rewarded for right answers",
          starts_from=("sft", "mid"),
          sections={"rl": "RL", "chat_eval_rl": "Evaluation after RL"},
          column="RL", graded_by="chat_eval_rl", settings=CHAT_SETTINGS),
)}

CHAT_STAGES = tuple(stage for stage in STAGES.values() if stage.starts_from)


def stage_of_folder(parts: tuple[str, ...]) -> Stage | None:
    """Return the stage whose checkpoint folder is among the parts of a path; None where none is."""
    return next((stage for stage in STAGES.values() if stage.folder in parts), None)
