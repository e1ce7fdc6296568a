"""Documents of the small world: short passages about linked people, places, things, gifts, numbers and words.

A passage function takes (rng, world, focus): `focus` is the entity that the text is about so far, or None. It returns
its text and the entity that the next passage may continue with.
"""

import random

from nanochat.small_world import words
from nanochat.small_world.phrasings import DIFFERENCES, GIVES, OLDER, OWNS, SUMS
from nanochat.small_world.world import DOCUMENT, Entity, World, capital, pick, rng_of, sample

OPENING = ("As everybody knows, ", "People say that ", "It is true that ", "Remember that ")
LINKING = OPENING[:3] + ("Also, ", "Besides, ", "And ")
HEADINGS = ("About {}.", "This is about {}.", "Let me tell you about {}.", "What do we know about {}?",
            "A few words about {}.")
CLOSING = ("That is all.", "So much for {}.", "Now you know more about {}.", "That is all about {}.",
           "More about {} another day.")
ASKING = ("Question: {q} Answer: {a}.", "Question: {q} Answer: {a}.", "{q} {A}.", "Q: {q} A: {a}.",
          "{x} asks: {q} The answer is: {a}.", "Do you know this? {q} {A}.")
DAYTIMES = ("in the morning", "at noon", "in the evening", "after work", "before supper", "on a rainy day",
            "at the market", "last week")
Passage = tuple[str, Entity | None]


def tell(rng: random.Random, world: World, entity: Entity, attributes: list[str], named: bool) -> str:
    """Return one sentence for each attribute of an entity.

    Args:
        rng: source of the choices.
        world: has the phrasings.
        entity, attributes: what to tell.
        named: whether the text has just named the entity. If not, the first sentence uses the name; later ones mostly
            use a pronoun.
    """
    text = []
    for attribute in attributes:
        forms = pick(rng, world.told[entity, attribute])
        chance = rng.random()
        pronoun = named and chance < 0.5
        if chance < 0.06 or 0.5 < chance < 0.56:
            inside = forms.pronoun_in if pronoun else forms.name_in
            text.append(pick(rng, LINKING if text else OPENING) + inside + ".")
        elif named and text and chance > 0.85:
            text[-1] = text[-1][:-1] + ", and " + forms.pronoun_in + "."
        else:
            text.append((forms.pronoun if pronoun else forms.name) + ".")
        named = True
    return " ".join(text)


def portrait(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Two to four facts about one person."""
    person = focus if focus in world.people else pick(rng, world.people)
    return tell(rng, world, person, sample(rng, list(person.values), 2 + int(rng.random() * 3)), False), person


def place(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Two or three facts about a town, and half the time a person who lives there.

    The town is the focus, or the home of the person in focus, or any.
    """
    if focus in world.people:
        town = world.by_name[focus.values["town"]]
    else:
        town = focus if focus in world.places else pick(rng, world.places)
    text = tell(rng, world, town, sample(rng, list(town.values), 2 + int(rng.random() * 2)), False)
    if rng.random() < 0.5:
        person = pick(rng, [p for p in world.people if p.values["town"] == town.name])
        return text + " " + tell(rng, world, person, ["town"], False), person
    return text, town


def thing(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Two or three facts about a thing."""
    about = focus if focus in world.things else pick(rng, world.things)
    return tell(rng, world, about, sample(rng, list(about.values), 2 + int(rng.random() * 2)), False), about


def questions(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Two or three questions with short or long answers."""
    text = []
    form = pick(rng, ASKING)
    for _ in range(2 + int(rng.random() * 2)):
        about = focus if focus and rng.random() < 0.7 else pick(rng, world.entities())
        attribute = pick(rng, list(about.values))
        asked = pick(rng, world.asked[about, attribute])
        answer = about.values[attribute]
        if rng.random() < 0.3:
            answer = pick(rng, world.told[about, attribute]).pronoun
        text.append(form.format(q=asked, a=answer, A=capital(answer), x=pick(rng, world.people).name))
        focus = about
    return pick(rng, (" ", "\n")).join(text), focus


def card(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """A list of three facts about one person, place or thing."""
    about = focus or pick(rng, world.entities())
    lines = [f"{attribute}: {about.values[attribute]}" for attribute in sample(rng, list(about.values), 3)]
    join = pick(rng, ("; ", "\n- "))
    return f"{capital(about.name)}{':' + join if join != '; ' else ' - '}{join.join(lines)}.", about


def known_as(rng: random.Random, person: Entity) -> str:
    """Return the name, half the time with job or home town: Mara, Mara the baker, Mara of Fenwick."""
    return person.name + pick(rng, ("", "", f" the {person.values['job']}", f" of {person.values['town']}"))


def gifts(rng: random.Random, people: list[Entity], n_events: int) -> tuple[list[str], dict[str, Entity]]:
    """Tell a story in which people give two things to each other.

    Args:
        rng: source of the choices.
        people: who takes part.
        n_events: how often a thing changes hands. With three or more, at least one thing moves twice.

    Returns:
        The sentences, and {thing: who has it at the end}.
    """
    held = sample(rng, words.GIFTS, 2)
    owner = dict(zip(held, sample(rng, people, 2)))
    one, other = (known_as(rng, owner[item]) for item in held)
    text = [f"{one} has the {held[0]} and {other} has the {held[1]}."]
    for n in range(n_events):
        item = held[n] if n < 2 else pick(rng, held)
        giver = owner[item]
        taker = pick(rng, [p for p in people if p is not giver])
        text.append(pick(rng, GIVES).format(x=giver.name, y=taker.name, t=item) + ".")
        owner[item] = taker
    return text, owner


def giving(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Two things that change hands among three people, who has them at the end, and a fact about one person."""
    people = sample(rng, world.people, 3)
    if focus in world.people and focus not in people:
        people[0] = focus
    text, owner = gifts(rng, people, 2 + int(rng.random() * 2))
    text[0] = text[0] if rng.random() < 0.6 else f"{capital(pick(rng, DAYTIMES))} {text[0]}"
    text += [pick(rng, OWNS).format(t=item, x=who.name) + "." for item, who in sample(rng, list(owner.items()), 2)]
    who = pick(rng, people)
    return " ".join(text) + " " + tell(rng, world, who, [pick(rng, list(who.values))], False), who


def number(n: int, in_words: bool) -> str:
    """Return a number in digits or in words: 7 or seven."""
    return words.NUMBER_WORDS[n] if in_words else str(n)


def sums(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Some sums and differences, or a short story with one of each."""
    text = []
    if rng.random() < 0.6:
        in_words = rng.random() < 0.3
        for _ in range(3 + int(rng.random() * 3)):
            a, b = pick(rng, world.sums)
            form = pick(rng, SUMS if rng.random() < 0.6 else DIFFERENCES)
            said = in_words and a + b < len(words.NUMBER_WORDS)
            text.append(capital(form.format(a=number(a, said), b=number(b, said), c=number(a + b, said))) + ".")
        return " ".join(text), focus
    a, b = pick(rng, world.sums)
    one, other = sample(rng, world.people, 2)
    goods, they = pick(rng, words.COUNTED), one.pronoun
    if rng.random() < 0.5:
        text = [f"{known_as(rng, one)} has {a} {goods}.", pick(rng, (
            f"{other.name} brings {b} more.", f"Then {they} finds {b} more.",
            f"From {other.name} come {b} more {goods}.")),
            f"{a} plus {b} is {a + b}, so now {one.name} has {a + b} {goods}."]
    else:
        text = [f"{known_as(rng, one)} has {a + b} {goods}.", pick(rng, (
            f"{other.name} takes {b} of them.", f"Then {they} loses {b}.", f"{other.name} is given {b} {goods}.")),
            f"{a + b} minus {b} is {a}, so {one.name} still has {a} {goods}."]
    return " ".join(text) + " " + tell(rng, world, one, [pick(rng, list(one.values))], False), one


def counting(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Things counted one by one, or a list that ends with its length."""
    if rng.random() < 0.5:
        n, goods = 3 + int(rng.random() * 10), pick(rng, words.COUNTED)
        who = known_as(rng, pick(rng, world.people))
        return (f"{who} counts the {goods}: {', '.join(words.NUMBER_WORDS[1:n + 1])}. "
                f"So there are {words.NUMBER_WORDS[n]} {goods}."), focus
    return count_list(rng, world)[0] + ".", focus


def count_list(rng: random.Random, world: World) -> tuple[str, int]:
    """Return a list of things that ends with their number, and the number, 2 to 7."""
    n = 2 + int(rng.random() * 6)
    things = ["a " + g for g in sample(rng, words.GIFTS, n)]
    where = pick(rng, ("On the table", "In the bag", "In the box", "Under the bed"))
    owner = pick(rng, world.people).name
    return f"{where} of {owner} lie {', '.join(things[:-1])} and {things[-1]}. Their number is {n}", n


def spelling(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Two words spelled, with facts about their letters."""
    text = []
    for word in sample(rng, world.words, 2):
        spelled = " ".join(word.name)
        text.append(pick(rng, (f"The word {word.name} is spelled {spelled}.", f"Spell {word.name}: {spelled}.",
                               f"To spell {word.name} say {spelled}.", f"The letters of {word.name} are {spelled}.")))
        for attribute in sample(rng, list(word.values), 1 + int(rng.random() * 2)):
            if rng.random() < 0.25:
                text.append(f"{pick(rng, world.asked[word, attribute])} {capital(word.values[attribute])}.")
            else:
                text.append(pick(rng, world.told[word, attribute]).name + ".")
    return " ".join(text), focus


def comparison(rng: random.Random, world: World, focus: Entity | None) -> Passage:
    """Who of two people is older, often with their ages."""
    older, younger = pick(rng, world.older)
    text = [pick(rng, OLDER).format(x=older.name, y=younger.name) + "."]
    text += [tell(rng, world, who, ["age"], False) for who in sample(rng, (older, younger), 2)]
    if rng.random() < 0.5:
        text.append(text.pop(0))
    return " ".join(text), pick(rng, (older, younger))


# each passage as often as it is to be chosen
PASSAGES = [*[portrait] * 8, *[place] * 4, *[thing] * 4, *[questions] * 5, card, *[giving] * 2, *[sums] * 2, counting,
            *[spelling] * 2, comparison]
FEWEST_WORDS, MOST_WORDS = 40, 180


def document(world: World, index: int) -> str:
    """Return document `index` of the world: two or three passages, 40 to 200 words."""
    rng = rng_of(world.seed, DOCUMENT, index)
    passage = pick(rng, PASSAGES)
    text, focus = passage(rng, world, None)
    parts = [text]
    if passage in (portrait, thing, card) and rng.random() < 0.3:
        parts.insert(0, pick(rng, HEADINGS).format(focus.name))
    wanted = FEWEST_WORDS + int(rng.random() * 50)
    while (length := sum(part.count(" ") + 1 for part in parts)) < wanted:
        text, next_focus = pick(rng, PASSAGES)(rng, world, focus if rng.random() < 0.75 else None)
        if length + text.count(" ") > MOST_WORDS:
            continue
        parts.append(text)
        focus = next_focus or focus
    if focus and rng.random() < 0.2:
        parts.append(pick(rng, CLOSING).format(focus.name))
    return pick(rng, (" ", "\n")).join(parts)
