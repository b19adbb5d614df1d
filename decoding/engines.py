"""Who answers a message: a model of this machine, or an OpenAI-compatible server.

Both have `ask(messages, seeds, number, max_new_tokens, temperature)`: `number` replies to each user message,
each message with a seed of its own, temperature 0 for the most probable reply. A list may be short where a
server gave up on a reply; the caller counts that. To a server a message may also be a list of turns.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import utils
from decoding import api, beams, sampling
from decoding.replies import Reply
from modeling.prompts import encode_prompt, end_of_turn
from utils import fail, info


class Local:
    """A model of this machine; rows that ask together share a batch."""

    def __init__(self, model, tokenizer, sampling: dict, batch_size: int):
        self.model, self.tokenizer, self.sampling, self.batch_size = model, tokenizer, sampling, batch_size
        self.ends = tokenizer.pad_token_id, end_of_turn(tokenizer)
        self.prefilled = Counter()  # prompt tokens computed, and what copied prompts would have cost

    def ask(self, messages: list[str], seeds: list[int], number: int, max_new_tokens: int,
            temperature: float) -> list[list[Reply]]:
        from trees import Tree, branch_prompts

        prompts = [encode_prompt(self.tokenizer, message) for message in messages]
        forest = [Tree(branch_prompts([prompt] * number, list(range(number)))) for prompt in prompts]
        replies = []
        for start in range(0, len(forest), self.batch_size):
            part = slice(start, start + self.batch_size)
            if temperature:
                draw = self.draw("sample", forest[part], seeds[part], max_new_tokens, temperature=temperature, **self.sampling)
            else:
                draw = self.draw("greedy", forest[part], None, max_new_tokens)
            replies += draw
        return replies

    def count_tokens(self, message: str) -> int:
        return len(encode_prompt(self.tokenizer, message))

    def draw(self, how: str, forest: list, seeds: list[int] | None, max_new_tokens: int, **options) -> list[list[Reply]]:
        """Replies [tree][response] by a function of decoding.py; when memory runs out, of the forest's halves.

        Raises what it got where even a single tree does not fit.
        """

        if seeds is not None:
            options["seeds"] = seeds
        try:
            drawn = getattr(beams if how in ("beam", "diverse") else sampling, how)(self.model, forest, pad_id=self.ends[0], eos_id=self.ends[1],
                                           max_new_tokens=max_new_tokens, **options)
        except Exception as error:
            if not utils.is_out_of_memory(error):
                raise
            if len(forest) == 1:
                raise
        else:
            self.count_prefill(forest, options)
            return [[Reply(self.tokenizer.decode(ids, skip_special_tokens=True), len(ids), len(ids) >= max_new_tokens)
                     for ids in row] for row in drawn]
        half = len(forest) // 2
        info(f"out of memory with {len(forest)} rows, trying {half} (same seeds)")
        halves = (forest[:half], seeds and seeds[:half]), (forest[half:], seeds and seeds[half:])
        options.pop("seeds", None)
        return [replies for part, own in halves for replies in self.draw(how, part, own, max_new_tokens, **options)]

    def count_prefill(self, forest: list, options: dict) -> None:
        for tree in [*forest, *(tree.twin for tree in forest if tree.twin)]:
            ends = [len(child.input_ids) for child in tree.root.children]
            sequences = max(len(ends), options.get("num_beams", 1))
            self.prefilled["shared"] += len(tree.root.input_ids) + sum(ends) * sequences // len(ends)
            self.prefilled["copied"] += (len(tree.root.input_ids) * len(ends) + sum(ends)) * sequences // len(ends)


class Server:
    """An OpenAI-compatible server; several replies in one call where it honours `n`, else one by one."""

    def __init__(self, base_url: str, model: str, max_connections: int, timeout: float, timeout_total: float, sampling: dict):

        self.client, self.url, self.model = api.connect(base_url, timeout), base_url, model
        self.max_connections, self.timeout_total = max_connections, timeout_total
        self.options = {name: sampling[name] for name in ("top_p",) if sampling[name] != 1.0}
        extra = {name: sampling[name] for name in ("top_k", "min_p") if sampling[name]}
        self.options |= {"extra_body": extra} if extra else {}
        self.takes_n, self.retries, self.served, self.failed = True, Counter(), set(), Counter()

    def ask(self, messages: list[str], seeds: list[int], number: int, max_new_tokens: int,
            temperature: float) -> list[list[Reply]]:

        found: list[list[Reply]] = [[] for _ in messages]

        def ask_all(jobs: list[tuple[int, int]], wanted: int) -> None:  # (message, how many replies are before)
            def one(job):
                i, before = job
                return i, self.call(messages[i], seeds[i] + before, wanted, max_new_tokens, temperature)

            for i, replies in api.work(one, jobs, self.max_connections):
                found[i] += replies[:wanted]

        try:
            if self.takes_n and number > 1:
                ask_all([(i, 0) for i in range(len(messages))], number)
            missing = [(i, k) for i, replies in enumerate(found) for k in range(len(replies), number)]
            if missing and number > 1 and self.takes_n:
                self.takes_n = False
                info(f"{self.url} gives one reply a call (no n); each reply is a call of its own")
            ask_all(missing, 1)
        except api.Stopped as error:
            code, what = error.args
            fail(code, f"{self.url}: {what}", "finished rows are kept; the same command with --resume goes on")
        return found

    def call(self, message: str | list[dict], seed: int, number: int, max_new_tokens: int, temperature: float) -> list[Reply]:
        """One call; [] where the server refuses this very message, and Stopped(75) where it answers badly again and again."""

        options = {"temperature": temperature, "seed": seed % 2**31, **self.options, **({"n": number} if number > 1 else {})}
        if not temperature:
            options.pop("top_p", None)
        turns = message if isinstance(message, list) else [{"role": "user", "content": message}]
        try:
            answers = api.retrying(
                lambda: api.choices(self.client, self.model, turns, max_new_tokens, **options),
                time.monotonic() + self.timeout_total, on_retry=self.tell)
        except api.Failed as error:
            what, may_pass = error.args
            if may_pass:
                raise api.Stopped(75, what) from None
            if number == 1:
                self.failed[what] += 1
            return []
        self.served.update(answer.served_model for answer in answers)
        return [Reply(answer.text, answer.new_tokens, answer.finish_reason == "length") for answer in answers]

    def tell(self, what: str, wait: float) -> None:
        from tqdm import tqdm

        kind = what.split(":")[0]
        if not self.retries[kind]:  # each kind once; the summary has the counts
            tqdm.write(f"note: {self.url}: {what}; trying again in {wait:.1f} s", file=sys.stderr)
        self.retries[kind] += 1
