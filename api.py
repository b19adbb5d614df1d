"""Talk to an OpenAI-compatible server: one form of address, one reading of errors, one layer of retries.

    client = api.connect("http://127.0.0.1:8000", timeout=120)
    answer = api.retrying(lambda: api.chat(client, "NAME", messages, 256), deadline=time.monotonic() + 600)
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from email.utils import mktime_tz, parsedate_tz
from itertools import count
from typing import NamedTuple
from urllib.parse import urlsplit

from utils import die

MAX_BAD_ANSWERS = 5  # tries of one call that a reachable server answers badly; it may be the call's fault
REFUSALS = {401: "key refused", 402: "payment required", 403: "access denied", 404: "no such model or address"}


class Answer(NamedTuple):
    """A chat completion; served_model as the server names it, tokens used in all and new ones (0: it does not tell)."""

    text: str
    served_model: str
    finish_reason: str = "stop"
    tokens: int = 0
    new_tokens: int = 0


class BadAnswer(Exception):
    """A 200 that holds no answer."""


class Failed(Exception):
    """This call has no answer, others may have one; args: what happened, and whether it may work later."""


class Stopped(Exception):
    """The run cannot go on; args: exit code (5 the provider refuses, 75 it may work later) and what happened."""


def normalise_url(url: str) -> str:
    """The address as the SDK wants it: /v1 at its end unless it names a version, no slash, no end point."""
    try:
        parts = urlsplit(url.strip())
        plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:  # a port that is no number, half an IPv6 address
        plain = False
    if not plain or "@" in url:
        die(2, f"--base_url {redact(url)} is not a plain address", "such as http://127.0.0.1:8000/v1, no password")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path}{'' if re.search(r'/v[0-9]', path) else '/v1'}"


def connect(base_url: str, timeout: float):
    """An SDK client with the key from OPENAI_API_KEY, if any; timeout is in seconds without a byte from the server."""
    import openai

    base_url = normalise_url(base_url)
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and urlsplit(base_url).hostname == "api.openai.com":
        die(3, "OPENAI_API_KEY is not set", "export it, or name a local server with --base_url")
    if not all("!" <= c <= "~" for c in key):  # the HTTP library would quote it in its error
        die(2, "OPENAI_API_KEY holds a space, a line break or a sign beyond ASCII", "export the bare key")
    return openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=0,  # a second layer would multiply
                         timeout=openai.Timeout(timeout, connect=min(timeout, 10)))


def chat(client, model: str, messages: list[dict], max_tokens: int, **options) -> Answer:
    """One chat completion; raises the SDK's errors, or BadAnswer where a 200 holds no text.

    options: such as temperature. A text cut at max_tokens has finish_reason "length".
    """
    return choices(client, model, messages, max_tokens, **options)[0]


def choices(client, model: str, messages: list[dict], max_tokens: int, **options) -> list[Answer]:
    """All texts of one chat completion: n of them where that option is given and the server honours it."""
    # OpenAI's newer models refuse the name max_tokens, and many compatible servers know no other
    name = "max_completion_tokens" if client.base_url.host.endswith(("openai.com", "azure.com")) else "max_tokens"
    reply = client.chat.completions.create(model=model, messages=messages, **{name: max_tokens}, **options)
    try:  # the SDK does not check a body's form
        found = [(choice.message.content, str(choice.finish_reason)) for choice in reply.choices]
        text, reason = found[0]
    except (AttributeError, TypeError, LookupError):
        raise BadAnswer(f"a body without choices: {redact(str(getattr(reply, 'error', reply)))[:100]}") from None
    if not isinstance(text, str) or not text.strip():
        raise BadAnswer(f"an empty answer (finish_reason {reason})")
    tokens = getattr(reply.usage, "total_tokens", 0) or 0
    new_tokens = (getattr(reply.usage, "completion_tokens", 0) or 0) // len(found)
    return [Answer(text, str(reply.model or ""), reason, tokens, new_tokens) for text, reason in found
            if isinstance(text, str) and text.strip()]


def classify(error: Exception) -> tuple[str, str, float]:
    """What to do about an error of `chat`, what happened, and the seconds that the server asks to wait, or 0.

    To do: "stop" the run, "fail" this call, "wait" until the deadline, try "again" a few times."""
    import openai

    if isinstance(error, openai.APIStatusError):
        status, says = error.status_code, error.body.get("message") if isinstance(error.body, dict) else None
        says = redact(" ".join(str(says or error.message).split()))[:200]
        if status in REFUSALS or "insufficient_quota" in (error.code, error.type):
            return "stop", f"HTTP {status}, {REFUSALS.get(status, 'the quota is used up')}: {says}", 0.0
        action = "wait" if status == 429 else "again" if status in (408, 409) or status >= 500 else "fail"
        return action, f"HTTP {status}: {says}", retry_after(error.response.headers)
    if isinstance(error, openai.APIConnectionError):
        kind = type(error.__cause__).__name__
        action = "wait" if kind in ("ConnectError", "ConnectTimeout", "ProxyError") else "again"
        return action, redact(f"{kind}: {error.__cause__}")[:200], 0.0
    if isinstance(error, (BadAnswer, json.JSONDecodeError, UnicodeDecodeError)):
        return "again", f"{type(error).__name__}: {error}"[:200], 0.0
    raise error


def retry_after(headers) -> float:
    """Seconds from a Retry-After header, a number or a date; 0 if there is none to read."""
    date = parsedate_tz(headers.get("retry-after", ""))
    try:
        return max(0.0, mktime_tz(date) - time.time() if date else float(headers.get("retry-after", 0)))
    except (ValueError, OverflowError):
        return 0.0


def redact(text: str) -> str:
    """Text without keys and passwords; servers echo what they were sent."""
    pattern = r"\bsk-[\w-]{6,}|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)"
    return re.sub(pattern, "[key]", text.replace(os.environ.get("OPENAI_API_KEY", "").strip() or "\0", "[key]"))


def retrying(call, deadline: float, max_backoff: float = 60.0, on_retry=lambda what, wait: None) -> Answer:
    """call()'s answer, tried again after errors that may pass, with full jitter over 1, 2, 4 ... max_backoff seconds.

    deadline: a time.monotonic() value. on_retry: told what went wrong and the seconds until the next try.
    Raises Stopped(5) where the provider refuses; Stopped(75) where the server cannot be reached, or asks to
    wait, beyond the deadline; Failed where it answers badly, MAX_BAD_ANSWERS times or beyond the deadline.
    """
    bad = 0
    for tries in count():
        try:
            return call()
        except Exception as error:
            action, what, asked = classify(error)
        bad += action == "again"
        if action == "stop":
            raise Stopped(5, what)
        wait = max(asked, random.uniform(0, min(max_backoff, 2.0 ** min(tries, 30))))
        late = time.monotonic() + wait > deadline
        if action == "fail" or bad >= MAX_BAD_ANSWERS or late and action == "again" and not asked:
            raise Failed(what, action == "again")
        if late:
            raise Stopped(75, f"{what} (asks to wait {asked:.0f} s)" if asked else what)
        on_retry(what, wait)
        time.sleep(wait)
