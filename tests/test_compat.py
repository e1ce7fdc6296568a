"""Files written by an older commit (tests/compat/README.md) are read by this one, and give what they gave then."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from nanochat import report
from nanochat.checkpoint import load_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.logs import read_log
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_train
from tests.compat import make

FILES = Path(make.__file__).parent
EXPECTED = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base directory with a copy of the files."""
    base = tmp_path / "base"
    shutil.copytree(FILES, base)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


def logits(base: Path, step: int) -> torch.Tensor:
    """The logits (V,) behind the prompt, from the base model's checkpoint of this step."""
    checkpoint = load_checkpoint(base / "base_checkpoints" / "d2", step)
    model = GPT(GPTConfig(**checkpoint.meta["model_config"]))
    model.load_state_dict(checkpoint.model_state)
    with torch.no_grad():
        return model.eval()(torch.tensor([EXPECTED["prompt"]]))[0, -1]


def assert_near(found: torch.Tensor, step: int, tolerance: float) -> None:
    torch.testing.assert_close(found, torch.tensor(EXPECTED["logits"][str(step)]), rtol=0, atol=tolerance)


def test_a_checkpoint_gives_the_same_logits_and_its_run_goes_on_to_the_same_end(base, monkeypatch, capsys):
    assert_near(logits(base, make.RESUME_AT), make.RESUME_AT, 1e-5)
    monkeypatch.setattr(GPTConfig, "from_depth", make.small_from_depth(GPTConfig))
    base_train.main(make.BASE)
    out = capsys.readouterr().out
    assert f"resuming from step {make.RESUME_AT}" in out and "note: resuming with other settings" not in out
    assert_near(logits(base, make.STEPS), make.STEPS, 1e-3)  # three steps later: other CPUs add up in another order
    losses = [[row["loss"] for row in read_log(folder / "logs" / "base_d2.jsonl") if row["kind"] == "train"]
              for folder in (FILES, base)]
    steps = make.STEPS - make.RESUME_AT
    assert len(losses[1]) == len(losses[0]) + steps
    assert losses[1][-steps:] == pytest.approx(losses[0][-steps:], abs=1e-3)


def test_a_tokenizer_gives_the_same_ids(base):
    tokenizer = RustBPETokenizer.from_directory(base / "tokenizer")
    assert tokenizer.fingerprint() == EXPECTED["fingerprint"]
    assert [tokenizer.encode(sentence) for sentence in make.SENTENCES] == EXPECTED["ids"]
    assert [tokenizer.decode(ids) for ids in EXPECTED["ids"]] == make.SENTENCES
    assert tokenizer.encode(make.PROMPT, prepend="<|bos|>") == EXPECTED["prompt"]


def test_the_pickled_tokenizer_alone_gives_the_same_ids(base):
    (base / "tokenizer" / "tokenizer.json").unlink()
    tokenizer = RustBPETokenizer.from_directory(base / "tokenizer")
    assert [tokenizer.encode(sentence) for sentence in make.SENTENCES] == EXPECTED["ids"]


def comparable(text: str) -> list[str]:
    """The lines of a report without its date, and without the plots, which need matplotlib."""
    text = re.sub(r"reported [^\n]* from the logs", "reported from the logs", text)
    return [line for line in text.splitlines() if line and not line.startswith(("![", "There are no plots"))]


def test_the_report_of_old_logs_is_the_one_of_then(base, tmp_path):
    path = report.generate(folder=tmp_path)
    assert comparable(path.read_text(encoding="utf-8")) == comparable((FILES / "report.md").read_text(encoding="utf-8"))
