"""Talk to a model's server: one reading of answers and errors, one layer of retries, threads.

    client = providers.connect("openai", "http://127.0.0.1:8000")
    [reply] = api.retrying(lambda: api.complete(client, "NAME", messages, 256), deadline)

One tool generates the packages of openai and together, so they look alike; this module knows where
they differ. The rest of the toolkit asks an engine (decoding/engines.py).
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import mktime_tz, parsedate_tz
from itertools import count

from decoding.providers import hide_keys, redact
from decoding.replies import Reply
from utils import REFUSED, TRY_LATER

# A server that is down is waited for until the deadline; one that answers badly is not.
MAX_BAD_ANSWERS = 5  # tries of a call that is answered badly; it may be the call's own fault
UNUSABLE = {"length": "truncated", "content_filter": "filtered"}  # finish reasons
# Repeating cannot help here, and every other call would meet the same.
REFUSALS = {401: "key refused", 402: "payment required", 403: "access denied",
            404: "no such model or address"}


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
    # The first text decides: a call of which only later texts are empty keeps the others.
    if not isinstance(text, str) or not text.strip():
        kind = UNUSABLE.get(reason, "empty")
        raise BadResponse(f"an empty answer (finish_reason {reason})", kind)
    served_model = str(getattr(answer, "model", None) or "")
    total = getattr(answer.usage, "total_tokens", 0) or 0
    # Servers count the tokens of all n texts together.
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
        # OpenAI reports a used-up quota as 429, which otherwise means to wait a little.
        if status in REFUSALS or "insufficient_quota" in (body.get("code"), body.get("type")):
            refusal = REFUSALS.get(status, "the quota is used up")
            return "stop", f"HTTP {status}, {refusal}: {message}", 0.0
        # 408 is a timeout, and 409 a conflict with another request: the SDKs repeat both, too.
        again = status in (408, 409) or status >= 500
        action = "wait" if status == 429 else "again" if again else "fail"
        return action, f"HTTP {status}: {message}", retry_after(error.response.headers)
    if isinstance(error, (openai.APIConnectionError, together.APIConnectionError)):
        cause = type(error.__cause__).__name__
        # No connection: the call was not sent, so waiting costs nothing until the deadline. A
        # connection that broke later may be the call's own fault.
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
            # Python deletes `error` at the end of its except block.
            cause = error
        bad += action == "again"
        if action == "stop":
            raise RunStopped(REFUSED, what) from cause
        # Full jitter: threads that failed together do not all come back at once. The
        # limit of 30 keeps 2.0 ** tries from overflowing.
        wait = max(asked, random.uniform(0, min(max_backoff, 2.0 ** min(tries, 30))))
        # A call that would only begin after the deadline is given up before the wait.
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
                # Without an error there is no hurry: None waits as long as the calls take.
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
