"""Score files of responses: coherence, diversity and their joint yield, side by side.

    python eval.py --eval_file outs/base.jsonl outs/my_peft.jsonl --save_file eval_logs/compare.json
    python eval.py --eval_file outs/out.jsonl --save_file eval_logs/out.pkl \\
        --judge1 together:meta-llama/Llama-3-70b-chat-hf --judge2 openai:gpt-4o
    python eval.py --show eval_logs/compare.json

Every method gets the common figures, and beside them its own: eval_logs/X.jsonl (a line per
response), X.METHOD.jsonl, X.json (the summary), X.html (a page of figures and replies), and tables.
Intervals are 95 % over prompts, differences are paired by prompt. Degenerate controls (random
words, replies moved to other prompts, one reply repeated) are scored with the systems, so that a
metric that rewards noise is seen to do so. The judge is checked, too: where it accepts replies
without sense, what hangs on its verdicts is withheld.

`python eval.py --persona` scores interviews (demographic bias test) instead; its flags:
`python eval.py --persona --help`.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import utils
from flags import Args, FlagParser, first_pass, parse_flags, positive_int
from methods import METHODS
from scoring.flags import add_judge_flags
from utils import UNSCORED, USAGE, fail, info

# What a summary's kind, "eval/FOLDER", stands for: measure(systems, sources, args) and
# tables(summary). A name that comes from a file is looked up here and never imported.
EVALUATIONS = {
    "possibility": "methods.possibility.evaluation",
    "diffuse": "methods.diffuse.evaluation",
    "spt": "methods.spt.evaluation",
    "delia": "methods.delia.evaluation",
    "control": "methods.control.evaluation",
    "persona": "persona.figures",
}


# ---- flags --------------------------------------------------------------------------------------


def build_parser() -> FlagParser:
    """All flags of evaluation."""
    parser = FlagParser(prog="eval.py", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--eval_file", nargs="+",
                       help="outs/*.jsonl with the same rows; the first is the baseline")
    group.add_argument("--save_file",
                       help="eval_logs/X.json; a name in .pkl also writes the published pickle")
    group.add_argument("--method", choices=METHODS,
                       help="whose figures are added to the common ones (default: what "
                            "outs/X.json says; base: none)")
    group.add_argument("--persona", action="store_true",
                       help="score files of infer.py --interview, with flags of its own: "
                            "--persona --help")
    group.add_argument("--limit", type=positive_int,
                       help="read the first N rows only (default: all)")
    group.add_argument("--no_controls", action="store_true",
                       help="leave out degenerate systems and references; the judge's own controls "
                            "cannot be left out, see --trust_judge")
    group.add_argument("--show", metavar="FILE",
                       help="only print the tables of an eval_logs/X.json")
    group.add_argument("--json", action="store_true",
                       help="print the summary as JSON and nothing else")
    add_judge_flags(parser)
    return parser


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command; fails over those that cannot work, before anything is loaded."""
    args = parse_flags(build_parser(), argv)
    if args.show:
        return args
    if not args.eval_file or not args.save_file:
        fail(USAGE, "--eval_file and --save_file are required",
             "or --show FILE for the tables of a finished evaluation")
    save_file = Path(args.save_file)
    if save_file.suffix not in (".json", ".pkl"):
        fail(USAGE, f"--save_file {save_file} must end in .json or .pkl",
             f"{save_file.with_suffix('.json')}")
    return args


# ---- the story ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    # Interviews have flags of their own, so the parser is chosen before anything is parsed.
    if first_pass(argv, "persona")["persona"]:
        import_module(EVALUATIONS["persona"]).main(argv)
        return
    args = read_flags(argv)
    if args.show:
        show(args.show, args.json)
        return
    # after the flags, so that a bad one answers in half a second
    from scoring import answers, common, judging, logs, verifiable
    from scoring.report import page
    from scoring.sources import Sources, read_systems

    save_file = Path(args.save_file)
    if args.judge == "api":
        judging.connect(args, save_file)  # a missing key shows before any row is read
    systems = read_systems(args.eval_file, args.limit)
    sources = Sources(dict(zip(systems, args.eval_file, strict=True)))
    by_program = answers.is_verifiable(next(iter(systems.values()))[0])
    if by_program and args.judge != "local":
        info(f"--judge {args.judge} is not asked: a program checks these rows")
    # A method's figures are about rows of its own; on these, any methods can be compared.
    folder = ("possibility" if by_program and not args.method
              else find_folder(sources, args.method))
    # Only the wanted module is imported, since each method has heavy libraries of its own.
    evaluation = import_module(EVALUATIONS[folder])

    result = (verifiable if by_program else common).measure(systems, sources, args)
    part = evaluation.measure(systems, sources, args)
    # Files with different numbers of replies may still have sound figures of their method.
    if result.summary["k"] is None and not part.summary:
        fail(USAGE, result.summary["reasons"]["common figures"],
             "compare files with equally many")
    summary = {"kind": "common", **result.summary}
    if part.summary:
        summary |= {"kind": f"eval/{folder}", folder: part.summary}
    html = page.render(summary, result.prompts, evaluation.tables(part.summary))
    logs.write(save_file, result._replace(summary=summary), html, {folder: part})
    if args.json:
        print(json.dumps(summary, allow_nan=False))
    else:
        print_summary(summary)
        print_files(save_file, [folder] if part.lines else [])
    # Last, so that exit code 4 leaves all files behind.
    stop_if_unscored(summary, args.fail_on_error)


def find_folder(sources, method: str | None) -> str:
    """The folder of the method whose figures are wanted; possibility has only the common ones.

    The method is the flag's, else what drew the files; base models are compared with any of them.
    """
    if method:
        return METHODS[method]
    drawn_by = {name: (sources.settings(name) or {}).get("method") for name in sources.files}
    if not any(drawn_by.values()):
        info("no outs/X.json says which method drew these files; --method adds its figures")
    folders = {METHODS[method] for method in drawn_by.values() if method in METHODS}
    # Its methods have no figures of their own, so they may be compared with any method.
    folders.discard("possibility")
    if len(folders) > 1:
        fail(USAGE, f"the files were drawn by several methods: {', '.join(sorted(folders))}",
             "compare files of one method and of base models, or say --method")
    return folders.pop() if folders else "possibility"


# ---- what is shown ------------------------------------------------------------------------------


def show(file: str, as_json: bool) -> None:
    """Print the tables of a summary that was written before."""
    try:
        summary = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        not_a_summary(file, f"{type(error).__name__}: {error}")
    kind = summary.get("kind") if isinstance(summary, dict) else None
    if kind != "common" and folder_of(kind) not in EVALUATIONS:
        not_a_summary(file, "it has no kind" if kind is None else f"its kind is {kind!r}")
    if as_json:
        print(json.dumps(summary))
        return
    try:
        print_summary(summary)
    # A file from elsewhere may have the right kind and still lack any key.
    except (KeyError, TypeError, AttributeError) as error:
        not_a_summary(file, f"{type(error).__name__}: {error}")


def not_a_summary(file: str, why: str) -> None:
    fail(USAGE, f"--show {file}: not a summary of eval.py ({why})",
         "give an eval_logs/X.json; one from before this version is made again by its command")


def folder_of(kind: object) -> str:
    """The folder in a summary's kind, "" where there is none."""
    return kind.removeprefix("eval/") if isinstance(kind, str) and kind.startswith("eval/") else ""


def print_summary(summary: dict) -> None:
    """The common figures where there are any, then the tables of a method or of interviews."""
    from scoring.report import table

    # A summary of interviews has no common figures, and so no k.
    if "k" in summary:
        table.print_common(summary)
    if folder := folder_of(summary["kind"]):
        table.print_tables(import_module(EVALUATIONS[folder]).tables(summary[folder]))


def print_files(save_file: Path, folders: list[str]) -> None:
    base = save_file.with_suffix("")
    lines = ", ".join([f"{base}.jsonl", *(f"{base}.{folder}.jsonl" for folder in folders)])
    print(f"figures and replies: {base}.html (open it in a browser); one line per response: "
          f"{lines}; summary: {base}.json")
    print(f"next: python eval.py --show {base}.json")


def stop_if_unscored(summary: dict, allowed: float) -> None:
    """Leave with 4 where more replies went unscored than allowed."""
    judged = [s for s in summary["systems"].values() if s.get("unscored") is not None]
    unscored = sum(sum(system["unscored"].values()) for system in judged)
    replies = sum(system["responses"] for system in judged)
    if unscored > allowed * replies:
        fail(UNSCORED, f"{unscored} of {replies} replies are unscored, --fail_on_error allows "
                       f"{allowed:.0%}",
             "the same command asks again about those that met a timeout or an HTTP error")


if __name__ == "__main__":
    utils.run(main)
