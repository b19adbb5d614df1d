"""What all rooms share: errors and exit codes, JSONL, whole files and folders, hashes, versions."""

from __future__ import annotations

# Only the standard library, so that --help and a bad flag are answered in half a second.
import errno
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent
EMBEDDED = "smollm2"  # the model that comes with the requirements, wherever a model is named
MAX_SHOWN_ERRORS = 20

# Exit codes. 0 is done; 130, 141 and 143 are 128 + a signal, after which the work is saved.
BUG = 1  # ours
USAGE = 2  # bad flag, config or data
MISSING = 3  # something missing in the environment: package, model, key, GPU, network
UNSCORED = 4  # more rows without a score than --fail_on_error allows
REFUSED = 5  # a provider refused: key, quota, retired model
DIVERGED = 6  # training
TRY_LATER = 75  # stopped for an outside reason, --resume can go on


def fail(code: int, what: str, hint: str = "") -> None:
    """Stop with an exit code, one line that says where and what, and the way out."""
    print(f"error: {what}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    raise SystemExit(code)


def info(text: str) -> None:
    """Tell the user something that is not a result (on stderr, results go to stdout)."""
    print(f"note: {text}", file=sys.stderr)


def warn(text: str) -> None:
    """Tell the user that something may not be as it was meant."""
    print(f"warning: {text}", file=sys.stderr)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the memory of the GPU or the CPU is full."""
    marks = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    has_mark = any(mark in str(error) for mark in marks)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and has_mark)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that the disk or the quota is full."""
    codes = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    # torch and safetensors raise types of their own, without errno.
    marks = ("No space left", "File too large", "file write failed", "os error 28", "os error 27")
    has_mark = any(mark in str(error) for mark in marks)
    return has_mark or (isinstance(error, OSError) and error.errno in codes)


def run(main: Callable[[], None]) -> None:
    """Run a script's main; an exception that escapes it ends the process with one of the codes."""
    try:
        main()
        sys.stdout.flush()  # a closed pipe shows here, not when Python exits
    except KeyboardInterrupt:
        info("stopped by Ctrl-C; finished work is kept, the same command with --resume goes on")
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if is_disk_full(error):
            free = shutil.disk_usage(".").free / 1e6
            fail(TRY_LATER, f"disk full: {error} ({free:.0f} MB free)", "make room, then --resume")
        log = Path("error.log")
        log.write_text(traceback.format_exc(), encoding="utf-8")
        hint = f"this is a bug of ours; traceback in {log.resolve()}"
        fail(BUG, f"{type(error).__name__}: {error}", hint)


def parse_line(text: str) -> dict:
    """Parse one JSON object strictly: no duplicate keys, no NaN, no half surrogates."""
    row = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    try:
        # json reads half a surrogate pair, but no file and no tokenizer takes one later.
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair (a broken \\ud8xx escape)") from None
    return row


def unique_keys(items: list[tuple[str, object]]) -> dict:
    """A JSON object without duplicate keys; json itself would keep the last of two."""
    row = dict(items)
    if len(row) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'key "{twice}" stands twice in one object')
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_jsonl(path: str | Path, check: Callable = lambda row: None) -> list[dict]:
    """Read and check a JSONL file; all lines are read before the first error stops the run.

    check(row) returns what is wrong with a row, or None. Up to 20 errors are shown, by
    file:line:column. A byte order mark, blank lines and one JSON array as a file are accepted.
    """
    rows, errors = [], []
    for number, raw in enumerate(_lines_of(Path(path)), 1):
        if not raw.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = parse_line(raw.decode("utf-8"))
            problem = check(row)
        except UnicodeDecodeError as error:
            byte, column = raw[error.start], error.start + 1
            problem = f"not UTF-8 (byte 0x{byte:02x} at column {column}); iconv converts it"
        except json.JSONDecodeError as error:
            place += f":{error.colno}"
            problem = f"not JSON: {error.msg}"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            shown = raw[:120].decode("utf-8", "replace")
            errors.append(f"{place}: {problem}\n  row: {shown}")
        else:
            rows.append(row)
    if errors:
        # The first error comes last, where a user looks: it often explains the others.
        for text in errors[1:MAX_SHOWN_ERRORS]:
            print(f"error: {text}", file=sys.stderr)
        hidden = len(errors) - MAX_SHOWN_ERRORS
        count = f"{len(errors)}; and {hidden} more" if hidden > 0 else f"{len(errors)}"
        fail(USAGE, f"{errors[0]}\nbad rows in {path}: {count}", "correct or delete these rows")
    if not rows:
        fail(USAGE, f"{path}: no rows", "one JSON object a line")
    return rows


def _lines_of(path: Path) -> list[bytes]:
    """The lines of a JSONL file; the items of a single array count as lines."""
    if not path.is_file():
        fail(USAGE, f"{path} is {'a folder' if path.is_dir() else 'not there'}", "give JSONL")
    if path.suffix in (".gz", ".parquet", ".csv", ".tsv", ".zip", ".pkl"):
        hint = "convert it to JSONL: one JSON object a line, UTF-8"
        fail(USAGE, f"{path}: {path.suffix} files are not read", hint)
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        fail(USAGE, f"{path}: UTF-16, not UTF-8", f"iconv -f UTF-16 -t UTF-8 {path} > new.jsonl")
    data = data.removeprefix(b"\xef\xbb\xbf")
    items = one_array(data)
    if items is None:
        return data.split(b"\n")  # never splitlines(): U+2028 may stand inside a JSON string
    info(f"{path} is one JSON array; its {len(items)} items are read as rows")
    return [json.dumps(item).encode() for item in items]


def one_array(data: bytes) -> list | None:
    """The items of a file that is a single JSON array of objects, else None."""
    if not data.lstrip().startswith(b"["):
        return None
    try:
        items = json.loads(data, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return None
    return items if items and all(isinstance(item, dict) for item in items) else None


def check_row(row: dict, candidates: bool = True) -> str | None:
    """What is wrong with a data row, or None.

    A row has `context` (a turn a line, the last one by Person A) or `prompt`, and `candidates`.
    """
    kinds = [key for key in ("context", "prompt") if key in row]
    if len(kinds) != 1:
        return f'needs either "context" or "prompt", has {kinds or sorted(row)[:5]}'
    text = row[kinds[0]]
    if not isinstance(text, str):
        return f'field "{kinds[0]}" must be a string, got {type(text).__name__}'
    if not text.strip():
        return f'field "{kinds[0]}" is empty'
    if not candidates and "candidates" not in row:
        return None
    replies = row.get("candidates")
    if not isinstance(replies, list) or not all(isinstance(r, str) for r in replies):
        return f'field "candidates" must be a list of strings, got {json.dumps(replies)[:60]}'
    if candidates and not replies:
        return 'field "candidates" is empty'
    if any(not r.strip() for r in replies):
        return f'candidate {[not r.strip() for r in replies].index(True) + 1} is empty'
    return None


def text_of(row: dict) -> str:
    """What a row asks: its prompt or its context; "" for a row without either."""
    return row.get("prompt") or row.get("context") or ""


def normalise(text: str) -> str:
    """Text for comparisons: lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.casefold().split()).strip(" .!?,;:'\"")


def atomic_write(path: str | Path, text: str) -> None:
    """Write a whole file or none: a temporary file in the same folder, synced, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # rename needs one file system
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def repair_tail(path: str | Path) -> None:
    """Make a JSONL file end in a whole line; a fragment of a row goes to FILE.torn."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return
    kept, _, tail = data.rpartition(b"\n")
    try:
        # Rows are objects, so a fragment of one never parses; a whole one only lacks its newline.
        json.loads(tail.decode("utf-8"))
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:  # also a cut inside a UTF-8 character
        path.with_name(path.name + ".torn").write_bytes(tail)
        with open(path, "r+b") as file:
            file.truncate(len(kept) + 1 if kept else 0)
        info(f"{path} ended in half a row; the fragment is kept in {path.name}.torn")


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Append rows, flushed and synced before it returns; NaN is refused, not written."""
    # All text is made before the file is opened, so a NaN in the last row leaves nothing behind.
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open(path, "ab") as file:
        file.write(lines.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def row_hash(row: dict) -> str:
    """12 hex digits of a row's normalised context, prompt or text, to compare data sets."""
    texts = [row[key] for key in ("context", "prompt", "text") if key in row]
    return sha256(normalise(texts[0] if texts else ""))[:12]


def row_seed(seed: int, index: int, turn: int = 0) -> int:
    """The seed of a row and a turn of asking, whatever other rows are decoded with it."""
    # 15 hex digits are 60 bits, which fit into the signed 64 that generators take.
    return int(sha256(f"{seed}-{index}" + (f"-{turn}" if turn else ""))[:15], 16)


def seal(staging: Path, final: Path) -> None:
    """Turn a staged folder into a complete one: sync, mark with COMPLETE.json last, rename."""
    sizes = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(staging))] = path.stat().st_size
    atomic_write(staging / "COMPLETE.json", json.dumps({"files": sizes}, indent=1))
    os.replace(staging, final)
    _sync_folder(final.parent)


def missing_files(folder: Path) -> list[str]:
    """The files that a checkpoint lacks, or that have another size than when it was sealed."""
    marker = folder / "COMPLETE.json"
    if not marker.is_file():
        return ["COMPLETE.json"]
    try:
        sizes = json.loads(marker.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return ["a readable COMPLETE.json"]
    # Sizes find what a kill has cut. Hashes of gigabytes would make every resume wait.
    files = [p for p in folder.rglob("*") if p.is_file()]
    present = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    return [name for name, size in sizes.items() if present.get(name) != size]


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The check_N folders of a run, newest first, whole or not."""
    folders = [p for p in run_dir.glob("check_*") if p.name[6:].isdecimal()]
    return sorted(folders, key=lambda p: int(p.name[6:]), reverse=True)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole check_N of a run; incomplete ones are named and skipped, never deleted."""
    for folder in checkpoints_in(run_dir):
        missing = missing_files(folder)
        if not missing:
            return folder
        warn(f"skipping {folder}: incomplete (no {', '.join(missing[:3])})")
    return None


def read_run(name: str | None) -> dict:
    """run.json of a checkpoint folder; for any other model name, that of an untrained base."""
    return _read_object(Path(name or "") / "run.json") or {"method": "base", "args": {}}


def made_by(outs_file: str | Path) -> dict:
    """outs/X.json, which says how outs/X.jsonl was made; {} where it is not there."""
    return _read_object(Path(outs_file).with_suffix(".json"))


def _read_object(path: Path) -> dict:
    """A file with one JSON object; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(USAGE, f"{path} is not JSON: {error}", "restore it, or make it again")


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
