"""Selective prompt tuning: method spt.

"Selective Prompting Tuning for Personalized Conversations with LLMs", arXiv:2406.18187 (Findings of ACL 2024). K soft prompts of
V rows each over a frozen model, and a retriever that scores them against persona and dialogue. With z_k the model's output under
prompt k, s the scores, h = softmax(s / tau_sim), and nll_k the mean negative log-probability of the reply under prompt k:

    L = w_lm L_LM + w_sel L_sel + w_fuse L_fuse + w_ctr L_ctr
    L_LM    mean of -log p_k(token) over all prompts and the tokens of the replies, end token included
    L_sel   KL(softmax(-nll / tau_gold) || h): the model tells the retriever which prompt suits
    L_fuse  -log of the prompts' mixture, sum_k h_k p_k(token)
    L_ctr   scores of rows with like personas are drawn together, others apart

The K prompts are also K ways to answer: `infer.py --prompts all` draws one reply under each.

A soft prompt is a run of token ids above the vocabulary (softprompts.py). It stands before the prompt, so the K runs of a row
cannot share it: they are the K trees of one packed row, and only the replies' positions are scored. K = 1 with all weights but
w_lm at 0 is plain prompt tuning (Lester et al., arXiv:2104.08691).

Differences from the paper's code:
- The retriever sees persona and dialogue, masked, in training as in inference; the code averages over pads and, in training, over
  the very reply. Both sides are layer-normalised before the head.
- The retriever sees a context's deviation from the mean of the training contexts, plus that mean at half its size: as they are,
  contexts point the same way (cosine 0.96 with SmolLM2's embeddings) and one prompt is chosen for all; from deviations alone it
  cannot learn that a prompt is best for most, and gives new people what suits those of the training set least.
- Messages are in the tokenizer's own chat template, the same in training and inference; the end token is learnt; masks come from
  segments and not from matching tokens; the oldest turns go first when something is too long, the persona never.
- Fusion mixes probabilities (`--fusion logits_raw` is published: logits weighted by raw scores; logits_norm weights them by h).
- Noise on the selection target is added to its logits; on probabilities it can make them negative, and the loss nan.
- Similarity of personas is symmetric and cached; rows without a persona are compared by their dialogue.
- `--retriever_learning_rate`: prompts want a far larger rate than the matrix that chooses among them; published is one for both.
- `--prompt_init vocab` starts from random words instead of standard normal rows, which are far larger than words.
- Rows of one batch may use different prompts, so decoding does not run a batch once per prompt.
"""

from __future__ import annotations

import math
import random

import trees
from methods.spt import personas
from methods.spt.losses import by_prompt, contrastive_loss, fusion_loss, logit_fusion_loss, mean_nll, selection_loss
from methods.spt.messages import prompt_ids, retrieval_ids
from modeling.prompts import end_of_turn
from modeling.softprompts import attach, read, save, soft_prompts, virtual_ids
from utils import USAGE, fail

CENTRE_ROWS = 1000  # rows whose mean the retriever takes off every context


def load_rows(args) -> list[dict]:
    """Rows with persona, context and response from JSONL or a ConvAI2 text file."""

    for name in ("num_prompts", "prompt_length"):
        if getattr(args, name) < 1:
            fail(USAGE, f"--{name} {getattr(args, name)} must be at least 1", "there is no prompt to tune otherwise")
    for name in ("w_lm", "w_sel", "w_fuse", "w_ctr", "target_noise"):
        if not 0 <= getattr(args, name) < math.inf:
            fail(USAGE, f"--{name} {getattr(args, name)} must be at least 0")
    rate = args.retriever_learning_rate
    if rate is not None and not 0 < rate < math.inf:
        fail(USAGE, f"--retriever_learning_rate {rate} must be above 0")
    for name in ("tau_gold", "tau_sim"):
        if not 0 < getattr(args, name) < math.inf:
            fail(USAGE, f"--{name} {getattr(args, name)} must be above 0")
    if not args.w_lm + args.w_sel + args.w_fuse + args.w_ctr:
        fail(USAGE, "--w_lm, --w_sel, --w_fuse and --w_ctr are all 0", "there is nothing to learn")
    if args.max_context_turns == 0 or args.max_context_turns < -1:
        fail(USAGE, f"--max_context_turns {args.max_context_turns} keeps no turn", "a positive number, or -1 for all turns")
    given = [name for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") if getattr(args, name) is not None]
    if given:
        fail(USAGE, f"--{given[0]} does nothing with method spt", "the model stays frozen; drop it")
    if args.load_in_4bit:
        fail(USAGE, "--load_in_4bit does not work with method spt", "drop it: the frozen weights are loaded in bf16 on GPUs")
    return personas.read(args.train_file)


def prepare_model(model, tokenizer, args):
    """The model frozen, with new soft prompts and a retriever; the retriever too is frozen where no loss needs it."""

    dim = model.get_input_embeddings().weight.shape[1]
    if args.retriever == "transformer" and dim % 4:
        fail(USAGE, f"--retriever transformer has 4 attention heads, the embeddings have {dim} dimensions", "--retriever linear")
    model = attach(model, {
        "num_prompts": args.num_prompts, "prompt_length": args.prompt_length, "prompt_init": args.prompt_init,
        "retriever": args.retriever, "shared_head": args.heads == "shared", "tau_sim": args.tau_sim, "fusion": args.fusion,
        "max_context_turns": args.max_context_turns})
    soft = model.get_input_embeddings()
    retrieves = bool(args.w_sel or args.w_fuse or args.w_ctr)
    soft.retriever.requires_grad_(retrieves)
    if retrieves:
        rows = personas.read(args.train_file)[: args.limit][:CENTRE_ROWS]
        soft.centre_on([retrieval_ids(row, tokenizer, args) for row in rows])
    return model


def parameter_groups(model, args) -> list[dict]:
    """What the optimizer learns: the prompts, and the retriever at a rate of its own."""

    soft = soft_prompts(model)
    retriever = [p for p in soft.retriever.parameters() if p.requires_grad]
    groups = [{"params": [soft.prompts]}]
    return groups + ([{"params": retriever, "lr": args.retriever_learning_rate or args.learning_rate}] if retriever else [])


def save_adapter(model, folder: str) -> None:

    save(model, folder)


def load_adapter(model, folder):
    """The base model with the soft prompts of a checkpoint."""

    return attach(model, *read(folder))


def restore_adapter(model, folder) -> None:
    """Give a model that trains on the weights of a checkpoint."""

    soft_prompts(model).load_state_dict(read(folder)[1], strict=False)


def response_tree(row: dict, response: list[int], tokenizer, args):
    """A row's K runs: soft prompt, message and reply, as K trees under one root without tokens; branch k is prompt k."""
    from trees import LIKELIHOOD, Segment, Tree

    ids, dropped = prompt_ids(row, tokenizer, args, args.max_length - args.prompt_length - len(response))
    if ids is None:
        return None
    runs = [Segment(virtual_ids(k, args.prompt_length) + ids, children=[Segment(response, LIKELIHOOD, branch=k)])
            for k in range(args.num_prompts)]
    about = " ".join(row.get("persona", [])) or row["context"]
    return Tree(Segment([], children=runs), dropped, note={"ids": retrieval_ids(row, tokenizer, args), "about": about})


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """The row's reply with its end token, under every soft prompt; None if the row does not fit."""
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    return response_tree(row, [*response, end_of_turn(tokenizer)], tokenizer, args)


def compute_loss(model, batch: dict, args):
    """The weighted sum of the four losses; also logged: each of them, the share of rows that every prompt is chosen for, the
    entropy of the mean of h, and how often the chosen prompt is the best one."""
    import torch


    soft = soft_prompts(model)
    logits, place = trees.score_logits(model, batch)
    targets = batch["input_ids"][0, batch["token"]]
    logps, row = by_prompt(logits[place, targets] - logits.logsumexp(-1)[place], batch)
    nll = mean_nll(logps, row, batch["num_rows"])
    notes = batch["notes"]
    with torch.set_grad_enabled(torch.is_grad_enabled() and soft.retriever.head.weight.requires_grad):
        scores = soft.scores([note["ids"] for note in notes])
    log_h = soft.choice(scores)
    zero = logps.new_zeros(())
    parts = {"lm_loss": -logps.mean(), "sel_loss": zero, "fuse_loss": zero, "ctr_loss": zero}
    if args.w_sel:
        parts["sel_loss"] = selection_loss(nll, log_h, args.tau_gold, args.target_noise)
    if args.w_fuse and args.fusion == "probs":
        parts["fuse_loss"] = fusion_loss(logps, log_h, row)
    elif args.w_fuse:
        weights = scores if args.fusion == "logits_raw" else log_h.exp()
        wide, target = by_prompt(logits[place], batch)[0], by_prompt(targets, batch)[0][0]
        parts["fuse_loss"] = logit_fusion_loss(wide, weights, target, row)
    if args.w_ctr:
        parts["ctr_loss"] = contrastive_loss(scores, [note["about"] for note in notes], args.ctr_threshold)
    loss = sum(weight * part for weight, part in zip((args.w_lm, args.w_sel, args.w_fuse, args.w_ctr), parts.values(), strict=True))
    chosen, mean_h = log_h.argmax(-1), log_h.exp().mean(0)
    shown = {name: part.detach() for name, part in parts.items()}
    shown |= {"agreement": (chosen == nll.argmin(-1)).float().mean(), "usage_entropy": torch.special.entr(mean_h).sum().detach()}
    shown |= {f"use_{k + 1}": (chosen == k).float().mean() for k in range(args.num_prompts)}
    return loss, shown
