"""Replies under chosen, all, sampled or fused soft prompts."""

from __future__ import annotations

import math

import utils
from decoding.replies import clean_reply
from methods.spt import chat, personas
from methods.spt.messages import latest, message, prompt_ids, retrieval_ids
from modeling.prompts import keep_latest, label_turns, refuse_special_tokens
from modeling.softprompts import virtual_ids
from utils import USAGE, fail


def decode_tree(row: dict, tokenizer, args):
    """A row's message under the num_branches soft prompts that row["prompts"] names (from 1), in this order.

    Equal ones share soft prompt and message; different ones are trees of their own.
    """
    from trees import Segment, Tree, branch_prompts

    ids, dropped = prompt_ids(row, tokenizer, args, args.max_length - args.prompt_length - args.max_new_tokens)
    if ids is None:
        return None
    runs = [virtual_ids(number - 1, args.prompt_length) + ids for number in row["prompts"]]
    if args.prompts == "chosen":
        return Tree(branch_prompts(runs, list(range(1, args.num_branches + 1))), dropped)
    return Tree(Segment([], children=[Segment(run, branch=number) for number, run in zip(row["prompts"], runs, strict=True)]), dropped)


def decode_messages(row: dict, args) -> list[str]:
    """The message, for a server; soft prompts are not to be had there."""
    row = latest(row, args.max_context_turns)
    return [message(row, keep_latest(label_turns(row["context"]), args.max_input_length))]


def inference_rows(args) -> list[dict]:
    """The test rows; --interactive talks instead and never returns."""

    if args.prompt_id is not None and args.prompts != "chosen":
        fail(USAGE, f"--prompt_id {args.prompt_id} with --prompts {args.prompts}", "drop one of the two")
    if args.engine != "hf":
        fail(USAGE, "--engine openai has no soft prompts", "--engine hf")
    if args.decoding not in ("sampling", "greedy", "beam") or (args.decoding == "beam" and args.prompts != "chosen"):
        fail(USAGE, f"--decoding {args.decoding} does not work with --prompts {args.prompts}", "--decoding sampling or greedy")
    if args.overgenerate:
        fail(USAGE, "--overgenerate does not work with method spt", "draw all of them with --num_response_per_input")
    if args.interactive:

        chat.main(args)
        raise SystemExit(0)
    if not args.test_file or not args.save_file:
        fail(USAGE, "--test_file and --save_file are required", "or --interactive")
    return personas.read(args.test_file)[: args.limit]


def plan(engine, rows: list[dict], args):
    """(answer, truncated) as infer.plan has it; also gives every row the retriever's scores, its choice and the prompts used."""
    if args.prompts is None:
        fail(USAGE, f"{args.model_name_or_path} holds soft prompts", "add --method spt")
    soft = engine.model.get_input_embeddings()
    settle(soft.config, args)
    refuse_special_tokens([{k: row.get(k) for k in ("context", "persona")} for row in rows], engine.tokenizer, args.test_file)
    chosen = [choose(soft, row, i, engine.tokenizer, args) for i, row in enumerate(rows)]
    for row, own in zip(rows, chosen, strict=True):
        row |= own
    trees = [decode_tree(row, engine.tokenizer, args) for row in rows]
    long = [i + 1 for i, tree in enumerate(trees) if tree is None]
    if long:
        fail(USAGE, f"{args.test_file}: row {long[0]} and {len(long) - 1} more do not fit into {args.max_length} tokens "
                  f"with {args.max_new_tokens} new ones", "shorten them, or raise --max_length")
    if args.prompts == "fused":
        for row, tree in zip(rows, trees, strict=True):
            tree.note = fusion_weights(row["scores"], soft.config)
    return lambda block: answer(engine, [trees[i] for i in block], block, args), sum(tree.dropped_turns > 0 for tree in trees)


def settle(config: dict, args) -> None:
    """What the checkpoint says about its prompts, and the branches of a row's tree."""
    args.prompt_length, args.max_context_turns, count = config["prompt_length"], config["max_context_turns"], config["num_prompts"]
    if args.prompt_id is not None and not 1 <= args.prompt_id <= count:
        fail(USAGE, f"--prompt_id {args.prompt_id}: the checkpoint has prompts 1 to {count}")
    if args.prompts == "all":
        args.num_response_per_input *= count
        args.num_drawn, args.num_branches = args.num_response_per_input, count
    if args.prompts == "fused":
        args.num_branches = count
    if args.decoding == "greedy" and args.num_response_per_input > (count if args.prompts == "all" else 1) and args.prompts != "sampled":
        fail(USAGE, f"{args.num_response_per_input} greedy responses would repeat one another", "--decoding sampling")


def choose(soft, row: dict, index: int, tokenizer, args) -> dict:
    """scores, chosen (the best prompt, from 1) and prompts (one per branch); random choices depend on (seed, row) alone."""
    import torch

    with torch.no_grad():
        scores = soft.scores([retrieval_ids(row, tokenizer, args)])[0].cpu()
    generator = torch.Generator().manual_seed(utils.row_seed(args.seed, index))
    noisy = scores + args.selection_noise * torch.randn(scores.shape, generator=generator)
    best = args.prompt_id or int(noisy.argmax()) + 1
    prompts = [best] * args.num_branches
    if args.prompts in ("all", "fused"):
        prompts = list(range(1, len(scores) + 1))
    elif args.prompts == "sampled":
        h = soft.choice(noisy[None])[0].exp()
        prompts = [k + 1 for k in torch.multinomial(h, args.num_branches, replacement=True, generator=generator).tolist()]
    return {"scores": [round(float(s), 6) for s in scores], "chosen": best, "prompts": prompts}


def fusion_weights(scores: list[float], config: dict) -> dict:
    """How the outputs of the prompts are mixed: kind and weights, as in the fusion loss."""
    import torch

    s = torch.tensor(scores)
    return {"kind": config["fusion"], "weights": s if config["fusion"] == "logits_raw" else (s / config["tau_sim"]).softmax(-1)}


def answer(engine, trees: list, block: list[int], args) -> list[dict]:
    """All replies of some rows, whose soft prompts may differ: one batch."""
    import infer

    if args.decoding == "beam":
        drawn = engine.draw("beam", trees, None, args.max_new_tokens, num_beams=args.num_beams,
                            num_responses=args.num_drawn, length_penalty=args.length_penalty)
    elif args.decoding == "greedy":
        drawn = engine.draw("fused_greedy" if args.prompts == "fused" else "greedy", trees, None, args.max_new_tokens)
    else:
        how, per_turn = ("fused_sample", 1) if args.prompts == "fused" else ("sample", args.num_branches)
        filters = {name: getattr(args, name) for name in infer.FILTERS}
        turns = [engine.draw(how, trees, [utils.row_seed(args.seed, i, turn) for i in block], args.max_new_tokens,
                             temperature=args.temperature, **filters) for turn in range(math.ceil(args.num_drawn / per_turn))]
        drawn = [sum(own, []) for own in zip(*turns, strict=True)]
    return [{"texts": [clean_reply(reply.text) for reply in own], "tokens": sum(r.tokens for r in own),
             "cut": sum(r.cut for r in own), "failed": args.num_drawn - len(own)} for own in drawn]


def infer_flags(args, checkpoint) -> list[str]:
    """The flags of infer.py that draw from what was trained."""
    return ["--method", "spt", "--model_name_or_path", f"{checkpoint}/", "--prompts", "all", "--test_file", "data/spt/test.jsonl",
            "--save_file", f"outs/{args.exp_name}.jsonl"]
