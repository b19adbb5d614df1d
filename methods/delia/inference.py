"""Answering messages with a delia or an untuned model, and drawing the cache of diverse rows."""

from __future__ import annotations

from pathlib import Path

import utils
from methods import defaults
from methods.delia import self_sampling
from methods.delia.messages import check_messages, context_of, encode
from trees import Tree, branch_prompts


def resolve(args, run: dict) -> dict:
    """The files: several are read, and self-sampling keeps its draws beside the cache.

    An untuned model answers, too: it is the baseline, and the one that writes the cache.
    """
    if run["method"] != "base":
        defaults.same_method(args, run)
    # infer.py names one file in its messages and settings, so test_file joins the names
    files = {"test_files": args.test_file, "test_file": " ".join(args.test_file)}
    if not args.self_sample:
        return files
    # draws are appended row by row and can be resumed; the cache is made of them as a whole
    return files | {"save_file": str(Path(args.save_file).with_suffix(".draws.jsonl"))}


def load_rows(args, run: dict) -> list[dict]:
    """Messages to answer, or with --self_sample queries to answer again in the model's words."""
    check = self_sampling.check_query if args.self_sample else check_messages
    rows = [row for path in args.test_files for row in utils.read_jsonl(path, check)][: args.limit]
    if not args.self_sample:
        # rows are compared by their prompt (utils.row_hash), here as in training
        return [row | {"prompt": row["messages"][-2]["content"]} for row in rows]
    return [{"prompt": row["query"], "answer": row["answer"],
             "messages": self_sampling.reanswer_messages(row["query"], row["answer"])}
            for row in rows]


prepare_rows = defaults.rows_as_they_are


def decode_tree(row: dict, tokenizer, args) -> Tree | None:
    """The turns before the reply, once, with num_branches equal branches."""
    prompt = encode(tokenizer, context_of(row))
    if len(prompt) > args.max_length - args.max_new_tokens:
        return None
    # without numbers of their own, equal prompts would become a single branch
    numbers = list(range(1, args.num_branches + 1))
    return Tree(branch_prompts([prompt] * args.num_branches, numbers))


def messages(row: dict, args) -> list[list[dict]]:
    """The same turns, for a server."""
    return [context_of(row)]


clean = str.strip  # a reply may be code or JSON, so nothing inside it is touched


def finish(save_file: Path, summary: dict, args) -> None:
    """With --self_sample the cache is made of the draws."""
    if not args.self_sample:
        return defaults.next_is_eval(save_file, summary, args)
    self_sampling.write_cache(save_file, summary, summary["run"], args)


talk = defaults.no_talk


def next_command(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that answer the test set with what was trained."""
    return ["--method", "delia", "--model_name_or_path", f"{checkpoint}/",
            "--test_file", "data/delia/test.jsonl", "data/delia/test_seen.jsonl",
            "--decoding", "greedy", "--max_new_tokens", "96",
            "--save_file", f"outs/{args.exp_name}.jsonl"]
