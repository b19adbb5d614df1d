"""The published judge: two language models behind servers, which rate every reply from 1 to 10.

Each is asked for a short assessment and a rating; a reply is incoherent at 5 or below
(arXiv:2412.03343). Answers go into a log as they come in, and what the log holds is not asked
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import utils
from decoding import api, providers
from decoding.engines import Asked, Server
from scoring.judge_prompt import RATINGS, judge_prompt, parse_rating
from utils import REFUSED, fail, info

RUBRIC = 1  # raise it when the question or the reading of ratings changes: older logs are void then


class Stage(NamedTuple):
    """A model behind a server. timeout: seconds without a byte."""

    provider: str
    model: str
    base_url: str
    temperature: float
    max_tokens: int
    timeout: float

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.model}"


PUBLISHED = {  # arXiv:2412.03343; providers retire models, so their names are flags
    1: Stage("together", "meta-llama/Llama-3-70b-chat-hf", providers.PROVIDERS["together"][0],
             0.1, 512, 50.0),
    2: Stage("openai", "gpt-4o", providers.PROVIDERS["openai"][0], 0.0, 1024, 100.0),
}
# As published. Keys of the log are hashes over these values, so their form must stay.
SAMPLING = {"together": {"top_p": 0.95, "extra_body": {"top_k": 50}}, "openai": {}}


def parse_stage(number: int, spec: str | None = None, base_url: str | None = None,
                temperature: float | None = None, max_tokens: int | None = None,
                timeout: float | None = None) -> Stage:
    """Stage 1 or 2 from PROVIDER:MODEL and settings; what is None is as published."""
    published = PUBLISHED[number]
    named = published.name if spec is None else spec
    provider, model = providers.parse_spec(named, f"--judge{number}", tuple(providers.PROVIDERS))
    given = {"temperature": temperature, "max_tokens": max_tokens, "timeout": timeout}
    return published._replace(
        provider=provider, model=model,
        base_url=providers.normalise_url(base_url or providers.PROVIDERS[provider][0]),
        **{name: value for name, value in given.items() if value is not None})


class Judgement(NamedTuple):
    """What one model says about one reply: score 1..10, or None and the reason for it.

    reason: parse, empty, truncated, filtered, timeout or http_error. text: the raw answer, or what
    went wrong.
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


# ---- two stages ---------------------------------------------------------------------------------


def needs_second(policy: str, first: Judgement | None) -> bool:
    """Whether stage 2 is asked; as published, where stage 1 gave no rating or one below 6."""
    return policy in ("second", "both", "mean") or (
        policy == "published" and (first.score is None or first.score < 6))


def decide(policy: str, first: Judgement | None, second: Judgement | None) -> Verdict:
    """The verdict of two stages.

    published and second take the last one asked, both the lower score, mean the average.

    As published, stage 2 can only overturn a bad rating, never a good one, so its incoherence rate
    is low by construction; `both` errs on the other side. A stage that was needed and gave no
    rating leaves the reply unscored.
    """
    asked = [judgement for judgement in (first, second) if judgement]
    # Asked second, a model has the last word, whatever the first one said.
    if policy in ("published", "second"):
        asked = asked[-1:]
    reason = next((judgement.reason for judgement in asked if judgement.score is None), None)
    if reason:
        return Verdict(None, reason, first, second)
    scores = [judgement.score for judgement in asked]
    score = sum(scores) / len(scores) if policy == "mean" else min(scores)
    return Verdict(float(score), None, first, second)


# ---- asking -------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call to make: its key in the log, the reply, and the whole message."""

    key: str
    reply: str
    message: str


def plan_call(stage: Stage, row: dict, reply: str, repeat: int = 0) -> Call:
    """The call about one reply. The key hashes all that an answer depends on.

    The nonce comes from the key, so a rerun asks the same; and a reply cannot hold its own nonce,
    since that is a hash of the reply.
    """
    # Without a nonce, which is made from the key that is made from the draft.
    draft = judge_prompt(row, reply, "")
    settings = [stage.temperature, stage.max_tokens, SAMPLING[stage.provider]]
    key = utils.sha256(json.dumps([stage.provider, stage.model, draft, settings, RUBRIC, repeat]))
    return Call(key, reply, judge_prompt(row, reply, key[:8]))


class APIJudge:
    """The two-stage judge. Constructing it reads keys, and fails without one; nothing is sent yet.

    stages: (first, second). log_file: JSONL, a line per judgement, appended as they come in; what
    it holds is not asked again, except for timeouts and HTTP errors. max_connections: calls at a
    time. timeout_total: seconds for a call with its repeats. repeat: the index of a repeated
    judging of the same replies.
    """

    def __init__(self, stages: list[Stage], policy: str, log_file: str | Path,
                 max_connections: int = 16, timeout_total: float = 600.0,
                 key_file: str | None = None, repeat: int = 0):
        self.stages, self.policy, self.repeat = stages, policy, repeat
        self.log_file = Path(log_file)
        # A model that the policy never asks needs no key.
        unused = {"first": 1, "second": 0}.get(policy)
        way_out = "export it, put it into a --key_file, or use --judge local, a proxy without a key"
        self.engines = [
            None if i == unused else Server(
                providers.Spec(stage.provider, stage.model), stage.base_url, key_file,
                max_connections, stage.timeout, timeout_total, tolerant=True, way_out=way_out)
            for i, stage in enumerate(stages)]

    def describe(self) -> dict:
        """What a summary should say of this judge."""
        used = [stage for stage, engine in zip(self.stages, self.engines, strict=True) if engine]
        return {"name": "two-stage API judge", "policy": self.policy,
                "stages": [stage.name for stage in used],
                "base_urls": [stage.base_url for stage in used],
                "temperature": [stage.temperature for stage in used],
                "max_tokens": [stage.max_tokens for stage in used], "rubric": RUBRIC}

    def judge(self, items: list[tuple[dict, str]],
              progress: Callable[..., Iterable] = lambda results, **_: results) -> list[Verdict]:
        """A verdict for each (row, reply); equal items share one call. progress: such as tqdm.

        Exits with REFUSED where a provider refuses, with TRY_LATER where one cannot be reached; the
        log keeps what came in.
        """
        calls = [[plan_call(stage, row, reply, self.repeat) for row, reply in items]
                 for stage in self.stages]
        log = read_log(self.log_file, {call.key for of_stage in calls for call in of_stage})
        verdicts = [Verdict(None, None, None, None)] * len(items)
        # One stage after the other, since the first one's ratings decide what the second one is
        # asked.
        for number, field in enumerate(("stage1", "stage2")):
            # There is no engine for this stage.
            if number == 0 and self.policy == "second":
                continue
            asked = [i for i, verdict in enumerate(verdicts)
                     if number == 0 or needs_second(self.policy, verdict.stage1)]
            self._complete_log(number, [calls[number][i] for i in asked], log, progress)
            for i in asked:
                verdicts[i] = verdicts[i]._replace(**{field: log[calls[number][i].key]})
        return [decide(self.policy, verdict.stage1, verdict.stage2) for verdict in verdicts]

    def _complete_log(self, number: int, calls: list[Call], log: dict[str, Judgement],
                      progress: Callable[..., Iterable]) -> None:
        """Ask one stage what the log does not hold yet; answers go into the log and its file."""
        stage = self.stages[number]
        # The same reply from several systems has one key, and is paid for once.
        calls = list({call.key: call for call in calls}.values())
        todo = [call for call in calls if call.key not in log]
        if len(todo) < len(calls):
            info(f"{len(calls) - len(todo)} of {len(calls)} judgements of {stage.name} "
                 f"are in {self.log_file}")
        if not todo:
            return
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        # no seeds: not every server knows them, and a judge is not asked twice
        results = self.engines[number].ask(
            [call.message for call in todo], None, 1, stage.max_tokens, stage.temperature,
            **SAMPLING[stage.provider])
        try:
            for asked in progress(results, total=len(todo), desc=stage.name):
                # Answers come in any order. Each goes into the file before anything else: a kill
                # loses none.
                entry = _log_entry(stage, todo[asked.index], asked)
                utils.append_jsonl(self.log_file, [entry])
                log[entry["key"]] = _judgement_of(entry)
        except api.RunStopped as stop:
            done = sum(call.key in log and log[call.key].reason not in TRANSIENT for call in calls)
            key_name = providers.PROVIDERS[stage.provider][1]
            look = (f"check {key_name}, the judge's model and address; "
                    if stop.code == REFUSED else "")
            fail(stop.code, f"judge {stop.what}; {done} of {len(calls)} are judged",
                 f"{look}the same command goes on from {self.log_file}")


# ---- the log ------------------------------------------------------------------------------------

TRANSIENT = ("timeout", "http_error")  # reasons that are not the reply's: the next run asks again


def _log_entry(stage: Stage, call: Call, asked: Asked) -> dict:
    """What became of a call, as a line of the log."""
    if asked.failure:
        judgement = Judgement(None, asked.failure.kind, "", asked.failure.what)
    else:
        # One reply was asked for, and without a failure there is one.
        [reply] = asked.replies
        # an answer that is not complete may quote a rating and never come to its own
        reason = api.UNUSABLE.get(reply.finish_reason)
        score = None if reason else parse_rating(reply.text)
        judgement = Judgement(score, reason or (None if score else "parse"), reply.served_model,
                              reply.text, reply.total_tokens)
    lasting = asked.failure is not None and not asked.failure.transient
    return {"key": call.key, "judge": stage.name, "rubric": RUBRIC, "reply": call.reply,
            **judgement._asdict(), "retries": asked.retries, "lasting": lasting}


def _judgement_of(entry: dict) -> Judgement:
    return Judgement(*(entry[field] for field in Judgement._fields))


def read_log(path: Path, keys: set[str]) -> dict[str, Judgement]:
    """The finished judgements with these keys. Other lines stay in the file and are counted."""
    utils.repair_tail(path)
    log, others, bad = {}, 0, 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        if not line.strip():
            continue
        try:
            entry = utils.parse_line(line.decode("utf-8"))
            judgement, is_asked = _judgement_of(entry), entry["key"] in keys
        except (ValueError, KeyError, TypeError):
            bad += 1
            continue
        # A reason and a score exclude each other; a line that has both, or neither, is damaged.
        scored, unscored = judgement.score in RATINGS, judgement.score is None
        if not (scored if judgement.reason is None else unscored):
            bad += 1
        elif not is_asked:
            others += 1
        elif judgement.reason not in TRANSIENT:
            log[entry["key"]] = judgement
    if others:
        info(f"{path} holds {others} judgements of other replies, models, settings or rubrics; "
             "not reused")
    if bad:
        info(f"{path} holds {bad} lines that are no judgements; they are left there and asked for "
             "again")
    return log
