"""Report on one-to-many JSONL files and enforce what training and evaluation rely on.

    python -m data.check data/train_dialogs_1k.jsonl data/test_dialogs.jsonl

Rows have `context` (turns joined by newlines) or `prompt`, and `candidates`. What comes out is a
table with a column per file, two plots, the violations as file:line: what, and as the last line of
stdout one JSON object with every figure. Exit code 0 without violations, 2 with. Contexts are also
compared across the given files, so give train and test together. Limits on lengths hold for
`context` rows; prompts are of any task. scoring/checks.py says what the checks cannot do.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import utils
from data import check_view
from data.check_report import KINDS, Report, read_report, spread
from flags import Args, FlagParser, natural, parse_flags
from modeling.checkpoints import load_checkpoint
from modeling.embedder import load_embedder
from scoring import checks, judge_local, metrics
from scoring.checks import MAX_PROFANITY, SUSPECT_PROFANITY, kind_of, short, texts_of, turns_of
from utils import USAGE, fail, info

MIN_ROWS_FOR_OPENINGS = 100  # in a smaller file one repeated opening is above any sensible share


def _check_profanity(report: Report, limit: float) -> None:
    """Score every text: at the limit it is a violation, between 0.5 and the limit it is counted."""
    texts = [(i, name, text) for i, row in enumerate(report.rows) for name, text in texts_of(row)]
    scores = checks.profanity_scores([text for _, _, text in texts])
    if scores is None:
        report.skipped["profanity"] = "skipped: pip install alt-profanity-check==1.9.1"
        return
    suspects = (scores >= SUSPECT_PROFANITY) & (scores < limit)
    report.figures["profanity_suspects"] = int(suspects.sum())
    for (i, name, text), score in zip(texts, scores, strict=True):
        if score >= limit:
            report.add(i, "profanity", f"{name} has profanity {score:.2f}, the limit is "
                                       f"{limit:g}: {short(text)}")


def _check_openings(report: Report, args) -> None:
    """Shares of the first three words; a frequent one is a violation where it is first used."""
    contexts = [(i, row[kind_of(row)]) for i, row in enumerate(report.rows)]
    candidates = [(i, c) for i, row in enumerate(report.rows) for c in row["candidates"]]
    enforced = len(report.rows) >= MIN_ROWS_FOR_OPENINGS
    if not enforced:
        report.skipped["opening"] = f"not enforced below {MIN_ROWS_FOR_OPENINGS} rows"
    for name, texts, limit in (("context", contexts, args.max_context_opening),
                               ("candidate", candidates, args.max_opening)):
        counts = Counter(checks.opening(text) for _, text in texts)
        common = [(words, count / len(texts)) for words, count in counts.most_common()]
        report.figures[f"{name}_openings"] = [
            [words, round(share, 4)] for words, share in common[:5]]
        for words, share in common:
            if enforced and share > limit:
                # one violation for all: the place where a reader starts to look
                first = next(i for i, text in texts if checks.opening(text) == words)
                report.add(first, "opening",
                           f'{share:.1%} of the {name}s begin with "{words}" '
                           f"({counts[words]} of {len(texts)}), the limit is {limit:.1%}")


def _embed_report(report: Report, embedder) -> None:
    """Fill in a report's vectors."""
    name = Path(report.path).name
    contexts = [row[kind_of(row)] for row in report.rows]
    report.context_vectors = checks.embed(contexts, embedder, f"contexts of {name}")
    # all rows at once, since the embedder is fastest on full batches; then cut back into rows
    vectors = checks.embed(report.candidates, embedder, f"candidates of {name}")
    ends = np.cumsum([len(row["candidates"]) for row in report.rows])
    report.candidate_vectors = np.split(vectors, ends[:-1])


def _compare(kind: str, later: str, earlier: str, cosine: float | None) -> tuple[str, str]:
    """The kind of a violation by two like texts, and what to say; cosine None: they are equal."""
    if cosine is None:
        return kind, f"{later} equals {earlier}"
    return f"near_{kind}", f"{later} nearly equals {earlier} (cosine {cosine:.3f})"


def _check_candidates_differ(report: Report, max_cosine: float) -> None:
    for i, (row, vectors) in enumerate(zip(report.rows, report.candidate_vectors, strict=True)):
        repeats = checks.find_duplicates(row["candidates"], vectors, max_cosine)
        for later, earlier, cosine in repeats:
            kind, what = _compare("duplicate", f"candidate {later + 1}",
                                  f"candidate {earlier + 1}", cosine)
            report.add(i, kind, f"{what}: {short(row['candidates'][later])}")


def _check_contexts_differ(reports: list[Report], max_cosine: float) -> None:
    """Compare contexts inside each file and across all files."""
    places = [(report, i) for report in reports for i in range(len(report.rows))]
    texts = [report.rows[i][kind_of(report.rows[i])] for report, i in places]
    vectors = np.concatenate([report.context_vectors for report in reports])
    for later, earlier, cosine in checks.find_duplicates(texts, vectors, max_cosine):
        (report, i), (other, j) = places[later], places[earlier]
        place = f"{other.path}:{other.lines[j]}"
        kind, what = _compare("duplicate_context", "context", place, cosine)
        report.add(i, kind, f"{what}: {short(texts[later])}")


# ---- figures ------------------------------------------------------------------------------------


def _load_judge(args, embedder) -> judge_local.LocalProxy | None:
    """The local coherence proxy on the embedded model, or None where the flag switches it off."""
    if not args.limit_proxy:
        return None
    if args.limit_proxy < judge_local.MIN_ROWS:
        fail(USAGE, f"--limit_proxy {args.limit_proxy} is too few rows",
             f"give {judge_local.MIN_ROWS} or more, or 0 for none")
    model, tokenizer, _ = load_checkpoint(utils.EMBEDDED)
    return judge_local.LocalProxy(model, tokenizer, embedder)


def _measure_proxy(report: Report, judge, limit: int) -> None:
    """AUC of the local proxy on true against mismatched replies: do candidates fit contexts?"""
    report.figures["proxy_auc"] = None
    if judge is None:
        report.skipped["proxy_auc"] = "skipped: --limit_proxy 0"
    elif len(report.rows) < judge_local.MIN_ROWS:
        report.skipped["proxy_auc"] = f"skipped: needs {judge_local.MIN_ROWS} rows"
    else:
        judge.calibrate(report.rows, limit, progress=lambda rows: tqdm(
            rows, desc="coherence proxy", unit="row"))
        report.figures["proxy_auc"] = round(judge.auc, 4)


def _measure(report: Report) -> None:
    """All figures that are no violations: counts, lengths in words, diversity.

    distinct-n pools the first 5 candidates of all rows, so only files of equally many rows compare;
    SBERT diversity is that of the first 4 candidates, averaged over rows with at least two.
    """
    rows, candidates = report.rows, report.candidates
    pool = [c for row in rows for c in row["candidates"][:5]]
    diversity = [metrics.pairwise_diversity(v[:4]) for v in report.candidate_vectors if len(v) > 1]
    english = checks.english_share(" ".join(text for row in rows for _, text in texts_of(row)))[0]
    report.figures |= {
        "rows": len(rows),
        "candidates": len(candidates),
        "candidates_per_row": spread([len(row["candidates"]) for row in rows]),
        "turns": spread([len(turns_of(row)) for row in rows]),
        "context_words": spread([len(row[kind_of(row)].split()) for row in rows]),
        "candidate_words": spread([len(c.split()) for c in candidates]),
        "question_share": round(sum("?" in c for c in candidates) / len(candidates), 4),
        "english_word_share": round(english, 4),
        "distinct_1": _rounded(metrics.distinct_n(pool, 1)),
        "distinct_2": _rounded(metrics.distinct_n(pool, 2)),
        "distinct_pool": len(pool),
        "sbert_diversity": _rounded(float(np.mean(diversity))) if diversity else None,
        "violations": {kind: sum(v[1] == kind for v in report.violations) for kind in KINDS},
        "skipped": report.skipped,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def build_parser() -> FlagParser:
    """All flags of the report."""
    parser = FlagParser(prog="-m data.check", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="JSONL files; contexts are compared across all of them")
    group = parser.add_argument_group("limits (of `context` rows where they are about length)")
    for name, default, what in (
            ("min_candidates", 1, "candidates a row"), ("min_turns", 2, "turns of a context"),
            ("max_turns", 10, "turns of a context"), ("min_words", 4, "words of a candidate"),
            ("max_words", 40, "words of a candidate")):
        group.add_argument(f"--{name}", type=natural, default=default,
                           help=f"{what} (default: %(default)s)")
    group.add_argument("--max_cosine", type=float, default=0.9,
                       help="MiniLM cosine above which two texts are near duplicates; "
                            "1 allows all (default: %(default)s)")
    group.add_argument("--max_opening", type=float, default=0.02,
                       help="share of candidates with the same first three words "
                            "(default: %(default)s)")
    group.add_argument("--max_context_opening", type=float, default=0.03,
                       help="the same for contexts (default: %(default)s)")
    group.add_argument("--max_profanity", type=float, default=MAX_PROFANITY,
                       help="profanity score that counts as a violation (default: %(default)s)")
    group.add_argument("--any_language", action="store_true",
                       help="leave out the check for English")
    group = parser.add_argument_group("effort and output")
    group.add_argument("--limit_proxy", type=natural, default=100,
                       help="rows a file for the coherence proxy, which needs the embedded model; "
                            "0 for none (default: %(default)s)")
    group.add_argument("--plot_dir", default="data/plots",
                       help="where the two PNG files go (default: %(default)s)")
    return parser


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command."""
    args = parse_flags(build_parser(), argv)
    if len(set(args.files)) < len(args.files):
        fail(USAGE, "a file is given twice",
             "name each file once; every context would be a duplicate")
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    reports = [read_report(path) for path in args.files]  # first: a broken row costs no loading
    embedder = load_embedder()
    judge = _load_judge(args, embedder)
    for report in reports:
        for i, row in enumerate(report.rows):
            for kind, what in checks.check_row(row, args):
                report.add(i, kind, what)
        _check_profanity(report, args.max_profanity)
        _check_openings(report, args)
        _embed_report(report, embedder)
        _check_candidates_differ(report, args.max_cosine)
        _measure_proxy(report, judge, args.limit_proxy)
    _check_contexts_differ(reports, args.max_cosine)  # once all files have their vectors
    for report in reports:
        _measure(report)  # last, since it counts the violations of all checks

    folder = Path(args.plot_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plots = [folder / "check_distributions.png", folder / "check_openings.png"]
    check_view.plot_distributions(reports, plots[0])
    check_view.plot_openings(reports, args, plots[1])
    check_view.print_table(reports, args.max_profanity)
    print(f"plots: {plots[0]} {plots[1]}", flush=True)
    _finish(reports)


def _finish(reports: list[Report]) -> None:
    """Name the violations, print the JSON line, and leave with code 2 if there were any."""
    violations = [f"{report.path}:{line}: {what}" for report in reports
                  for line, _, what in sorted(report.violations)]
    for text in violations[: utils.MAX_SHOWN_ERRORS]:
        info(text)
    summary = {"violations": len(violations),
               "files": {report.path: report.figures for report in reports}}
    # before the failure below: scripts read this line whether or not there are violations
    print(json.dumps(summary, ensure_ascii=False, allow_nan=False), flush=True)
    if violations:
        more = len(violations) - utils.MAX_SHOWN_ERRORS
        fail(USAGE, f"{len(violations)} violations"
                    + (f", {more} of them not shown" if more > 0 else ""),
             "mend or delete these rows, or move a limit (--help)")


if __name__ == "__main__":
    utils.run(main)
