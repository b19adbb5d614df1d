"""Coherence judges: they read a row and replies, and rate each reply.

`APIJudge` is the published one: two language models behind OpenAI-compatible servers, asked for a short
assessment and a rating from 1 to 10; a reply is incoherent at 5 or below. `HFJudge` puts the same question
to a local chat model and takes the expected rating. `LocalProxy` needs neither network nor a good model. It
is a proxy and labelled so wherever it is shown: it tells replies that belong to their context from replies
that belong to another one, which is less than telling good from bad. Two features go in:

- pointwise mutual information per token under the base model, log p(reply | context) - log p(reply),
  with the dialogue as a plain transcript (not as the prompt that a system under test was given, whose
  own samples it would flatter), computed in one packed row of two prompt trees;
- cosine of the sentence embeddings of context and reply.

A logistic regression on the rows' own reference replies (true pairs against the same replies under
other rows' contexts) joins them; its AUC on held-out rows is reported with every score.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import utils
from decoding import api
from scoring.judge_prompt import RATINGS, judge_prompt, parse_rating
from utils import USAGE, fail, info

RUBRIC = 1  # raise it with every change of the question or of how ratings are read; older logs are then not reused
MAX_FAILED_IN_A_ROW = 20  # calls; then it is the server, not the replies


class Stage(NamedTuple):
    """A model behind a server; timeout in seconds without a byte."""

    provider: str
    model: str
    base_url: str
    temperature: float
    max_tokens: int
    timeout: float

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.model}"


PUBLISHED = {  # arXiv:2412.03343; models get retired, so their names are flags
    1: Stage("together", "meta-llama/Llama-3-70b-chat-hf", api.PROVIDERS["together"][0], 0.1, 512, 50.0),
    2: Stage("openai", "gpt-4o", api.PROVIDERS["openai"][0], 0.0, 1024, 100.0),
}
SAMPLING = {"together": {"top_p": 0.95, "extra_body": {"top_k": 50}}, "openai": {}}  # as published


def parse_stage(number: int, spec: str | None = None, base_url: str | None = None, temperature: float | None = None,
                max_tokens: int | None = None, timeout: float | None = None) -> Stage:
    """Stage 1 or 2 from PROVIDER:MODEL and settings; what is None is as published."""
    published = PUBLISHED[number]
    spec = published.name if spec is None else spec
    provider, _, model = spec.partition(":")
    if provider not in api.PROVIDERS or not model.strip():
        fail(USAGE, f'judge "{spec}" is not PROVIDER:MODEL',
                  f"such as {published.name}; providers: {', '.join(api.PROVIDERS)} (openai: any compatible server)")
    given = {"temperature": temperature, "max_tokens": max_tokens, "timeout": timeout}
    return published._replace(
        provider=provider, model=model, base_url=api.normalise_url(base_url or api.PROVIDERS[provider][0]),
        **{name: value for name, value in given.items() if value is not None})


class Judgement(NamedTuple):
    """What one model said about one reply: score 1..10, or None and the reason why there is none.

    reason: parse, empty, truncated, filtered, timeout or http_error. text: the raw answer, or what went wrong.
    """

    score: int | None
    reason: str | None
    served_model: str
    text: str
    tokens: int = 0


class Verdict(NamedTuple):
    """The score of one reply, or None and the reason; a stage that was not asked is None."""

    score: float | None
    reason: str | None
    stage1: Judgement | None
    stage2: Judgement | None


POLICIES = ("published", "first", "second", "both", "mean")


def needs_second(policy: str, first: Judgement | None) -> bool:
    """Whether stage 2 is asked; as published, where stage 1 gave no rating or one below 6."""
    return policy in ("second", "both", "mean") or policy == "published" and (first.score is None or first.score < 6)


def decide(policy: str, first: Judgement | None, second: Judgement | None) -> Verdict:
    """Join two stages: published and second take the last one asked, both the lower score, mean the average.

    As published, stage 2 can only overturn a bad rating, never a good one, so its rate of incoherence is low
    by construction; `both` errs on the other side. A stage that was needed and gave no rating leaves the reply
    unscored.
    """
    asked = [judgement for judgement in (first, second) if judgement]
    if policy in ("published", "second"):
        asked = asked[-1:]
    reason = next((judgement.reason for judgement in asked if judgement.score is None), None)
    scores = [judgement.score for judgement in asked]
    score = None if reason else float(sum(scores) / len(scores) if policy == "mean" else min(scores))
    return Verdict(score, reason, first, second)


class Call(NamedTuple):
    """One call to make: its key in the log, the reply and the whole message."""

    key: str
    reply: str
    message: str


def plan_call(stage: Stage, row: dict, reply: str, repeat: int = 0) -> Call:
    """The key hashes all that an answer depends on; the nonce comes from the key, so a rerun asks the same.

    A reply cannot hold its own nonce, which is a hash of that reply.
    """
    draft = judge_prompt(row, reply, "")
    settings = [stage.temperature, stage.max_tokens, SAMPLING[stage.provider]]
    key = utils.sha256(json.dumps([stage.provider, stage.model, draft, settings, RUBRIC, repeat]))
    return Call(key, reply, judge_prompt(row, reply, key[:8]))


class APIJudge:
    """The two-stage judge. Constructing it reads keys and connects to nothing yet; dies without a key.

    stages: (first, second). log_file: JSONL, a line per judgement, appended as they come in; what it holds is
    not asked again, but for timeouts and HTTP errors. max_connections: calls at a time. timeout_total: seconds
    for a call with its repeats. repeat: the index of a repeated judging of the same replies.
    """

    def __init__(self, stages: list[Stage], policy: str, log_file: str | Path, max_connections: int = 16,
                 timeout_total: float = 600.0, key_file: str | None = None, repeat: int = 0):
        self.stages, self.policy, self.log_file = stages, policy, Path(log_file)
        self.max_connections, self.timeout_total, self.repeat = max_connections, timeout_total, repeat
        unused = {"first": 1, "second": 0}.get(policy)
        self.clients = [
            None if i == unused else api.connect(
                stage.base_url, stage.timeout, stage.provider, key_file,
                "export it, put it into a --key_file, or use --judge local, a proxy that needs none")
            for i, stage in enumerate(stages)]

    def describe(self) -> dict:
        """What a summary should say of this judge."""
        used = [stage for stage, client in zip(self.stages, self.clients, strict=True) if client]
        return {"name": "two-stage API judge", "policy": self.policy, "stages": [stage.name for stage in used],
                "base_urls": [stage.base_url for stage in used], "temperature": [stage.temperature for stage in used],
                "max_tokens": [stage.max_tokens for stage in used], "rubric": RUBRIC}

    def judge(self, items: list[tuple[dict, str]], progress: Callable = lambda results, **_: results) -> list[Verdict]:
        """A verdict for each (row, reply); equal items share one call. progress: such as tqdm.

        Leaves with 5 where a provider refuses, with 75 where one cannot be reached; the log keeps what came in.
        """
        calls = [[plan_call(stage, row, reply, self.repeat) for row, reply in items] for stage in self.stages]
        log = read_log(self.log_file, {call.key for stage_calls in calls for call in stage_calls})
        verdicts = [Verdict(None, None, None, None)] * len(items)
        for number, field in enumerate(("stage1", "stage2")):
            if number == 0 and self.policy == "second":
                continue
            asked = [i for i, verdict in enumerate(verdicts) if number == 0 or needs_second(self.policy, verdict.stage1)]
            self.ask_all(number, [calls[number][i] for i in asked], log, progress)
            for i in asked:
                verdicts[i] = verdicts[i]._replace(**{field: log[calls[number][i].key]})
        return [decide(self.policy, verdict.stage1, verdict.stage2) for verdict in verdicts]

    def ask_all(self, number: int, calls: list[Call], log: dict[str, Judgement], progress: Callable) -> None:
        """Ask one stage what the log does not hold yet; answers go into the log and its file."""
        stage, client = self.stages[number], self.clients[number]
        calls = list({call.key: call for call in calls}.values())
        todo = [call for call in calls if call.key not in log]
        if len(todo) < len(calls):
            info(f"{len(calls) - len(todo)} of {len(calls)} judgements of {stage.name} are in {self.log_file}")
        if not todo:
            return
        failed, answered = 0, 0  # in a row; at all
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        results = api.work(lambda call: ask(client, stage, call, self.timeout_total), todo, self.max_connections)
        try:
            for entry in progress(results, total=len(todo), desc=stage.name):
                utils.append_jsonl(self.log_file, [entry])
                log[entry["key"]] = to_judgement(entry)
                failed = failed + 1 if entry["reason"] in PASSING else 0
                answered += not failed
                if failed >= MAX_FAILED_IN_A_ROW and not (entry["lasting"] and answered):
                    raise api.Stopped(5 if entry["lasting"] else 75, f"{failed} calls failed in a row: {entry['text']}")
        except api.Stopped as stop:
            code, what = stop.args
            look = f"check {api.PROVIDERS[stage.provider][1]}, the judge's model and address; " if code == 5 else ""
            done = sum(call.key in log and log[call.key].reason not in PASSING for call in calls)
            fail(code, f"judge {stage.name} at {stage.base_url}: {what}; {done} of {len(calls)} are judged",
                      f"{look}the same command goes on from {self.log_file}")


PASSING = ("timeout", "http_error")  # reasons that say nothing about the reply; a later run asks again


def ask(client, stage: Stage, call: Call, timeout_total: float) -> dict:
    """One call with its repeats, as a line of the log."""
    waits: list[float] = []
    options = {"temperature": stage.temperature, **SAMPLING[stage.provider]}
    lasting = False
    try:
        answer = api.retrying(
            lambda: api.chat(client, stage.model, [{"role": "user", "content": call.message}], stage.max_tokens, **options),
            time.monotonic() + timeout_total, on_retry=lambda what, wait: waits.append(wait))
        reason = api.UNUSABLE.get(answer.finish_reason)
        score = None if reason else parse_rating(answer.text)
        reason = reason or (None if score else "parse")
        judgement = Judgement(score, reason, answer.served_model, answer.text, answer.tokens)
    except api.Failed as failed:
        what, passing = failed.args
        judgement, lasting = Judgement(None, api.kind(failed.__cause__), "", what), not passing
    return {"key": call.key, "judge": stage.name, "rubric": RUBRIC, "reply": call.reply, **judgement._asdict(),
            "retries": len(waits), "lasting": lasting}


def to_judgement(entry: dict) -> Judgement:
    return Judgement(*(entry[field] for field in Judgement._fields))


def read_log(path: Path, keys: set[str]) -> dict[str, Judgement]:
    """Finished judgements of a log by key, of `keys` alone. Other lines stay in the file and are counted, once."""
    utils.repair_tail(path)
    log, others, bad = {}, 0, 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        if not line.strip():
            continue
        try:
            entry = utils.parse_line(line.decode("utf-8"))
            judgement = to_judgement(entry)
            if not (judgement.score in RATINGS if judgement.reason is None else judgement.score is None):
                raise ValueError
            wanted = entry["key"] in keys
        except (ValueError, KeyError, TypeError):
            bad += 1
            continue
        if not wanted:
            others += 1
        elif judgement.reason not in PASSING:
            log[entry["key"]] = judgement
    if others:
        info(f"{path} holds {others} judgements of other replies, models, settings or rubrics; not reused")
    if bad:
        info(f"{path} holds {bad} lines that are no judgements; they are left there and asked for again")
    return log
