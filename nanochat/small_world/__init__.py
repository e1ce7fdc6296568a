"""The small world: endless English-like documents about one consistent little world, and questions that grade what a model
learned from them. It needs no data files and no network, and is what a machine without a GPU trains on by default.

    documents(seed)  texts of 40 to 200 words; document i is a pure function of (seed, i), the same everywhere
    facts(seed)      prompts to complete, in phrasings that were kept out of the documents for that very fact
    grade(facts, score)   accuracy and chance for each kind of fact
    World(seed)      the people, places, things and words themselves; World().describe() to read them

    python -c "from nanochat.small_world import documents as d; print(next(d()))"

The main figure is `grade(...)["world"]`: facts about people, places and things, told many times in other phrasings. The other
kinds ask for what must be worked out: sums and differences whose pair of numbers never occurs, ages compared for pairs never
compared, letters of words, and new little stories that hold their own answer (giving, counting)."""

from nanochat.small_world.grading import WORLD_KINDS, Fact, Grade, facts, grade
from nanochat.small_world.stories import document
from nanochat.small_world.world import Entity, World

__all__ = ["WORLD_KINDS", "Entity", "Fact", "Grade", "World", "document", "documents", "facts", "grade"]


def documents(seed: int = 0, start: int = 0):
    """Yield the documents of a seed without end, from number `start` on."""
    world = World(seed)
    while True:
        yield document(world, start)
        start += 1
