"""Talk to an OpenAI-compatible server: one form of address, one reading of errors, one layer of retries.

    client = api.connect("http://127.0.0.1:8000", timeout=120)
    text, served_model, finish_reason, tokens = api.retrying(
        lambda: api.chat(client, "NAME", [{"role": "user", "content": "Hi"}]), deadline=time.monotonic() + 600)

`Failed` means that one call has no answer; `Stopped` that the whole run should end, with an exit code.
The SDK's own retries are off: two layers multiply.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

from utils import die

MAX_BAD_ANSWERS = 5  # tries of one call that a reachable server answers badly; it may be the call's fault
REFUSALS = {401: "the key is refused", 402: "payment is required", 403: "access is denied",
            404: "no such model or address"}


class Answer(NamedTuple):
    """A chat completion: its text, the model that the server names, why it ended, tokens used (0 if not told)."""

    text: str
    served_model: str
    finish_reason: str
    tokens: int


class Verdict(NamedTuple):
    """What an error means: action is stop (the run), fail (this call), wait (until the deadline) or again (a few times).

    wait: seconds that the server asks for, else 0.
    """

    action: str
    what: str
    wait: float = 0.0


class BadAnswer(Exception):
    """A 200 that holds no answer."""


class Failed(Exception):
    """This call has no answer, others may."""


class Stopped(Exception):
    """The run cannot go on now: exit code 5 when the provider refuses, 75 when it may work later."""

    def __init__(self, code: int, what: str):
        super().__init__(what)
        self.code = code


def normalise_url(url: str) -> str:
    """The address that the SDK wants: with a version at its end (/v1 unless it names one), no slash after it."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        die(2, f"--base_url {redact(url)} is not an http:// or https:// address", "such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        die(2, "--base_url must hold neither a password nor a query", "the key comes from OPENAI_API_KEY alone")
    path = re.sub(r"/(chat/)?completions$", "", parts.path.rstrip("/"))
    if not re.search(r"/v\d\w*(/|$)", path):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def connect(base_url: str, timeout: float):
    """An SDK client; the key comes from OPENAI_API_KEY, which a local server does not need.

    timeout: seconds without a byte from the server before a call counts as hung.
    """
    import openai

    base_url = normalise_url(base_url)
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and urlsplit(base_url).hostname == "api.openai.com":
        die(3, "OPENAI_API_KEY is not set", "export it, or name a local server with --base_url")
    if not all("!" <= c <= "~" for c in key):
        die(2, "OPENAI_API_KEY holds a space, a line break or a sign beyond ASCII", "export the bare key")
    return openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=0,
                         timeout=openai.Timeout(timeout, connect=min(timeout, 10)))


def chat(client, model: str, messages: list[dict], max_tokens: int | None = None, **options) -> Answer:
    """One chat completion. Raises the SDK's errors, or BadAnswer where a 200 holds no text.

    options: such as temperature, passed on. A text cut at max_tokens has finish_reason "length".
    """
    if max_tokens:  # OpenAI's own models refuse the old name, many compatible servers do not know the new one
        name = "max_completion_tokens" if "openai" in client.base_url.host else "max_tokens"
        options[name] = max_tokens
    reply = client.chat.completions.create(model=model, messages=messages, **options)
    try:  # the SDK does not check a body's form, and returns plain text as a string
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    except (AttributeError, TypeError, LookupError):
        problem = getattr(reply, "error", None) or reply
        raise BadAnswer(f"a body without choices: {redact(str(problem))[:100]}") from None
    if not isinstance(text, str) or not text.strip():
        raise BadAnswer(f"an empty answer (finish_reason {reason})")
    used = getattr(reply.usage, "total_tokens", 0)
    return Answer(text, str(reply.model or ""), str(reason or ""), used if isinstance(used, int) else 0)


def classify(error: Exception) -> Verdict:
    """What to do about an error of `chat`; anything that is not the server's doing is raised again."""
    import openai

    if isinstance(error, openai.APIStatusError):
        status, what = error.status_code, f"HTTP {error.status_code}: {redact(' '.join(str(error.message).split()))[:200]}"
        if status in REFUSALS:
            return Verdict("stop", f"{REFUSALS[status]} ({what})")
        if "insufficient_quota" in (error.code, error.type):
            return Verdict("stop", f"the quota is used up ({what})")
        if status in (408, 409, 429) or status >= 500:
            return Verdict("wait" if status == 429 else "again", what, retry_after(error.response.headers))
        return Verdict("fail", what)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        unreached = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")
        what = redact(f"{type(cause).__name__}: {cause}")[:200]
        return Verdict("wait" if unreached else "again", f"cannot be reached ({what})" if unreached else what)
    if isinstance(error, (BadAnswer, json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError)):
        return Verdict("again", f"{error}" if isinstance(error, BadAnswer) else "a body that is not JSON")
    raise error


def retry_after(headers) -> float:
    """Seconds from a Retry-After header, which is a number or a date; 0 if there is none to read."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def redact(text: str) -> str:
    """Text without anything that looks like a key; servers echo what they were sent."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    text = text.replace(key, "[key]") if len(key) > 3 else text
    return re.sub(r"\bsk-[\w-]{6,}|(?<=Bearer )\S+|(?<=://)[^/\s@]+@", "[key]", text)


def retrying(call: Callable[[], Answer], deadline: float, max_backoff: float = 60.0,
             on_retry: Callable[[str, float], None] = lambda what, wait: None) -> Answer:
    """call()'s answer, tried again after errors that may pass; waits grow with full jitter.

    deadline: a time.monotonic() value. on_retry: told what went wrong and the seconds until the next try.
    Raises Stopped(5) at once where the provider refuses and Stopped(75) where a server cannot be reached or
    asks to wait beyond the deadline; Failed where it answers, but badly, MAX_BAD_ANSWERS times.
    """
    bad = 0
    for attempt in range(10**9):
        try:
            return call()
        except Exception as error:
            action, what, asked = classify(error)
        if action == "stop":
            raise Stopped(5, what)
        bad += action == "again"
        if action == "fail" or bad >= MAX_BAD_ANSWERS:
            raise Failed(what)
        wait = asked + random.uniform(0, min(max_backoff, 2.0 ** min(attempt, 30)))
        left = deadline - time.monotonic()
        if wait > left:
            if action == "again" and not asked:
                raise Failed(what)
            raise Stopped(75, what + (f"; it asks to wait {asked:.0f} s" if asked else ""))
        on_retry(what, wait)
        time.sleep(wait)
