"""Measure how well the tokenizer compresses prose, code, numbers and several scripts, next to GPT-2's and GPT-4's.

    python -m scripts.tok_eval

Prints a table of bytes per token and writes $NANOCHAT_BASE_DIR/tokenizer/eval.json. The columns of GPT-2 and GPT-4
appear only if tiktoken has their vocabularies in its cache on this machine; nothing is downloaded.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import tiktoken

from nanochat.cli import COUNT, flag, parse, run_main
from nanochat.dataset import iter_documents
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.recipe import published
from nanochat.tokenizer import get_tokenizer, tokenizer_dir

OTHERS = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}
LONGEST = published.tokenizer.doc_cap  # characters of a document: what training saw of it

TEXTS = {
    "English prose": """The lighthouse keeper had not expected visitors before spring. When the knock came, he set \
down his cup, listened to the wind for a moment, and wondered whether he had imagined it. "Who's there?" he called. \
Nobody answered, but the door moved a little, as if somebody were leaning against it from the other side; and so, \
though it wasn't in his nature to hurry, he crossed the room in three strides and lifted the latch.
""",
    "Python": '''def moving_average(values: list[float], window: int = 5) -> list[float]:
    """Average of the last `window` values at every position."""
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    total, result = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append(total / min(i + 1, window))
    return result
''',
    "C": """static int find(const struct table *t, uint64_t key) {
    size_t slot = (key * 0x9E3779B97F4A7C15ull) >> t->shift;
    while (t->used[slot]) {
        if (t->keys[slot] == key) return (int)slot;
        slot = (slot + 1) & t->mask;
    }
    return -1; /* not there */
}
""",
    "HTML and JSON": """<ul class="menu">
  <li><a href="/about.html" title="About us">About</a></li>
</ul>
<script type="application/json">{"id": 4821, "tags": ["new", "sale"], "price": {"amount": 19.99, "currency": \
"EUR"}}</script>
""",
    "mathematics": r"""Let $f(x) = \frac{x^2 - 1}{x + 1}$ for $x \neq -1$. Then $\lim_{x \to -1} f(x) = -2$, and since
\[ \sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}, \] the mean of the first $n$ squares is $(n+1)(2n+1)/6$. """
    r"""Hence 3x + 7 = 22 gives x = 5.
""",
    "numbers": """1 2 4 8 16 32 64 128 256 512 1024 2048 4096; 3.14159265358979, 2.71828182845905, 1,234,567.89; \
2024-02-29 23:59:59;
17 + 25 = 42, 123 * 456 = 56088, 1000000 / 8 = 125000; 0xDEADBEEF, 6.02214076e23, +49 30 901820, 98.6 %, 1/3 = 0.3333
""",
    "spelling": "s,t,r,a,w,b,e,r,r,y: s:1 t:1 r:1 a:1 w:1 b:1 e:1 r:2 r:3 y:1; the letter r occurs 3 times. "
                "Q-U-E-U-E spells queue.\n",
    "German": """Als der Zug endlich hielt, war der Bahnsteig leer. Über den Gleisen hing ein dünner Nebel, und \
irgendwo schlug eine Glocke. Sie nahm ihren Koffer, zählte noch einmal ihr Geld und ging die Straße hinunter, die \
zum Fluss führte.
""",
    "French": """Ce matin-là, le marché était déjà plein de monde. On y vendait des pêches, du fromage de chèvre et \
des fleurs coupées ; un garçon jouait de l'accordéon près de la fontaine, et personne n'avait l'air pressé \
d'arriver où que ce soit.
""",
    "Russian": """Утром выпал первый снег, и весь двор стал тихим и белым. Дети выбежали из дома без шапок, а \
старая собака долго стояла на крыльце и не решалась сойти вниз. К обеду всё растаяло, и только у забора остались следы.
""",
    "Japanese": """春になると、川沿いの桜がいっせいに咲きはじめる。朝早く散歩に出かけると、\
まだ人の少ない道に花びらが静かに落ちていた。駅前の小さなパン屋では、焼きたてのメロンパンが\
並んでいる。「今日はいい天気ですね」と店の人が笑った。
""",
    "Chinese": """傍晚下了一场小雨，街上的人渐渐少了。老人把茶馆的灯点亮，又给靠窗的客人添了一壶热茶。客人说，\
他从很远的地方来，只想看看这座城里的桥。老人笑着说：“桥还在，只是河水比从前慢了。”
""",
    "Korean": """비가 그친 뒤에 우리는 천천히 산길을 올라갔다. 나뭇잎에서 물방울이 떨어지고, 멀리서 새 우는 \
소리가 들렸다. 정상에 도착하자 구름 사이로 마을이 보였고, 동생은 가방에서 \
김밥을 꺼내며 크게 웃었다.
""",
    "Arabic": """في المساء جلس الصياد على الشاطئ وأصلح شباكه القديمة. كان البحر هادئا، وكان القمر يلمع فوق الماء \
كأنه مصباح. قال لابنه: غدا نخرج قبل الفجر، فالسمك لا ينتظر من يتأخر في النوم.
""",
    "Hindi": """सुबह होते ही गाँव की गलियों में चहल-पहल शुरू हो गई। बच्चे स्कूल जा रहे थे और दादी आँगन में बैठकर \
चाय पी रही थीं। आम के पेड़ पर एक तोता बार-बार वही शब्द दोहरा रहा था।
""",
    "emoji and signs": "👩‍👩‍👧‍👦 went to 東京 🗼 → 3 × 🍣, 2 × 🍵 ≈ ¥4,500 ✅ … “wow” — naïve café ½ ±5 °C 🇯🇵🙏🏽\n",
}


@dataclass
class Config:
    max_chars: int = flag(1_000_000, "characters to read of the training text, and of the validation text",
                          within=COUNT)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print. Raises UserError if there is no tokenizer, or if it does not restore a text."""
    config = parse(Config, argv, __doc__)
    tokenizer = get_tokenizer()
    others = {OTHERS[name]: enc for name in OTHERS if (enc := _cached_encoding(name)) is not None}
    samples = {name: [text] for name, text in TEXTS.items()}
    notes = [f"{name}: left out, because tiktoken has not cached it here"
             for name in OTHERS.values() if name not in others]
    for split in ("train", "val"):
        try:
            samples[f"{split} shards"] = _documents(split, config.max_chars)
        except UserError as error:
            notes.append(f"{split} shards: left out ({error})")

    rows: dict[str, dict[str, Any]] = {}
    tokenizer.encode_flat([""])  # builds the encoder's tables before the clock starts
    start = time.perf_counter()
    for name, texts in samples.items():
        size, tokens = sum(len(text.encode()) for text in texts), int(tokenizer.encode_flat(texts)[1][-1])
        rows[name] = {"bytes": size, "tokens": tokens, "bytes_per_token": round(size / tokens, 4)}
    speed = sum(row["bytes"] for row in rows.values()) / (time.perf_counter() - start)
    for name, texts in samples.items():
        tokenizer.check_round_trip(texts)
        for other, enc in others.items():
            count = sum(len(ids) for ids in enc.encode_ordinary_batch(texts))
            rows[name][f"bytes_per_token_{other}"] = round(rows[name]["bytes"] / count, 4)

    print(f"{'bytes per token':<18}{'bytes':>12}{'tokens':>10}{'ours':>8}" + "".join(f"{other:>8}" for other in others))
    for name, row in rows.items():
        columns = [row["bytes_per_token"], *(row[f"bytes_per_token_{other}"] for other in others)]
        print(f"{name:<18}{row['bytes']:>12,}{row['tokens']:>10,}" + "".join(f"{value:>8.2f}" for value in columns))
    print(f"vocabulary {tokenizer.get_vocab_size():,}; every text decodes to itself; "
          f"encoded at {speed / 1e6:.1f} MB/s")
    for note in notes:
        print(note)
    result = {"fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.get_vocab_size(), "round_trip": True,
              "encode_bytes_per_second": round(speed), "texts": rows, "left_out": notes}
    with atomic_write(tokenizer_dir() / "eval.json", "w") as file:
        json.dump(result, file, indent=1, ensure_ascii=False)


def _documents(split: str, max_chars: int) -> list[str]:
    """Return the first documents of a split, each cut to LONGEST characters, `max_chars` characters in all."""
    documents, left = [], max_chars
    for document in iter_documents(split):
        documents.append(document[:min(LONGEST, left)])
        left -= len(documents[-1])
        if left <= 0:
            break
    if not any(documents):
        raise UserError("there is no text in them")
    return documents


def _cached_encoding(name: str) -> tiktoken.Encoding | None:
    """Return one of tiktoken's own encodings; None if its files are not in tiktoken's cache."""
    with mock.patch("tiktoken.load.read_file", side_effect=FileNotFoundError("not cached")):
        try:
            return tiktoken.get_encoding(name)
        except (FileNotFoundError, ValueError):
            return None


if __name__ == "__main__":
    run_main(main)
