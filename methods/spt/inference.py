"""Replies under chosen, all, sampled or fused soft prompts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import utils
from decoding import drawing
from decoding.mixtures import MixedTree
from decoding.replies import clean_reply
from methods import defaults
from methods.spt import chat, personas
from methods.spt.messages import prompt_ids, retrieval_ids
from modeling.softprompts import virtual_ids
from trees import Segment, Tree, branch_prompts
from utils import USAGE, fail


def resolve(args, run: dict) -> dict:
    """What the checkpoint says about its prompts, and the replies and branches that follow."""
    # this comes first, since a base model has no adapter_config.json to read
    defaults.same_method(args, run)
    config = json.loads(
        (Path(args.model_name_or_path) / "adapter_config.json").read_text(encoding="utf-8"))
    count = config["num_prompts"]
    if args.prompt_id is not None and args.prompt_id > count:
        fail(USAGE, f"--prompt_id {args.prompt_id}: the checkpoint has prompts 1 to {count}")
    values = {name: config[name] for name in ("prompt_length", "max_context_turns", "tau_sim",
                                              "fusion")}
    replies = args.num_response_per_input
    if args.soft_prompt == "all":
        replies *= count
        values |= {"num_response_per_input": replies, "num_drawn": replies}
    # a fused reply, too, is computed in one branch for each prompt
    if args.soft_prompt in ("all", "fused"):
        values["num_branches"] = count
    # greedy decoding has one reply to each prompt; sampled prompts may differ every time
    different = {"all": count, "sampled": replies}.get(args.soft_prompt, 1)
    if args.decoding == "greedy" and replies > different:
        fail(USAGE, f"{replies} greedy responses would repeat one another", "--decoding sampling")
    return values


def load_rows(args, run: dict) -> list[dict]:
    """Dialogues with a persona."""
    return personas.read(args.test_file)[: args.limit]


def prepare_rows(engine, rows: list[dict], args) -> list[dict]:
    """The rows with the retriever's scores, its choice, and the soft prompt of every reply."""
    soft = engine.model.get_input_embeddings()
    return [row | choose(soft, row, index, engine.tokenizer, args)
            for index, row in enumerate(rows)]


def choose(soft, row: dict, index: int, tokenizer, args) -> dict:
    """scores, selected (the best prompt, from 1) and soft_prompts of a row.

    soft_prompts has the prompt of every reply, in the order in which they are drawn; none for fused
    replies, which belong to all prompts alike. Random choices depend on (seed, row) alone.
    """
    with torch.no_grad():
        scores = soft.scores([retrieval_ids(row, tokenizer, args)])[0].cpu()
    # the generator is the CPU's, so that a seed makes the same choices on every device
    generator = torch.Generator().manual_seed(utils.row_seed(args.seed, index))
    noisy = scores + args.selection_noise * torch.randn(scores.shape, generator=generator)
    # prompts count from 1, so a prompt_id that is given is never 0
    best = args.prompt_id or int(noisy.argmax()) + 1
    prompts = [best] * args.num_drawn
    if args.soft_prompt == "fused":
        prompts = []
    elif args.soft_prompt == "all":
        # every turn of drawing gives one reply under each prompt
        prompts = list(range(1, len(scores) + 1)) * (args.num_drawn // len(scores))
    elif args.soft_prompt == "sampled":
        # this is h of the losses, with the temperature tau_sim of the training
        probability = soft.choice(noisy[None])[0].exp()
        drawn = torch.multinomial(probability, args.num_drawn, replacement=True,
                                  generator=generator)
        prompts = [k + 1 for k in drawn.tolist()]
    return {"scores": [round(float(score), 6) for score in scores], "selected": best,
            "soft_prompts": prompts}


def decode_tree(row: dict, tokenizer, args) -> Tree | None:
    """A row's message under the first num_branches of row["soft_prompts"], fused under all prompts.

    Equal ones share soft prompt and message. Different ones stand before the message, so they share
    nothing: they are trees of their own under one root without tokens.
    """
    room = args.max_length - args.prompt_length - args.max_new_tokens
    ids, dropped = prompt_ids(row, tokenizer, args, room)
    if ids is None:
        return None
    numbers = list(range(1, len(row["scores"]) + 1)) if args.soft_prompt == "fused" else \
        row["soft_prompts"][: args.num_branches]
    # rows count prompts from 1, virtual ids from 0
    runs = [virtual_ids(number - 1, args.prompt_length) + ids for number in numbers]
    if args.soft_prompt == "chosen":
        return Tree(branch_prompts(runs, list(range(1, args.num_branches + 1))), dropped)
    root = Segment([], children=[Segment(run, branch=number) for number, run in
                                 zip(numbers, runs, strict=True)])
    if args.soft_prompt != "fused":
        return Tree(root, dropped)
    weights = mixture_weights(row["scores"], args.fusion, args.tau_sim)
    return MixedTree(root, dropped, weights=weights, kind=args.fusion)


def mixture_weights(scores: list[float], fusion: str, tau_sim: float) -> torch.Tensor:
    """The weight (K,) of every prompt's output in the mixture, as in the fusion loss."""
    scores = torch.tensor(scores)
    return scores if fusion == "logits_raw" else (scores / tau_sim).softmax(-1)


def messages(row: dict, args) -> None:
    """None: no server takes soft prompts."""


clean = clean_reply
finish = defaults.next_is_eval


def talk(engine, args) -> None:
    """The chat in the terminal."""

    def answer(row: dict, turn: int) -> tuple[dict, str, bool]:
        """The row with its soft prompt, a reply, and whether the oldest turns were dropped."""
        # a seed of its own for every turn: the same words may be answered differently
        seeded = args.with_values(seed=args.seed + turn, test_file="the chat")  # for errors
        # the scores are new at every turn, since another prompt may suit the dialogue now
        rows = prepare_rows(engine, [row], seeded)
        job = drawing.prepare(engine, rows, seeded, decode_tree, messages)
        return rows[0], clean(job.draw([0])[0].texts[0]), job.truncated > 0

    chat.talk(answer, args, engine.run["weights"])


def next_command(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that draw a reply under every soft prompt."""
    return ["--method", "spt", "--model_name_or_path", f"{checkpoint}/", "--prompts", "all",
            "--test_file", "data/spt/test.jsonl", "--save_file", f"outs/{args.exp_name}.jsonl"]
