"""The published judge behind scripted servers: what its tests share."""

from __future__ import annotations

import json
import re

import pytest
import servers
from conftest import DIALOGUES
from servers import rated

from decoding import api
from scoring import judge_api

serve = servers.serve
KEYS = {"TOGETHER_API_KEY": "tgp_v1_not-a-real-key-7", "OPENAI_API_KEY": "sk-not-a-real-key-42"}
ITEMS = [(row, reply) for row in DIALOGUES for reply in row["candidates"]]  # 16


@pytest.fixture
def waits(monkeypatch):
    """Seconds that api.retrying would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(api.time, "sleep", slept.append)
    return slept


@pytest.fixture
def judge(tmp_path, monkeypatch, waits, capsys):
    """judge(items, server, server 2, policy=...): the verdicts or the exit code, and what was said.

    All calls share one log.
    """
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)

    def run(items, *stage_servers, policy="first", timeout=5.0, max_connections=1, repeat=0,
            model="judge-1"):
        urls = [server.url for server in stage_servers]
        stages = [judge_api.parse_stage(1, f"together:{model}", urls[0], timeout=timeout),
                  judge_api.parse_stage(2, "openai:judge-2", urls[-1], timeout=timeout)]
        try:
            done = judge_api.APIJudge(stages, policy, run.log_file, max_connections,
                                      repeat=repeat).judge(items)
        except SystemExit as stop:
            done = stop.code
        return done, capsys.readouterr().err

    run.log_file = tmp_path / "logs" / "judgements.jsonl"
    run.log = lambda: [json.loads(line) for line in run.log_file.read_text().splitlines()]
    return run


def reply_in(message: str) -> str:
    return re.search(r"\n([0-9a-f]{8})\n(.*)\n\1\n", message, re.DOTALL)[2]


def replies_to(server) -> list[str]:
    """The replies that a server was asked about, in order."""
    return [reply_in(body["messages"][0]["content"]) for _, _, body in server.seen]


def knows_references(rows: list[dict], good: int = 9, bad: int = 2):
    """A judge that answers right: references of the row that it is shown are good, all else is bad.

    It passes every control.
    """
    def rate(body: dict) -> tuple:
        message = body["messages"][0]["content"]
        # The last turn is what tells the rows of tests apart.
        row = next(row for row in rows
                   if (row.get("prompt") or row["context"].split("\n")[-1]) in message)
        known = row.get("candidates") or [row.get("response")]
        return rated(good if reply_in(message) in known else bad)

    return rate
