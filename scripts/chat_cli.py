"""Chat with a model in the terminal.

    python -m scripts.chat_cli                                     # a conversation; /help lists the commands
    python -m scripts.chat_cli -i mid -p "Why is the sky blue?"    # one answer, to stdout

Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice, leaves. A call of the calculator and its result show as [2+2 = 4].
"""

import sys
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Literal

from nanochat.cli import COUNT, LARGEST, PENALTY, STEP_OR_LAST, TEMPERATURE, TOP_K, TOP_P, Range, flag, parse, run_main
from nanochat.distributed import init_ranks
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.loading import load_for_decoding
from nanochat.request import CHAT_CLI as DEFAULTS
from nanochat.request import answer_reserve
from nanochat.tokenizer.stream import TerminalText

HELP = """/clear          forget the conversation
/temperature X  0 takes the most likely token each time, higher is more varied
/topk N         sample from the N most likely tokens; 0 = all
/help           this
/quit           leave; so do Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer."""


@dataclass
class Config:
    """Flags of chat_cli."""

    source: str = flag("sft", "which model: sft, mid, rl, base, or a folder", short="i")
    model_tag: str = flag("", "which of its models; unset takes the only or the deepest one", short="g")
    step: int = flag(-1, "which of its checkpoints; -1 is the last", short="s", within=STEP_OR_LAST)
    prompt: str = flag("", "one question to answer; unset starts a conversation", short="p")
    temperature: float = flag(DEFAULTS.temperature, "0 takes the most likely token each time; higher is more varied",
                              short="t", within=TEMPERATURE)
    top_k: int = flag(DEFAULTS.top_k, "sample from this many of the most likely tokens; 0 = all", short="k",
                      within=TOP_K)
    top_p: float = flag(DEFAULTS.top_p, "sample from the most likely tokens that together have this probability",
                        within=TOP_P)
    repetition_penalty: float = flag(DEFAULTS.repetition_penalty, "above 1 makes tokens seen before less likely",
                                     within=PENALTY)
    max_tokens: int = flag(DEFAULTS.max_tokens, "tokens of an answer at most", within=COUNT)
    seed: int = flag(-1, "of the random numbers; -1 takes new ones each time", within=Range(0, LARGEST, also=-1))
    quantize: Literal["none", "int8"] = flag("none", "int8: weights of 8 bits, faster on a CPU, a little less exact")
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")


def turns_to_drop(turns: list[list[int]], question: list[int], room: int) -> int:
    """Return how many of the oldest turns to drop so that the rest, <|bos|> and the question fit into `room` tokens.

    Raises UserError if the question alone is too long.
    """
    left = room - 1 - len(question)
    if left < 0:
        raise UserError(f"that is {len(question):,} tokens; the model can read {max(room - 1, 0):,} and still answer: "
                        "say it shorter")
    keep = 0
    for turn in reversed(turns):
        left -= len(turn)
        if left < 0:
            break
        keep += 1
    return len(turns) - keep


def without_unfinished_call(answer: list[int], tokenizer) -> list[int]:
    """Return an answer without a tool call or result that was cut short: the model should not continue from it."""
    for name in ("output", "python"):
        start, end = (tokenizer.encode_special(f"<|{name}_{place}|>") for place in ("start", "end"))
        places = [i for i, token in enumerate(answer) if token == start]
        if places and end not in answer[places[-1]:]:
            answer = answer[:places[-1]]
    return answer


@dataclass
class Conversation:
    """A conversation with a model. turns: its tokens, one list for each question with its answer."""

    engine: Engine
    config: Config
    turns: list[list[int]] = field(default_factory=list)

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece, with remarks in brackets on lines of their own.

        What was yielded is kept in `turns`, also if the caller stops early. Raises UserError for a question that is too
        long.
        """
        tokenizer, config, context = self.engine.tokenizer, self.config, self.engine.model.config.sequence_len
        special = tokenizer.encode_special
        question = [special("<|user_start|>"), *tokenizer.encode(text), special("<|user_end|>"),
                    special("<|assistant_start|>")]
        dropped = turns_to_drop(self.turns, question, context - answer_reserve(config.max_tokens, context))
        if dropped:
            del self.turns[:dropped]
            yield (f"[the conversation no longer fits the model's {context:,} tokens: its oldest {dropped} "
                   f"turn{'s are' if dropped > 1 else ' is'} forgotten]\n")
        prompt = [tokenizer.get_bos_token_id(), *(token for turn in self.turns for token in turn), *question]
        room = min(config.max_tokens, context - len(prompt))
        answer: list[int] = []
        decoded, ended = TerminalText(tokenizer), False
        try:
            for (token,), _ in self.engine.generate(
                    prompt, max_tokens=room, temperature=config.temperature, top_k=config.top_k or None,
                    top_p=config.top_p,
                    repetition_penalty=config.repetition_penalty, seed=None if config.seed < 0 else config.seed):
                if token in self.engine.stops:
                    ended = True
                    break
                answer.append(token)
                if piece := decoded.feed(token):
                    yield piece
            if piece := decoded.finish():
                yield piece
        finally:  # an answer that was stopped stays in the conversation
            self.turns.append([*question, *without_unfinished_call(answer, tokenizer), special("<|assistant_end|>")])
        if not ended:
            why = ("--max-tokens sets how many" if room == config.max_tokens
                   else f"the model's {context:,} are full; /clear begins anew")
            yield f"\n[the answer ends after {room:,} tokens: {why}]"


def show(pieces: Generator[str, None, None]) -> None:
    """Write pieces to stdout as they come, and end the line."""
    try:
        with closing(pieces):
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        print(flush=True)


def command(line: str, chat: Conversation) -> str | None:
    """Run a command, a line that begins with /. Return what to print, None to leave."""
    name, _, value = line.partition(" ")
    config, value = chat.config, value.strip()
    if name in ("/quit", "/exit"):
        return None
    if name == "/clear":
        chat.turns.clear()
        return "[a new conversation]"
    try:
        if name == "/temperature":
            if not 0 <= (number := float(value)) < float("inf"):
                raise ValueError
            config.temperature = number
            return f"[temperature {config.temperature:g}]"
        if name == "/topk":
            if (count := int(value)) < 0:
                raise ValueError
            config.top_k = count
            return f"[top_k {count}]"
    except ValueError:
        now = config.temperature if name == "/temperature" else config.top_k
        return f"[{name} takes a number from 0 on, not {value!r}; it is {now:g} now]"
    return HELP if name == "/help" else f"[there is no {name}]\n{HELP}"


def converse(chat: Conversation) -> None:
    """Read lines and answer them until the user leaves."""
    pressed = False  # whether the last key was Ctrl-C
    while True:
        try:
            line = input("\nYou: ").strip()
            pressed = False
            if not line:
                continue
            if line.startswith("/"):
                said = command(line, chat)
                if said is None:
                    return
                print(said)
                continue
            sys.stdout.write("Model: ")
            show(chat.ask(line))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if pressed:
                print()
                return
            pressed = True
            print("[stopped; Ctrl-C again leaves]", flush=True)
        except UserError as error:
            print(f"[{error}]")


def main(argv: Sequence[str] | None = None) -> None:
    """Answer once, or until the user leaves. Raises UserError for what the user can correct."""
    config = parse(Config, argv, __doc__)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        with suppress(AttributeError, ValueError):  # not a file: a test, a notebook
            stream.reconfigure(errors=errors)
    device = init_ranks(config.device_type).device
    model, tokenizer, meta = load_for_decoding(config.source, device, model_tag=config.model_tag or None,
                                               step=None if config.step < 0 else config.step, quantize=config.quantize)
    chat = Conversation(Engine(model, tokenizer), config)
    if config.prompt:
        show(chat.ask(config.prompt))
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - arrows and history for input()
    print(f"{meta['loaded']}\n/help for help, Ctrl-C stops an answer, Ctrl-D leaves")
    if config.source == "base":
        print("[a base model continues text; it has not learnt to chat]")
    converse(chat)


if __name__ == "__main__":
    run_main(main)
