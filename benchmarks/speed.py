"""Speed, each figure against its own yardstick in the same run.

    python benchmarks/speed.py train
    python benchmarks/speed.py judge

train: prompt trees against padded rows, seconds and peak memory of a training step. The baseline is what the
published code does: every (number, reply) pair is a row with its own copy of the context, padded to the
longest, with the logits of all positions. Model, rows, loss and adapter are the same on both sides. flop_share
is the step's floating point operations per second over the rate at which the machine multiplies matrices of
this model's shapes.

judge: judgements per second through a server of this machine that takes 0.1 s for each, over the rate at which
connections that wait for nothing else would get them.

Prints tables, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import random
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, imports the toolkit

import torch  # noqa: E402

import judges  # noqa: E402
import trees  # noqa: E402
import utils  # noqa: E402
from methods import possibility  # noqa: E402

PUBLISHED_CONTEXT_WORDS = 75  # mean of the published training contexts
MAX_PADDED_TOKENS = 8000  # beyond, the logits of all positions of a small model alone need over 6 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "judge"])
    parser.add_argument("--model_name", default=utils.EMBEDDED)
    parser.add_argument("--train_file", default="data/train_dialogs_1k.jsonl")
    parser.add_argument("--steps", type=int, default=6, help="timed contexts of the main comparison (default: 6)")
    flags = parser.parse_args()
    result = judge_speed() if flags.what == "judge" else train_speed(flags)
    print(json.dumps(result | {"device": device_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}))


# ---- train --------------------------------------------------------------------------------------


def train_speed(flags) -> dict:
    torch.manual_seed(0)
    folder = utils.model_dir(flags.model_name)
    tokenizer = utils.load_tokenizer(folder)
    args = training_args(num_response_per_input=4)
    model = utils.add_lora(utils.load_model(folder), tokenizer, args).train()
    rows = sorted(utils.read_jsonl(flags.train_file),
                  key=lambda row: abs(utils.count_words(row["context"]) - PUBLISHED_CONTEXT_WORDS))
    result = compare(model, tokenizer, rows[: flags.steps], args)
    return result | {"growth": growth(model, tokenizer, rows)}


def training_args(num_response_per_input: int) -> argparse.Namespace:
    """The published peft recipe, with the adapter that Mistral gets, on query, key and value."""
    return argparse.Namespace(
        method="peft", num_response_per_input=num_response_per_input, max_pos_number=9, max_num_negatives_per_sample=60,
        ul_weight=0.5, no_ul=False, number=True, warmup_steps=-1, micro_step=0, max_length=4000, max_input_length=4000,
        attn_implementation="sdpa", load_in_4bit=False, gradient_checkpointing=False, lora_r=16, lora_alpha=32,
        lora_dropout=0.0, lora_target_modules=["q_proj", "k_proj", "v_proj"])


def step(model, forest: list[trees.Tree], args, padded: bool) -> float:
    """One forward and backward pass; returns the loss."""
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in trees.pack(forest).items()}
    logps = trees.score_rows(model, forest) if padded else trees.score(model, batch)
    loss, _ = possibility.loss_of(logps, batch, args)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def timed(model, forests, args, padded: bool, warm_up: bool = True) -> tuple[float, float, list[float]]:
    """Seconds per step, peak memory in GB and losses; to warm up, the first step is done twice."""
    if warm_up:
        step(model, forests[0], args, padded)
    reset_peak()
    start = time.perf_counter()
    losses = [step(model, forest, args, padded) for forest in forests]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(forests), peak_gb(), losses


def compare(model, tokenizer, rows, args) -> dict:
    """The main comparison: 4 replies + 12 negatives, one context a step."""
    forests = [[possibility.build_tree(row, tokenizer, args, random.Random(i))] for i, row in enumerate(rows)]
    rate = matrix_rate(model, num_tokens(forests[0]))
    tree_seconds, tree_gb, tree_losses = timed(model, forests, args, padded=False)
    padded_seconds, padded_gb, padded_losses = timed(model, forests, args, padded=True)
    worst = max(abs(a - b) / b for a, b in zip(tree_losses, padded_losses, strict=True))
    flops = sum(count_flops(model, forest, args) for forest in forests) / len(forests)
    tokens, padded_tokens = (sum(f(forest) for forest in forests) / len(forests) for f in (num_tokens, num_padded))
    result = {
        "ratio": round(padded_seconds / tree_seconds, 2), "flop_share": round(flops / tree_seconds / rate, 3),
        "tree_seconds": round(tree_seconds, 3), "padded_seconds": round(padded_seconds, 3),
        "tree_tokens": round(tokens), "padded_tokens": round(padded_tokens), "tree_peak_gb": round(tree_gb, 2),
        "padded_peak_gb": round(padded_gb, 2), "matrix_gflops": round(rate / 1e9), "loss_difference": worst,
    }
    table("4 replies + 12 negatives, one context a step", ["", "seconds a step", "tokens", "peak memory GB"], [
        ["prompt tree", f"{tree_seconds:.2f}", f"{tokens:.0f}", f"{tree_gb:.2f}"],
        ["padded rows", f"{padded_seconds:.2f}", f"{padded_tokens:.0f}", f"{padded_gb:.2f}"],
        ["ratio", f"{padded_seconds / tree_seconds:.1f}", f"{padded_tokens / tokens:.1f}", f"{padded_gb / tree_gb:.1f}"]])
    print(f"the tree reaches {flops / tree_seconds / 1e9:.0f} GFLOP/s, {100 * result['flop_share']:.0f} % of the "
          f"{rate / 1e9:.0f} that products of this model's shapes reach alone; losses agree to {worst:.0e}")
    return result


def growth(model, tokenizer, rows) -> list[dict]:
    """How a step grows with replies, context length and contexts per step, tree and padded."""
    cases = [("replies", n, n, 150, 1) for n in (2, 4, 8)]
    cases += [("context tokens", length, 4, length, 1) for length in (100, 200, 400, 800)]
    cases += [("contexts a step", count, 4, 150, count) for count in (1, 2, 4)]
    lines = []
    for what, value, replies, length, count in cases:
        args = training_args(replies)
        forest = [possibility.build_tree(lengthen(rows, i, length, replies, tokenizer), tokenizer, args, random.Random(i))
                  for i in range(count)]
        seconds, gb, _ = timed(model, [forest], args, padded=False)
        line = {"what": what, "value": value, "tokens": num_tokens(forest), "padded_tokens": num_padded(forest),
                "seconds": round(seconds, 2), "gb": round(gb, 2)}
        if num_padded(forest) <= MAX_PADDED_TOKENS:
            padded_seconds, padded_gb, _ = timed(model, [forest], args, padded=True, warm_up=False)
            line |= {"padded_seconds": round(padded_seconds, 2), "padded_gb": round(padded_gb, 2),
                     "ratio": round(padded_seconds / seconds, 1)}
        lines.append(line)
        print(f"\r{what} {value}: done", end="", file=sys.stderr)
    print(file=sys.stderr)
    columns = ["what", "value", "tokens", "padded_tokens", "seconds", "padded_seconds", "ratio", "gb", "padded_gb"]
    table("growth (otherwise 4 replies, 150 context tokens, 1 context a step)", columns,
          [[str(line.get(c, "too large")) for c in columns] for line in lines])
    return lines


def lengthen(rows: list[dict], index: int, length: int, replies: int, tokenizer) -> dict:
    """A row whose context has about `length` tokens, made of the turns of several rows, with n candidates."""
    turns, candidates = [], []
    for row in rows[index * 20:]:
        turns = row["context"].split("\n") + turns
        candidates += row["candidates"]
        if len(tokenizer("\n".join(turns))["input_ids"]) >= length and len(candidates) >= replies:
            break
    words = "\n".join(turns)
    while len(tokenizer(words)["input_ids"]) > length and " " in words:
        words = words.split(" ", 1)[1]
    return {"context": words, "candidates": candidates[:replies]}


def matrix_rate(model, tokens: int) -> float:
    """Floating point operations per second of one product with every weight matrix of the layers."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and min(m.weight.shape) > 64]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=w.device, dtype=w.dtype) for w in weights}
    best = float("inf")
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return sum(2 * tokens * w.numel() for w in weights) / best


def count_flops(model, forest, args) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(model, forest, args, padded=False)
    return counter.get_total_flops()


def num_tokens(forest) -> int:
    return sum(len(path[-1].input_ids) for tree in forest for path in trees.walk(tree.root))


def num_padded(forest) -> int:
    lengths = [len(row["input_ids"]) for tree in forest for row in trees.ordinary_rows(tree)]
    return max(lengths) * len(lengths)


# ---- judge --------------------------------------------------------------------------------------

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
        body = json.dumps({"model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def judge_speed() -> dict:
    """1,000 judgements at 16 connections, fewer at fewer, against a server in a process of its own."""
    server = SlowServer(("127.0.0.1", 0), Answerer)
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    try:
        lines = [judge_rate(connections, count, server.server_port) for connections, count in ((1, 60), (4, 250), (16, 1000))]
    finally:
        process.kill()
    table("judgements through a server that takes 0.1 s", ["connections", "judgements", "a second", "ideal", "share"],
          [[f"{v:g}" for v in line.values()] for line in lines])
    return {"share_of_ideal": lines[-1]["share"], "judgements": lines}


def judge_rate(connections: int, count: int, port: int) -> dict:
    """Judgements per second, with keys, parsing and a synced log line for each."""
    stages = [judges.parse_stage(number, "openai:m", f"http://127.0.0.1:{port}") for number in (1, 2)]
    items = [({"context": "Is a tomato a fruit?"}, f"Ask cook number {i}.") for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        judge = judges.APIJudge(stages, "first", Path(folder) / "log.jsonl", connections)
        judge.judge([({"context": "Who is there?"}, f"Visitor {i}.") for i in range(connections)])  # connects, imports
        judge.log_file = judge.log_file.with_name("timed.jsonl")
        start = time.perf_counter()
        verdicts = judge.judge(items)
        rate = count / (time.perf_counter() - start)
    assert all(verdict.score == 7 for verdict in verdicts)
    ideal = connections / ANSWER_SECONDS
    return {"connections": connections, "count": count, "rate": round(rate, 1), "ideal": ideal, "share": round(rate / ideal, 3)}


# ---- measuring ----------------------------------------------------------------------------------


def reset_peak() -> None:
    """Start a new peak of memory: hand freed memory back and clear the high-water mark."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Peak memory since reset_peak, in GB: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(models)} cores, {models[0].split(':')[1].strip()}"


def table(title: str, header: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title)
    for name in header:
        view.add_column(name, justify="right" if name else "left")
    for line in lines:
        view.add_row(*line)
    Console(width=110).print(view)


if __name__ == "__main__":
    main()
