"""Label texts by their attributes, for method control: split, clean, score, part by thresholds, write.

    python data/build_control.py --input chitchat --attributes toxicity sentiment --threshold toxicity=0.4
    python data/build_control.py --input my_documents.jsonl --attributes sentiment question --min_words 10

--input is a JSONL file of documents, {"text": "..."}, split into sentences, or {"texts": ["...", ...]}, split already;
or `chitchat`: the messages of the human conversations in the wheel `chitchat-dataset` (a conversation is a document).
A threshold is a number or a quantile (q0.9). Scores are of the cleaned text, the very text that is written.

Writes train.jsonl and valid.jsonl (rows: text, scores, values, document; a share of --drop_rate has `unconditioned`),
split by document; prompts.jsonl, the first words of held-out texts; and manifest.json: scorers, versions,
thresholds and all counts, which train.py and eval.py read again.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import utils
from flags import FlagParser, parse_flags
from methods.control import attributes
from scoring import checks
from utils import MISSING, USAGE, fail

URL = re.compile(r"\b(?:https?://|www\.)\S+", re.I)
MENTION = re.compile(r"^\s*RT\b|(?<!\w)@\w+")  # retweets and names
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|e\.g|i\.e|[A-Z])\.)$")
DROPPED = {  # in this order; a text counts under the first filter that drops it
    "no letters": "holds no letter, so there is nothing to score",
    "length": "fewer than --min_words or more than --max_words words",
    "personal data": "an e-mail address, phone number, URL or card-like number",
    "special token": "spells a token of chat templates",
    "duplicate": "equals an earlier text, after normalising",
}


def clean(text: str) -> str:
    """A text in NFC without addresses, mentions, control characters and line breaks, a space in place of each.

    Every letter of every script, every digit and all punctuation stay.
    """
    text = MENTION.sub(" ", URL.sub(" ", unicodedata.normalize("NFC", text)))
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\u200d" else c for c in text).split())


def sentences(text: str) -> list[str]:
    """The sentences of a text: cut after . ! ? and closing quotes before a capital, a digit or an opening quote.

    Not after common abbreviations and single capitals ("Dr. No", "J. Doe"). Line breaks always cut.
    """
    found = []
    for line in text.splitlines():
        start = 0
        for end in re.finditer(r"[.!?…]+[\"'”’)]*(?=\s+[\"'“‘(]*[A-Z0-9À-Þ])", line):
            if not ABBREVIATION.search(line[start : end.end()]):
                found.append(line[start : end.end()])
                start = end.end()
        found.append(line[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def read_documents(name: str) -> Iterator[list[str]]:
    """The raw texts of every document."""
    if name == "chitchat":
        if find_spec("chitchat_dataset") is None:
            fail(MISSING, "the chitchat data set is not installed", "pip install --no-deps -r requirements-models.txt")
        import chitchat_dataset

        for conversation in chitchat_dataset.Dataset().values():
            yield [message["text"] for turn in conversation["messages"] for message in turn]
        return
    for row in utils.read_jsonl(name, check_document):
        yield sentences(row["text"]) if "text" in row else row["texts"]


def check_document(row: dict) -> str | None:
    """What is wrong with a document, or None."""
    if ("text" in row) == ("texts" in row):
        return 'needs either "text" (a string) or "texts" (a list of strings)'
    if "text" in row:
        return None if isinstance(row["text"], str) else 'field "text" must be a string'
    good = isinstance(row["texts"], list) and all(isinstance(t, str) for t in row["texts"])
    return None if good else 'field "texts" must be a list of strings'


def why_dropped(text: str, seen: set[str], args) -> str | None:
    """The first filter that a cleaned text fails; seen: normalised texts before it."""

    if not attributes.has_letters(text):
        return "no letters"
    if not args.min_words <= len(text.split()) <= args.max_words:
        return "length"
    if checks.find_personal_data(text):
        return "personal data"
    if re.search(r"<\|.*?\|>|\[/?INST\]|</?s>", text):
        return "special token"
    return "duplicate" if utils.normalise(text) in seen else None


def collect(args) -> tuple[list[dict], Counter, int]:
    """Usable texts as rows (text, document), how many each filter dropped, and the number of documents."""
    rows, dropped, seen, number = [], Counter(), set(), 0
    for number, raw in enumerate(read_documents(args.input), 1):
        for text in map(clean, raw):
            if reason := why_dropped(text, seen, args):
                dropped[reason] += 1
            else:
                seen.add(utils.normalise(text))
                rows.append({"text": text, "document": number})
    if not rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there is none"
        fail(USAGE, f"--input {args.input}: no text is left ({counts})", "texts need letters, and --min_words to --max_words words")
    return rows, dropped, number


def label(rows: list[dict], thresholds: dict[str, tuple[str, ...]], checkpoint: str | None) -> dict:
    """Add scores and values to the rows; returns the schema."""
    schema: dict[str, dict] = {}
    texts = [row["text"] for row in rows]
    for name, given in thresholds.items():
        scorer = "detoxify" if name == "toxicity" and checkpoint else attributes.ATTRIBUTES[name].scorer
        score, version = attributes.load_scorer(scorer, checkpoint)
        scores = score(texts)
        for row, value in zip(rows, scores, strict=True):
            row.setdefault("scores", {})[name] = round(value, 4)
        scores = [row["scores"][name] for row in rows]
        schema[name] = {"values": list(attributes.ATTRIBUTES[name].values),
                        "thresholds": attributes.resolve_thresholds(name, given, scores),
                        "given": list(given), "scorer": scorer, "version": version,
                        **({"checkpoint": checkpoint} if scorer == "detoxify" else {})}
    for row in rows:
        row["values"] = attributes.values_of(row["scores"], schema)
    return schema


def split_documents(rows: list[dict], valid_share: float, rng: random.Random) -> dict[str, list[dict]]:
    """Rows by split; a document is in exactly one."""
    documents = sorted({row["document"] for row in rows})
    rng.shuffle(documents)
    held_out = set(documents[: max(1, round(valid_share * len(documents)))])
    return {"train": [r for r in rows if r["document"] not in held_out], "valid": [r for r in rows if r["document"] in held_out]}


def balance(rows: list[dict], rng: random.Random) -> list[dict]:
    """As many rows of every combination of values as the rarest one has, in random order."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row["values"].values()), []).append(row)
    size = min(map(len, groups.values()))
    kept = [row for _, group in sorted(groups.items()) for row in rng.sample(group, size)]
    rng.shuffle(kept)
    return kept


def first_words(rows: list[dict], count: int, limit: int, rng: random.Random) -> list[dict]:
    """Prompts: the first `count` words of texts that have at least three more, one per document, at most `limit`."""
    rows = rng.sample(rows, len(rows))
    found: dict[int, dict] = {}
    seen: set[str] = set()
    for row in rows:
        words = row["text"].split()
        prompt = " ".join(words[:count])
        if len(words) >= count + 3 and row["document"] not in found and prompt not in seen and attributes.has_letters(prompt):
            seen.add(prompt)
            found[row["document"]] = {"prompt": prompt, "rest": " ".join(words[count:])}
    return list(found.values())[:limit]


def count_values(rows: list[dict], schema: dict) -> dict:
    """How many rows have each value, and each combination of values."""
    counts: dict[str, dict] = {name: {v: sum(r["values"][name] == v for r in rows) for v in own["values"]} for name, own in schema.items()}
    counts["joint"] = dict(sorted(Counter(" ".join(row["values"].values()) for row in rows).items()))
    return counts


def print_table(counts: dict, dropped: Counter, num_rows: int, splits: dict) -> None:
    """What the filters dropped and how the values are spread."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="texts for method control", title_justify="left")
    for column in ("", "texts", "what"):
        table.add_column(column, justify="right" if column == "texts" else "left")
    for name, why in DROPPED.items():
        table.add_row(name, f"- {dropped[name]:,}", why)
    table.add_row("usable", f"{num_rows:,}", "")
    table.add_section()
    for split, rows in splits.items():
        table.add_row(split, f"{len(rows):,}", "; ".join(
            f"{name}: " + ", ".join(f"{v} {n:,}" for v, n in own.items()) for name, own in counts[split].items() if name != "joint"))
    Console(width=max(140, Console().width)).print(table)


def build_parser(method: str | None) -> FlagParser:
    parser = FlagParser(prog="data/build_control.py", description=__doc__)
    parser.add_argument("--input", required=True, metavar="FILE|chitchat", help="JSONL of documents, or chitchat")
    parser.add_argument("--attributes", nargs="+", default=["toxicity", "sentiment"], choices=list(attributes.ATTRIBUTES),
                        help="what is scored (default: toxicity sentiment)")
    parser.add_argument("--threshold", nargs="+", default=[], metavar="NAME=T[,T]",
                        help="where the values part: numbers, or quantiles such as toxicity=q0.9 (default: see attributes.py)")
    parser.add_argument("--detoxify_checkpoint", metavar="MODEL", help="score toxicity by this detoxify folder or hub id")
    parser.add_argument("--min_words", type=int, default=4, help="words of a text at least (default: %(default)s; published: 10)")
    parser.add_argument("--max_words", type=int, default=30, help="words of a text at most (default: %(default)s)")
    parser.add_argument("--drop_rate", type=float, default=0.01, help="share of training texts without tokens (default: %(default)s)")
    parser.add_argument("--balance", action="store_true", help="equally many texts of every combination of values")
    parser.add_argument("--limit", type=int, help="training texts at most, drawn at random (default: all)")
    parser.add_argument("--valid_share", type=float, default=0.05, help="share of documents held out (default: %(default)s)")
    parser.add_argument("--prompt_words", type=int, default=3, help="words of a prompt (default: %(default)s)")
    parser.add_argument("--num_prompts", type=int, default=400, help="prompts at most (default: %(default)s)")
    parser.add_argument("--out_dir", default="data/control", help="where the files go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of all random choices (default: %(default)s)")
    return parser


def check_flags(args) -> dict[str, tuple[str, ...]]:
    """The thresholds of every attribute, as given or by default; dies over flags that cannot work."""
    for name in ("min_words", "max_words", "prompt_words", "num_prompts", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(USAGE, f"--{name} {getattr(args, name)} must be at least 1")
    if not 0 <= args.drop_rate < 1 or not 0 < args.valid_share < 1:
        fail(USAGE, f"--drop_rate {args.drop_rate}, --valid_share {args.valid_share}: shares, 0 to 1")
    found = {name: attributes.ATTRIBUTES[name].thresholds for name in dict.fromkeys(args.attributes)}
    for word in args.threshold:
        name, equals, numbers = word.partition("=")
        if not equals or name not in found:
            fail(USAGE, f"--threshold {word}: {name!r} is none of --attributes {' '.join(found)}", "such as toxicity=0.5 or toxicity=q0.9")
        found[name] = tuple(numbers.split(","))
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(build_parser, argv)
    thresholds = check_flags(args)
    rng = random.Random(args.seed)
    rows, dropped, documents = collect(args)
    schema = label(rows, thresholds, args.detoxify_checkpoint)
    splits = split_documents(rows, args.valid_share, rng)
    before = {split: count_values(own, schema) for split, own in splits.items()}
    if not splits["train"]:
        fail(USAGE, f"--input {args.input}: one document cannot be split into train and valid", "give more documents")
    prompts = first_words(splits["valid"], args.prompt_words, args.num_prompts, rng)
    if args.balance:
        splits = {split: balance(own, rng) for split, own in splits.items()}
    if args.limit:
        splits["train"] = rng.sample(splits["train"], min(args.limit, len(splits["train"])))
    for row in splits["train"]:
        if rng.random() < args.drop_rate:
            row["unconditioned"] = True
    out_dir, described = Path(args.out_dir), {}
    for name, own in (*splits.items(), ("prompts", prompts)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        utils.atomic_write(out_dir / f"{name}.jsonl", text)
        described[name] = {"file": f"{name}.jsonl", "rows": len(own), "sha256": utils.sha256(text)}
    counts = {split: count_values(own, schema) for split, own in splits.items()}
    manifest = {
        "made_by": "data/build_control.py", "input": args.input, "seed": args.seed, "documents": documents, "schema": schema,
        "filters": {name: {"dropped": dropped[name], "rule": why} for name, why in DROPPED.items()},
        "drop_rate": args.drop_rate, "unconditioned": sum("unconditioned" in row for row in splits["train"]),
        "balanced": args.balance, "counts": counts, "counts_before_choosing": before, "files": described}
    utils.atomic_write(out_dir / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    print_table(counts, dropped, len(rows), splits)
    for name, own in schema.items():
        print(f"{name}: {own['scorer']} {own['version']}, {' '.join(own['values'])} parted at {', '.join(f'{t:.4g}' for t in own['thresholds'])}")
    print(f"{len(prompts)} prompts; {manifest['unconditioned']} training texts stay without tokens")
    print(json.dumps({"counts": counts, "dropped": {name: dropped[name] for name in DROPPED}, "files": described}))


if __name__ == "__main__":
    utils.run(main)
