"""Answering messages with a delia model."""

from __future__ import annotations

from pathlib import Path

import utils
from methods.delia.messages import check_messages, context_of, encode
from methods.delia.self_sampling import check_query, reanswer_messages
from utils import USAGE, fail


def decode_tree(row: dict, tokenizer, args):
    """The turns before the reply, once, with num_branches equal branches."""
    from trees import Tree, branch_prompts

    prompt = encode(tokenizer, context_of(row))
    if len(prompt) > args.max_length - args.max_new_tokens:
        return None
    return Tree(branch_prompts([prompt] * args.num_branches, list(range(1, args.num_branches + 1))))


def decode_messages(row: dict, args) -> list[list[dict]]:
    """The same turns, for a server."""
    return [context_of(row)]


def inference_rows(args) -> list[dict]:
    """Messages to answer, or with --self_sample queries to answer again; settles files and whether the model is untuned."""
    files, args.test_file = args.test_file, " ".join(args.test_file)
    if args.engine == "hf" and not (Path(args.model_name_or_path) / "adapter_config.json").is_file():
        args.mode = "untuned"
    if not args.self_sample:
        rows = [row for path in files for row in utils.read_jsonl(path, check_messages)]
        return [row | {"prompt": row["messages"][-2]["content"]} for row in rows[: args.limit]]
    cache = Path(args.save_file)
    if cache.suffix != ".jsonl":
        fail(USAGE, f"--save_file {cache} must end in .jsonl", f"{cache.with_suffix('.jsonl')}")
    if cache.exists() and not args.resume:
        fail(USAGE, f"{cache} is already there", "--resume goes on with it; or give another --save_file")
    args.save_file = str(cache.with_suffix(".draws.jsonl"))
    rows = [row for path in files for row in utils.read_jsonl(path, check_query)]
    return [{"prompt": row["query"], "answer": row["answer"], "messages": reanswer_messages(row["query"], row["answer"])}
            for row in rows[: args.limit]]


def infer_flags(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that answer the test set with what was trained."""
    return ["--method", "delia", "--model_name_or_path", f"{checkpoint}/", "--test_file", "data/delia/test.jsonl",
            "data/delia/test_seen.jsonl", "--decoding", "greedy", "--max_new_tokens", "96",
            "--save_file", f"outs/{args.exp_name}.jsonl"]
