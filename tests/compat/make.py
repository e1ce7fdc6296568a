"""Write the files of this folder: text, tokenizer, checkpoint, logs and report of a tiny run of an older commit.

    git worktree add ../older d5aee75
    PYTHONPATH=../older python tests/compat/make.py

It runs the real scripts of the code on PYTHONPATH, in this process, on one thread. The model is a hybrid of two layers,
32 wide, so that the files stay small. Paths and the machine are taken out of the logs. tests/test_compat.py reads the
files with the code of today: code that cannot read them any more is wrong, and the files are not written again for it.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPE = {"n_embd": 32, "n_head": 2, "n_kv_head": 2}  # instead of what depth 2 gives
BASE = ["--depth=2", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=512", "--num-iterations=6",
        "--save-every=3", "--eval-every=3", "--eval-tokens=1000", "--sample-every=-1", "--device-type=cpu"]
MID = ["--device-type=cpu", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=512",
       "--num-iterations=2", "--eval-tokens=500"]
SFT = ["--device-type=cpu", "--device-batch-size=4", "--target-examples-per-step=4", "--num-iterations=2",
       "--eval-steps=1", "--eval-metrics-every=-1"]
RL = ["--device-type=cpu", "--num-iterations=2", "--examples-per-step=2", "--num-samples=2", "--max-new-tokens=4",
      "--eval-examples=2", "--eval-samples=1", "--source=sft"]
EVAL = ["--max-problems=2", "--max-new-tokens=4", "--device-type=cpu"]
SENTENCES = ["The lamp is in the kitchen.", "What is 17 + 25?", "Zürich, 日本, naïve: 3.14\n\n\tdone",
             "<|bos|> is not a special token here"]
PROMPT = "Once there was a town"
RESUME_AT, STEPS = 3, 6  # the step of the checkpoint kept here, and the last step of that run


def small_from_depth(config: type) -> classmethod:
    """Return what takes the place of GPTConfig.from_depth, so that the models are as wide as SHAPE says."""
    whole = config.from_depth.__func__
    return classmethod(lambda cls, depth, **given: whole(cls, depth, **{**SHAPE, **given}))


def main() -> None:
    import torch

    from nanochat import dataset, report
    from nanochat.checkpoint import load_model
    from nanochat.gpt import GPTConfig
    from nanochat.tokenizer import get_tokenizer
    from scripts import base_eval, base_loss, base_train, chat_eval, chat_rl, chat_sft, mid_train, tok_eval, tok_train

    torch.set_num_threads(1)
    GPTConfig.from_depth = small_from_depth(GPTConfig)
    with tempfile.TemporaryDirectory() as made:
        base = Path(made)
        os.environ.update(NANOCHAT_BASE_DIR=made, NANOCHAT_DTYPE="float32")
        dataset.main(["small-world", "--docs=200"])
        tok_train.main(["--vocab-size=320"])
        tok_eval.main([])
        base_train.main(BASE)
        base_loss.main(["--split-tokens=1000", "--device-batch-size=2", "--device-type=cpu"])
        base_eval.main(["--split-tokens=1000", "--device-batch-size=2", "--device-type=cpu",
                        "--eval=bpb,sample,small-world"])
        mid_train.main(MID)
        chat_eval.main(["-i", "mid", *EVAL])
        chat_sft.main(SFT)
        chat_eval.main(["-i", "sft", *EVAL])
        chat_rl.main(RL)
        chat_eval.main(["-i", "rl", *EVAL])

        for old in ("base_data", "tokenizer", "base_checkpoints", "logs", "report"):
            shutil.rmtree(HERE / old, ignore_errors=True)
        for path in sorted((base / "logs").glob("*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text("".join(anonymous(line, made) + "\n" for line in lines), encoding="utf-8")
        report.generate(folder=base)
        tokenizer, logits = get_tokenizer(), {}
        ids = torch.tensor([tokenizer.encode(PROMPT, prepend="<|bos|>")])
        for step in (RESUME_AT, STEPS):
            model, _, _ = load_model("base", torch.device("cpu"), model_tag="d2", step=step)
            with torch.no_grad():
                logits[str(step)] = model(ids)[0, -1].tolist()
        shutil.copytree(base / "base_data", HERE / "base_data")
        shutil.copytree(base / "tokenizer", HERE / "tokenizer")
        shutil.copytree(base / "logs", HERE / "logs")
        shutil.copytree(base / "base_checkpoints", HERE / "base_checkpoints",
                        ignore=shutil.ignore_patterns(f"*_{STEPS:06d}*"))
        shutil.copy(base / "report.md", HERE / "report.md")
        (HERE / "expected.json").write_text(json.dumps({
            "ids": [tokenizer.encode(sentence) for sentence in SENTENCES], "fingerprint": tokenizer.fingerprint(),
            "prompt": ids[0].tolist(), "logits": logits}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def anonymous(line: str, base: str) -> str:
    """Return a line of a log without the paths and the machine of whoever made it."""
    row = json.loads(line.replace(base, "BASE"))
    if "machine" in row:
        row["machine"] = {"system": "Linux", "cpu": "some CPU", "cores": 2, "memory": 2**34, "gpus": []}
    return json.dumps(row, ensure_ascii=False)


if __name__ == "__main__":
    main()
