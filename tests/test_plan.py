"""scripts/plan.py and scripts/estimate.py: what a run takes, counted; and the README says the same."""

import pytest

from nanochat.errors import UserError
from nanochat.recipe import Recipe, at_depth, modern, published
from nanochat.training import clock
from scripts import plan
from scripts.estimate import CARDS, EXPECTED, PRICE, card_named, choices, stage_lines, step_lines, step_seconds
from scripts.speedrun_plan import Machine, accumulation_of, run_of, sized_plan
from tests.conftest import ROOT

CONFIG = run_of(published).shape


def run_on(card: str, gpus: int, depth: int = 20, recipe: Recipe = published):
    machine = Machine([CARDS[card].name] * gpus, int(CARDS[card].memory), 64)
    return sized_plan(f"d{depth}", at_depth(depth, recipe), machine, source=recipe.source, chat="hub")


def seconds(card: str, gpus: int, depth: int = 20, recipe: Recipe = published) -> float:
    return sum(line.seconds for line in stage_lines(run_on(card, gpus, depth, recipe), CARDS[card]))


def test_the_parts_of_a_step_are_counted_from_the_model():
    lines = {line.name: line for line in step_lines(CONFIG, 32, CARDS["H100"], 8)}
    assert lines["matrix products"].basis == "180 TFLOP"  # 6 FLOPs a weight in a product, 65,536 tokens
    assert lines["attention"].basis.startswith("8.4 TFLOP")
    assert sum(line.seconds for line in lines.values()) == pytest.approx(0.346, abs=0.004)
    assert all(line.seconds > 0 for line in lines.values())


def test_a_step_follows_from_rows_cards_and_gpus():
    card = CARDS["H100"]

    def step(**given):
        shape = {"rows": 32, "card": card, "gpus": 8, **given}
        return step_seconds(step_lines(CONFIG, **shape))
    assert step(rows=16) < 0.6 * step()
    assert step(rows=16, accumulation=2) == pytest.approx(step(), rel=0.05)
    assert step(card=CARDS["A100"]) > 2 * step() > 2 * step(card=CARDS["B200"])
    names = {line.name for line in step_lines(CONFIG, 32, card, 1)}
    assert "waiting for other GPUs" not in names
    slow = next(line for line in step_lines(CONFIG, 4, CARDS["RTX-4090"], 8) if line.name == "waiting for other GPUs")
    assert slow.seconds > 0.02, "over PCIe the gradients do not hide"


def test_the_published_run_is_planned_within_two_hours_twenty():
    assert seconds("H100", 8) < 2 * 3600 + 20 * 60
    assert seconds("H100", 1) > 7 * seconds("H100", 8) > 0
    lines = stage_lines(run_on("H100", 8), CARDS["H100"])
    assert [line.name for line in lines if "grading" in line.name or "tuning" in line.name] == [
        "grading after it", "fine-tuning", "grading after it"]
    assert all(line.basis and line.seconds > 0 for line in lines)


def test_the_plan_is_printed_with_memory_minutes_and_cost(capsys):
    plan.main(["--depth=20", "--gpus=8", "--price=24"])
    text = capsys.readouterr().out
    assert "542,035,200 parameters" in text and "32 rows of 2048" in text and "counted, not measured" in text
    total = seconds("H100", 8)
    assert clock(total) in text and f"${total / 3600 * 24:,.2f}" in text
    plan.main(["--gpus=1", "--card=RTX-4090", "--price=0"])
    text = capsys.readouterr().out
    assert "GeForce RTX 4090" in text and "$" not in text
    assert f"{accumulation_of(run_on('RTX-4090', 1))} micro-batches a step" in text


@pytest.mark.parametrize("flags, says", [(["--card=H1000"], "RTX-4090"), (["--gpus=0"], "--gpus"),
                                         (["--depth=48", "--card=L4", "--gpus=1"], "does not fit")])
def test_what_cannot_be_planned_is_refused(flags, says):
    with pytest.raises(UserError, match=says):
        plan.main(flags)


def test_the_choice_that_is_printed_first_is_what_the_plan_says(capsys):
    machine = Machine([CARDS["H100"].name] * 8, int(CARDS["H100"].memory), 64)
    rows = {row[0]: row[1:] for row in choices(machine, CARDS["H100"])}
    assert len(rows) == len(EXPECTED) and all(expected for _, _, expected in rows.values())
    whole = seconds("H100", 8, 18, modern)
    assert rows["SPEEDRUN_RECIPE=modern SPEEDRUN_PROFILE=d18"][:2] == [f"{whole / 60:.0f}",
                                                                       f"{whole / 3600 * 8 * PRICE:.0f}"]
    plan.main(["--recipe=modern", "--depth=18"])
    said = capsys.readouterr().out
    assert f"sum                          | {whole / 60:7.1f}" in said and EXPECTED["modern", 18] in said


def test_cards_are_known_by_what_the_driver_calls_them():
    assert card_named("NVIDIA H100 80GB HBM3") is CARDS["H100"] and card_named("Tesla T4") is CARDS["T4"]
    assert card_named("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None and card_named("a new one") is None
    assert all(card.flops > 1e12 for card in CARDS.values())


def test_the_table_of_times_in_the_readme_is_what_the_plan_says():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## What to expect")[1].split("\n\n")[1]
    for card, gpus, depth in (("H100", 8, 20), ("H100", 1, 20), ("RTX-4090", 1, 20), ("H100", 8, 26)):
        hours, minutes = divmod(round(seconds(card, gpus, depth) / 60), 60)
        assert f"{hours} h {minutes:02d} min" in table, (card, gpus, depth, hours, minutes)
    for depth in (18, 24):
        hours, minutes = divmod(round(seconds("H100", 8, depth, modern) / 60), 60)
        assert f"{hours} h {minutes:02d} min" in table, (depth, hours, minutes)
