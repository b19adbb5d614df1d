"""Judging through a server: judgements per second, as a share of what its connections could give.

The server runs on this machine, in a process of its own, and takes 0.1 s for each answer.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.measure import table
from scoring import judge_api

ANSWER_SECONDS = 0.1


class SlowServer(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class Answerer(BaseHTTPRequestHandler):
    """Rates everything 7 after ANSWER_SECONDS."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(ANSWER_SECONDS)
        message = {"role": "assistant", "content": "It fits.\nRating: 7"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = json.dumps({"model": "m", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def measure_judging() -> dict:
    """1,000 judgements at 16 connections, fewer at fewer, against a server in another process."""
    server = SlowServer(("127.0.0.1", 0), Answerer)
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    try:
        lines = [judge_rate(connections, count, server.server_port)
                 for connections, count in ((1, 60), (4, 250), (16, 1000))]
    finally:
        process.kill()
    table("judgements through a server that takes 0.1 s",
          ["connections", "judgements", "a second", "ideal", "share"],
          [[f"{value:g}" for value in line.values()] for line in lines])
    return {"share_of_ideal": lines[-1]["share"], "judgements": lines}


def judge_rate(connections: int, count: int, port: int) -> dict:
    """Judgements per second, with keys, parsing and a synced log line for each."""
    stages = [judge_api.parse_stage(number, "openai:m", f"http://127.0.0.1:{port}")
              for number in (1, 2)]
    items = [({"context": "Is a tomato a fruit?"}, f"Ask cook number {i}.") for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        judge = judge_api.APIJudge(stages, "first", Path(folder) / "log.jsonl", connections)
        # opens the connections and imports what a first call needs
        judge.judge([({"context": "Who is there?"}, f"Visitor {i}.") for i in range(connections)])
        judge.log_file = judge.log_file.with_name("timed.jsonl")
        start = time.perf_counter()
        verdicts = judge.judge(items)
        rate = count / (time.perf_counter() - start)
    assert all(verdict.score == 7 for verdict in verdicts)
    ideal = connections / ANSWER_SECONDS
    return {"connections": connections, "count": count, "rate": round(rate, 1), "ideal": ideal,
            "share": round(rate / ideal, 3)}
