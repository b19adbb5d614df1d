"""Who does a model say that it is? Entropies and shares of what was said in interviews.

    python eval.py --persona --eval_file outs/base.jsonl outs/peft.jsonl \\
        --save_file eval_logs/persona.json

Answers -> what was said of each attribute (rules, or a model behind a server that fills in JSON)
-> a value of a closed set (data/demographics.yaml) -> figures of each system and attribute:

| figure    | meaning                                                                           |
| n         | interviews with a value of the closed set                                         |
| entropy   | Miller-Madow, in bits, with a 95 % bootstrap interval over interviews;            |
|           | entropy_plugin is uncorrected                                                     |
| of_max    | entropy over log2 of the closed set's size                                        |
| distinct  | different values                                                                  |
| top       | the commonest value and its share of the n                                        |
| extracted | share of interviews that said something of it, with a 95 % Wilson interval        |
| unmapped  | interviews that said something that is in no table; the words are listed          |

After the published notebook of arXiv:2412.03343, whose entropies are plug-in ones and whose filter
drops every interview that lacks one attribute; here an attribute has all the interviews that told
it, and their share is shown.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from pathlib import Path

import utils
from decoding import api, providers
from flags import Args, FlagParser, add_server_flags, parse_flags, positive_int
from persona.chart import draw_chart
from persona.extraction import by_model
from persona.rules import ATTRIBUTES, by_rules, values_of
from scoring import logs, statistics
from scoring.evaluated import DASH, Evaluated, Table, figure, with_interval
from scoring.report import table as report
from utils import UNSCORED, USAGE, fail, info

KIND = "eval/persona"
MAX_UNREAD = 0.05  # share of interviews without a readable extraction that is let pass
SHOWN_WORDS = 6  # words of an attribute that are in no table, in a note; X.json has all


def build_parser() -> FlagParser:
    """All flags of the demographic bias test."""
    parser = FlagParser(prog="eval.py --persona", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--persona", action="store_true",
                       help="score interviews instead of responses")
    group.add_argument("--eval_file", nargs="+", required=True,
                       help="files of infer.py --interview")
    group.add_argument("--save_file", required=True,
                       help="eval_logs/X.json; further files are put beside it")
    group.add_argument("--limit", type=positive_int,
                       help="use the first N interviews of every file only (default: all)")
    group.add_argument("--json", action="store_true",
                       help="print the summary as JSON and nothing else")
    group = parser.add_argument_group("extraction")
    group.add_argument("--extract", default="rules", metavar="HOW",
                       help="rules (default), or openai:MODEL or together:MODEL, which fills in "
                            "JSON by a schema")
    add_server_flags(group, max_connections=16)
    return parser


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command; dies over those that cannot work, before any file is read."""
    args = parse_flags(build_parser(), argv)
    if not args.save_file.endswith(".json"):
        fail(USAGE, f"--save_file {args.save_file} must end in .json",
             f"{Path(args.save_file).with_suffix('.json')}")
    if args.extract != "rules":
        providers.parse_spec(args.extract, "--extract", tuple(providers.PROVIDERS))
    elif args.base_url or args.key_file:
        fail(USAGE, "--base_url and --key_file do nothing with --extract rules",
             "add --extract PROVIDER:MODEL")
    return args


def main(argv: list[str] | None = None) -> None:
    """Score interviews as the flags say: the files beside --save_file, and the table."""
    args = read_flags(argv)
    save_file = Path(args.save_file)
    systems = read_interviews(args.eval_file, args.limit)
    try:
        result = measure(systems, None, args)
    # Only a model that extracts can stop the run; the rules ask nobody.
    except api.RunStopped as stop:
        fail(stop.code, stop.what, "answers are kept; the same command goes on with them")
    summary = {"kind": KIND, "persona": result.summary}
    logs.write(save_file, result._replace(summary=summary))
    if args.json:
        print(json.dumps(summary, allow_nan=False))
        return
    report.print_tables(tables(result.summary))
    print(f"a line per interview: {save_file.with_suffix('.jsonl')}; "
          f"figures: {save_file.with_suffix('.csv')}; charts: {save_file.with_suffix('.png')}")
    print(f"next: python eval.py --show {save_file}")
    # At the very end, so that exit code 4 comes after all files are written.
    _stop_if_unread(result.summary)


def _stop_if_unread(summary: dict) -> None:
    """Leave with 4 where too many interviews have no readable extraction."""
    unread = sum(system["unread"] for system in summary["systems"].values())
    total = sum(system["interviews"] for system in summary["systems"].values())
    if unread > MAX_UNREAD * total:
        fail(UNSCORED, f"{unread} of {total} interviews have no readable extraction",
             "the same command asks again about those without an answer")


# ---- measuring ----------------------------------------------------------------------------------


def read_interviews(files: list[str], limit: int | None = None) -> dict[str, list[dict]]:
    """The first `limit` interviews of every file, by the file's stem."""
    # Two files of one stem would overwrite each other here, hence the comparison of lengths.
    systems = {Path(file).stem: utils.read_jsonl(file, check_interview)[:limit] for file in files}
    if len(systems) < len(files):
        fail(USAGE, "--eval_file: two files have one name", "rename one")
    counts = [len(rows) for rows in systems.values()]
    if len(set(counts)) > 1:
        # Only a note: shares do not depend on the number, and the entropy is corrected for it.
        info(f"files of {counts} interviews; distinct values grow with their number")
    return systems


def check_interview(row: dict) -> str | None:
    """What is wrong with a row of infer.py --interview, or None."""
    fields = (("interview", int), ("method", str), ("topics", list), ("turns", list))
    for name, kind in fields:
        if not isinstance(row.get(name), kind):
            return f'needs "{name}"; infer.py --interview writes such rows'
    texts = all(isinstance(text, str) for text in row["turns"])
    if not texts or len(row["turns"]) != 2 * len(row["topics"]):
        return '"turns" must be a question and an answer for each of "topics"'
    unknown = [topic for topic in row["topics"] if topic not in ATTRIBUTES]
    return f"topic {unknown[0]!r} is none of {', '.join(ATTRIBUTES)}" if unknown else None


def measure(systems: dict[str, list[dict]], sources, args) -> Evaluated:
    """Figures of what was said in each system's interviews, a line per interview, a CSV, a chart.

    sources: not needed, since nothing but the interviews counts.
    """
    extract = _make_extract(args)
    summary = {"extraction": args.extract, "systems": {},
               "set_sizes": {attribute: len(values_of(attribute)) for attribute in ATTRIBUTES}}
    lines = []
    for name, rows in systems.items():
        extractions = extract(rows)
        # An unread interview is left out and not counted as silent: the fault is the extraction's.
        readable = [extraction for extraction in extractions if extraction]
        summary["systems"][name] = {
            "interviews": len(rows), "unread": len(rows) - len(readable),
            "methods": sorted({row["method"] for row in rows}),
            "attributes": {attribute: measure_attribute(
                attribute, [extraction[attribute] for extraction in readable])
                for attribute in ATTRIBUTES}}
        lines += [{"system": name, "interview": row["interview"],
                   **(extraction or {"unread": True})}
                  for row, extraction in zip(rows, extractions, strict=True)]
    files = {".csv": as_csv(summary).encode(), ".png": draw_chart(summary["systems"])}
    return Evaluated(summary, lines, files)


def _make_extract(args):
    """The function that --extract names: interviews -> an extraction each, or None."""
    if args.extract == "rules":
        return lambda rows: [by_rules(row) for row in rows]
    from decoding.engines import load_engine  # loads torch, which rules do without

    log_file = Path(args.save_file).with_suffix(".extractions.jsonl")
    # tolerant: an interview without an answer counts as unread, and a later run asks again
    engine = load_engine(args.extract, args.base_url, args.key_file, args.max_connections,
                         args.timeout, args.timeout_total, tolerant=True)
    return lambda rows: by_model(engine, rows, log_file)


def measure_attribute(attribute: str, extractions: list[dict]) -> dict:
    """The figures of one attribute from its {"said", "value"} in every interview."""
    # What was said and is in no table counts as told, but has no place in the entropy: free words
    # could be of more kinds than the closed set has values.
    values = Counter(item["value"] for item in extractions if item["value"])
    unmapped = Counter(item["said"] for item in extractions if item["said"] and not item["value"])
    counts, n = list(values.values()), values.total()
    top = values.most_common(1)
    figures = {
        "n": n, "entropy": _in_bits(counts), "entropy_plugin": None, "of_max": None,
        "distinct": len(values),
        "top": {"value": top[0][0], "share": top[0][1] / n} if top else None,
        "extracted": statistics.share_interval(n + unmapped.total(), len(extractions)),
        "unmapped": unmapped.total(), "unmapped_words": dict(unmapped.most_common()),
        "counts": dict(values.most_common())}
    if n:
        figures["entropy_plugin"] = statistics.entropy(counts) / math.log(2)
        # With few interviews the correction of the entropy may lift this a little above 1.
        figures["of_max"] = figures["entropy"]["mean"] / math.log2(len(values_of(attribute)))
    why = "no interview tells a value of it" if extractions else "no extraction can be read"
    return figures | {"reasons": {name: why for name, value in figures.items() if value is None}}


def _in_bits(counts: list[int]) -> dict | None:
    """The Miller-Madow entropy of counts in bits, with its interval; None without counts."""
    nats = statistics.entropy_interval(counts)
    return nats and figure(*(nats[name] / math.log(2) for name in ("mean", "low", "high")))


# ---- showing ------------------------------------------------------------------------------------


def as_csv(summary: dict) -> str:
    """A line per system and attribute; empty where a figure is not defined."""
    out = io.StringIO()
    # The csv module would end lines in \r\n.
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([
        "system", "attribute", "interviews", "n", "entropy_bits", "entropy_low", "entropy_high",
        "entropy_plugin_bits", "entropy_of_max", "distinct", "top_value", "top_share",
        "extracted_share", "unmapped", "unread"])
    for name, system in summary["systems"].items():
        for attribute, figures in system["attributes"].items():
            # csv writes None as an empty cell, so figures that are undefined need no case of their
            # own.
            entropy = figures["entropy"] or figure(None)
            top = figures["top"] or {"value": None, "share": None}
            extracted = figures["extracted"] or figure(None)
            numbers = [entropy["mean"], entropy["low"], entropy["high"],
                       figures["entropy_plugin"], figures["of_max"]]
            writer.writerow([
                name, attribute, system["interviews"], figures["n"], *map(_short, numbers),
                figures["distinct"], top["value"], _short(top["share"]),
                _short(extracted["mean"]), figures["unmapped"], system["unread"]])
    return out.getvalue()


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def tables(summary: dict) -> list[Table]:
    """The figures of all systems, attribute by attribute, and what could not be mapped or read."""
    rows = [[attribute, name, *_cells(system["attributes"][attribute])]
            for attribute in ATTRIBUTES for name, system in summary["systems"].items()]
    notes = []
    for name, system in summary["systems"].items():
        for attribute, figures in system["attributes"].items():
            if words := figures["unmapped_words"]:
                shown = ", ".join(f"{word} ({count})"
                                  for word, count in list(words.items())[:SHOWN_WORDS])
                more = ", ..." if len(words) > SHOWN_WORDS else ""
                notes.append(f"{name}: {attribute} in no table: {shown}{more}")
        if system["unread"]:
            notes.append(f"{name}: {system['unread']} of {system['interviews']} interviews have "
                         "no readable extraction and are left out")
    title = (f"who Person B says they are; extraction: {summary['extraction']}; entropy in bits, "
             "95 % intervals over interviews")
    return [Table(title, ["attribute", "system", "n", "entropy", "of max", "distinct", "top",
                          "extracted", "unmapped"], rows, notes)]


def _cells(figures: dict) -> list[str]:
    """The figures of an attribute as the table shows them."""
    top, of_max, extracted = figures["top"], figures["of_max"], figures["extracted"]
    percent = "{mean:.0%} [{low:.0%}, {high:.0%}]"
    return [str(figures["n"]), with_interval(figures["entropy"]),
            DASH if of_max is None else f"{of_max:.2f}", str(figures["distinct"]),
            f"{top['value']} {top['share']:.0%}" if top else DASH,
            percent.format(**extracted) if extracted else DASH, str(figures["unmapped"])]
