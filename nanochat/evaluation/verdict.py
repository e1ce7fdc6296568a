"""Compare the end of a stage with its beginning, and say in words whether it taught anything.

    progress = Progress({}, fresh=True)                         # {}: kept in every checkpoint's meta, for a resume
    progress.measure(0, 100, "bpb", evaluate, count=20, about=[8, 256])
    progress.measure(100, 100, "bpb", evaluate, count=20, about=[8, 256])
    str(progress.verdict)                                       # "verdict: better: bpb 2.3100 → 0.7310"

Losses are measured on the same batches both times, so that a small change counts. Where a stage has no evaluation at
its beginning, FEW batches are measured then, and the same ones again at its end. Rates are means over sampled answers:
a change within twice its standard error is none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nanochat.errors import UserError

FEW = 4            # batches, where a stage has no evaluation at its beginning
SAME = 0.001       # a relative change of a loss that is none
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Verdict:
    """What a stage did to its measure.

    word: "unknown" where the beginning is not known, or was measured on other data.
    """

    word: Literal["better", "no change", "worse", "unknown"]
    text: str
    name: str
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        return f"verdict: {self.word}: {self.text}"

    def warning(self) -> str:
        """Return what to tell beside it, loudly; "" where there is nothing to tell."""
        if self.word == "worse":
            return ("WARNING: this stage did harm: its model is worse than the one it began from. Lower learning rates "
                    "or other data may help; --fresh trains it anew.")
        if self.word == "no change":
            return ("WARNING: this stage taught nothing that can be measured. Are the learning rates, the steps and "
                    "the data what they should be?")
        return ""


@dataclass
class Progress:
    """Where a run began, and at its end, the verdict.

    began: by name of the measure, what it was. It is stored in checkpoints, so that a run that resumes still knows it.
    fresh: whether this run begins at step 0.
    """

    began: dict[str, dict[str, Any]]
    fresh: bool
    verdict: Verdict | None = field(default=None)

    def measure(self, step: int, end: int, name: str, evaluate: Callable[[int], float], count: int, about: list[int],
                known: float | None = None) -> None:
        """Remember a loss at step 0, and judge it at the end of the run; does nothing at other steps. Collective.

        Args:
            step: optimizer steps done. end: of the whole run.
            name: of the loss.
            evaluate: given n, returns the loss on the first n batches. Collective.
            count: batches that there are.
            about: what else the loss depends on, such as the shape of a batch.
            known: the loss on all batches, where it is known already.
        """
        if step == 0 and self.fresh:
            size = count if known is not None else min(FEW, count)
            value = known if known is not None else evaluate(size)
            self.began[name] = {"value": value, "batches": size, "about": about}
        elif step == end:
            then = self.began.get(name)
            if then is None:
                self.verdict = Verdict("unknown", f"the checkpoint does not say what its {name} was at step 0", name)
            elif then["about"] != about or then["batches"] > count:
                self.verdict = Verdict("unknown", f"at step 0 the {name} was measured on other batches", name)
            else:
                size = then["batches"]
                self.verdict = judge_loss(name, then["value"], known if known is not None and size == count
                                          else evaluate(size))

    def compare_with_unigram(self, bpb: float, unigram: float) -> None:
        """Add to the verdict whether a base model has learnt more than how frequent each token is.

        bpb: of the model. unigram: of a model that knows the frequencies alone, on the same text.
        """
        if bpb >= unigram:
            self.verdict = replace(self.verdict, text=f"{self.verdict.text}; the frequencies of the tokens alone give "
                                                      f"{unigram:.4f}, so the model has not learnt more than these")

    def measure_rate(self, step: int, end: int, name: str, value: float, error: float) -> None:
        """Remember a rate with its standard error at step 0, and judge it at the end; does nothing at other steps."""
        if step == 0 and self.fresh:
            self.began[name] = {"value": value, "error": error}
        elif step == end:
            then = self.began.get(name)
            self.verdict = (judge_rate(name, then["value"], then["error"], value, error) if then else
                            Verdict("unknown", f"the checkpoint does not say what its {name} was at step 0", name))


def judge_loss(name: str, before: float, after: float) -> Verdict:
    """Compare two values of a loss on the same data. Raises UserError where one is not finite."""
    if not (math.isfinite(before) and math.isfinite(after)):
        raise UserError(f"the {name} is {after} at the end and was {before} at the beginning: the model is damaged, or "
                        "training has diverged. An earlier checkpoint may be whole.")
    word = "no change" if abs(after - before) <= SAME * abs(before) else "better" if after < before else "worse"
    return Verdict(word, f"{name} {before:.4f} → {after:.4f}", name, before, after)


def judge_rate(name: str, before: float, before_error: float, after: float, after_error: float) -> Verdict:
    """Compare two rates, each with its standard error. Higher is better."""
    error = math.hypot(before_error, after_error)
    same = abs(after - before) <= STANDARD_ERRORS * error or after == before
    word = "no change" if same else "better" if after > before else "worse"
    return Verdict(word, f"{name} {before:.1%} → {after:.1%} (standard error {error:.1%})", name, before, after)
