"""How likely the untuned base model finds replies after their prompts."""

from __future__ import annotations

import torch
from tqdm import tqdm

import trees
from methods.control.tokens import start_ids
from modeling.checkpoints import load_checkpoint
from trees import LIKELIHOOD, Segment, Tree
from utils import EMBEDDED

MAX_BRANCHES = 40  # replies a tree; more would make a block of trees uneven


def base_nats(base: str, systems: dict[str, list[dict]]
              ) -> dict[tuple[str, str], tuple[float, int]]:
    """{(prompt, reply): (-log p(reply | prompt) in nats, number of tokens)} under the base model.

    All replies to a prompt are branches of one tree. An empty reply has neither nats nor tokens.
    """
    # a base without chat template serves as well: prompts are plain text
    model, tokenizer, _ = load_checkpoint(base, chat_template=None if base == EMBEDDED else "none")
    replies: dict[str, dict[str, None]] = {}  # dicts keep the order of first appearance
    for rows in systems.values():
        for row in rows:
            replies.setdefault(row["prompt"], {}).update(dict.fromkeys(row["preds"]))
    nats = {(prompt, ""): (0.0, 0) for prompt in replies}
    forest, names = [], []
    for prompt, texts in replies.items():
        # replies start as in training, so that those without a prompt have a context, too
        context = start_ids(tokenizer) + _ids(tokenizer, prompt)
        full = [text for text in texts if text]
        for k in range(0, len(full), MAX_BRANCHES):
            part = full[k : k + MAX_BRANCHES]
            # No end token is scored: a reply that was cut at the token limit has none. The space is
            # joined before encoding, since " hat" and "hat" are different tokens.
            branches = [Segment(_ids(tokenizer, join(prompt, text)), LIKELIHOOD, branch=i)
                        for i, text in enumerate(part)]
            forest.append(Tree(Segment(context, children=branches)))
            names.append([(prompt, text) for text in part])
    bar = tqdm(forest, desc="perplexity", unit="tree")
    for part, scored in zip(names, trees.score_forest(model, bar), strict=True):
        sums = scored.branch_sums(len(part)).tolist()
        counts = torch.bincount(scored.branch, minlength=len(part)).tolist()
        for name, logp, count in zip(part, sums, counts, strict=True):
            nats[name] = -logp, count
    return nats


def join(prompt: str, text: str) -> str:
    """A continuation as it stands after its prompt: with the space that cleaning took off."""
    return f" {text}" if prompt and text[:1].isalnum() else text


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
