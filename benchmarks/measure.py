"""What the benchmarks share: time, peak memory, rows of a wanted length, and tables."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats`, with the GPU's work finished."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


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


def about_the_run() -> dict:
    return {"device": device_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def lengthen(rows: list[dict], index: int, length: int, replies: int, tokenizer) -> dict:
    """A row whose context has about `length` tokens, made of the turns of several rows, with n candidates."""
    turns, candidates = [], []
    for row in rows[index * 20:]:
        turns = row["context"].split("\n") + turns
        candidates += row["candidates"]
        if len(tokenizer("\n".join(turns))["input_ids"]) >= length and len(candidates) >= replies:
            break
    ids = tokenizer("\n".join(turns), add_special_tokens=False)["input_ids"]
    words = tokenizer.decode(ids[-length:])
    return {"context": words, "candidates": candidates[:replies]}


def table(title: str, header: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title)
    for name in header:
        view.add_column(name, justify="right" if name else "left")
    for line in lines:
        view.add_row(*line)
    Console(width=110).print(view)
