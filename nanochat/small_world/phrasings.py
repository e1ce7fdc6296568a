"""The phrasings that tell and ask for each attribute of the small world: data only.

Placeholders: {S} and {s} are the entity as subject, at the start of a sentence or inside it; {o} is the entity as
object; {P} and {p} are its possessive; {n} is its name. If the text has just named the entity, all but {n} become
pronouns. {r} and {h} are always pronouns: she and her, he and his. {v} is the value, {V} the value at the start of a
sentence.

No phrasing of an attribute contains another one of the same attribute. Otherwise a phrasing held out for an entity
could still be read inside a longer one.
"""

from typing import NamedTuple


class Phrasings(NamedTuple):
    """How one attribute is told and asked for.

    Attributes:
        last: sentences that end in the value. They can be held out, and completed by a model.
        other: sentences with the value elsewhere; never held out.
        questions: questions that the value alone answers.
    """

    last: tuple[str, ...]
    other: tuple[str, ...]
    questions: tuple[str, ...]


def _p(last: str, other: str, questions: str) -> Phrasings:
    return Phrasings(*(tuple(line.strip() for line in text.strip().splitlines()) for text in (last, other, questions)))


PHRASINGS = {
    ("people", "town"): _p(
        """{S} lives in {v}
        {S} comes from {v}
        {P} home is {v}
        {P} house stands in {v}
        {S} was born in {v}
        {S} never leaves {v}
        The town of {n} is {v}
        Every evening {s} goes home to {v}""",
        """In {v} lives {n}
        {v} is home to {n}""",
        """Where does {s} live?
        Where is {s} from?
        What is {p} town?"""),
    ("people", "job"): _p(
        """{S} works as a {v}
        {S} is a {v}
        {P} trade is that of a {v}
        By day {s} is the best {v}
        {S} learned to be a {v}
        {S} earns bread as a {v}
        The job of {n} is {v}
        The sign at {p} door says {v}""",
        """A good {v} is {n}
        One {v} is called {n}""",
        """What is {p} job?
        What does {s} work as?
        What is {p} trade?"""),
    ("people", "pet"): _p(
        """{S} has a {v}
        {S} keeps a {v}
        {P} pet is a {v}
        {S} feeds the {v}
        {S} walks with a {v}
        {P} animal friend is the {v}
        The pet of {n} is a {v}
        At home {s} talks to a {v}""",
        """A {v} follows {n}
        One {v} belongs to {n}""",
        """What pet does {s} have?
        Which animal does {s} keep?
        What is {p} pet?"""),
    ("people", "colour"): _p(
        """{S} likes {v}
        {P} colour is {v}
        {S} prefers {v}
        {S} dresses in {v}
        {P} coat is {v}
        {S} paints every door {v}
        The colour of {n} is {v}
        The walls of {p} room are {v}""",
        """In a {v} coat comes {n}
        The one in {v} is {n}""",
        """What is {p} colour?
        Which colour does {s} like?
        What colour is {p} coat?"""),
    ("people", "food"): _p(
        """{S} eats {v}
        {S} cooks {v}
        {S} wants {v}
        {P} favourite food is {v}
        {P} supper is {v}
        {S} never says no to {v}
        The meal for {o} is {v}
        When hungry {s} asks for {v}""",
        """Some {v} is for {n}
        With {v} you please {n}""",
        """What does {s} eat?
        What is {p} favourite food?
        What should I cook for {o}?"""),
    ("people", "instrument"): _p(
        """{S} plays the {v}
        {P} instrument is the {v}
        {S} practises the {v}
        {S} sings to the {v}
        {S} carries a {v}
        {S} taught us the {v}
        The music of {n} is the {v}
        At the feast {s} brings the {v}""",
        """On the {v} we hear {n}
        The {v} sounds well under {n}""",
        """What does {s} play?
        What is {p} instrument?
        Which instrument does {s} carry?"""),
    ("people", "age"): _p(
        """{P} age is {v}
        {S} turned {v}
        {S} is aged {v}
        {S} became {v}
        {S} counts the years to {v}
        {P} years are {v}
        The age of {n} is {v}
        The candles on {p} cake were {v}""",
        """Aged {v} is {n}
        With {v} years comes {n}""",
        """How old is {s}?
        What is {p} age?
        How many years has {s}?"""),
    ("places", "river"): _p(
        """{S} lies on the {v}
        {P} river is the {v}
        {P} bridge crosses the {v}
        {S} drinks from the {v}
        {P} mill stands by the {v}
        Boats reach {o} by the {v}
        The river of {n} is the {v}
        The children of {n} swim in the {v}""",
        """The {v} flows past {n}
        On the {v} lies {n}""",
        """Which river flows through {o}?
        On which river does {s} lie?
        What is {p} river?"""),
    ("places", "product"): _p(
        """{S} makes {v}
        {S} sells {v}
        {S} is famous for {v}
        {P} pride is {v}
        {P} shops are full of {v}
        {S} grew rich by {v}
        The goods of {n} are {v}
        Merchants go to {n} for {v}""",
        """The best {v} comes from {n}
        For {v} go to {n}""",
        """What is {s} famous for?
        What does {s} make?
        What can one buy in {n}?"""),
    ("places", "neighbour"): _p(
        """{S} lies next to {v}
        {P} neighbour is {v}
        {S} borders on {v}
        {P} road leads to {v}
        {P} tower looks over to {v}
        {S} quarrels with {v}
        The town nearest to {n} is {v}
        An hour's walk from {n} is {v}""",
        """In {v} they hear the bells of {n}
        To {v} you pass through {n}""",
        """Which town lies next to {n}?
        What is {p} neighbour?
        Where does {p} road lead?"""),
    ("places", "market day"): _p(
        """{P} market day is {v}
        {P} market is on {v}
        {P} streets are full on {v}
        {S} wakes up on {v}
        {S} rings its bells on {v}
        {S} sells and buys on {v}
        The busy day of {n} is {v}
        Farmers bring their carts to {n} on {v}""",
        """On {v} go to market in {n}
        Every {v} is market day in {n}""",
        """When is {p} market day?
        On which day is the market of {n}?
        Which day is the busy one in {n}?"""),
    ("things", "colour"): _p(
        """{S} is painted {v}
        {P} colour is {v}
        {S} shines {v}
        {S} looks {v}
        {P} paint is {v}
        Somebody painted {o} {v}
        The colour of {n} is {v}
        In the sunlight {s} glows {v}""",
        """Some {v} paint is on {n}
        Bright and {v} is {n}""",
        """What colour is {s}?
        How is {s} painted?
        What is {p} paint?"""),
    ("things", "material"): _p(
        """{S} is made of {v}
        {S} consists of {v}
        {P} material is {v}
        {S} was cut from {v}
        {S} is as strong as {v}
        They built {o} from {v}
        The material of {n} is {v}
        To mend {o} you need {v}""",
        """Much {v} went into {n}
        From {v} they made {n}""",
        """What is {s} made of?
        What is {p} material?
        What do you need to mend {o}?"""),
    ("things", "room"): _p(
        """{S} is kept in the {v}
        {S} stands in the {v}
        {P} place is the {v}
        {S} belongs in the {v}
        {S} hides in the {v}
        You find {o} in the {v}
        The place of {n} is the {v}
        Never take {o} out of the {v}""",
        """In the {v} stands {n}
        There in the {v} is {n}""",
        """Where is {s} kept?
        What is {p} place?
        Where do I find {o}?"""),
    ("words", "first letter"): _p(
        """{S} begins with {v}
        {S} starts with {v}
        {P} first letter is {v}
        {P} head is {v}
        To write {n} begin with {v}
        At the front of {n} stands {v}
        The first letter of {n} is {v}
        In a dictionary {n} is under {v}""",
        """With {v} begins the word {n}
        The letter {v} opens the word {n}""",
        """What is the first letter of {n}?
        With which letter does {n} begin?
        Under which letter is {n} in the dictionary?"""),
    ("words", "last letter"): _p(
        """{S} ends with {v}
        {S} stops at {v}
        {P} last letter is {v}
        {P} tail is {v}
        To finish {n} write {v}
        At the end of {n} stands {v}
        The last letter of {n} is {v}
        To spell {n} close with {v}""",
        """With {v} ends the word {n}
        The letter {v} closes the word {n}""",
        """What is the last letter of {n}?
        With which letter does {n} end?
        Which letter closes {n}?"""),
    ("words", "length"): _p(
        """{P} length is {v}
        {P} number of letters is {v}
        {P} letters count {v}
        {S} is as long as {v}
        The letters in {n} are {v}
        The length of {n} is {v}
        Count the letters of {n} and get {v}
        To spell {n} the letters go up to {v}""",
        """There are {v} letters in {n}
        It takes {v} letters to write {n}""",
        """How many letters are in {n}?
        How long is {n}?
        What is the length of {n}?"""),
}

# Sums and differences: {a} + {b} = {c}, so {c} - {b} = {a}. Numbers are digits or words.
SUMS = ("{a} + {b} = {c}", "{a} plus {b} is {c}", "{a} and {b} make {c}", "Add {b} to {a} and you get {c}",
        "The sum of {a} and {b} is {c}", "Together {a} and {b} are {c}", "Whoever has {a} and finds {b} more has {c}",
        "Count on from {a} by {b} and you reach {c}")
DIFFERENCES = ("{c} - {b} = {a}", "{c} minus {b} is {a}", "{c} less {b} leaves {a}",
               "Take {b} from {c} and you keep {a}", "The difference of {c} and {b} is {a}",
               "From {b} to {c} you need {a}", "Whoever has {c} and loses {b} still has {a}",
               "Count back from {c} by {b} and you reach {a}")
OLDER = ("{x} is older than {y}", "{y} is younger than {x}", "{x} was born before {y}", "{y} was born after {x}",
         "{x} has lived more years than {y}", "{y} has lived fewer years than {x}",
         "Of {x} and {y} the older one is {x}", "Of {y} and {x} the older one is {x}",
         "Of {x} and {y} the younger one is {y}", "Of {y} and {x} the younger one is {y}")
GIVES = ("{x} gives the {t} to {y}", "{x} hands the {t} to {y}", "{y} gets the {t} from {x}",
         "{x} passes the {t} on to {y}", "{y} is given the {t} by {x}", "{x} lends the {t} to {y}",
         "{y} asks {x} for the {t} and is given it", "{x} sells the {t} to {y}", "The {t} goes from {x} to {y}")
OWNS = ("Now the {t} is with {x}", "In the end the {t} belongs to {x}", "The one who has the {t} now is {x}",
        "Who has the {t} now? {x}", "If you need the {t}, ask {x}", "So the last to get the {t} was {x}",
        "Question: Who has the {t} now? Answer: {x}", "At the end of the day the {t} is in the hands of {x}")
