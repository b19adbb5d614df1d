"""What the benchmarks share: time, peak memory, rows of a wanted length, and tables."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats`, with the GPU's work finished."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    # kernels run on their own time: without this a call would end before its work does
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
        # freed blocks that malloc keeps would count as memory of the next measurement
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets VmHWM


def peak_gb() -> float:
    """Peak memory since reset_peak, in GB: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6


def device_name() -> str:
    """The GPU's name, or the number and name of the CPU's cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line for line in lines if line.startswith("model name")]
    return f"{len(models)} cores, {models[0].split(':')[1].strip()}"


def about_the_run() -> dict:
    """What figures of speed depend on beside the code."""
    return {"device": device_name(), "torch": torch.__version__,
            "threads": torch.get_num_threads()}


def lengthen(rows: list[dict], index: int, length: int, num_replies: int, tokenizer) -> dict:
    """A row whose context has about `length` tokens, with num_replies candidates.

    It is made of the turns of successive rows, so that a long context is still a dialogue.
    """
    turns, candidates = [], []
    for row in rows[index * 20 :]:  # 20 rows apart, so that no two of these contexts overlap
        turns = row["context"].split("\n") + turns
        candidates += row["candidates"]
        long_enough = len(tokenizer("\n".join(turns))["input_ids"]) >= length
        if long_enough and len(candidates) >= num_replies:
            break
    ids = tokenizer("\n".join(turns), add_special_tokens=False)["input_ids"]
    return {"context": tokenizer.decode(ids[-length:]), "candidates": candidates[:num_replies]}


def table(title: str, header: list[str], lines: list[list[str]]) -> None:
    """Print a table; numbers are aligned on the right."""
    view = Table(title=title)
    for name in header:
        view.add_column(name, justify="right" if name else "left")
    for line in lines:
        view.add_row(*line)
    Console(width=110).print(view)
