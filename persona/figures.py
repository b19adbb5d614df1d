"""Entropy and shares of what was said in interviews."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from pathlib import Path

import utils
from flags import FlagParser, parse_flags
from persona.chart import plot
from persona.extraction import by_model
from persona.interview import ApiModel
from persona.rules import ATTRIBUTES, by_rules, values_of
from scoring import statistics
from scoring.logs import write_figures
from utils import UNSCORED, USAGE, fail, info

COLUMNS = ("n", "entropy", "of_max", "distinct", "top", "extracted", "unmapped")


def figures_of(attribute: str, found: list[dict]) -> dict:
    """The figures of one attribute from its {"said", "value"} in every interview."""

    values = Counter(item["value"] for item in found if item["value"])
    unmapped = Counter(item["said"] for item in found if item["said"] and not item["value"])
    counts, n, bits = list(values.values()), values.total(), 1 / math.log(2)
    entropy = [statistics.miller_madow(counts) * bits, *(v * bits for v in statistics.entropy_interval(counts))] if n else None
    return {
        "n": n, "entropy": entropy, "entropy_plugin": statistics.entropy(counts) * bits if n else None,
        "of_max": entropy and entropy[0] / math.log2(len(values_of(attribute))), "distinct": len(values),
        "top": [values.most_common(1)[0][0], max(counts) / n] if n else None,
        "extracted": statistics.share_interval(n + unmapped.total(), len(found)), "unmapped": unmapped.total(),
        "unmapped_words": dict(unmapped.most_common()), "counts": dict(values.most_common())}


def evaluate(files: list[str], save_file: str | Path, model=None, limit: int | None = None) -> dict:
    """Score files of interviews: X.json (the summary, which is returned), X.jsonl (a line per interview), X.csv, X.png.

    model: an interview.ApiModel that extracts; None for the rules.
    """
    save_file = Path(save_file)
    systems = {Path(file).stem: utils.read_jsonl(file, check_interview)[:limit] for file in files}
    if len(systems) < len(files):
        fail(USAGE, "--eval_file: two files have one name", "rename one")
    summary = {"kind": "demographics", "extraction": model.name if model else "rules", "systems": {},
               "set_sizes": {attribute: len(values_of(attribute)) for attribute in ATTRIBUTES}}
    lines = []
    for name, rows in systems.items():
        found = by_model(model, rows, save_file.with_suffix(".extractions.jsonl")) if model else [by_rules(row) for row in rows]
        read = [own for own in found if own]
        summary["systems"][name] = {"interviews": len(rows), "unread": len(rows) - len(read), "methods": sorted({row["method"] for row in rows}),
                                    "attributes": {a: figures_of(a, [own[a] for own in read]) for a in ATTRIBUTES}}
        lines += [{"system": name, "interview": row["interview"], **(own or {"unread": True})} for row, own in zip(rows, found, strict=True)]
    if len({own["interviews"] for own in summary["systems"].values()}) > 1:
        info(f"files of {[own['interviews'] for own in summary['systems'].values()]} interviews; distinct values grow with their number")
    write_figures(save_file, summary, lines)
    utils.atomic_write(save_file.with_suffix(".csv"), as_csv(summary))
    plot(summary, save_file.with_suffix(".png"))
    return summary


def check_interview(row: dict) -> str | None:
    """What is wrong with a row of infer.py --interview, or None."""
    for field, kind in (("interview", int), ("method", str), ("topics", list), ("turns", list)):
        if not isinstance(row.get(field), kind):
            return f'needs "{field}"; infer.py --interview writes such rows'
    if not all(isinstance(text, str) for text in row["turns"]) or len(row["turns"]) != 2 * len(row["topics"]):
        return '"turns" must be a question and an answer for each of "topics"'
    odd = [topic for topic in row["topics"] if topic not in ATTRIBUTES]
    return f"topic {odd[0]!r} is none of {', '.join(ATTRIBUTES)}" if odd else None


def as_csv(summary: dict) -> str:
    """A line per system and attribute; empty where a figure is not defined."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "attribute", "interviews", "n", "entropy_bits", "entropy_low", "entropy_high", "entropy_plugin_bits", "entropy_of_max",
                     "distinct", "top_value", "top_share", "extracted_share", "unmapped", "unread"])
    for name, own in summary["systems"].items():
        for attribute, f in own["attributes"].items():
            numbers = [*(f["entropy"] or [None] * 3), f["entropy_plugin"], f["of_max"]]
            top, share = f["top"] or (None, None)
            writer.writerow([name, attribute, own["interviews"], f["n"], *(v if v is None else round(v, 4) for v in numbers), f["distinct"],
                             top, share and round(share, 4), f["extracted"] and round(f["extracted"][0], 4), f["unmapped"], own["unread"]])
    return out.getvalue()


def print_figures(summary: dict) -> None:
    """The table of all systems, attribute by attribute, and what could not be mapped or read."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(150, Console().width))
    table = Table(title=f"who Person B says they are; extraction: {summary['extraction']}; entropy in bits, 95 % intervals over interviews")
    for column in ("attribute", "system", *COLUMNS):
        table.add_column(column.replace("_", " "), no_wrap=column == "entropy")
    for attribute in ATTRIBUTES:
        for name, own in summary["systems"].items():
            table.add_row(attribute, name, *cells(own["attributes"][attribute]))
        table.add_section()
    console.print(table)
    for name, own in summary["systems"].items():
        words = {a: f["unmapped_words"] for a, f in own["attributes"].items() if f["unmapped"]}
        for attribute, found in words.items():
            shown = ", ".join(f"{word} ({count})" for word, count in list(found.items())[:6])
            console.print(f"{name}: {attribute} in no table: {shown}{', ...' if len(found) > 6 else ''}", highlight=False, markup=False)
        if own["unread"]:
            console.print(f"{name}: {own['unread']} of {own['interviews']} interviews have no readable extraction and are left out", highlight=False)


def cells(f: dict) -> list[str]:
    """The figures of an attribute as COLUMNS shows them."""
    entropy = "—" if f["entropy"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(*f["entropy"])
    return [str(f["n"]), entropy, "—" if f["of_max"] is None else f"{f['of_max']:.2f}", str(f["distinct"]),
            "—" if f["top"] is None else f"{f['top'][0]} {f['top'][1]:.0%}",
            "—" if f["extracted"] is None else "{:.0%} [{:.0%}, {:.0%}]".format(*f["extracted"]), str(f["unmapped"])]


def build_parser(method: str | None) -> FlagParser:
    """All flags of the demographic bias test."""
    parser = FlagParser(prog="eval.py --persona", description=__doc__)
    parser.add_argument("--eval_file", nargs="+", required=True, help="files of infer.py --interview")
    parser.add_argument("--save_file", required=True, help="eval_logs/X.json; X.jsonl, X.csv and X.png go beside it")
    parser.add_argument("--limit", type=int, help="use the first N interviews of every file only (default: all)")
    parser.add_argument("--extract", default="rules", metavar="HOW", help="rules (default), or PROVIDER:MODEL, which fills in JSON by a schema")
    parser.add_argument("--base_url", metavar="URL", help="any OpenAI-compatible server (default: the provider's)")
    parser.add_argument("--key_file", metavar="FILE", help="lines NAME=KEY, mode 600")
    parser.add_argument("--max_connections", type=int, default=16, help="calls at a time (default: 16)")
    parser.add_argument("--timeout_total", type=float, default=600, help="seconds for a call with its repeats (default: 600)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Score interviews as the flags say and print the table."""
    args = parse_flags(build_parser, argv)
    if not args.save_file.endswith(".json"):
        fail(USAGE, f"--save_file {args.save_file} must end in .json", f"{Path(args.save_file).with_suffix('.json')}")
    for name in ("limit", "max_connections", "timeout_total"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            fail(USAGE, f"--{name} {getattr(args, name)} must be above 0")
    model = None
    if args.extract != "rules":

        model = ApiModel(args.extract, args.base_url, args.key_file, args.max_connections, args.timeout_total)
    elif args.base_url or args.key_file:
        fail(USAGE, "--base_url and --key_file do nothing with --extract rules", "add --extract PROVIDER:MODEL")
    summary = evaluate(args.eval_file, args.save_file, model, args.limit)
    if args.json:
        print(json.dumps(summary, allow_nan=False))
        return
    print_figures(summary)
    base = Path(args.save_file)
    print(f"a line per interview: {base.with_suffix('.jsonl')}; figures: {base.with_suffix('.csv')}; charts: {base.with_suffix('.png')}")
    print(f"next: python eval.py --show {base}")
    unread, total = (sum(own[key] for own in summary["systems"].values()) for key in ("unread", "interviews"))
    if unread > 0.05 * total:
        fail(UNSCORED, f"{unread} of {total} interviews have no readable extraction", "the same command asks again about those without an answer")
