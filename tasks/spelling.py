"""Letters of words: SimpleSpelling spells a word, SpellingBee counts a letter in a word and checks it by calculator.

A model reads tokens, not letters, so it has to learn the letters of each token. Test words never occur in training, in
either task.
"""

from nanochat.dataset.identity import digest_of
from nanochat.small_world.world import pick
from tasks.base import (
    Task,
    calculator_parts,
    meant_number,
    non_negative,
    number_after_hashes,
    one_of,
    question_and_answer,
    reference_text,
    rng_for,
    same_number,
    text_part,
    until_assistant_end,
)
from tasks.words import load_words

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SIZES = {"train": 10_000, "test": 256}
QUOTES = ("", "'", '"')

# {w} is the word and {l} the letter, each with or without quotes. The plain questions suit the smallest model.
PLAIN_QUESTIONS = ("How many {l} are in {w}?", "How many {l} does {w} have?", "Count {l} in {w}.")
ALL_QUESTIONS = (
    *PLAIN_QUESTIONS, "How many {l} are in the word {w}?", "How many {l} are there in {w}?",
    "How often does {l} stand in {w}?", "How often is the letter {l} found in {w}?",
    "What is the number of {l} in {w}?", "Tell me how many {l} the word {w} has.", "Please count {l} in {w}.",
    "Can you count the {l} in {w}?", "Do you know how many {l} are in {w}?", "In {w}, how many {l} are there?",
    "The word {w}: how many {l} does it contain?", "Count of {l} in {w}?",
    "Find out how often {l} appears in the word {w}.", "I need to know how many times the letter {l} is used in {w}.",
    "How many of the letters of {w} are {l}?", "number of {l} in {w}",
    "If I spell {w}, how many times do I write {l}?", "Look at {w} and say how many {l} you see.",
    "Is there any {l} in {w}, and how many?", "Wie viele {l} sind in {w}?", "Wie oft kommt {l} in {w} vor?",
    "Wie oft steht der Buchstabe {l} im Wort {w}?", "Zähle die {l} in {w}.", "Combien de {l} y a-t-il dans {w}?",
    "Combien de fois trouve-t-on la lettre {l} dans le mot {w}?", "Compte les {l} dans {w}.",
    "¿Cuántas {l} hay en {w}?", "¿Cuántas veces aparece la letra {l} en la palabra {w}?", "Cuenta las {l} de {w}.",
    "Quante {l} ci sono in {w}?", "Quante volte compare la lettera {l} nella parola {w}?", "Conta le {l} in {w}.",
    "Quantos {l} há em {w}?", "Quantas vezes a letra {l} aparece na palavra {w}?", "Hoeveel {l} zitten er in {w}?",
    "Hoe vaak komt de letter {l} voor in het woord {w}?", "Hur många {l} finns det i {w}?",
    "Ile liter {l} jest w słowie {w}?", "Kolik {l} je ve slově {w}?", "{w} kelimesinde kaç tane {l} var?",
    "Сколько букв {l} в слове {w}?", "Скільки літер {l} у слові {w}?", "{w}の中に{l}はいくつありますか?",
    "{w}という単語に{l}は何回出てきますか?", "{w}里有几个{l}?", "单词{w}中字母{l}出现了多少次?",
    "{w}에 {l}이 몇 개 있나요?", "{w} में कितने {l} हैं?", "كم عدد الحرف {l} في {w}?",
)


class SpellingTask(Task):
    """One conversation for each word, in an order that depends on the seed. Words repeat if there are too few.

    The attribute `source` says where the words come from: "words_alpha" or "invented".
    """

    def __init__(self, split: str, size: int | None = None, seed: int = 0, source: str = "auto", fetch: bool = False):
        """Load the words.

        Args:
            split: "train" or "test".
            size: number of conversations; by default 10,000 in training and 256 in the test.
            seed: of the order of the words.
            source, fetch: as in `load_words` of tasks/words.py.
        """
        self.split, self.seed = one_of("split of the words", split, tuple(SIZES)), non_negative("seed", seed)
        self.size = SIZES[split] if size is None else non_negative("size", size)
        words, self.source = load_words(split, source, fetch)
        rng = rng_for("spelling", split, seed)
        self.words = list(words)
        rng.shuffle(self.words)

    def __len__(self) -> int:
        return self.size

    def identity(self) -> dict[str, str]:
        return {**super().identity(), f"{self.name}, words of {self.source}": digest_of(self.words)}

    def word(self, i: int) -> str:
        """Return the word of conversation i."""
        return self.words[i % len(self.words)]


class SimpleSpelling(SpellingTask):
    """Spell a word: the letters, separated by commas."""

    name = "SimpleSpelling"

    def conversation(self, i: int) -> dict:
        word = self.word(i)
        return question_and_answer(f"Spell the word: {word}", spelled(word))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Return whether the answer equals the reference."""
        return until_assistant_end(answer).strip() == reference_text(conversation)


class SpellingBee(SpellingTask):
    """How often a letter occurs in a word. The answer spells, counts, asks the calculator, and ends with the count."""

    name = "SpellingBee"

    def __init__(self, split: str, size: int | None = None, seed: int = 0, source: str = "auto", fetch: bool = False,
                 phrasings: str = "all"):
        """Load the words.

        Args:
            split, size, seed, source, fetch: as in SpellingTask.
            phrasings: of the question: "all" in many languages and scripts, or "plain", three in English.
        """
        super().__init__(split, size, seed, source, fetch)
        self.phrasings = one_of("kind of phrasings", phrasings, ("all", "plain"))

    def conversation(self, i: int) -> dict:
        word, rng = self.word(i), rng_for(self.name, self.split, self.seed, i)
        letter = pick(rng, word if rng.random() < 0.9 else ALPHABET)
        count = str(word.count(letter))
        return question_and_answer(self.question(rng, word, letter), [
            text_part(f"{spelled(word)}\n{counted(word, letter)}"),
            *calculator_parts(f"'{word}'.count('{letter}')", count), text_part(f"#### {count}")])

    def question(self, rng, word: str, letter: str) -> str:
        """Return a random question for the count of a letter."""
        if self.phrasings == "plain":   # single quotes as in the call, so that the word has the same tokens in both
            return pick(rng, PLAIN_QUESTIONS).format(w=f"'{word}'", l=f"'{letter}'")
        w, l = (mark + item + mark for mark, item in ((pick(rng, QUOTES), word), (pick(rng, QUOTES), letter)))
        asked = pick(rng, ALL_QUESTIONS)
        if rng.random() < 0.3:   # people often leave out capitals and punctuation
            asked = asked[:1].lower() + asked[1:]
        if rng.random() < 0.3:
            asked = asked.rstrip("?.")
        return asked.format(w=w, l=l)

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Return whether the number after the first `#### ` is the count."""
        return number_after_hashes(until_assistant_end(answer)) == number_after_hashes(reference_text(conversation))

    def evaluate_lenient(self, conversation: dict, answer: str) -> bool:
        """Return whether the number that the answer gives, in any usual form, is the count."""
        return same_number(meant_number(until_assistant_end(answer)), number_after_hashes(reference_text(conversation)))


def spelled(word: str) -> str:
    """Return the spelling in the published form: bramok:b,r,a,m,o,k."""
    return f"{word}:{','.join(word)}"


def counted(word: str, letter: str) -> str:
    """Return the letters of a word, with a count at each wanted one: for o in oblong, o1 b l o2 n g."""
    return " ".join(f"{one}{word[:i].count(letter)}" if one == letter else one for i, one in enumerate(word, 1))
