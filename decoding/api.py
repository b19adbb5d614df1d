"""Talk to a model's server: one grammar of names, one reading of errors, one layer of retries.

    client = api.connect("openai", "http://127.0.0.1:8000")
    [reply] = api.retrying(lambda: api.complete(client, "NAME", messages, 256), deadline)

Provider together is asked through its own package, every other server through openai's. One tool
generates both, so they look alike; this module knows where they differ. They are imported where
they are used, since --help should not wait. The rest of the toolkit asks decoding/engines.py.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import mktime_tz, parsedate_tz
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from decoding.replies import Reply
from utils import MISSING, REFUSED, TRY_LATER, USAGE, fail

MAX_BAD_ANSWERS = 5  # tries of a call that is answered badly; it may be the call's own fault
PROVIDERS = {  # the address of each one, and what its key is called
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "together": ("https://api.together.xyz/v1", "TOGETHER_API_KEY")}
LOCAL = "hf"  # the provider of models on this machine
UNUSABLE = {"length": "truncated", "content_filter": "filtered"}  # finish reasons
MIN_KEY = 8  # characters; shorter "keys" such as none and EMPTY are common words and no secrets
REFUSALS = {401: "key refused", 402: "payment required", 403: "access denied",
            404: "no such model or address"}
_KEYS_READ: set[str] = set()  # for redact


class CallFailed(Exception):
    """One call has no answer, others may get one.

    what: what happened. transient: whether the same call may work later. kind: what it is counted
    as, one of empty, truncated, filtered, timeout and http_error.
    """

    def __init__(self, what: str, transient: bool, kind: str = "http_error"):
        super().__init__(what)
        self.what, self.transient, self.kind = what, transient, kind


class RunStopped(Exception):
    """No call can work now. code: REFUSED (by the provider) or TRY_LATER. what: what happened."""

    def __init__(self, code: int, what: str):
        super().__init__(what)
        self.code, self.what = code, what


class BadResponse(Exception):
    """A 200 without a text. what: what it holds instead. kind: as of CallFailed."""

    def __init__(self, what: str, kind: str):
        super().__init__(what)
        self.what, self.kind = what, kind


# ---- names, addresses and keys ------------------------------------------------------------------


class Spec(NamedTuple):
    """A model and who runs it: hf (this machine), openai (any compatible server) or together."""

    provider: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.model}"


def parse_spec(text: str, flag: str = "--model",
               providers: Sequence[str] = (LOCAL, *PROVIDERS)) -> Spec:
    """Read PROVIDER:MODEL, such as hf:smollm2 or openai:gpt-4o; fails over other texts.

    flag: named in the message. providers: those that this flag takes.
    """
    provider, _, model = text.partition(":")
    if provider not in providers or not model.strip():
        known = ", ".join(f"{name}:MODEL" for name in providers)
        fail(USAGE, f'{flag} "{text}" is not PROVIDER:MODEL', f"one of {known} "
             "(hf: on this machine; openai: any compatible server, named by its address)")
    return Spec(provider, model)


def normalise_url(url: str) -> str:
    """The address as the SDKs want it: with a version, without a slash or end point at its end."""
    try:
        parts = urlsplit(url.strip())
        plain = (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
                 and not parts.query)
    except ValueError:  # a port that is not a number, half of an IPv6 address
        plain = False
    if not plain or "@" in url:
        fail(USAGE, f"--base_url {redact(url)} is not a plain address",
             "such as http://127.0.0.1:8000/v1, without a password")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    version = "" if re.search(r"/v[0-9]", path) else "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}{version}"


def read_key(name: str, key_file: str | Path | None = None) -> str:
    """The key `name` from a key file (lines NAME=KEY) or else the environment, or "".

    Only the file's owner may be able to read it.
    """
    key = ""
    if key_file:
        path = Path(key_file)
        if not path.is_file():
            fail(USAGE, f"--key_file {path} is not a file",
                 f"write a line {name}=... into it, then chmod 600 {path}")
        if (mode := path.stat().st_mode & 0o777) & 0o077:
            fail(USAGE, f"--key_file {path} can be read by others (mode {mode:o})",
                 f"chmod 600 {path}")
        lines = [line.partition("=") for line in path.read_text(encoding="utf-8").splitlines()]
        key = {left.strip(): right.strip() for left, _, right in lines}.get(name, "")
    key = key or os.environ.get(name, "").strip()
    if not all("!" <= c <= "~" for c in key):  # the HTTP library would quote it in its error
        fail(USAGE, f"{name} holds a space, a line break or a sign beyond ASCII", "only the key")
    _KEYS_READ.add(key)
    return key


def connect(provider: str, base_url: str | None = None, timeout: float = 120.0,
            key_file: str | Path | None = None,
            way_out: str = "export it, or name a local server with --base_url"):
    """An SDK client with the provider's key, if there is one. Nothing is sent yet.

    base_url: the provider's own if None; only that one needs a key, and way_out is the hint where
    there is none. timeout: seconds without a byte from the server.
    """
    provider_url, key_name = PROVIDERS[provider]
    base_url = normalise_url(base_url or provider_url)
    key = read_key(key_name, key_file)
    if not key and urlsplit(base_url).hostname == urlsplit(provider_url).hostname:
        fail(MISSING, f"{key_name} is not set", way_out)
    if provider == "together":
        from together import Timeout
        from together import Together as Client

        base_url = base_url.removesuffix("/v1")  # this package puts the version into every path
    else:
        import together  # noqa: F401  before threads: openai breaks on its half-imported httpx
        from openai import OpenAI as Client
        from openai import Timeout
    return Client(base_url=base_url, api_key=key or "none",
                  max_retries=0,  # the SDK's own retries would multiply with ours
                  timeout=Timeout(timeout, connect=min(timeout, 10)))


def redact(text: str) -> str:
    """Text without keys, passwords, and what looks like one; servers echo what they were sent."""
    text = hide_keys(text)
    pattern = (r"\bsk-[\w-]{6,}|\btgp_v1_[\w-]+|\b[0-9a-f]{40,}\b|(?<=Bearer )\S+"
               r"|(?<=://)[^/\s@]+(?=@)")
    return re.sub(pattern, "[key]", text)


def hide_keys(text: str) -> str:
    """Text without the keys of this run, and else unchanged: for replies, which are data."""
    for key in _KEYS_READ | {os.environ.get(name, "").strip() for _, name in PROVIDERS.values()}:
        if len(key) >= MIN_KEY:
            text = text.replace(key, "[key]")
    return text


# ---- one call -----------------------------------------------------------------------------------


def complete(client, model: str, messages: list[dict], max_tokens: int, **fields) -> list[Reply]:
    """The texts of one chat completion: n of them where fields has n and the server honours it.

    fields: further fields of the request, such as temperature. Raises the SDK's errors, and
    BadResponse where a 200 holds no text. Empty texts beside others are left out.
    """
    # OpenAI's newer models refuse the name max_tokens, and many compatible servers know no other
    is_openai = client.base_url.host.endswith(("openai.com", "azure.com"))
    fields["max_completion_tokens" if is_openai else "max_tokens"] = max_tokens
    answer = client.chat.completions.create(model=model, messages=messages, **fields)
    try:  # the SDKs do not check a body's form: it may be any JSON, or a string
        texts = [(choice.message.content, str(choice.finish_reason)) for choice in answer.choices]
        text, reason = texts[0]
    except (AttributeError, TypeError, LookupError):
        shown = redact(str(getattr(answer, "error", answer)))[:100]
        raise BadResponse(f"a body without choices: {shown}", "http_error") from None
    if not isinstance(text, str) or not text.strip():
        kind = UNUSABLE.get(reason, "empty")
        raise BadResponse(f"an empty answer (finish_reason {reason})", kind)
    served_model = str(getattr(answer, "model", None) or "")
    total = getattr(answer.usage, "total_tokens", 0) or 0
    new = (getattr(answer.usage, "completion_tokens", 0) or 0) // len(texts)
    return [Reply(hide_keys(text), new, reason == "length", reason, served_model, total)
            for text, reason in texts if isinstance(text, str) and text.strip()]


def classify(error: Exception) -> tuple[str, str, float]:
    """What to do about an error of `complete`, what happened, and the seconds to wait or 0.

    To do: "stop" the run, "fail" this call, "wait" until the deadline, or try "again" a few times.
    The seconds are what the server asks for. Errors that are not the server's are raised again.
    """
    import openai
    import together

    if isinstance(error, (openai.APIStatusError, together.APIStatusError)):
        status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
        if isinstance(body.get("error"), dict):  # openai unwraps the body, together does not
            body = body["error"]
        message = redact(" ".join(str(body.get("message") or error.message).split()))[:200]
        if status in REFUSALS or "insufficient_quota" in (body.get("code"), body.get("type")):
            refusal = REFUSALS.get(status, "the quota is used up")
            return "stop", f"HTTP {status}, {refusal}: {message}", 0.0
        again = status in (408, 409) or status >= 500
        action = "wait" if status == 429 else "again" if again else "fail"
        return action, f"HTTP {status}: {message}", retry_after(error.response.headers)
    if isinstance(error, (openai.APIConnectionError, together.APIConnectionError)):
        cause = type(error.__cause__).__name__
        unreachable = cause in ("ConnectError", "ConnectTimeout", "ProxyError")
        return "wait" if unreachable else "again", redact(f"{cause}: {error.__cause__}")[:200], 0.0
    if isinstance(error, (BadResponse, json.JSONDecodeError, UnicodeDecodeError)):
        return "again", f"{type(error).__name__}: {error}"[:200], 0.0
    raise error


def kind_of(error: Exception) -> str:
    """What an error that `classify` knows is counted as: see CallFailed."""
    import openai
    import together

    if isinstance(error, BadResponse):
        return error.kind
    timeouts = (openai.APITimeoutError, together.APITimeoutError)
    return "timeout" if isinstance(error, timeouts) else "http_error"


def retry_after(headers) -> float:
    """Seconds from a Retry-After header, a number or a date; 0 if there is none to read."""
    date = parsedate_tz(headers.get("retry-after", ""))
    try:
        return max(0.0, mktime_tz(date) - time.time() if date
                   else float(headers.get("retry-after", 0)))
    except (ValueError, OverflowError):
        return 0.0


def retrying(call: Callable, deadline: float, max_backoff: float = 60.0,
             on_retry: Callable[[str, float], None] = lambda what, wait: None):
    """call()'s result, tried again after errors that may pass, with full jitter over 1, 2, 4 ... s.

    deadline: a time.monotonic() value. max_backoff: seconds. on_retry: told what went wrong and the
    seconds until the next try. Raises RunStopped where the provider refuses, and where the server
    cannot be reached, or asks to wait, beyond the deadline; CallFailed where it answers badly,
    MAX_BAD_ANSWERS times or beyond the deadline.

    The SDKs retry, too, and so does tenacity: neither has our deadline over all tries together,
    takes keys out of messages, or says what kind of fault was counted.
    """
    bad = 0
    for tries in count():
        try:
            return call()
        except Exception as error:
            action, what, asked = classify(error)
            cause = error
        bad += action == "again"
        if action == "stop":
            raise RunStopped(REFUSED, what) from cause
        wait = max(asked, random.uniform(0, min(max_backoff, 2.0 ** min(tries, 30))))
        late = time.monotonic() + wait > deadline
        if action == "fail" or bad >= MAX_BAD_ANSWERS or late and action == "again" and not asked:
            raise CallFailed(what, action == "again", kind_of(cause)) from cause
        if late:
            what += f" (asks to wait {asked:.0f} s)" if asked else ""
            raise RunStopped(TRY_LATER, what) from cause
        on_retry(what, wait)
        time.sleep(wait)


# ---- many calls ---------------------------------------------------------------------------------


def work(call: Callable, items: list, num_threads: int, grace: float = 2.0) -> Iterator:
    """call(item) of every item, in the order in which they finish, on num_threads threads.

    The first error, or Ctrl-C, starts no more items; what is in flight has `grace` seconds to
    finish and is yielded or dropped; then the error is raised. One thread is the caller's own:
    torch crashes at exit when a daemon thread is cut off in the middle of its work.

    concurrent.futures waits for its threads before Python may exit, so one hanging server would
    hold Ctrl-C for minutes; these threads are daemons, which is what `grace` needs.
    """
    if num_threads == 1:
        yield from map(call, items)
        return
    tasks, results = queue.SimpleQueue(), queue.SimpleQueue()
    for item in items:
        tasks.put(item)

    def take() -> Iterator:
        while True:
            try:
                yield tasks.get_nowait()
            except queue.Empty:
                return

    def worker() -> None:
        error = None
        try:
            for item in take():
                results.put((True, call(item)))
        except BaseException as stop:  # also SystemExit; the caller's thread raises it
            error = stop
        results.put((False, error))

    running, error, end = num_threads, None, 0.0
    for _ in range(num_threads):
        threading.Thread(target=worker, daemon=True).start()
    try:
        while running:
            try:
                left = max(0.0, end - time.monotonic()) if error else None
                finished, value = results.get(timeout=left)
            except queue.Empty:
                break
            except KeyboardInterrupt as stop:
                finished, value, running = False, stop, running + 1  # no worker has ended
            if finished:
                yield value
                continue
            running -= 1
            if value and not error:
                error, end = value, time.monotonic() + grace
                list(take())  # no worker starts another item
    finally:
        list(take())
    if error:
        raise error
