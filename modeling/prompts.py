"""One prompt builder for training, inference and judging."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from nltk.tokenize import NLTKWordTokenizer

from utils import USAGE, fail


def count_words(text: str) -> int:
    """Number of NLTK (Penn Treebank) word tokens, the unit of --max_input_length."""
    # The class itself, because nltk.word_tokenize wants data that it has to download (punkt_tab).
    return len(NLTKWordTokenizer().tokenize(text))


def label_turns(context: str | list[str]) -> list[str]:
    """Name the speakers of a dialogue: the last turn is Person A's, the one before Person B's."""
    turns = context.strip("\n").split("\n") if isinstance(context, str) else list(context)
    # Counted from the end: the last turn is always Person A's, so who begins depends on the length.
    count = len(turns)
    return [f"Person {'AB'[(count - 1 - i) % 2]}: {turn}" for i, turn in enumerate(turns)]


def keep_latest(turns: list[str], max_words: int) -> list[str]:
    """The newest turns that fit into max_words, at least one; an over-long one loses its start."""
    kept: list[str] = []
    for turn in reversed(turns):
        # Counts of single turns do not add up: NLTK splits off a full stop only at the end of its
        # input. A context of exactly max_words stays whole; the published code drops a turn of it.
        if kept and count_words("\n".join([turn, *kept])) > max_words:
            break
        kept.insert(0, turn)
    if count_words("\n".join(kept)) > max_words:  # possible only if the newest turn is alone
        kept = [_cut_start(kept[0], max_words)]
    return kept


def _cut_start(turn: str, max_words: int) -> str:
    """A labelled turn with as many words from its end as fit, at least one."""
    name, _, text = turn.partition(": ")
    words = text.split()
    low, high = 1, max(1, len(words))
    while low < high:  # bisect: the count is monotonous in the number of words
        middle = (low + high + 1) // 2
        fits = count_words(" ".join([f"{name}:", *words[-middle:]])) <= max_words
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join([f"{name}:", *words[-low:]])


def build_prompt(
    row: dict, number: int | None = None, base: bool = False, turns: list[str] | None = None
) -> str:
    """The user message for one response of a row with `context` or `prompt`.

    The possibility number stands last, so that the prompts of a row share all that is before it.
    base: adds the length hint that an untuned model gets.
    turns: the labelled turns to show, if not all of the context's.
    """
    # The published hint. An untuned model would otherwise answer at length, while a tuned one has
    # learnt how long replies are. A request whose answers can be checked says itself how to answer,
    # and a second instruction would be held against the untuned model.
    base = base and not ("answers" in row or "rule" in row)
    limit = ", in at most 25 words" if base else ""
    ask = "." if number is None else f": possibility number #{number}"
    if "prompt" in row:
        if number is None:
            return row["prompt"] + (f"\n\nAnswer{limit}." if base else "")
        return f"{row['prompt']}\n\nMany different answers would be good. Give one{ask}"
    dialogue = "\n".join(turns or label_turns(row["context"]))
    several = "" if number is None else "Person B could go on in many different ways. "
    return f"A conversation:\n\n{dialogue}\n\n{several}Write what Person B says next{limit}{ask}"


def encode_prompt(tokenizer, message: str) -> list[int]:
    """Token ids of a user message in the tokenizer's chat template, up to where the reply starts.

    Prompt and response are tokenised apart and joined as ids, so that training and inference see
    the same ids, whatever the response starts with.
    """
    return encode_messages(tokenizer, [{"role": "user", "content": message}])


def encode_messages(tokenizer, messages: list[dict]) -> list[int]:
    """The same for several turns, the last of which is the user's."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has its own


def end_of_turn(tokenizer) -> int:
    """The token that the chat template puts after a reply; every reply is trained to end with it.

    It is not always eos: the base and many fine-tunes of Llama 3 end a turn with another token.
    """
    reply = "\x02"  # no template contains it
    messages = [{"role": "user", "content": "\x01"}, {"role": "assistant", "content": reply}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(reply)[2]
    # Some tokenizers hold the end of a turn as an added token that is not marked as special.
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    # The first one counts: a template may go on after it, as with a line break.
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if token in special:
            return token
    return tokenizer.eos_token_id


def fit_prompts(
    row: dict,
    numbers: list[int | None],
    tokenizer,
    max_words: int,
    max_tokens: int,
    base: bool = False,
) -> tuple[list[list[int]], int]:
    """Token ids of one prompt per number, and how many of the oldest turns were dropped to fit.

    All prompts of a row lose the same turns. Returns ([], dropped) if not even the newest turn
    fits; replies are never cut.
    """

    def write(turns: list[str] | None) -> list[str]:
        return [build_prompt(row, number, base, turns) for number in numbers]

    return fit_messages(row, write, tokenizer, max_words, max_tokens)


def fit_messages(
    row: dict,
    write: Callable[[list[str] | None], list[str]],
    tokenizer,
    max_words: int,
    max_tokens: int,
) -> tuple[list[list[int]], int]:
    """Like fit_prompts, for the user messages that write(turns) returns.

    turns is None for a row with a `prompt`.
    """
    turns = label_turns(row["context"]) if "context" in row else None
    # The limit in words comes first, as published. Tokens are counted below, template included.
    kept = turns and keep_latest(turns, max_words)
    cut = int(bool(turns) and kept[-1] != turns[-1])  # the newest turn itself lost its start
    while True:
        prompts = [encode_prompt(tokenizer, message) for message in write(kept)]
        if max(map(len, prompts)) <= max_tokens:
            return prompts, len(turns) - len(kept) + cut if turns else 0
        kept = kept and kept[1:]  # the oldest turn goes, for all prompts alike
        if not kept:
            return [], len(turns or ())


def refuse_special_tokens(
    rows: list[dict], tokenizer, path: str, allowed: Iterable[str] = ()
) -> None:
    """Die over a row whose text contains a special token, which would end its own turn.

    allowed: new tokens of a checkpoint, which are meant to be written.
    """
    # Some tokenizers have added tokens that are only spaces, and those are harmless.
    marks = set(tokenizer.all_special_tokens)
    marks |= {str(token) for token in tokenizer.added_tokens_decoder.values()}
    marks = sorted(mark for mark in marks - set(allowed) if not mark.isspace())
    # The JSON of a row is searched, so that no field and no nested list is forgotten. A mark is
    # escaped in the same way, without the quotes around it.
    escaped = {mark: json.dumps(mark, ensure_ascii=False)[1:-1] for mark in marks}
    for number, row in enumerate(rows, 1):
        text = json.dumps(row, ensure_ascii=False)
        present = [mark for mark in marks if escaped[mark] in text]
        if present:
            fail(
                USAGE,
                f"{row.get('file', path)}: row {number} contains the special token {present[0]}",
                "write it differently: the tokenizer would read it as a command",
            )
