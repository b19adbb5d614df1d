"""Who runs a model, where, and with which key: names, addresses, keys and clients of providers.

    spec = providers.parse_spec("openai:gpt-4o")
    client = providers.connect(spec.provider, "http://127.0.0.1:8000")

Provider together is asked through its own package, every other server through openai's. They are
imported where they are used, since --help should not wait.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from utils import MISSING, USAGE, fail

# openai stands for every compatible server, too, such as vLLM on this machine.
PROVIDERS = {  # the address of each one, and what its key is called
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "together": ("https://api.together.xyz/v1", "TOGETHER_API_KEY")}
LOCAL = "hf"  # the provider of models on this machine
MIN_KEY = 8  # characters; shorter "keys" such as none and EMPTY are common words and no secrets
_KEYS_READ: set[str] = set()  # for redact


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
    # At the first colon only: names such as llama3:8b have one of their own.
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
    # Pasted addresses often name the end point, and the SDKs would add it a second time.
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
    # The file may hold the keys of other providers only.
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
    # Local servers mostly want no key. By host, since a provider's address may be given, too.
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
    # Keys of OpenAI and Together, long hex numbers, and passwords within addresses.
    pattern = (r"\bsk-[\w-]{6,}|\btgp_v1_[\w-]+|\b[0-9a-f]{40,}\b|(?<=Bearer )\S+"
               r"|(?<=://)[^/\s@]+(?=@)")
    return re.sub(pattern, "[key]", text)


def hide_keys(text: str) -> str:
    """Text without the keys of this run, and else unchanged: for replies, which are data."""
    # Also keys of providers that this run does not ask: a proxy may have them in an error.
    keys = _KEYS_READ | {os.environ.get(name, "").strip() for _, name in PROVIDERS.values()}
    # The longest first: a key that holds a shorter one would else keep its ends.
    for key in sorted(keys, key=len, reverse=True):
        if len(key) >= MIN_KEY:
            text = text.replace(key, "[key]")
    return text
