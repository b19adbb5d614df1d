"""Training of method spt: soft prompts and the retriever that chooses among them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import trees
from methods import defaults
from methods.spt import losses, personas
from methods.spt.messages import DialogueTree, prompt_ids, retrieval_ids
from modeling import softprompts
from modeling.prompts import end_of_turn
from modeling.softprompts import attach, soft_prompts, virtual_ids
from trees import LIKELIHOOD, Segment
from utils import USAGE, fail

CENTRE_ROWS = 1000  # rows whose mean context the retriever subtracts from every context
# softprompts.Retriever has this number; it is checked here, where a flag can be named
HEADS = 4  # attention heads of --retriever transformer


def load_rows(args) -> list[dict]:
    """Rows with persona, context and response, from JSONL or a ConvAI2 text file."""
    return personas.read(args.train_file)[: args.limit]


prepare_tokenizer = defaults.leave_as_is


def prepare_model(model, tokenizer, rows: list[dict], args):
    """The model frozen, with new soft prompts and a retriever.

    The retriever, too, is frozen where no loss needs it: a parameter without gradient stops DDP.
    """
    dim = model.get_input_embeddings().weight.shape[1]
    if args.retriever == "transformer" and dim % HEADS:
        fail(USAGE, f"--retriever transformer has {HEADS} attention heads, "
                    f"the embeddings have {dim} dimensions", "--retriever linear")
    # all of this is saved with the weights: decoding takes it from there, not from flags
    model = attach(model, {
        "num_prompts": args.num_prompts, "prompt_length": args.prompt_length,
        "prompt_init": args.prompt_init, "retriever": args.retriever,
        "shared_head": args.heads == "shared", "tau_sim": args.tau_sim, "fusion": args.fusion,
        "max_context_turns": args.max_context_turns})
    soft = soft_prompts(model)
    retrieves = bool(args.w_sel or args.w_fuse or args.w_ctr)
    soft.retriever.requires_grad_(retrieves)
    if retrieves:
        # rows that do not fit are included, so the centre does not depend on --max_length
        soft.centre_on([retrieval_ids(row, tokenizer, args) for row in rows[:CENTRE_ROWS]])
    return model


def describe(model, tokenizer, rows: list[dict], args) -> dict:
    """Nothing, since the flags say all."""
    return {}


def build_tree(row: dict, tokenizer, args, rng: random.Random) -> DialogueTree | None:
    """The row's reply with its end token under every soft prompt; None if the row does not fit.

    The K runs of soft prompt, message and reply are K trees below a root without tokens; the reply
    in the k-th has branch k, from 0.
    """
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    response = [*response, end_of_turn(tokenizer)]
    # only the dialogue is shortened, never the soft prompt or the reply
    room = args.max_length - args.prompt_length - len(response)
    ids, dropped = prompt_ids(row, tokenizer, args, room)
    if ids is None:
        return None
    runs = [Segment(virtual_ids(k, args.prompt_length) + ids,
                    children=[Segment(response, LIKELIHOOD, branch=k)])
            for k in range(args.num_prompts)]
    return DialogueTree(Segment([], children=runs), dropped,
                        retrieval_ids=retrieval_ids(row, tokenizer, args),
                        about=" ".join(row.get("persona", [])) or row["context"])


def compute_loss(model, batch: dict, args, step: int) -> tuple[Tensor, dict]:
    """The weighted sum of the four losses, in nats.

    Also logged: each of them; agreement, how often the chosen prompt is the best one; use_k, how
    often prompt k is chosen; and usage_entropy, the entropy of the mean of h in nats.
    """
    soft = soft_prompts(model)
    # the logits themselves are needed, since --fusion logits_* mixes them
    logits, place = trees.score_logits(model, batch)
    targets = batch["input_ids"][0, batch["token"]]
    token_logps = logits[place, targets] - logits.logsumexp(-1)[place]
    logps = losses.by_prompt(token_logps, batch["branch"])  # (K, N)
    row = losses.by_prompt(batch["row"], batch["branch"])[0]  # (N,)
    nll = losses.mean_nll(logps, row, batch["num_rows"])  # (B, K)
    # no loss uses the scores of a frozen retriever, so no graph is kept for them
    learns = torch.is_grad_enabled() and soft.retriever.head.weight.requires_grad
    with torch.set_grad_enabled(learns):
        scores = soft.scores([tree.retrieval_ids for tree in batch["trees"]])  # (B, K)
    log_h = soft.choice(scores)

    zero = logps.new_zeros(())
    # The LM loss is a mean over all tokens, as published, so long replies count more. The order of
    # the parts is that of the weights below.
    parts = {"lm_loss": -logps.mean(), "sel_loss": zero, "fuse_loss": zero, "ctr_loss": zero}
    if args.w_sel:
        parts["sel_loss"] = losses.selection_loss(nll, log_h, args.tau_gold, args.target_noise)
    if args.w_fuse and args.fusion == "probs":
        parts["fuse_loss"] = losses.fusion_loss(logps, log_h, row)
    elif args.w_fuse:
        wide = losses.by_prompt(logits[place], batch["branch"])  # (K, N, W)
        parts["fuse_loss"] = losses.logit_fusion_loss(
            wide, scores if args.fusion == "logits_raw" else log_h.exp(),
            losses.by_prompt(targets, batch["branch"])[0], row)
    if args.w_ctr:
        texts = [tree.about for tree in batch["trees"]]
        parts["ctr_loss"] = losses.contrastive_loss(scores, texts, args.ctr_threshold)
    weights = (args.w_lm, args.w_sel, args.w_fuse, args.w_ctr)
    loss = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
    logged = {name: part.detach() for name, part in parts.items()}
    return loss, logged | _choice_figures(nll, log_h.detach())


def _choice_figures(nll: Tensor, log_h: Tensor) -> dict[str, Tensor]:
    """How often the chosen prompt is the best one, and how evenly prompts are used; both (B, K)."""
    chosen = log_h.argmax(-1)
    # the entropy of the mean of h is low where one prompt serves nearly all rows
    figures = {"agreement": (chosen == nll.argmin(-1)).float().mean(),
               "usage_entropy": torch.special.entr(log_h.exp().mean(0)).sum()}
    return figures | {f"use_{k + 1}": (chosen == k).float().mean() for k in range(nll.shape[1])}


order_rows = defaults.shuffled


def parameter_groups(model, args) -> list[dict]:
    """The soft prompts, and the retriever at a learning rate of its own."""
    soft = soft_prompts(model)
    # prompts want a far higher rate than the retriever: 5e-2 and 3e-4 in configs/spt/smollm2.yaml
    groups = [{"params": [soft.prompts]}]
    retriever = [p for p in soft.retriever.parameters() if p.requires_grad]
    if retriever:
        rate = args.retriever_learning_rate or args.learning_rate
        groups.append({"params": retriever, "lr": rate})
    return groups


after_pass = defaults.no_figures


def save(model, folder, state_dict=None) -> None:
    """Write prompts and retriever; the frozen model is not saved."""
    softprompts.save(model, folder)
