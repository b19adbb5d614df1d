"""Report on one-to-many JSONL files and enforce what training and evaluation rely on.

    python data/check.py data/train_dialogs_1k.jsonl data/test_dialogs.jsonl

Rows have `context` (turns joined by newlines) or `prompt`, and `candidates`. One table with a column per
file, two plots, the violations as file:line: what, and as the last line of stdout one JSON object with
every figure. Exit code 0 without violations, 2 with. Contexts are also compared across the given files,
so give train and test together. Limits on lengths hold for `context` rows; prompts are of any task.

What the checks cannot do: the language check is a heuristic (see `english_share`), profanity is a score for
offensive words that is biased against identity terms, and personal data is found by its form alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modeling.checkpoints import load_checkpoint
from modeling.embedder import load_embedder
from scoring import judge_local, metrics
from utils import USAGE, fail, info

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a subfolder does not see utils.py

import utils
from flags import FlagParser, parse_flags

MIN_ROWS_FOR_OPENINGS = 100  # in a smaller file one repeated opening is already above any sensible share
MAX_PROFANITY = 0.98  # 16 of 15,201 harmless hand-written texts reach 0.9, none 0.98; strong profanity is above 0.99
SUSPECT_PROFANITY = 0.5
KINDS = {  # the kinds of violation, as the table names them
    "num_candidates": "too few candidates",
    "turns": "turns outside limits",
    "length": "candidate length outside limits",
    "speaker_label": "speaker labels",
    "language": "not English (heuristic)",
    "personal_data": "personal data",
    "profanity": "profanity",
    "duplicate": "equal candidates in a row",
    "near_duplicate": "near-equal candidates in a row",
    "duplicate_context": "equal contexts",
    "near_duplicate_context": "near-equal contexts",
    "opening": "openings used too often",
}


@dataclass
class Report:
    """One file: its rows, the 1-based line of each, what was found, and what was not checked and why."""

    path: str
    rows: list[dict]
    lines: list[int]
    violations: list[tuple[int, str, str]] = field(default_factory=list)  # (line, kind, what)
    figures: dict = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    context_vectors: np.ndarray | None = None  # (rows, D), unit length
    candidate_vectors: list[np.ndarray] = field(default_factory=list)  # per row (candidates, D), unit length

    def add(self, index: int, kind: str, what: str) -> None:
        self.violations.append((self.lines[index], kind, what))

    @property
    def candidates(self) -> list[str]:
        return [c for row in self.rows for c in row["candidates"]]


# ---- what counts as a fault of one text ---------------------------------------------------------

PERSONAL_DATA = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w"),
    "a URL": re.compile(r"https?://\S+|\bwww\.\S+|\b[\w-]+\.(?:com|org|net|edu|gov|io)\b", re.IGNORECASE),
    "a card-like number": re.compile(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?!\d)"),
    "a phone number": re.compile(
        r"(?<![\w.])(?<!\d )(?:\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,5}"  # +44 20 7946 0958
        r"|(?:1[ .-])?\(?\d{3}\)?[ .-]?\d{3}[ .-]?\d{4}"       # (801) 555-0123, 8015550123
        r"|0[1-9]\d{1,3}[ /-]\d{3,}(?:[ -]\d{2,})*"            # 020 7946 0958
        r"|[2-9]\d\d-\d{4})(?![\w-]|\.\d)"),                   # 555-0123; no exchange starts with 0 or 1
}
SPEAKER_LABEL = re.compile(
    r"^\W*(?:(?i:person|speaker|participant) ?\w\b|(?i:user|assistant|human|bot|system)|[AB])\W{0,2}:"
    r"|<speaker ?\d>", re.MULTILINE)
# Common words of English that are no words of its neighbours (so not: a, in, me, was, will, is, on, he).
ENGLISH_WORDS = frozenset("""
    about after and any are because been before being can't could did didn't does don't down have he's here his how
    i'd i'll i'm i've isn't it it's let's may might mine my our out shall she she's some than that that's the their
    then these they they're this those too up very we'll we're were what what's when which why with without would
    you you'll you're your yours""".split())
MIN_ENGLISH = {"context": 0.08, "prompt": 0.02}  # talk has 0.12 to 0.4; lists and headlines have few such words
MIN_ENGLISH_LENGTH = 30  # words; a shorter text may hold none by chance
MIN_ASCII = 0.8  # of one text's letters


def find_personal_data(text: str) -> str | None:
    """What a text holds that looks like personal data ("an e-mail address: x@y.z"), or None."""
    for name, pattern in PERSONAL_DATA.items():
        if match := pattern.search(text):
            return f"{name}: {match[0].strip()}"
    return None


def english_share(text: str) -> tuple[float, int]:
    """Share of words that are common and distinctly English ones, and the number of words.

    A heuristic without a model: English talk lies near 0.3, other languages at 0. It cannot see one
    foreign reply among six English ones unless that is in another script.
    """
    found = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.casefold().replace("’", "'"))
    return sum(word in ENGLISH_WORDS for word in found) / max(len(found), 1), len(found)


def ascii_share(text: str) -> float:
    """Share of a text's letters that are ASCII; 1 for a text without letters."""
    letters = [c for c in text if c.isalpha()]
    return sum(c.isascii() for c in letters) / len(letters) if letters else 1.0


def opening(text: str) -> str:
    """The first three words, lower case, without punctuation."""
    return " ".join(re.findall(r"[\w']+", text.casefold().replace("’", "'"))[:3])


def profanity_scores(texts: Sequence[str]) -> np.ndarray | None:
    """Probability of offensive language (N,) by alt-profanity-check, or None where it is not installed.

    A linear model over words: quick, and biased. "I am gay" scores 0.98, "I am a Muslim woman" 0.30,
    "damn it" 0.98. Only a high score is evidence, and a person should read each hit.
    """
    try:
        from profanity_check import predict_prob
    except ImportError:
        return None
    return predict_prob(texts)


# ---- rows ---------------------------------------------------------------------------------------


def read_report(path: str) -> Report:
    """Read a file with its line numbers; broken rows end the run here, with file:line:column."""
    rows = utils.read_jsonl(path, utils.check_row)
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = [number for number, raw in enumerate(data.split(b"\n"), 1) if raw.strip()]
    if utils.one_array(data) is not None:
        lines = list(range(1, len(rows) + 1))  # as read_jsonl counts the items of an array
    return Report(path, rows, lines)


def kind_of(row: dict) -> str:
    return "context" if "context" in row else "prompt"


def turns_of(row: dict) -> list[str]:
    """The turns of a context; a prompt is one turn."""
    return row["context"].split("\n") if "context" in row else [row["prompt"]]


def texts_of(row: dict) -> Iterator[tuple[str, str]]:
    """Every text of a row with its name: ("turn 1", ...), ("candidate 1", ...)."""
    for name, texts in (("turn", turns_of(row)), ("candidate", row["candidates"])):
        for number, text in enumerate(texts, 1):
            yield f"{name} {number}", text


def short(text: str) -> str:
    """A text as it is shown in a message."""
    text = " ".join(text.split())
    return json.dumps(text if len(text) <= 70 else text[:67] + "...", ensure_ascii=False)


def check_row(row: dict, args) -> Iterator[tuple[str, str]]:
    """What is wrong with one row on its own: (kind, what)."""
    turns, candidates = turns_of(row), row["candidates"]
    if len(candidates) < args.min_candidates:
        yield "num_candidates", f"{len(candidates)} candidates, --min_candidates is {args.min_candidates}"
    if "context" in row:
        if not args.min_turns <= len(turns) <= args.max_turns:
            yield "turns", f"{len(turns)} turns, not {args.min_turns} to {args.max_turns}"
        if not all(turn.strip() for turn in turns):
            yield "turns", f"turn {[bool(turn.strip()) for turn in turns].index(False) + 1} is empty"
        for number, text in enumerate(candidates, 1):
            if not args.min_words <= (num_words := len(text.split())) <= args.max_words:
                yield "length", (f"candidate {number} has {num_words} words, "
                                 f"not {args.min_words} to {args.max_words}: {short(text)}")
    for name, text in texts_of(row):
        if SPEAKER_LABEL.search(text) and ("context" in row or name.startswith("candidate")):
            yield "speaker_label", f"{name} holds a speaker label: {short(text)}"
        if found := find_personal_data(text):
            yield "personal_data", f"{name} holds {found}"
        if not args.any_language and ascii_share(text) < MIN_ASCII:
            yield "language", f"{name} has {ascii_share(text):.0%} ASCII letters: {short(text)}"
    sides = [" ".join(turns), " ".join(candidates)]
    for text in sides if "context" in row else [" ".join(sides)]:
        share, num_words = english_share(text)
        if not args.any_language and num_words >= MIN_ENGLISH_LENGTH and share < MIN_ENGLISH[kind_of(row)]:
            yield "language", f"has {share:.0%} common English words: {short(text)}"


def check_profanity(report: Report, limit: float) -> None:
    """Score every turn and candidate; what reaches the limit is a violation, the rest above 0.5 is counted."""
    texts = [(i, name, text) for i, row in enumerate(report.rows) for name, text in texts_of(row)]
    scores = profanity_scores([text for _, _, text in texts])
    if scores is None:
        report.skipped["profanity"] = "skipped: pip install alt-profanity-check==1.9.1"
        return
    report.figures["profanity_suspects"] = int(((scores >= SUSPECT_PROFANITY) & (scores < limit)).sum())
    for (i, name, text), score in zip(texts, scores, strict=True):
        if score >= limit:
            report.add(i, "profanity", f"{name} has profanity {score:.2f}, the limit is {limit:g}: {short(text)}")


def check_openings(report: Report, args) -> None:
    """Shares of the first three words; a frequent one is a violation of the row that first uses it."""
    contexts = [(i, row[kind_of(row)]) for i, row in enumerate(report.rows)]
    candidates = [(i, c) for i, row in enumerate(report.rows) for c in row["candidates"]]
    enforced = len(report.rows) >= MIN_ROWS_FOR_OPENINGS
    if not enforced:
        report.skipped["opening"] = f"not enforced below {MIN_ROWS_FOR_OPENINGS} rows"
    for name, texts, limit in (("context", contexts, args.max_context_opening),
                               ("candidate", candidates, args.max_opening)):
        counts = Counter(opening(text) for _, text in texts)
        common = [(words, count / len(texts)) for words, count in counts.most_common()]
        report.figures[f"{name}_openings"] = [[words, round(share, 4)] for words, share in common[:5]]
        for words, share in common:
            if enforced and share > limit:
                first = next(i for i, text in texts if opening(text) == words)
                report.add(first, "opening", f'{share:.1%} of the {name}s begin with "{words}" '
                                             f"({counts[words]} of {len(texts)}), the limit is {limit:.1%}")


# ---- similarity ---------------------------------------------------------------------------------


def embed(texts: list[str], embedder, what: str) -> np.ndarray:
    """Sentence embeddings (N, D) of unit length, with a progress bar; texts beyond 256 tokens are cut."""
    from tqdm import tqdm

    starts = tqdm(range(0, len(texts), 256), desc=f"embed {what}", unit="batch")
    return np.concatenate([
        embedder.encode(texts[i:i + 256], normalize_embeddings=True, show_progress_bar=False) for i in starts])


def embed_report(report: Report, embedder) -> None:
    """Fill in a report's vectors."""
    name = Path(report.path).name
    report.context_vectors = embed([row[kind_of(row)] for row in report.rows], embedder, f"contexts of {name}")
    vectors = embed(report.candidates, embedder, f"candidates of {name}")
    ends = np.cumsum([len(row["candidates"]) for row in report.rows])
    report.candidate_vectors = np.split(vectors, ends[:-1])


def find_duplicates(texts: Sequence[str], vectors: np.ndarray, cosine: float) -> list[tuple[int, int, float | None]]:
    """(later, earlier, cosine) for every text that repeats an earlier one; cosine is None if they are equal.

    Equal means after utils.normalise. vectors: (N, D) of unit length. N dot products of growing length,
    so a second for 5,000 texts.
    """
    seen: dict[str, int] = {}
    found: list[tuple[int, int, float | None]] = []
    for i, text in enumerate(texts):
        key = utils.normalise(text)
        if key in seen:
            found.append((i, seen[key], None))
        elif i:
            similar = vectors[:i] @ vectors[i]
            j = int(similar.argmax())
            value = min(float(similar[j]), 1.0)  # rounding may carry a cosine above 1
            if value > cosine:
                found.append((i, j, value))
        seen.setdefault(key, i)
    return found


def compare(kind: str, later: str, earlier: str, cosine: float | None) -> tuple[str, str]:
    """The kind of a violation by two like texts, and what to say of it; cosine is None if they are equal."""
    if cosine is None:
        return kind, f"{later} equals {earlier}"
    return f"near_{kind}", f"{later} nearly equals {earlier} (cosine {cosine:.3f})"


def check_candidates_differ(report: Report, max_cosine: float) -> None:
    for i, (row, vectors) in enumerate(zip(report.rows, report.candidate_vectors, strict=True)):
        for later, earlier, cosine in find_duplicates(row["candidates"], vectors, max_cosine):
            kind, what = compare("duplicate", f"candidate {later + 1}", f"candidate {earlier + 1}", cosine)
            report.add(i, kind, f"{what}: {short(row['candidates'][later])}")


def check_contexts_differ(reports: list[Report], max_cosine: float) -> None:
    """Compare contexts inside each file and across all files."""
    places = [(report, i) for report in reports for i in range(len(report.rows))]
    texts = [report.rows[i][kind_of(report.rows[i])] for report, i in places]
    vectors = np.concatenate([report.context_vectors for report in reports])
    for later, earlier, cosine in find_duplicates(texts, vectors, max_cosine):
        (report, i), (other, j) = places[later], places[earlier]
        kind, what = compare("duplicate_context", "context", f"{other.path}:{other.lines[j]}", cosine)
        report.add(i, kind, f"{what}: {short(texts[later])}")


# ---- figures ------------------------------------------------------------------------------------


def load_judge(args, embedder):
    """The local coherence proxy on the embedded model, or None where the flag switches it off."""
    if not args.limit_proxy:
        return None

    if args.limit_proxy < 2 * judge_local.FOLDS:
        fail(USAGE, f"--limit_proxy {args.limit_proxy} is too few rows",
                  f"give {2 * judge_local.FOLDS} or more, or 0 for none")
    model, tokenizer, _ = load_checkpoint(utils.EMBEDDED)
    return judge_local.LocalProxy(model, tokenizer, embedder)


def measure_proxy(report: Report, judge, limit: int) -> None:
    """AUC of the local proxy on true against mismatched replies: do candidates belong to their contexts?"""
    from tqdm import tqdm

    report.figures["proxy_auc"] = None
    if judge is None:
        report.skipped["proxy_auc"] = "skipped: --limit_proxy 0"
    elif len(report.rows) < 10:
        report.skipped["proxy_auc"] = "skipped: needs 10 rows"
    else:
        judge.calibrate(report.rows, limit, progress=lambda rows: tqdm(rows, desc="coherence proxy", unit="row"))
        report.figures["proxy_auc"] = round(judge.auc, 4)


def measure(report: Report) -> None:
    """All figures that are no violations: counts, lengths in words, diversity.

    distinct-n pools the first 5 candidates of all rows, so only files of equally many rows compare;
    SBERT diversity is that of the first 4 candidates, averaged over rows with at least two.
    """
    rows, candidates = report.rows, report.candidates
    pool = [c for row in rows for c in row["candidates"][:5]]
    diversity = [metrics.pairwise_diversity(v[:4]) for v in report.candidate_vectors if len(v) > 1]
    english = english_share(" ".join(text for row in rows for _, text in texts_of(row)))[0]
    report.figures |= {
        "rows": len(rows),
        "candidates": len(candidates),
        "candidates_per_row": spread([len(row["candidates"]) for row in rows]),
        "turns": spread([len(turns_of(row)) for row in rows]),
        "context_words": spread([len(row[kind_of(row)].split()) for row in rows]),
        "candidate_words": spread([len(c.split()) for c in candidates]),
        "question_share": round(sum("?" in c for c in candidates) / len(candidates), 4),
        "english_word_share": round(english, 4),
        "distinct_1": rounded(metrics.distinct_n(pool, 1)),
        "distinct_2": rounded(metrics.distinct_n(pool, 2)),
        "distinct_pool": len(pool),
        "sbert_diversity": rounded(float(np.mean(diversity))) if diversity else None,
        "violations": {kind: sum(v[1] == kind for v in report.violations) for kind in KINDS},
        "skipped": report.skipped,
    }


def spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "mean": round(float(np.mean(values)), 2),
            "max": max(values)}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# ---- what the user sees -------------------------------------------------------------------------


def column_names(reports: list[Report]) -> list[str]:
    """File names, or whole paths where two files have one name."""
    names = [Path(report.path).name for report in reports]
    return names if len(set(names)) == len(names) else [report.path for report in reports]


def cells(report: Report, max_profanity: float) -> dict[str, str]:
    """The table's column of one file, by the name of the line; violations come last."""
    figures = report.figures

    def show(name: str) -> str:
        value = figures.get(name)
        if name in report.skipped or value is None:
            return report.skipped.get(name, "-")
        if isinstance(value, dict):
            return f"{value['mean']:.1f}  ({value['min']} to {value['max']}, median {value['median']:g})"
        return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"

    def openings(name: str) -> str:
        return "\n".join(f"{share:.1%} {words}" for words, share in figures[name][:3])

    lines = {
        "rows": show("rows"), "candidates": show("candidates"), "candidates per row": show("candidates_per_row"),
        "turns": show("turns"), "words of a context": show("context_words"),
        "words of a candidate": show("candidate_words"), "share with a question": show("question_share"),
        "share of common English words": show("english_word_share"),
        "distinct-1, first 5 candidates": show("distinct_1"), "distinct-2, first 5 candidates": show("distinct_2"),
        "SBERT diversity, first 4": show("sbert_diversity"),
        "coherence proxy AUC": show("proxy_auc"),
        f"profanity {SUSPECT_PROFANITY} to {max_profanity:g}, to read": show("profanity_suspects"),
        "context openings": openings("context_openings"), "candidate openings": openings("candidate_openings"),
    }
    return lines | {name: report.skipped.get(kind, str(figures["violations"][kind])) for kind, name in KINDS.items()}


def print_table(reports: list[Report], max_profanity: float) -> None:
    """One column per file; counts of violations are marked where they are not 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=max(120, Console().width))
    table = Table(title="One-to-many data: figures, then violations", title_justify="left")
    for name in ["", *column_names(reports)]:
        table.add_column(name, overflow="fold")
    columns = [cells(report, max_profanity) for report in reports]
    for name in columns[0]:
        if name == next(iter(KINDS.values())):
            table.add_section()
        bad = [name in KINDS.values() and column[name].isdigit() and column[name] != "0" for column in columns]
        table.add_row(name, *(Text(f"{column[name]} !", "bold red") if marked else Text(column[name])
                              for column, marked in zip(columns, bad, strict=True)))
    console.print(table)
    console.print("profanity: a score for offensive words, biased against identity terms; read a hit before you "
                  "delete it.\nlanguage and personal data: heuristics. coherence proxy: true against mismatched "
                  "replies, 0.5 is chance.", highlight=False)


COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]  # Okabe and Ito, without yellow
DASHES = ["-", "--", ":"]  # a second sign beside colour, and for more than seven files


def plot_distributions(reports: list[Report], file: Path) -> None:
    """Histograms of candidate lengths and of the cosines between the candidates of a row."""
    from matplotlib.figure import Figure

    lengths = [[len(c.split()) for c in report.candidates] for report in reports]
    cosines = [np.concatenate([(v @ v.T)[np.triu_indices(len(v), 1)] for v in report.candidate_vectors]).clip(-0.2, 1)
               for report in reports]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    longest = max(max(values) for values in lengths)
    step = max(1, longest // 40)
    bins = [np.arange(0.5, longest + step + 0.5, step), np.linspace(-0.2, 1, 49)]
    for panel, values, edges, label in zip(panels, (lengths, cosines), bins, (
            "words of a candidate", "cosine of two candidates of a row (MiniLM)"), strict=True):
        for i, (one, name) in enumerate(zip(values, column_names(reports), strict=True)):
            if len(one):  # no pairs where rows have one candidate
                weights = np.full(len(one), 1 / len(one))
                panel.hist(one, edges, weights=weights, histtype="step", linewidth=1.8, label=name,
                           color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)])
        panel.set(xlabel=label, ylabel="share")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=150)


def plot_openings(reports: list[Report], args, file: Path) -> None:
    """Bars: the shares of each file's most common openings, beside the limit."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 1.2 + 1.3 * len(reports)), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name, limit in zip(panels, ("context", "candidate"), (args.max_context_opening, args.max_opening),
                                  strict=True):
        bars = [(words, share, i) for i, report in enumerate(reports)
                for words, share in report.figures[f"{name}_openings"]][::-1]
        panel.barh(range(len(bars)), [100 * share for _, share, _ in bars],
                   color=[COLOURS[i % len(COLOURS)] for _, _, i in bars])
        panel.set_yticks(range(len(bars)), [words.replace("$", r"\$")[:40] for words, _, _ in bars], fontsize=8)
        panel.axvline(100 * limit, color="#555555", linestyle="--", linewidth=1)
        panel.set(xlabel=f"% of the {name}s (dashed: limit)", title=f"most common openings of {name}s")
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(column_names(reports))]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=150)


def build_parser(method: str | None) -> FlagParser:
    parser = FlagParser(prog="data/check.py", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="JSONL files; contexts are compared across all of them")
    group = parser.add_argument_group("limits (of `context` rows where they are about length)")
    group.add_argument("--min_candidates", type=int, default=1, help="candidates a row (default: 1)")
    group.add_argument("--min_turns", type=int, default=2, help="turns of a context (default: 2)")
    group.add_argument("--max_turns", type=int, default=10, help="turns of a context (default: 10)")
    group.add_argument("--min_words", type=int, default=4, help="words of a candidate (default: 4)")
    group.add_argument("--max_words", type=int, default=40, help="words of a candidate (default: 40)")
    group.add_argument("--max_cosine", type=float, default=0.9,
                       help="MiniLM cosine above which two texts are near duplicates; 1 allows all (default: 0.9)")
    group.add_argument("--max_opening", type=float, default=0.02,
                       help="share of candidates with the same first three words (default: 0.02)")
    group.add_argument("--max_context_opening", type=float, default=0.03, help="the same for contexts (default: 0.03)")
    group.add_argument("--max_profanity", type=float, default=MAX_PROFANITY,
                       help=f"profanity score that counts as a violation (default: {MAX_PROFANITY})")
    group.add_argument("--any_language", action="store_true", help="leave out the check for English")
    group = parser.add_argument_group("effort and output")
    group.add_argument("--limit_proxy", type=int, default=100, help="rows a file for the coherence proxy, "
                       "which needs the embedded model; 0 for none (default: 100)")
    group.add_argument("--plot_dir", default="data/plots", help="where the two PNG files go (default: data/plots)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(build_parser, argv)
    if len(set(args.files)) < len(args.files):
        fail(USAGE, "a file is given twice", "name each file once; every context would be a duplicate")
    reports = [read_report(path) for path in args.files]
    embedder = load_embedder()
    judge = load_judge(args, embedder)
    for report in reports:
        for i, row in enumerate(report.rows):
            for kind, what in check_row(row, args):
                report.add(i, kind, what)
        check_profanity(report, args.max_profanity)
        check_openings(report, args)
        embed_report(report, embedder)
        check_candidates_differ(report, args.max_cosine)
        measure_proxy(report, judge, args.limit_proxy)
    check_contexts_differ(reports, args.max_cosine)
    for report in reports:
        measure(report)

    plots = [Path(args.plot_dir) / "check_distributions.png", Path(args.plot_dir) / "check_openings.png"]
    plots[0].parent.mkdir(parents=True, exist_ok=True)
    plot_distributions(reports, plots[0])
    plot_openings(reports, args, plots[1])
    print_table(reports, args.max_profanity)
    print(f"plots: {plots[0]} {plots[1]}", flush=True)
    finish(reports)


def finish(reports: list[Report]) -> None:
    """Name the violations, print the JSON line, and leave with exit code 2 if there were any."""
    found = [f"{report.path}:{line}: {what}" for report in reports for line, _, what in sorted(report.violations)]
    for text in found[:utils.MAX_SHOWN_ERRORS]:
        info(text)
    figures = {report.path: report.figures for report in reports}
    print(json.dumps({"violations": len(found), "files": figures}, ensure_ascii=False, allow_nan=False), flush=True)
    if found:
        more = len(found) - utils.MAX_SHOWN_ERRORS
        fail(USAGE, f"{len(found)} violations" + (f", {more} of them not shown" if more > 0 else ""),
                  "mend or delete these rows, or move a limit (--help)")


if __name__ == "__main__":
    utils.run(main)
