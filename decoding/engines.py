"""Who answers a message: a model of this machine (Local) or one behind a server (Server).

Both kinds have

    ask(messages, seeds, n, max_new_tokens, temperature, **fields) -> Iterator[Asked]
    count_tokens(message) -> int | None     None: a server does not tell
    figures() -> dict                       what a summary should say of the work so far
    name, run                               such as hf:smollm2; the model's run.json
    limit, failed                           positions of the model or None; see below

A message is a user's text, or a list of turns ({"role": ..., "content": ...}). Each message is
asked for n replies with a seed of its own (seeds None: a server is sent none); temperature 0 takes
the most probable reply. fields: such as response_format, which a server gets and a local model
ignores. `ask` is lazy and yields in the order in which messages finish, so that callers can write
each result down at once. Asked.replies is shorter than n only where Asked.failure says why;
`failed` counts these failures by what happened.

Retries and deadlines are api.py's, keys and their redaction providers.py's. Whether a server that
fails again and again stops the run is decided here. Both kinds raise api.RunStopped, which the
caller turns into an exit code and a way out.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tqdm import tqdm

import utils
from decoding import api, mixtures, providers
from decoding.api import CallFailed, RunStopped
from decoding.providers import Spec
from decoding.replies import Reply
from decoding.sampling import greedy, sample
from modeling.checkpoints import load_checkpoint
from modeling.prompts import encode_messages, encode_prompt, end_of_turn
from trees import Tree, branch_prompts
from utils import REFUSED, TRY_LATER, USAGE, fail, info

MAX_FAILED_IN_A_ROW = 20  # calls; then it is the server, not the messages
SERVER_FAULTS = ("timeout", "http_error")  # the other kinds are about a reply: the server works

Message = str | list[dict]


class Asked(NamedTuple):
    """What became of messages[index]: its replies, and the last failure if there are fewer than n.

    retries: repeated calls that it took.
    """

    index: int
    replies: list[Reply]
    failure: CallFailed | None = None
    retries: int = 0


def load_engine(spec: str | Spec, base_url: str | None = None, key_file: str | None = None,
                max_connections: int = 8, timeout: float = 120.0, timeout_total: float = 600.0,
                sampling: Mapping[str, float] | None = None, batch_size: int = 8,
                force_base: bool = False, chat_template: str | None = None,
                tolerant: bool = False) -> Local | Server:
    """The engine of hf:MODEL, openai:MODEL or together:MODEL.

    base_url to timeout_total and tolerant are a server's (see Server), batch_size to chat_template
    a local model's. sampling: the filters of decoding.sampling.sample; a server takes top_p, top_k
    and min_p of them.
    """
    spec = providers.parse_spec(spec) if isinstance(spec, str) else spec
    if spec.provider != providers.LOCAL:
        return Server(spec, base_url, key_file, max_connections, timeout, timeout_total, sampling,
                      tolerant)
    # a forgotten provider would else draw quietly from another model
    if base_url:
        fail(USAGE, f"--base_url {base_url} does nothing with the local model {spec.name}",
             f"drop it, or ask openai:{spec.model}")
    model, tokenizer, run = load_checkpoint(spec.model, force_base, chat_template)
    return Local(model, tokenizer, run, sampling, batch_size, spec.name)


class Local:
    """A model of this machine; messages that are asked together share a batch.

    run: the run.json of its checkpoint, as load_checkpoint gives it. prefilled: prompt tokens that
    were computed ("shared"), and what copied prompts would have cost ("copied").
    """

    def __init__(self, model, tokenizer, run: dict, sampling: Mapping[str, float] | None = None,
                 batch_size: int = 8, name: str = "hf"):
        self.model, self.tokenizer, self.run, self.name = model, tokenizer, run, name
        self.sampling, self.batch_size = dict(sampling or {}), batch_size
        self.limit = model.config.get_text_config().max_position_embeddings
        self.pad_id, self.eos_id = tokenizer.pad_token_id, end_of_turn(tokenizer)
        self.prefilled, self.failed = Counter(), Counter()

    def count_tokens(self, message: Message) -> int:
        return len(self._encode(message))

    def figures(self) -> dict:
        if not self.prefilled:
            return {}
        return {"prefill_tokens": self.prefilled["shared"],
                "prefill_tokens_without_sharing": self.prefilled["copied"]}

    def ask(self, messages: list[Message], seeds: list[int] | None, n: int, max_new_tokens: int,
            temperature: float, response_format: dict | None = None) -> Iterator[Asked]:
        """See the module. A message that does not fit beside its reply fails, and is not cut.

        response_format is not enforced; callers read replies as if there were none.
        """
        prompts = [self._encode(message) for message in messages]
        # A message is never cut: what it asks for may stand anywhere in it.
        room, fitting = self.limit - max_new_tokens, []
        for i, prompt in enumerate(prompts):
            if len(prompt) <= room:
                fitting.append(i)
                continue
            what = f"the request has {len(prompt)} tokens, {max(0, room)} fit beside the new ones"
            self.failed[what] += 1
            yield Asked(i, [], CallFailed(what, transient=False))
        for start in range(0, len(fitting), self.batch_size):
            block = fitting[start : start + self.batch_size]
            # equal prompts with labels are branches of their own, so one prefill gives n replies
            forest = [Tree(branch_prompts([prompts[i]] * n, list(range(n)))) for i in block]
            if temperature:
                drawn = self.draw(sample, forest, [seeds[i] for i in block], max_new_tokens,
                                  temperature=temperature, **self.sampling)
            else:
                # Greedy has no noise, so seeds would be refused.
                drawn = self.draw(greedy, forest, None, max_new_tokens)
            for i, replies in zip(block, drawn, strict=True):
                yield Asked(i, [reply._replace(total_tokens=len(prompts[i]) + reply.tokens)
                                for reply in replies])

    def draw(self, function: Callable, forest: list[Tree], seeds: list[int] | None,
             max_new_tokens: int, **options) -> list[list[Reply]]:
        """Replies [tree][response] by a function of decoding/sampling.py or decoding/beams.py.

        On out-of-memory the forest is split in two and tried again, with the same seeds and so the
        same replies; the error is raised if a single tree does not fit.
        """
        given = options if seeds is None else options | {"seeds": seeds}
        try:
            drawn = function(self.model, forest, pad_id=self.pad_id, eos_id=self.eos_id,
                             max_new_tokens=max_new_tokens, **given)
        except Exception as error:
            # torch has no single exception for this: each backend raises its own.
            if not utils.is_out_of_memory(error) or len(forest) == 1:
                raise
        else:
            self._count_prefill(forest, options)
            return [[self._reply(ids, max_new_tokens) for ids in row] for row in drawn]
        # outside of the except block, where the error would hold the tensors of the failed try
        half = len(forest) // 2
        info(f"out of memory with {len(forest)} rows, trying {half} (same seeds)")
        parts = [(forest[:half], seeds and seeds[:half]), (forest[half:], seeds and seeds[half:])]
        return [replies for part, part_seeds in parts
                for replies in self.draw(function, part, part_seeds, max_new_tokens, **options)]

    def _encode(self, message: Message) -> list[int]:
        encode = encode_prompt if isinstance(message, str) else encode_messages
        return encode(self.tokenizer, message)

    def _reply(self, ids: list[int], max_new_tokens: int) -> Reply:
        text, cut = self.tokenizer.decode(ids, skip_special_tokens=True), len(ids) >= max_new_tokens
        return Reply(text, len(ids), cut, "length" if cut else "stop")

    def _count_prefill(self, forest: list[Tree], options: dict) -> None:
        # Classifier-free guidance scores a second tree beside each.
        uncond = [tree.uncond for tree in forest if isinstance(tree, mixtures.GuidedTree)]
        for tree in [*forest, *uncond]:
            ends = [len(child.input_ids) for child in tree.root.children]
            # Computed once: the root, and each sequence's own ending. Without a tree, every
            # sequence would have begun with the whole root.
            sequences = max(len(ends), options.get("num_beams", 1))  # beams repeat the branches
            root, branches = len(tree.root.input_ids), len(ends)
            self.prefilled["shared"] += root + sum(ends) * sequences // branches
            self.prefilled["copied"] += (root * branches + sum(ends)) * sequences // branches


class Server:
    """A model behind a server; several replies in one call where it honours `n`, else one by one.

    Constructing it reads the key and fails without one where the provider needs it; nothing is
    sent. max_connections: calls at a time. timeout: seconds without a byte. timeout_total: seconds
    for a call with its repeats. tolerant: the caller copes with a message without an answer, or
    asks it again in a later run; else a transient failure stops the run at once, since a row that
    is written stays as it is. max_failed: failed calls in a row that stop the run in any case.
    retries: repeated calls by what went wrong. served: the model's names as the server gives them.
    """

    limit = None

    def __init__(self, spec: Spec, base_url: str | None = None, key_file: str | None = None,
                 max_connections: int = 8, timeout: float = 120.0, timeout_total: float = 600.0,
                 sampling: Mapping[str, float] | None = None, tolerant: bool = False,
                 max_backoff: float = 60.0, max_failed: int = MAX_FAILED_IN_A_ROW,
                 way_out: str = "export it, or name a local server with --base_url"):
        self.client = providers.connect(spec.provider, base_url, timeout, key_file, way_out)
        self.name, self.model = spec.name, spec.model
        self.url = providers.normalise_url(base_url or providers.PROVIDERS[spec.provider][0])
        # What a server runs is unknown, so it is treated like an untrained model.
        self.run = {"method": "base", "base_model": spec.model, "weights": None, "args": {}}
        self.sampling, self.max_connections = dict(sampling or {}), max_connections
        self.timeout_total, self.max_backoff = timeout_total, max_backoff
        self.tolerant, self.max_failed = tolerant, max_failed
        self.retries, self.failed, self.served = Counter(), Counter(), set()
        self._takes_n, self._failed_in_a_row, self._has_answered = True, 0, False
        self._lock = threading.Lock()  # callers may ask from several threads

    def count_tokens(self, message: Message) -> None:
        """None: only the server knows its tokenizer."""

    def figures(self) -> dict:
        return {"served_models": sorted(self.served), "retries": dict(self.retries)}

    def ask(self, messages: list[Message], seeds: list[int] | None, n: int, max_new_tokens: int,
            temperature: float, **fields) -> Iterator[Asked]:
        """See the module. fields: of the request, over those that `sampling` gives."""
        fields = {"temperature": temperature, **self._filters(temperature), **fields}

        def calls(jobs: list[tuple[int, int]], wanted: int) -> Iterator[tuple[int, Asked]]:
            """One call a job (a message, how many of its replies come before): (before, Asked)."""

            def call(job: tuple[int, int]) -> tuple[int, Asked]:
                index, before = job
                request = fields | ({"n": wanted} if wanted > 1 else {})
                if seeds is not None:  # servers take 31 bits, ours have 60
                    request["seed"] = (seeds[index] + before) % 2**31
                asked = self._call(index, messages[index], max_new_tokens, request)
                return before, asked._replace(replies=asked.replies[:wanted])

            threads = max(1, min(self.max_connections, len(jobs)))
            for before, asked in api.work(call, jobs, threads):
                yield before, asked  # first, so that the caller has written it when the run stops
                self._stop_if_down(asked.failure)

        # First one call for all n replies of a message; what is missing comes one by one.
        known: dict[int, list[Reply]] = {i: [] for i in range(len(messages))}
        if self._takes_n and n > 1:
            for _, asked in calls([(i, 0) for i in known], n):
                known[asked.index] = asked.replies
                # A refused call may have been refused for its n, so only transient failures are
                # final.
                if len(asked.replies) == n or (asked.failure and asked.failure.transient):
                    del known[asked.index]
                    yield asked
            if known:  # some servers ignore n, others refuse the call
                self._takes_n = False
                info(f"{self.url} gives one reply a call (no n); each reply is a call of its own")
        # The replies that came with n keep the first places, and so the first seeds.
        slots = {i: dict(enumerate(replies)) for i, replies in known.items()}
        jobs = [(i, k) for i, replies in known.items() for k in range(len(replies), n)]
        last, left = {}, Counter(i for i, _ in jobs)
        for k, asked in calls(jobs, 1):
            i, before = asked.index, last.get(asked.index, asked)
            slots[i].update((k, reply) for reply in asked.replies)
            last[i] = asked._replace(failure=asked.failure or before.failure)
            left[i] -= 1
            if not left[i]:  # in the order of the seeds, whichever call ended first
                yield last[i]._replace(replies=[slots[i][k] for k in sorted(slots[i])])

    def _filters(self, temperature: float) -> dict:
        """The request's fields for the filters that are on."""
        fields, top_p = {}, self.sampling.get("top_p", 1.0)
        # A default is not sent, since some models refuse the field; at temperature 0 it does
        # nothing.
        if top_p != 1.0 and temperature:
            fields["top_p"] = top_p
        # not of OpenAI's, but compatible servers know them
        extra = {key: self.sampling[key] for key in ("top_k", "min_p") if self.sampling.get(key)}
        return fields | ({"extra_body": extra} if extra else {})

    def _call(self, index: int, message: Message, max_new_tokens: int, request: dict) -> Asked:
        """One call with its repeats."""
        turns = [{"role": "user", "content": message}] if isinstance(message, str) else message
        waits: list[float] = []

        def on_retry(what: str, wait: float) -> None:
            waits.append(wait)
            self._tell(what, wait)

        try:
            replies = api.retrying(
                lambda: api.complete(self.client, self.model, turns, max_new_tokens, **request),
                time.monotonic() + self.timeout_total, self.max_backoff, on_retry)
        except CallFailed as failure:
            if failure.transient and not self.tolerant:
                raise self._stop(TRY_LATER, failure.what) from failure
            with self._lock:
                self.failed[failure.what] += "n" not in request  # else it is tried without n
            return Asked(index, [], failure, len(waits))
        except RunStopped as stop:
            raise self._stop(stop.code, stop.what) from stop
        self.served.update(reply.served_model for reply in replies)
        return Asked(index, replies, None, len(waits))

    def _stop_if_down(self, failure: CallFailed | None) -> None:
        """Raise RunStopped when max_failed calls in a row have failed: it is not the messages.

        Refused calls may be the messages' own fault, unless no call has ever been answered.
        """
        with self._lock:
            # Any answer, even one that is of no use, shows that the server works.
            if failure is None or failure.kind not in SERVER_FAULTS:
                self._failed_in_a_row, self._has_answered = 0, True
                return
            self._failed_in_a_row += 1
            count = self._failed_in_a_row
        if count >= self.max_failed and (failure.transient or not self._has_answered):
            code = TRY_LATER if failure.transient else REFUSED
            raise self._stop(code, f"{count} calls failed in a row: {failure.what}")

    def _stop(self, code: int, what: str) -> RunStopped:
        return RunStopped(code, f"{self.name} at {self.url}: {what}")

    def _tell(self, what: str, wait: float) -> None:
        kind = what.split(":")[0]
        with self._lock:
            self.retries[kind] += 1
            first = self.retries[kind] == 1  # each kind is told once; the summary has the counts
        if first:
            tqdm.write(f"note: {self.url}: {what}; trying again in {wait:.1f} s", file=sys.stderr)
