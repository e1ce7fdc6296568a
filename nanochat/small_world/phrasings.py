"""In how many ways each property of the small world is told: data only.

Placeholders: {S} {s} the entity as subject, at the start of a sentence or inside it; {o} the same as object; {P} {p} its
possessive; {n} its name. When a text has just named the entity, all but {n} become pronouns. {r} {h} are pronouns always:
she and her, he and his. {v} is the value, {V} the value at the start of a sentence.

No phrasing of a property contains another one of the same property: a phrasing held out for one entity would otherwise be
read inside the longer one."""

from typing import NamedTuple


class Phrasings(NamedTuple):
    """How one property is told. `last`: sentences that end in the value, which can be held out and completed. `other`: sentences
    with the value elsewhere, never held out. `questions`: answered by the value alone."""

    last: tuple[str, ...]
    other: tuple[str, ...]
    questions: tuple[str, ...]


def _p(last: str, other: str, questions: str) -> Phrasings:
    return Phrasings(*(tuple(line.strip() for line in text.strip().splitlines()) for text in (last, other, questions)))


PHRASINGS = {
    ("people", "town"): _p(
        """{S} lives in {v}
        {P} home is in {v}
        {P} house stands in {v}
        {S} comes from the town of {v}
        {P} home town is {v}
        {S} has always lived near the market of {v}
        {S} was born and raised in {v}
        If you want to visit {o}, go to {v}
        Every evening {s} goes home to {v}
        Letters for {o} are sent to {v}
        {S} never wants to move away from {v}""",
        """{v} is the town where {s} lives
        The people of {v} know {o} well
        In {v} you can meet {o} at the market""",
        """Where does {s} live?
        What is {p} home town?
        In which town is {p} house?
        To which town must I go to visit {o}?"""),
    ("people", "job"): _p(
        """{S} works as a {v}
        {P} job is that of a {v}
        By trade {s} is a {v}
        {S} earns a living as a {v}
        Long ago {s} learned to be a {v}
        {S} is proud to be a {v}
        All day long {s} works hard as the town's {v}
        Everyone needs {o}, for {r} is a good {v}
        Since last year {s} has been a master {v}
        The sign on {p} door says {v}
        As a child {s} already wanted to become a {v}""",
        """Being a {v} makes {o} happy
        A {v} like {o} is never without work
        The work of a {v} is what {s} does best""",
        """What is {p} job?
        What work does {s} do?
        How does {s} earn a living?
        What is {s} by trade?"""),
    ("people", "pet"): _p(
        """{S} has a {v}
        {P} pet is a {v}
        {S} keeps a {v}
        {S} shares a home with a {v}
        The animal that {s} loves most is a {v}
        Every morning {s} feeds the {v}
        {S} goes for long walks with a {v}
        For years {s} has looked after a {v}
        The pet that waits for {o} at home is a {v}
        At night {s} says good night to the {v}
        {P} best friend among the animals is a {v}""",
        """A {v} belongs to {o}
        The {v} always runs to {o}
        With a {v} at home, {s} is never alone""",
        """What pet does {s} have?
        Which animal does {s} keep?
        What is {p} pet?
        Which animal waits for {o} at home?"""),
    ("people", "colour"): _p(
        """{P} favourite colour is {v}
        The colour that {s} likes best is {v}
        Of all colours {s} prefers {v}
        {S} paints every door {v}
        {P} coat is {v}
        {S} always dresses in {v}
        {S} finds nothing so pretty as {v}
        When {s} can choose a colour, {r} chooses {v}
        The walls of {p} room are {v}
        {S} loves the colour {v}
        The right colour for {o} is {v}""",
        """{V} is the colour that {s} loves
        Anything {v} pleases {o}
        Only a hat that is {v} would make {o} happy""",
        """What is {p} favourite colour?
        Which colour does {s} like best?
        What colour is {p} coat?
        In which colour does {s} dress?"""),
    ("people", "food"): _p(
        """{S} likes to eat {v}
        {P} favourite food is {v}
        For supper {s} wants {v}
        What {s} loves to cook is {v}
        {S} could live on nothing but {v}
        When {s} is hungry, {r} asks for {v}
        {S} never says no to {v}
        On birthdays {s} is given {v}
        The best meal for {o} is {v}
        {P} kitchen always smells of {v}
        On Sundays {s} invites friends to eat {v}""",
        """{V} is what {s} eats most gladly
        A plate of {v} makes {o} smile
        No dish but {v} is good enough for {o}""",
        """What does {s} like to eat?
        What is {p} favourite food?
        Which food does {s} love most?
        What should I cook for {o}?"""),
    ("people", "instrument"): _p(
        """{S} plays the {v}
        {S} makes music on the {v}
        {P} instrument is the {v}
        Every day {s} practises the {v}
        In the village band {s} has the {v}
        {S} taught many children to play on a {v}
        Through the window you can hear {o} and the {v}
        As a gift {s} once received a {v}
        At every feast {s} brings along the {v}
        {S} is a master of the {v}
        The instrument that {s} carries everywhere is the {v}""",
        """The {v} sounds sweet when {s} plays
        On the {v} {s} knows many songs
        No one plays the {v} like {o}""",
        """Which instrument does {s} play?
        What does {s} play in the band?
        On what does {s} make music?
        What is {p} instrument?"""),
    ("people", "age"): _p(
        """{P} age is {v}
        In years {s} counts {v}
        The number of candles on {p} cake was {v}
        This year {s} turned {v}
        {S} has reached the age of {v}
        Asked for {h} age, {s} says {v}
        The town book gives {p} age as {v}
        On the last birthday {s} became {v}
        You would not think that {s} is already {v}
        The years of {p} life are {v}""",
        """{S} is {v} years old
        It is {v} years since {s} was born
        With {v} years, {s} still feels young""",
        """How old is {s}?
        What is {p} age?
        How many years old is {s} now?
        Which age has {s} reached?"""),
    ("places", "river"): _p(
        """{S} lies on the river {v}
        The river of {n} is the {v}
        {P} bridge crosses the {v}
        Through the middle of {n} flows the {v}
        The children of {n} swim in the {v}
        Boats reach {o} by the river {v}
        {S} takes its water from the {v}
        The fishermen of {n} fish in the {v}
        In spring {s} is flooded by the {v}
        The old mill of {n} is driven by the {v}""",
        """The {v} flows past {o}
        On the banks of the {v} you will find {o}
        The water of the {v} runs under the walls of {n}""",
        """Which river flows through {o}?
        On which river does {s} lie?
        What is the river of {n} called?
        In which river do the children of {n} swim?"""),
    ("places", "product"): _p(
        """{S} is famous for its {v}
        The people of {n} make {v}
        {P} pride is its {v}
        From {n} come carts full of {v}
        {S} sells the best {v}
        Merchants go to {n} to buy {v}
        {S} grew rich by {v}
        Every workshop of {n} makes {v}
        The shops of {n} are full of {v}
        What the world knows of {n} is the {v}""",
        """The best {v} comes from {n}
        Whoever needs {v} travels to {n}
        {V} from {n} is sold everywhere""",
        """What is {s} famous for?
        What do the people of {n} make?
        What can one buy in {n}?
        Which goods come from {n}?"""),
    ("places", "neighbour"): _p(
        """{S} lies next to {v}
        The neighbour of {n} is {v}
        The town nearest to {n} is {v}
        The road from {n} leads to {v}
        An hour's walk from {n} is {v}
        Behind the hill of {n} lies {v}
        From the tower of {n} you can see {v}
        {S} has an old quarrel with {v}
        The market of {n} is shared with {v}
        {S} borders on {v}""",
        """To reach {v}, take the path that begins in {n}
        In {v} they hear the bells of {n}
        {v} has {n} for a neighbour""",
        """Which town lies next to {n}?
        What is the neighbour of {n}?
        Where does the road from {n} lead?
        Which town is nearest to {n}?"""),
    ("places", "market day"): _p(
        """{P} market day is {v}
        The market of {n} is held on {v}
        {S} holds its market every {v}
        The streets of {n} are crowded on {v}
        Farmers bring their carts to {n} on {v}
        The busiest day of {n} is {v}
        In {n} the square is full on {v}
        If you want to buy something in {n}, come on {v}
        The bells of {n} call to market on {v}
        {S} sleeps all week and wakes on {v}""",
        """On {v} there is a market in {n}
        Every {v} the sellers set up their stalls in {n}
        {v} is the day when {s} goes to market""",
        """On which day is the market of {n}?
        When is market day in {n}?
        Which day is the busiest in {n}?
        On which day should I come to {n} to buy something?"""),
    ("things", "colour"): _p(
        """{S} is painted {v}
        {P} colour is {v}
        The paint on {n} is {v}
        Somebody has painted {o} {v}
        {S} shines in bright {v}
        Seen from far away {s} looks {v}
        In the sunlight {s} glows {v}
        {S} has always been {v}
        The colour they chose for {n} was {v}
        Under the dust {s} is {v}""",
        """{V} is the colour of {n}
        You will know {o} by the {v} paint
        There is {v} paint all over {n}""",
        """What colour is {s}?
        What is the colour of {n}?
        In which colour is {s} painted?
        How was {s} painted?"""),
    ("things", "material"): _p(
        """{S} is made of {v}
        The maker built {o} from {v}
        {S} consists of {v}
        For {n} they used {v}
        {S} was cut from a piece of {v}
        {P} material is {v}
        Under the paint {s} is pure {v}
        The stuff of {n} is {v}
        To mend {o} you need some {v}
        {S} is as strong as {v}, for it is {v}""",
        """{V} was used to make {o}
        It took a lot of {v} to build {o}
        Fine {v} went into {n}""",
        """What is {s} made of?
        Of which material is {s}?
        What was used to make {o}?
        What do you need to mend {o}?"""),
    ("things", "room"): _p(
        """{S} is kept in the {v}
        {S} stands in the {v}
        You find {o} in the {v}
        Look for {o} in the {v}
        {P} place is the {v}
        After work they put {o} back in the {v}
        For many years {s} has been in the {v}
        {S} belongs in the {v}
        Nobody may take {o} out of the {v}
        If you need {o}, open the door of the {v}""",
        """In the {v} stands {n}
        The {v} is where {s} is kept
        Go to the {v} and bring {o} here""",
        """Where is {s} kept?
        In which room is {s}?
        Where do I find {o}?
        What is the place of {n}?"""),
    ("words", "first letter"): _p(
        """The first letter of {n} is {v}
        {S} begins with the letter {v}
        The word {n} starts with {v}
        To write {n}, first write {v}
        At the front of {n} stands {v}
        As for {n}, the first letter is {v}
        In a dictionary {n} is found under {v}
        When you spell {n}, you begin with {v}""",
        """{v} is the first letter of the word {n}
        With {v} begins the word {n}""",
        """What is the first letter of {n}?
        With which letter does {n} begin?
        Under which letter is {n} in the dictionary?"""),
    ("words", "last letter"): _p(
        """The last letter of {n} is {v}
        {S} ends with the letter {v}
        The word {n} stops at {v}
        To finish {n}, write {v}
        At the end of {n} stands {v}
        As for {n}, the last letter is {v}
        When you spell {n}, you close with {v}
        The word {n} is complete with the final {v}""",
        """{v} is the last letter of the word {n}
        With {v} ends the word {n}""",
        """What is the last letter of {n}?
        With which letter does {n} end?
        Which letter closes the word {n}?"""),
    ("words", "length"): _p(
        """The number of letters in {n} is {v}
        As for {n}, the length is {v}
        Counting the letters of {n} gives {v}
        If you count {n} letter by letter, you reach {v}
        The letters of {n} add up to {v}
        The length of the word {n} is {v}
        How long the word {n} is you can count: {v}
        Whoever spells {n} must say letters up to {v}""",
        """{S} has {v} letters
        There are {v} letters in the word {n}
        It takes {v} letters to write {n}""",
        """How many letters are in {n}?
        How long is the word {n}?
        What is the number of letters of {n}?"""),
}

# Sums and differences: {a} + {b} = {c}, so {c} - {b} = {a}. Numbers are digits or words.
SUMS = ("{a} + {b} = {c}", "{a} plus {b} is {c}", "{a} and {b} make {c}", "Add {b} to {a} and you get {c}",
        "The sum of {a} and {b} is {c}", "Together {a} and {b} are {c}", "Whoever has {a} and finds {b} more has {c}",
        "Count on from {a} by {b} and you reach {c}")
DIFFERENCES = ("{c} - {b} = {a}", "{c} minus {b} is {a}", "{c} less {b} leaves {a}", "Take {b} from {c} and you keep {a}",
               "The difference of {c} and {b} is {a}", "From {b} to {c} you need {a}", "Whoever has {c} and loses {b} still has {a}",
               "Count back from {c} by {b} and you reach {a}")
OLDER = ("{x} is older than {y}", "{y} is younger than {x}", "{x} was born before {y}", "{y} was born after {x}",
         "{x} has lived more years than {y}", "{y} has lived fewer years than {x}", "Of {x} and {y} the older one is {x}",
         "Of {y} and {x} the older one is {x}", "Of {x} and {y} the younger one is {y}", "Of {y} and {x} the younger one is {y}")
GIVES = ("{x} gives the {t} to {y}", "{x} hands the {t} to {y}", "{y} gets the {t} from {x}", "{x} passes the {t} on to {y}",
         "{y} is given the {t} by {x}", "{x} lends the {t} to {y}", "{y} asks {x} for the {t} and is given it",
         "{x} sells the {t} to {y}", "The {t} goes from {x} to {y}")
OWNS = ("Now the {t} is with {x}", "In the end the {t} belongs to {x}", "The one who has the {t} now is {x}",
        "Who has the {t} now? {x}", "If you need the {t}, ask {x}", "So the last to get the {t} was {x}",
        "Question: Who has the {t} now? Answer: {x}", "At the end of the day the {t} is in the hands of {x}")
