"""The small world: endless English-like documents about one consistent world, and questions that grade a model on it.

It needs no data files and no network. A machine without a GPU trains on it by default.

    documents(seed)       texts of 40 to 200 words; document i depends on (seed, i) alone, on every machine
    facts(seed)           prompts to complete, in phrasings that the documents never use for the same fact
    grade(facts, score)   accuracy and chance for each kind of fact
    World(seed)           the people, places, things and words; World().describe() prints them

    python -c "from nanochat.small_world import documents as d; print(next(d()))"

The main figure is `grade(...)["world"]`: facts about people, places and things, which documents tell many times in
other phrasings. The other kinds ask what the model must work out: sums and differences of pairs of numbers that never
occur, comparisons of ages for pairs that are never compared, letters of words, and new short stories that contain their
answer (giving, counting).
"""

from nanochat.small_world.grading import WORLD_KINDS, Fact, Grade, facts, grade
from nanochat.small_world.stories import document
from nanochat.small_world.world import Entity, World

__all__ = ["WORLD_KINDS", "Entity", "Fact", "Grade", "World", "document", "documents", "facts", "grade"]


def documents(seed: int = 0, start: int = 0):
    """Yield the documents of a seed from number `start` on; never ends."""
    world = World(seed)
    while True:
        yield document(world, start)
        start += 1
