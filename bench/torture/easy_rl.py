"""scripts.chat_rl with a reward that a hardly trained model gets: answers of odd length.

    python -m bench.torture.easy_rl --num-iterations=8      # flags of scripts.chat_rl

A model of forty steps solves no problem. With its real reward no group of answers would differ, no step would change a
weight, and all runs would be equal whatever happened to them.
"""

from nanochat.cli import run_main
from scripts import chat_rl
from tasks import recipes


def main() -> None:
    """Run chat_rl. Raises what it raises."""
    recipes.WorldSums.reward = lambda self, conversation, answer: float(len(answer) % 2)
    chat_rl.main()


if __name__ == "__main__":
    run_main(main)
