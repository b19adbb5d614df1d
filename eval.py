"""Score files of responses: coherence, diversity and their joint yield, side by side.

    python eval.py --eval_file outs/base.jsonl outs/my_peft.jsonl --save_file eval_logs/compare.json

outs/*.jsonl -> coherence judge + diversity metrics -> eval_logs/X.jsonl (a line per response),
X.json (the summary) and a table with 95 % bootstrap intervals over rows.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import utils
from flags import FlagParser, parse_flags


def build_parser(method: str | None) -> FlagParser:
    """All flags of evaluation."""
    parser = FlagParser(prog="eval.py", description=__doc__)
    parser.add_argument("--eval_file", nargs="+", help="outs/*.jsonl with the same rows; the first is the baseline")
    parser.add_argument("--save_file", help="eval_logs/X.json; a name in .pkl also writes the published pickle")
    parser.add_argument("--judge", choices=["local"], default="local", help="local: the offline coherence proxy (default)")
    parser.add_argument("--judge_model", default=utils.EMBEDDED, help="base model of the local judge (default: smollm2)")
    parser.add_argument("--show", metavar="FILE", help="only print the table of an eval_logs/X.json")
    parser.add_argument("--limit", type=int, help="judge the first N rows only (default: all)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(build_parser, argv)
    if args.show:
        show(args.show)
        return
    if not args.eval_file or not args.save_file:
        utils.die(2, "--eval_file and --save_file are required", "or --show FILE for the table of a finished evaluation")
    save_file = Path(args.save_file)
    if save_file.suffix not in (".json", ".pkl"):
        utils.die(2, f"--save_file {save_file} must end in .json or .pkl", f"{save_file.with_suffix('.json')}")
    systems = read_systems(args.eval_file, args.limit)
    if all("targets" in row for rows in systems.values() for row in rows):
        import distributions

        distributions.evaluate_diffuse(systems, args.eval_file, save_file)
        return

    judge, embedder = load_judge(args, next(iter(systems.values())))
    judged = {name: judge_rows(name, rows, judge, embedder) for name, rows in systems.items()}
    summary = {
        "judge": {"name": "local proxy (pmi + cosine)", "model": args.judge_model, "auc": round(judge.auc, 4),
                  "feature_auc": [round(a, 4) for a in judge.feature_auc], "pairs": judge.num_pairs,
                  "threshold": round(judge.threshold, 4)},
        "systems": {name: summarise(rows, args.eval_file[i]) for i, (name, rows) in enumerate(judged.items())},
        "differences": compare(judged),
    }
    write_logs(save_file, summary, judged)
    print_table(summary)
    print(f"one line per response: {save_file.with_suffix('.jsonl')}; summary: {save_file.with_suffix('.json')}")


def read_systems(files: list[str], limit: int | None) -> dict[str, list[dict]]:
    """The rows of every file by its stem; all files must hold the same rows with equally many preds."""

    def check(row):
        preds = row.get("preds")
        if not isinstance(preds, list) or not preds or not all(isinstance(p, str) for p in preds):
            return 'needs "preds", a list of strings; infer.py writes them'
        return utils.check_row(row, candidates=False)

    systems: dict[str, list[dict]] = {}
    for file in files:
        rows = utils.read_jsonl(file, check)[:limit]
        name = Path(file).stem
        if name in systems:
            utils.die(2, f"--eval_file: two files are called {name}", "rename one")
        first = next(iter(systems.values()), rows)
        if [utils.row_hash(r) for r in rows] != [utils.row_hash(r) for r in first]:
            utils.die(2, f"{file} holds other rows than {files[0]} ({len(rows)} and {len(first)})",
                      "compare files made from one --test_file")
        if {len(r["preds"]) for r in rows} != {len(first[0]["preds"])}:
            utils.die(2, f"{file}: rows with different numbers of preds", f"every row needs {len(first[0]['preds'])}")
        systems[name] = rows
    return systems


def load_judge(args, rows: list[dict]):
    """The calibrated local judge and the sentence embedder."""
    from tqdm import tqdm

    from judges import LocalProxy

    embedder = utils.load_embedder()
    model, tokenizer, _ = utils.load_checkpoint(args.judge_model)
    judge = LocalProxy(model, tokenizer, embedder)
    judge.calibrate(rows, progress=lambda items: tqdm(items, desc="calibrate judge", unit="row"))
    return judge, embedder


def judge_rows(name: str, rows: list[dict], judge, embedder) -> list[dict]:
    """Per row: the replies with coherence, features and embeddings."""
    from tqdm import tqdm

    judged = []
    for row in tqdm(rows, desc=f"judge {name}", unit="row"):
        probability, features = judge.score(row, row["preds"])
        judged.append({
            "row": row, "preds": row["preds"], "coherence": probability, "features": features,
            "coherent": probability >= judge.threshold,
            "embeddings": embedder.encode(row["preds"], normalize_embeddings=True, show_progress_bar=False),
        })
    return judged


def per_row(judged: list[dict]) -> dict[str, list[float]]:
    """The metrics that have a value per row, as lists over rows."""
    import metrics

    k = len(judged[0]["preds"])
    values = {
        f"yield@{k}": [metrics.yield_at_k(j["preds"], j["embeddings"], j["coherent"]) for j in judged],
        "coherent": [float(j["coherent"].mean()) for j in judged],
        "cosine": [float(j["features"][:, 1].mean()) for j in judged],
    }
    if k > 1:
        values["sbert_diversity"] = [metrics.pairwise_diversity(j["embeddings"]) for j in judged]
    return values


def summarise(judged: list[dict], file: str) -> dict:
    """All figures of one system: [mean, low, high] where there is one value per row."""
    import metrics

    summary = {name: [round(v, 4) for v in metrics.interval(values)] for name, values in per_row(judged).items()}
    replies = [j["preds"] for j in judged]
    everything = [reply for group in replies for reply in group]
    for n in (1, 2):
        summary[f"distinct-{n}"] = metrics.distinct_n(everything, n)
        summary[f"distinct-{n} per prompt"] = metrics.mean_distinct_n(replies, n)
    summary |= {"rows": len(judged), "responses": len(everything), "empty": sum(not r for r in everything),
                "mean_words": round(sum(len(r.split()) for r in everything) / len(everything), 2)}
    speed = Path(file).with_suffix(".json")
    if speed.is_file():
        summary["seconds_per_row"] = json.loads(speed.read_text(encoding="utf-8")).get("seconds_per_row")
    return summary


def compare(judged: dict[str, list[dict]]) -> dict:
    """Each system minus the first one, paired by row: [mean, low, high]."""
    import metrics

    names = list(judged)
    baseline = per_row(judged[names[0]])
    return {
        f"{name} - {names[0]}": {
            metric: [round(v, 4) for v in metrics.interval([a - b for a, b in zip(values, baseline[metric], strict=True)])]
            for metric, values in per_row(judged[name]).items()
        }
        for name in names[1:]
    }


def write_logs(save_file: Path, summary: dict, judged: dict[str, list[dict]]) -> None:
    """eval_logs/X.jsonl, X.json, and X.pkl (plain dicts) if that is the name that was asked for."""
    lines = [
        {"system": name, "row": number, "context": j["row"].get("context", j["row"].get("prompt")), "response": reply,
         "coherence": round(float(j["coherence"][i]), 4), "coherent": bool(j["coherent"][i]),
         "pmi": round(float(j["features"][i, 0]), 4), "cosine": round(float(j["features"][i, 1]), 4)}
        for name, rows in judged.items() for number, j in enumerate(rows, 1) for i, reply in enumerate(j["preds"])
    ]
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    utils.atomic_write(save_file.with_suffix(".jsonl"), text)
    utils.atomic_write(save_file.with_suffix(".json"), json.dumps(summary, indent=1, allow_nan=False))
    if save_file.suffix == ".pkl":
        save_file.write_bytes(pickle.dumps(lines))


def show(file: str) -> None:
    """Print the table of a summary that was written before."""
    try:
        summary = json.loads(Path(file).read_text(encoding="utf-8"))
        if summary.get("kind") == "diffuse":
            from distributions import print_figures

            print_figures(summary)
        else:
            print_table(summary)
    except (OSError, ValueError, KeyError) as error:
        utils.die(2, f"--show {file}: not a summary of eval.py ({error})", "give an eval_logs/X.json")


def print_table(summary: dict) -> None:
    """One row per system, intervals in brackets, then the paired differences."""
    from rich.console import Console
    from rich.table import Table

    def figure(value) -> str:
        if value is None:
            return "—"
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if isinstance(value, list) else f"{value:.3f}"

    columns = [c for c in next(iter(summary["systems"].values())) if c.startswith("yield")]
    columns += ["coherent", "cosine", "sbert_diversity", "distinct-1", "distinct-2", "seconds_per_row"]
    table = Table(title="95 % bootstrap intervals over rows")
    for column in ["system", *columns]:
        table.add_column(column.replace("_", " "))
    for name, figures in summary["systems"].items():
        table.add_row(name, *(figure(figures.get(column)) for column in columns))
    for name, figures in summary["differences"].items():
        table.add_row(name, *(figure(figures[column]) if column in figures else "" for column in columns))
    console = Console(width=max(120, Console().width))
    console.print(table)
    judge = summary["judge"]
    console.print(f"coherent: {judge['name']}, a proxy; it tells true from mismatched reference replies with AUC "
                  f"{judge['auc']:.3f} (held-out, {judge['pairs']} pairs)", highlight=False)
    for name, figures in summary["systems"].items():
        console.print(f"{name}: {figures['rows']} rows, {figures['responses']} responses, {figures['empty']} empty, "
                      f"{figures['mean_words']} words each", highlight=False)


if __name__ == "__main__":
    utils.run(main)
