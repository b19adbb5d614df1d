"""What a model's probabilities say about new tokens, reference replies and held-out answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

import trees
from methods.delia import messages, mixing
from modeling.adapters import grow_embeddings
from modeling.models import load_model, load_tokenizer, model_dir
from modeling.prompts import end_of_turn
from scoring import statistics
from scoring.sources import NoModel
from trees import LIKELIHOOD, Segment, Tree
from utils import info

# token_unscored: prompts that only open with a new token, which nothing predicts
FIGURES = ("ratio", "reply_nll", "token_nll", "token_nll_before", "token_unscored", "neighbours",
           "retention")
NUM_NEAREST = 10  # neighbours of an embedding
Sequence = tuple[list[int], list[bool]]  # token ids, and which of them are scored


# ---- sequences and their log-probabilities ------------------------------------------------------


def sequence_logps(model, sequences: list[Sequence]) -> list[np.ndarray]:
    """log p of the chosen tokens of each sequence in nats, given all tokens before them.

    The first token has none before it and is never scored: where it alone is chosen, the array is
    empty.
    """
    # a tree needs a context, and nothing predicts the first token, so that token is the context
    forest = [Tree(Segment(ids[:1], children=[
        Segment(ids[1:], LIKELIHOOD, [float(is_chosen) for is_chosen in chosen[1:]])]))
        for ids, chosen in sequences if any(chosen[1:])]
    scored = iter(trees.score_forest(model, forest) if forest else ())
    return [next(scored).logps.double().numpy() if any(chosen[1:]) else np.empty(0)
            for _, chosen in sequences]


def mean_nlls(model, sequences: list[Sequence]) -> list[float | None]:
    """Mean -log p of the chosen tokens of every sequence, in nats; None where none is scored."""
    return [float(-logps.mean()) if len(logps) else None
            for logps in sequence_logps(model, sequences)]


def token_sequences(rows: list[dict], tokenizer, new_tokens: list[str]) -> list[Sequence]:
    """The prompts that mention a new token, with its places chosen."""
    # The prompt is scored here, which training masks. The published recorder uses the masked
    # labels, finds no such token and logs nan.
    ids_of_tokens = set(tokenizer.convert_tokens_to_ids(new_tokens))
    prompts = [messages.encode(tokenizer, messages.context_of(row)) for row in rows]
    return [(ids, [i in ids_of_tokens for i in ids]) for ids in prompts if ids_of_tokens & set(ids)]


def reply_sequences(rows: list[dict], tokenizer) -> list[Sequence]:
    """Prompt and reference reply of every row, with the reply and its end token chosen."""
    sequences = []
    for row in rows:
        prompt = messages.encode(tokenizer, row["messages"][:-1])
        reply = tokenizer(row["messages"][-1]["content"], add_special_tokens=False)["input_ids"]
        reply = [*reply, end_of_turn(tokenizer)]
        sequences.append((prompt + reply, [False] * len(prompt) + [True] * len(reply)))
    return sequences


# ---- before training ----------------------------------------------------------------------------


class BeforeTraining:
    """What base models give without training, each measured once for all systems.

    rows: those whose prompts mention new tokens. held_out: diverse rows that no run trains on.
    Prompts are written with the chat template of the run that is compared: the base may have
    another one, or none, and would then be measured on other prompts.
    """

    def __init__(self, rows: list[dict], held_out: list[dict]):
        self.rows, self.held_out = rows, held_out
        self.of_held_out: dict[tuple[str, str], list[float | None]] = {}
        self.of_tokens: dict[str, list[float | None]] = {}

    def held_out_nlls(self, base: str, template: str) -> list[float | None]:
        """nats per token of the base model's answers to the held-out queries."""
        if (base, template) not in self.of_held_out:
            folder = model_dir(base)
            # of the run's tokenizer only the template, as the base cannot embed its new tokens
            tokenizer = load_tokenizer(folder, "none")
            tokenizer.chat_template = template
            self.of_held_out[base, template] = mean_nlls(
                load_model(folder).eval(), reply_sequences(self.held_out, tokenizer))
        return self.of_held_out[base, template]

    def token_nlls(self, base: str, tokenizer, settings: dict) -> list[float | None]:
        """-log p of the new tokens in the prompts, with their rows as training starts from them.

        tokenizer, settings: the run's, with its new tokens, and its args; runs that start alike are
        measured once.
        """
        start = {name: settings.get(name)
                 for name in ("new_tokens", "token_init", "token_description", "seed")}
        key = json.dumps([base, tokenizer.chat_template, start])
        if key not in self.of_tokens:
            # loaded anew: with more rows in its embeddings, its other figures would change
            model = load_model(model_dir(base)).eval()
            grow_embeddings(model, tokenizer, settings)
            sequences = token_sequences(self.rows, tokenizer, settings["new_tokens"])
            self.of_tokens[key] = mean_nlls(model, sequences)
        return self.of_tokens[key]


def held_out_rows(sources) -> tuple[list[dict], str | None]:
    """The held-out rows of the cache that the systems' runs name; or none, and why."""
    caches = []
    for name in sources.files:
        cache = (sources.run(name) or {}).get("args", {}).get("diverse_file")
        caches += [cache] if cache and cache not in caches else []
    if not caches:
        return [], "no run names a --diverse_file"
    if not Path(caches[0]).is_file():
        return [], f"{caches[0]} is not there"
    if len(caches) > 1:
        info(f"runs with different caches; retention is measured on {caches[0]}")
    # no new tokens to look for: the cache was checked when it was trained on
    rows = [row for row in messages.read_messages(caches[0], [], strict=False)
            if mixing.is_held_out(row)]
    return rows, None if rows else f"{caches[0]} has no held-out row"


# ---- the figures --------------------------------------------------------------------------------


def model_figures(rows: list[dict], sources, name: str, before: BeforeTraining,
                  no_held_out: str | None) -> tuple[dict, dict[str, str]]:
    """The figures of the model that drew a system's replies, and reasons of missing ones.

    no_held_out: why there are no held-out rows, if so.
    """
    figures = dict.fromkeys(FIGURES)
    try:
        model, tokenizer, run = sources.model(name)
    except NoModel as error:
        return figures, dict.fromkeys(FIGURES, str(error))
    settings, base = run["args"], run["base_model"]
    # the references of the other rows are prose, which says nothing about the token
    asking = [row for row in rows if row["asks_format"]]
    # this is the ratio asked for; run.json has the counts, num_task_rows and num_diverse_rows
    figures["ratio"] = settings.get("diverse_ratio")
    figures["reply_nll"] = statistics.interval(
        mean_nlls(model, reply_sequences(asking, tokenizer)))
    if new_tokens := settings.get("new_tokens"):
        token_nlls = mean_nlls(model, token_sequences(rows, tokenizer, new_tokens))
        figures["token_nll"] = statistics.interval(token_nlls)
        figures["token_unscored"] = token_nlls.count(None)
        # a single description, such as the default, stands for all tokens
        descriptions = settings["token_description"]
        figures["neighbours"] = {
            token: embedding_figures(model, tokenizer, token,
                                     descriptions[min(i, len(descriptions) - 1)])
            for i, token in enumerate(new_tokens)}
    nlls = mean_nlls(model, reply_sequences(before.held_out, tokenizer))
    del model  # before the base model is loaded: memory need not hold both
    if run["method"] == "base":
        # it is its own reference
        before.of_held_out[base, tokenizer.chat_template] = nlls
    if new_tokens:
        figures["token_nll_before"] = statistics.interval(
            before.token_nlls(base, tokenizer, settings))
    if nlls:
        figures["retention"] = {
            "rows": len(nlls), "nll": statistics.interval(nlls),
            "change": statistics.paired_difference(
                nlls, before.held_out_nlls(base, tokenizer.chat_template))}
    no_token = "the model has no new token"
    if new_tokens:
        no_token = "the new tokens open their prompts, and nothing predicts a first token" \
            if figures["token_unscored"] else "no prompt mentions a new token"
    reasons = {"ratio": "the model was not trained with --diverse_ratio",
               "retention": no_held_out} | dict.fromkeys(
        ("token_nll", "token_nll_before", "token_unscored", "neighbours"), no_token)
    return figures, {name: reasons[name] for name, value in figures.items() if value is None}


@torch.no_grad()
def embedding_figures(model, tokenizer, token: str, description: str) -> dict:
    """Where a token's input embedding lies.

    description: its cosine with the mean embedding of the tokens of that text.
    less_like_description: the share of the vocabulary whose cosine with that text is lower.
    norm_ratio: its length over the mean length. nearest: [[token, cosine], ...], nearest first.
    """
    table = model.get_input_embeddings()
    # the layer is called, since PEFT keeps a low-rank update beside the matrix itself
    matrix = table(torch.arange(len(tokenizer), device=model.device)).float()  # (V, D)
    index = tokenizer.convert_tokens_to_ids(token)
    described = matrix[tokenizer(description, add_special_tokens=False)["input_ids"]].mean(0)
    cosine = torch.nn.functional.cosine_similarity
    to_token, to_text = cosine(matrix, matrix[index][None]), cosine(matrix, described[None])
    to_token[index] = -1  # not its own neighbour
    nearest = to_token.topk(NUM_NEAREST)
    # a new row starts shorter than most: its length shows how far training has moved it
    norms = matrix.norm(dim=1)
    return {"description": float(to_text[index]),
            "less_like_description": float((to_text < to_text[index]).float().mean()),
            "norm_ratio": float(norms[index] / norms.mean()),
            "nearest": [[tokenizer.decode([i]), round(value, 4)] for value, i in zip(
                nearest.values.tolist(), nearest.indices.tolist(), strict=True)]}
