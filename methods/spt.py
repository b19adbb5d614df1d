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

import utils
from flags import add_alias

# softprompts and trees import torch, so they are imported where they are used: --help must answer in half a second.

CENTRE_ROWS = 1000  # rows whose mean the retriever takes off every context
PROMPTS = ("chosen", "all", "sampled", "fused")


def add_args(group) -> None:
    group.set_defaults(learning_rate=1e-4, per_device_train_batch_size=2, max_steps=-1, seed=3407)  # as published
    add_alias(group, "train_file", "--train")
    add_alias(group, "per_device_train_batch_size", "--batch_size")
    add_alias(group, "num_train_epochs", "--num_epochs")
    add_alias(group, "max_length", "--max_token_length")
    group.add_argument("--num_prompts", "--K", dest="num_prompts", type=int, default=4, help="soft prompts K (default: %(default)s)")
    group.add_argument("--prompt_length", "--num_virtual_tokens", dest="prompt_length", type=int, default=8,
                       help="rows V of a soft prompt (default: %(default)s)")
    group.add_argument("--prompt_init", choices=["normal", "vocab"], default="normal",
                       help="standard normal rows, as published (default), or the rows of random words")
    group.add_argument("--retriever", choices=["linear", "transformer"], default="linear", help="pooled embeddings (default), or encoded first")
    group.add_argument("--heads", choices=["shared", "separate"], default="shared",
                       help="one linear head for prompts and contexts, as published (default), or one each")
    group.add_argument("--retriever_learning_rate", type=float, help="AdamW learning rate of the retriever (default: --learning_rate, as published)")
    group.add_argument("--w_lm", type=float, default=1.0, help="weight of the language-model loss (default: %(default)s)")
    group.add_argument("--w_sel", "--selective_loss_weight", dest="w_sel", type=float, default=0.4, help="weight of the selection loss (default: %(default)s)")
    group.add_argument("--w_fuse", type=float, default=1.0, help="weight of the fusion loss (default: %(default)s)")
    group.add_argument("--w_ctr", "--contrastive_weight", dest="w_ctr", type=float, default=0.4, help="weight of the contrastive loss (default: %(default)s)")
    group.add_argument("--fusion", choices=["logits_raw", "logits_norm", "probs"], default="probs", help="what the fusion loss mixes (default: %(default)s)")
    group.add_argument("--tau_gold", type=float, default=1.0, help="temperature of the selection target (default: %(default)s)")
    group.add_argument("--tau_sim", type=float, default=1.0, help="temperature of the retriever's scores (default: %(default)s)")
    group.add_argument("--ctr_threshold", "--contrastive_threshold", dest="ctr_threshold", type=float, default=20.0,
                       help="BLEU of two personas that count as alike (default: %(default)s)")
    group.add_argument("--target_noise", "--adding_noise", dest="target_noise", type=float, default=0.0,
                       help="noise on the logits of the selection target (default: 0)")
    group.add_argument("--max_context_turns", type=int, default=-1, help="keep the last 2n - 1 turns, -1 keeps all (default)")


def load_rows(args) -> list[dict]:
    """Rows with persona, context and response from JSONL or a ConvAI2 text file."""
    import personas

    for name in ("num_prompts", "prompt_length"):
        if getattr(args, name) < 1:
            utils.die(2, f"--{name} {getattr(args, name)} must be at least 1", "there is no prompt to tune otherwise")
    for name in ("w_lm", "w_sel", "w_fuse", "w_ctr", "target_noise"):
        if not 0 <= getattr(args, name) < math.inf:
            utils.die(2, f"--{name} {getattr(args, name)} must be at least 0")
    rate = args.retriever_learning_rate
    if rate is not None and not 0 < rate < math.inf:
        utils.die(2, f"--retriever_learning_rate {rate} must be above 0")
    for name in ("tau_gold", "tau_sim"):
        if not 0 < getattr(args, name) < math.inf:
            utils.die(2, f"--{name} {getattr(args, name)} must be above 0")
    if not args.w_lm + args.w_sel + args.w_fuse + args.w_ctr:
        utils.die(2, "--w_lm, --w_sel, --w_fuse and --w_ctr are all 0", "there is nothing to learn")
    if args.max_context_turns == 0 or args.max_context_turns < -1:
        utils.die(2, f"--max_context_turns {args.max_context_turns} keeps no turn", "a positive number, or -1 for all turns")
    given = [name for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") if getattr(args, name) is not None]
    if given:
        utils.die(2, f"--{given[0]} does nothing with method spt", "the model stays frozen; drop it")
    if args.load_in_4bit:
        utils.die(2, "--load_in_4bit does not work with method spt", "drop it: the frozen weights are loaded in bf16 on GPUs")
    return personas.read(args.train_file)


def prepare_model(model, tokenizer, args):
    """The model frozen, with new soft prompts and a retriever; the retriever too is frozen where no loss needs it."""
    import personas
    import softprompts

    dim = model.get_input_embeddings().weight.shape[1]
    if args.retriever == "transformer" and dim % 4:
        utils.die(2, f"--retriever transformer has 4 attention heads, the embeddings have {dim} dimensions", "--retriever linear")
    model = softprompts.attach(model, {
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
    import softprompts

    soft = softprompts.soft_prompts(model)
    retriever = [p for p in soft.retriever.parameters() if p.requires_grad]
    groups = [{"params": [soft.prompts]}]
    return groups + ([{"params": retriever, "lr": args.retriever_learning_rate or args.learning_rate}] if retriever else [])


def save_adapter(model, folder: str) -> None:
    import softprompts

    softprompts.save(model, folder)


def load_adapter(model, folder):
    """The base model with the soft prompts of a checkpoint."""
    import softprompts

    return softprompts.attach(model, *softprompts.read(folder))


def restore_adapter(model, folder) -> None:
    """Give a model that trains on the weights of a checkpoint."""
    import softprompts

    softprompts.soft_prompts(model).load_state_dict(softprompts.read(folder)[1], strict=False)


# ---- trees --------------------------------------------------------------------------------------


def latest(row: dict, max_turns: int) -> dict:
    """The row with its last 2n - 1 turns, so that the first of them is Person A's."""
    turns = row["context"].strip("\n").split("\n")
    return row | {"context": "\n".join(turns if max_turns == -1 else turns[-(2 * max_turns - 1) :])}


def message(row: dict, turns: list[str]) -> str:
    """The user message: who Person B is, and the dialogue."""
    about = "\n".join(row.get("persona", []))
    return (f"About Person B:\n\n{about}\n\n" if about else "") + utils.build_prompt(row, turns=turns)


def prompt_ids(row: dict, tokenizer, args, room: int) -> tuple[list[int] | None, int]:
    """Token ids of a row's message without its soft prompt, and how many turns went; None if it does not fit."""
    row = latest(row, args.max_context_turns)
    prompts, dropped = utils.fit_messages(row, lambda turns: [message(row, turns)], tokenizer, args.max_input_length, room)
    return (prompts[0] if prompts else None), dropped


def retrieval_ids(row: dict, tokenizer, args) -> list[int]:
    """What the retriever sees: persona and dialogue, never the reply, nor what all messages have in common."""
    text = "\n".join([*row.get("persona", []), latest(row, args.max_context_turns)["context"]])
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def response_tree(row: dict, response: list[int], tokenizer, args):
    """A row's K runs: soft prompt, message and reply, as K trees under one root without tokens; branch k is prompt k."""
    from softprompts import virtual_ids
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
    return response_tree(row, [*response, utils.end_of_turn(tokenizer)], tokenizer, args)


def compute_loss(model, batch: dict, args):
    """The weighted sum of the four losses; also logged: each of them, the share of rows that every prompt is chosen for, the
    entropy of the mean of h, and how often the chosen prompt is the best one."""
    import torch

    import softprompts
    import trees

    soft = softprompts.soft_prompts(model)
    logits, place = trees.score_logits(model, batch)
    targets = batch["input_ids"][0, batch["token"]]
    logps, row = softprompts.by_prompt(logits[place, targets] - logits.logsumexp(-1)[place], batch)
    nll = softprompts.mean_nll(logps, row, batch["num_rows"])
    notes = batch["notes"]
    with torch.set_grad_enabled(torch.is_grad_enabled() and soft.retriever.head.weight.requires_grad):
        scores = soft.scores([note["ids"] for note in notes])
    log_h = soft.choice(scores)
    zero = logps.new_zeros(())
    parts = {"lm_loss": -logps.mean(), "sel_loss": zero, "fuse_loss": zero, "ctr_loss": zero}
    if args.w_sel:
        parts["sel_loss"] = softprompts.selection_loss(nll, log_h, args.tau_gold, args.target_noise)
    if args.w_fuse and args.fusion == "probs":
        parts["fuse_loss"] = softprompts.fusion_loss(logps, log_h, row)
    elif args.w_fuse:
        weights = scores if args.fusion == "logits_raw" else log_h.exp()
        wide, target = softprompts.by_prompt(logits[place], batch)[0], softprompts.by_prompt(targets, batch)[0][0]
        parts["fuse_loss"] = softprompts.logit_fusion_loss(wide, weights, target, row)
    if args.w_ctr:
        parts["ctr_loss"] = softprompts.contrastive_loss(scores, [note["about"] for note in notes], args.ctr_threshold)
    loss = sum(weight * part for weight, part in zip((args.w_lm, args.w_sel, args.w_fuse, args.w_ctr), parts.values(), strict=True))
    chosen, mean_h = log_h.argmax(-1), log_h.exp().mean(0)
    shown = {name: part.detach() for name, part in parts.items()}
    shown |= {"agreement": (chosen == nll.argmin(-1)).float().mean(), "usage_entropy": torch.special.entr(mean_h).sum().detach()}
    shown |= {f"use_{k + 1}": (chosen == k).float().mean() for k in range(args.num_prompts)}
    return loss, shown


# ---- inference ----------------------------------------------------------------------------------


def decode_tree(row: dict, tokenizer, args):
    """A row's message under the num_branches soft prompts that row["prompts"] names (from 1), in this order.

    Equal ones share soft prompt and message; different ones are trees of their own.
    """
    from softprompts import virtual_ids
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
    return [message(row, utils.keep_latest(utils.label_turns(row["context"]), args.max_input_length))]


def add_infer_args(parser) -> None:
    group = parser.add_argument_group("method spt")
    for name in ("test_file", "save_file"):
        next(a for a in parser._actions if a.dest == name).required = False
    group.set_defaults(num_response_per_input=1, max_new_tokens=32, prompts="chosen")
    group.add_argument("--prompts", choices=PROMPTS, help="chosen: the retriever's best (default); all: --num_response_per_input replies (1) under each; "
                       "sampled: a prompt drawn for every reply; fused: the mixture of all")
    group.add_argument("--prompt_id", type=int, metavar="K", help="reply under soft prompt K, from 1, whatever the retriever says")
    group.add_argument("--selection_noise", type=float, default=0.0, help="noise on the scores before choosing (default: 0)")
    group.add_argument("--interactive", action="store_true", help="talk to the model: exit, clear, r, save; --test_file gives personas")


def inference_rows(args) -> list[dict]:
    """The test rows; --interactive talks instead and never returns."""
    import personas

    if args.prompt_id is not None and args.prompts != "chosen":
        utils.die(2, f"--prompt_id {args.prompt_id} with --prompts {args.prompts}", "drop one of the two")
    if args.engine != "hf":
        utils.die(2, "--engine openai has no soft prompts", "--engine hf")
    if args.decoding not in ("sampling", "greedy", "beam") or (args.decoding == "beam" and args.prompts != "chosen"):
        utils.die(2, f"--decoding {args.decoding} does not work with --prompts {args.prompts}", "--decoding sampling or greedy")
    if args.overgenerate:
        utils.die(2, "--overgenerate does not work with method spt", "draw all of them with --num_response_per_input")
    if args.interactive:
        import chat

        chat.main(args)
        raise SystemExit(0)
    if not args.test_file or not args.save_file:
        utils.die(2, "--test_file and --save_file are required", "or --interactive")
    return personas.read(args.test_file)[: args.limit]


def plan(engine, rows: list[dict], args):
    """(answer, truncated) as infer.plan has it; also gives every row the retriever's scores, its choice and the prompts used."""
    if args.prompts is None:
        utils.die(2, f"{args.model_name_or_path} holds soft prompts", "add --method spt")
    soft = engine.model.get_input_embeddings()
    settle(soft.config, args)
    utils.refuse_special_tokens([{k: row.get(k) for k in ("context", "persona")} for row in rows], engine.tokenizer, args.test_file)
    chosen = [choose(soft, row, i, engine.tokenizer, args) for i, row in enumerate(rows)]
    for row, own in zip(rows, chosen, strict=True):
        row |= own
    trees = [decode_tree(row, engine.tokenizer, args) for row in rows]
    long = [i + 1 for i, tree in enumerate(trees) if tree is None]
    if long:
        utils.die(2, f"{args.test_file}: row {long[0]} and {len(long) - 1} more do not fit into {args.max_length} tokens "
                  f"with {args.max_new_tokens} new ones", "shorten them, or raise --max_length")
    if args.prompts == "fused":
        for row, tree in zip(rows, trees, strict=True):
            tree.note = fusion_weights(row["scores"], soft.config)
    return lambda block: answer(engine, [trees[i] for i in block], block, args), sum(tree.dropped_turns > 0 for tree in trees)


def settle(config: dict, args) -> None:
    """What the checkpoint says about its prompts, and the branches of a row's tree."""
    args.prompt_length, args.max_context_turns, count = config["prompt_length"], config["max_context_turns"], config["num_prompts"]
    if args.prompt_id is not None and not 1 <= args.prompt_id <= count:
        utils.die(2, f"--prompt_id {args.prompt_id}: the checkpoint has prompts 1 to {count}")
    if args.prompts == "all":
        args.num_response_per_input *= count
        args.num_drawn, args.num_branches = args.num_response_per_input, count
    if args.prompts == "fused":
        args.num_branches = count
    if args.decoding == "greedy" and args.num_response_per_input > (count if args.prompts == "all" else 1) and args.prompts != "sampled":
        utils.die(2, f"{args.num_response_per_input} greedy responses would repeat one another", "--decoding sampling")


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
    from decoding import clean_reply

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
