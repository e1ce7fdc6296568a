"""Get text to train on, in one of three ways.

    python -m nanochat.dataset -n 240                    # 240 training shards of FineWeb-Edu and its validation shard
    python -m nanochat.dataset -n 170 --source=climbmix  # the same of ClimbMix, from which models learn faster
    python -m nanochat.dataset import notes/ log.txt.gz  # your .txt, .md, .jsonl, .json, .parquet files, or their .gz
    python -m nanochat.dataset small-world               # text of the built-in generator: no network, no files

Each command takes --help. All of them write shards into $NANOCHAT_BASE_DIR/base_data. The last two take --to FOLDER
to write somewhere else.
"""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from nanochat.checks import NOTHING_CHANGED, dry_run_flag, need_writable
from nanochat.cli import COUNT, FAR, SEED, Range, flag, parse, parser_of, run_main
from nanochat.dataset.readers import TextFormat, look_at_files
from nanochat.dataset.shards import FINEWEB_EDU, HUB_TEXTS, data_dir
from nanochat.files import in_words
from nanochat.recipe import published

REPLACE = "replace shards that were imported or generated earlier"


@dataclass
class FetchFlags:
    num_files: int = flag(MISSING, "training shards to fetch, about 100 MB each, beside the validation shard; -1 is "
                                   f"all ({', '.join(f'{text.last} of {text.title}' for text in HUB_TEXTS.values())})",
                           short="n", within=Range(0, FAR, also=-1))
    source: Literal[tuple(HUB_TEXTS)] = flag(FINEWEB_EDU, "which data set")
    num_workers: int = flag(4, "parallel downloads", short="w", within=Range(1, 256))
    revision: str = flag("main", "branch, tag or commit of the data set; resolved to a commit at the first fetch, "
                                 "which later fetches reuse")
    dry_run: bool = dry_run_flag()


@dataclass
class ImportFlags:
    to: str = flag("", "folder to write the shards to; unset is base_data")
    doc_separator: str = flag("", "in .txt and .md, a line that holds only this ends a document; "
                                  "unset: each file is one document")
    val_fraction: float = flag(0.01, "share of the documents kept for validation, from 0 to 1; at least one document",
                               within=Range(above=0, below=1))
    text_column: str = flag("text", "name of the text field in .jsonl, .json and .parquet")
    encoding: str = flag("utf-8", "encoding of the text files, such as cp1252, shift_jis, utf-16")
    replace: bool = flag(False, REPLACE)
    dry_run: bool = dry_run_flag()


@dataclass
class SmallWorldFlags:
    docs: int = flag(published.docs, "training documents, about 400 characters each", within=COUNT)
    seed: int = flag(0, "which small world", within=SEED)
    to: str = flag("", "folder to write the shards to; unset is base_data")
    replace: bool = flag(False, REPLACE)
    dry_run: bool = dry_run_flag()


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the three commands. Raises UserError if the text, or a part of it, cannot be provided."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["import"]:
        from nanochat.dataset.importing import import_files
        parser = parser_of(ImportFlags, "Make shards of your own text files. Folders are searched in sorted order; "
                                        "hidden files are left out.")
        parser.prog += " import"
        parser.add_argument("paths", nargs="+", metavar="PATH",
                            help="folder, or .txt, .md, .jsonl, .json or .parquet file, plain or .gz")
        flags = vars(parser.parse_args(argv[1:]))
        paths, folder = flags.pop("paths"), _folder(flags.pop("to"))
        if flags.pop("dry_run"):
            text_format = TextFormat(flags["doc_separator"].strip(), flags["text_column"], flags["encoding"])
            files = look_at_files(paths, text_format)
            _say(f"{len(files):,} files, {in_words(sum(path.stat().st_size for path in files))}, would be imported",
                 folder)
            return
        import_files(paths, folder, **flags)
    elif argv[:1] == ["small-world"]:
        from nanochat.dataset.importing import make_small_world
        flags = parse(SmallWorldFlags, argv[1:],
                      "Make shards of the built-in small world, with 1000 more documents for validation.")
        if flags.dry_run:
            _say(f"{flags.docs:,} documents of the small world, about {in_words(400 * flags.docs)}, would be made",
                 _folder(flags.to))
            return
        make_small_world(_folder(flags.to), flags.docs, flags.seed, flags.replace)
    else:
        from nanochat.dataset.download import fetch
        flags = parse(FetchFlags, argv, (__doc__ or "").rstrip() + "\n\nFlags of the first form:")
        if flags.dry_run:
            text = HUB_TEXTS[flags.source]
            count = text.last if flags.num_files == -1 else flags.num_files
            _say(f"up to {count:,} training shards and the validation shard of {text.title}, about "
                 f"{in_words(1e8 * (count + 1))}, would be fetched; those that are there stay", data_dir())
            return
        fetch(flags.num_files, data_dir(), source=flags.source, workers=flags.num_workers, revision=flags.revision)


def _say(text: str, folder: Path) -> None:
    need_writable(folder)
    print(f"{text}. They would go to {folder}. {NOTHING_CHANGED.capitalize()}.")


def _folder(name: str) -> Path:
    return (Path(name).expanduser() if name else data_dir()).resolve()


if __name__ == "__main__":
    run_main(main)
