"""Label texts by their attributes, for method control: split, clean, score, set values, write.

    python -m data.build_control --input chitchat --attributes toxicity sentiment \\
        --threshold toxicity=0.4
    python -m data.build_control --input my_documents.jsonl --attributes sentiment question \\
        --min_words 10

--input is a JSONL file of documents, or `chitchat`. A document is {"text": "..."}, which is split
into sentences, or {"texts": ["...", ...]}, which is split already. `chitchat` stands for the human
conversations in the wheel `chitchat-dataset`: a conversation is a document, its messages the texts.
A threshold is a number or a quantile (q0.9). Scores are those of the cleaned text as it is written.

Writes train.jsonl and valid.jsonl, split by document (rows: text, scores, values, document; a share
of --drop_rate has `unconditioned`); prompts.jsonl, the first words of held-out texts; and
manifest.json, which train.py and eval.py read again: scorers, versions, thresholds and all counts.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

import utils
from flags import Args, FlagParser, number, parse_flags, positive_int
from methods.control.attributes import (
    ATTRIBUTES,
    has_letters,
    load_scorer,
    resolve_thresholds,
    values_of,
)
from scoring import checks
from utils import MISSING, USAGE, fail

URL = re.compile(r"\b(?:https?://|www\.)\S+", re.I)
MENTION = re.compile(r"^\s*RT\b|(?<!\w)@\w+")  # retweets and names
TEMPLATE_TOKEN = re.compile(r"<\|.*?\|>|\[/?INST\]|</?s>")
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|e\.g|i\.e|[A-Z])\.)$")
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)]*(?=\s+[\"'“‘(]*[A-Z0-9À-Þ])")
BLANKED = ("Cc", "Cf", "Zl", "Zp")  # Unicode categories: control, format and line separators
JOINER = "\u200d"  # a format character, but emoji and Indic scripts need it
MORE_WORDS = 3  # words that a text must have beyond a prompt, so that it can be continued
DROPPED = {  # in this order; a text counts under the first filter that drops it
    "no letters": "no letter, so there is nothing to score",
    "length": "fewer than --min_words or more than --max_words words",
    "personal data": "an e-mail address, phone number, URL or card-like number",
    "special token": "contains a token of chat templates",
    "duplicate": "equals an earlier text, after normalising",
}


# ---- texts --------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """A text in NFC, a space in place of addresses, mentions, control characters and line breaks.

    Every letter of every script, every digit and all punctuation stay.
    """
    text = MENTION.sub(" ", URL.sub(" ", unicodedata.normalize("NFC", text)))
    kept = (" " if unicodedata.category(c) in BLANKED and c != JOINER else c for c in text)
    return " ".join("".join(kept).split())


def sentences(text: str) -> list[str]:
    """The sentences of a text.

    Cut after . ! ? and closing quotes before a capital, a digit or an opening quote, but not after
    common abbreviations and single capitals ("Dr. No", "J. Doe"). Line breaks always cut.
    """
    pieces = []
    for line in text.splitlines():
        start = 0
        for end in SENTENCE_END.finditer(line):
            if not ABBREVIATION.search(line[start : end.end()]):
                pieces.append(line[start : end.end()])
                start = end.end()
        pieces.append(line[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def _read_documents(name: str) -> Iterator[list[str]]:
    """The raw texts of every document."""
    if name != "chitchat":
        for row in utils.read_jsonl(name, _check_document):
            yield sentences(row["text"]) if "text" in row else row["texts"]
        return
    try:
        import chitchat_dataset  # a wheel of requirements-models.txt, which need not be installed
    except ImportError:
        fail(MISSING, "the chitchat data set is not installed",
             "pip install --no-deps -r requirements-models.txt")
    for conversation in chitchat_dataset.Dataset().values():
        yield [message["text"] for turn in conversation["messages"] for message in turn]


def _check_document(row: dict) -> str | None:
    """What is wrong with a document, or None."""
    if ("text" in row) == ("texts" in row):
        return 'needs either "text" (a string) or "texts" (a list of strings)'
    if "text" in row:
        return None if isinstance(row["text"], str) else 'field "text" must be a string'
    good = isinstance(row["texts"], list) and all(isinstance(text, str) for text in row["texts"])
    return None if good else 'field "texts" must be a list of strings'


def _why_dropped(text: str, seen: set[str], args) -> str | None:
    """The first filter that a cleaned text fails, or None; seen: normalised texts before it."""
    if not has_letters(text):
        return "no letters"
    if not args.min_words <= len(text.split()) <= args.max_words:
        return "length"
    if checks.find_personal_data(text):
        return "personal data"
    if TEMPLATE_TOKEN.search(text):
        return "special token"
    return "duplicate" if utils.normalise(text) in seen else None


def _collect(args) -> tuple[list[dict], Counter, int]:
    """Usable texts as rows (text, document), how many each filter dropped, number of documents."""
    rows, dropped, seen, num_documents = [], Counter(), set(), 0
    for num_documents, raw in enumerate(_read_documents(args.input), 1):
        for text in map(clean, raw):
            if reason := _why_dropped(text, seen, args):
                dropped[reason] += 1
            else:
                seen.add(utils.normalise(text))
                rows.append({"text": text, "document": num_documents})
    if not rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        fail(USAGE, f"--input {args.input}: no text is left ({counts or 'there is none'})",
             "texts need letters, and --min_words to --max_words words")
    return rows, dropped, num_documents


# ---- scores, splits and prompts -----------------------------------------------------------------


def _label(rows: list[dict], thresholds: dict[str, tuple[str, ...]],
           checkpoint: str | None) -> dict:
    """Add scores and values to the rows; returns the schema.

    checkpoint: the detoxify model that scores toxicity, or None for the scorer of attributes.py.
    """
    schema: dict[str, dict] = {}
    texts = [row["text"] for row in rows]
    for name, given in thresholds.items():
        attribute = ATTRIBUTES[name]
        scorer = "detoxify" if name == "toxicity" and checkpoint else attribute.scorer
        score, version = load_scorer(scorer, checkpoint)
        # rounded before thresholds are found, so that the file's scores give the file's values
        scores = [round(value, 4) for value in score(texts)]
        for row, value in zip(rows, scores, strict=True):
            row.setdefault("scores", {})[name] = value
        schema[name] = {"values": list(attribute.values),
                        "thresholds": resolve_thresholds(name, given, scores),
                        "given": list(given), "scorer": scorer, "version": version,
                        **({"checkpoint": checkpoint} if scorer == "detoxify" else {})}
    for row in rows:
        row["values"] = values_of(row["scores"], schema)
    return schema


def _split_documents(
    rows: list[dict], valid_share: float, rng: random.Random
) -> dict[str, list[dict]]:
    """Rows by split; a document is in exactly one."""
    documents = sorted({row["document"] for row in rows})
    rng.shuffle(documents)
    held_out = set(documents[: max(1, round(valid_share * len(documents)))])
    return {"train": [row for row in rows if row["document"] not in held_out],
            "valid": [row for row in rows if row["document"] in held_out]}


def _balance(rows: list[dict], rng: random.Random) -> list[dict]:
    """As many rows of every combination of values as the rarest one has, in random order."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row["values"].values()), []).append(row)
    size = min(map(len, groups.values()))
    # sorted: what is drawn depends on the seed and not on which combination comes first
    kept = [row for _, group in sorted(groups.items()) for row in rng.sample(group, size)]
    rng.shuffle(kept)
    return kept


def _first_words(rows: list[dict], count: int, limit: int, rng: random.Random) -> list[dict]:
    """Prompts, at most `limit`: the first `count` words of texts that go on after them.

    One per document, since texts of one conversation are alike.
    """
    prompts: dict[int, dict] = {}
    seen: set[str] = set()
    for row in rng.sample(rows, len(rows)):
        words = row["text"].split()
        prompt = " ".join(words[:count])
        new = row["document"] not in prompts and prompt not in seen
        if new and len(words) >= count + MORE_WORDS and has_letters(prompt):
            seen.add(prompt)
            prompts[row["document"]] = {"prompt": prompt, "rest": " ".join(words[count:])}
    return list(prompts.values())[:limit]


def _count_values(rows: list[dict], schema: dict) -> dict:
    """How many rows have each value, and each combination of values."""
    counts: dict[str, dict] = {}
    for name, labels in schema.items():
        by_value = Counter(row["values"][name] for row in rows)
        counts[name] = {value: by_value[value] for value in labels["values"]}
    joint = Counter(" ".join(row["values"].values()) for row in rows)
    return counts | {"joint": dict(sorted(joint.items()))}


# ---- output -------------------------------------------------------------------------------------


def _print_table(counts: dict, dropped: Counter, num_rows: int, splits: dict) -> None:
    """What the filters dropped and how the values are spread."""
    table = Table(title="texts for method control", title_justify="left")
    for column in ("", "texts", "what"):
        table.add_column(column, justify="right" if column == "texts" else "left")
    for name, why in DROPPED.items():
        table.add_row(name, f"- {dropped[name]:,}", why)
    table.add_row("usable", f"{num_rows:,}", "")
    table.add_section()
    for split, rows in splits.items():
        shown = [f"{name}: " + ", ".join(f"{value} {n:,}" for value, n in by_value.items())
                 for name, by_value in counts[split].items() if name != "joint"]
        table.add_row(split, f"{len(rows):,}", "; ".join(shown))
    Console(width=max(140, Console().width)).print(table)


def _write_files(out_dir: Path, files: dict[str, list[dict]]) -> dict:
    """Write a JSONL file per name; returns names, counts and hashes for the manifest."""
    described = {}
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        utils.atomic_write(out_dir / f"{name}.jsonl", text)
        described[name] = {"file": f"{name}.jsonl", "rows": len(rows), "sha256": utils.sha256(text)}
    return described


def build_parser() -> FlagParser:
    parser = FlagParser(prog="-m data.build_control", description=__doc__)
    add = parser.add_argument
    add("--input", required=True, metavar="FILE|chitchat", help="JSONL of documents, or chitchat")
    add("--attributes", nargs="+", default=["toxicity", "sentiment"], choices=list(ATTRIBUTES),
        help="what is scored (default: toxicity sentiment)")
    add("--threshold", nargs="+", default=[], metavar="NAME=T[,T]",
        help="where one value ends and the next begins: numbers, or quantiles such as "
             "toxicity=q0.9 (default: see methods/control/attributes.py)")
    add("--detoxify_checkpoint", metavar="MODEL",
        help="score toxicity by this detoxify folder or hub id")
    add("--min_words", type=positive_int, default=4,
        help="words of a text at least (default: %(default)s; published: 10)")
    add("--max_words", type=positive_int, default=30,
        help="words of a text at most (default: %(default)s)")
    add("--drop_rate", default=0.01, help="share of training texts without tokens "
        "(default: %(default)s)",
        type=number(float, lambda value: 0 <= value < 1, "must be a share, from 0 to below 1"))
    add("--balance", action="store_true", help="equally many texts of every combination of values")
    add("--limit", type=positive_int,
        help="training texts at most, drawn at random (default: all)")
    add("--valid_share", default=0.05, help="share of documents held out (default: %(default)s)",
        type=number(float, lambda value: 0 < value < 1, "must be a share between 0 and 1"))
    add("--prompt_words", type=positive_int, default=3,
        help="words of a prompt (default: %(default)s)")
    add("--num_prompts", type=positive_int, default=400,
        help="prompts at most (default: %(default)s)")
    add("--out_dir", default="data/control", help="where the files go (default: %(default)s)")
    add("--seed", type=int, default=42, help="of all random choices (default: %(default)s)")
    parser.derive(_thresholds)
    return parser


def _thresholds(args) -> dict:
    """The thresholds of every attribute, as given or by default."""
    thresholds = {name: ATTRIBUTES[name].thresholds for name in dict.fromkeys(args.attributes)}
    for word in args.threshold:
        name, equals, numbers = word.partition("=")
        if not equals or name not in thresholds:
            fail(USAGE, f"--threshold {word}: {name!r} is none of --attributes "
                        f"{' '.join(thresholds)}", "such as toxicity=0.5 or toxicity=q0.9")
        thresholds[name] = tuple(numbers.split(","))
    return {"thresholds": thresholds}


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command."""
    return parse_flags(build_parser(), argv)


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    # one generator for all choices: their order below is part of what a seed means
    rng = random.Random(args.seed)
    rows, dropped, num_documents = _collect(args)
    schema = _label(rows, args.thresholds, args.detoxify_checkpoint)
    splits = _split_documents(rows, args.valid_share, rng)
    before = {split: _count_values(part, schema) for split, part in splits.items()}
    if not splits["train"]:
        fail(USAGE, f"--input {args.input}: one document cannot be split into train and valid",
             "give more documents")
    prompts = _first_words(splits["valid"], args.prompt_words, args.num_prompts, rng)
    if args.balance:
        splits = {split: _balance(part, rng) for split, part in splits.items()}
    if args.limit:
        splits["train"] = rng.sample(splits["train"], min(args.limit, len(splits["train"])))
    for row in splits["train"]:
        if rng.random() < args.drop_rate:
            row["unconditioned"] = True
    out_dir = Path(args.out_dir)
    files = _write_files(out_dir, splits | {"prompts": prompts})
    counts = {split: _count_values(part, schema) for split, part in splits.items()}
    num_unconditioned = sum("unconditioned" in row for row in splits["train"])
    manifest = {
        "made_by": "data/build_control.py", "input": args.input, "seed": args.seed,
        "documents": num_documents, "schema": schema,
        "filters": {name: {"dropped": dropped[name], "rule": why} for name, why in DROPPED.items()},
        "drop_rate": args.drop_rate, "unconditioned": num_unconditioned, "balanced": args.balance,
        "counts": counts, "counts_before_choosing": before, "files": files}
    # last, so that a manifest never describes files that are not there
    utils.atomic_write(out_dir / "manifest.json",
                       json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    _print_table(counts, dropped, len(rows), splits)
    for name, labels in schema.items():
        limits = ", ".join(f"{threshold:.4g}" for threshold in labels["thresholds"])
        print(f"{name}: {labels['scorer']} {labels['version']}, {' '.join(labels['values'])} "
              f"parted at {limits}")
    print(f"{len(prompts)} prompts; {num_unconditioned} training texts stay without tokens")
    print(json.dumps({"counts": counts, "dropped": {name: dropped[name] for name in DROPPED},
                      "files": files}))


if __name__ == "__main__":
    utils.run(main)
