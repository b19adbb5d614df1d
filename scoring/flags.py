"""The flags that say which judge rates replies. Light: nothing here loads torch."""

from __future__ import annotations

import argparse

from decoding import providers
from flags import FlagParser, positive, positive_int, share
from utils import EMBEDDED, USAGE, fail


def add_judge_flags(parser: FlagParser) -> None:
    """All of them; args.judge and args.policy are settled at the end of parsing."""
    group = parser.add_argument_group("judge")
    # No default: _settle_judge has to see whether a judge was named at all.
    group.add_argument("--judge",
                       help="local: the offline proxy (default); api: one or two models behind "
                            "servers; hf:MODEL: the expected rating under a chat model on this "
                            "machine")
    group.add_argument("--judge_model", default=EMBEDDED,
                       help="base model of the local judge (default: smollm2)")
    group.add_argument("--no_canaries", action="store_true",
                       help="skip the prompt-injection check (10 replies that try to manipulate "
                            "the judge)")
    group.add_argument("--control_prompts", type=positive_int, default=20, metavar="N",
                       help="prompts whose controls check an api or hf judge: replies without "
                            "sense, which it must refuse, and references; up to 6 more questions "
                            "a prompt (default: 20; the local proxy: 100)")
    group.add_argument("--trust_judge", action="store_true",
                       help="show, marked, the figures of a judge that accepts more than 10 %% of "
                            "a control or less than 80 %% of the references; without it they are "
                            "withheld")
    group.add_argument("--fail_on_error", type=share, default=0.05, metavar="SHARE",
                       help="exit with 4 if a larger share of replies is unscored (default: 0.05)")
    group = parser.add_argument_group(
        "judge behind a server (keys: TOGETHER_API_KEY, OPENAI_API_KEY)")
    for stage, published in ((1, "together:meta-llama/Llama-3-70b-chat-hf, 0.1, 512"),
                             (2, "openai:gpt-4o, 0, 1024")):
        group.add_argument(f"--judge{stage}", metavar="PROVIDER:MODEL",
                           help=f"with --temperature{stage} and --max_tokens{stage}, as "
                                f"published: {published}")
        group.add_argument(f"--base_url{stage}", metavar="URL",
                           help="any OpenAI-compatible server (default: the provider's)")
        # Hidden from --help, where one line for each judge already names them with their values.
        group.add_argument(f"--temperature{stage}", type=float, help=argparse.SUPPRESS)
        group.add_argument(f"--max_tokens{stage}", type=positive_int, help=argparse.SUPPRESS)
    group.add_argument("--policy", choices=["published", "first", "second", "both", "mean"],
                       help="published: judge 2 is asked where judge 1 rates below 6 (default; "
                            "first where only --judge1 is given)")
    group.add_argument("--max_connections", type=positive_int, default=16,
                       help="calls at a time (default: 16)")
    group.add_argument("--timeout", type=positive,
                       help="seconds without a byte (default: 50 and 100, as published)")
    group.add_argument("--timeout_total", type=positive, default=600,
                       help="seconds for a call with its repeats (default: 600)")
    group.add_argument("--key_file", metavar="FILE", help="lines NAME=KEY, mode 600")
    group.add_argument("--judge_controls", action="store_true",
                       help="send the degenerate systems to the server, too")
    parser.derive(_settle_judge)


def _settle_judge(args) -> dict:
    """The judge that the flags name, and its policy."""
    by_flag = {"judge1": args.judge1, "judge2": args.judge2, "base_url1": args.base_url1,
               "base_url2": args.base_url2, "policy": args.policy}
    # a server that is named and not asked would leave the reader with another judge's figures
    given = [f"--{name}" for name, value in by_flag.items() if value]
    judge = args.judge or ("api" if given else "local")
    if judge not in ("local", "api") and not judge.startswith("hf:"):
        fail(USAGE, f"--judge {judge} is none of local, api, hf:MODEL",
             "a model behind a server: --judge1 PROVIDER:MODEL")
    if given and judge != "api":
        fail(USAGE, f"{given[0]} does nothing with --judge {judge}", "drop one of the two")
    for name in ("judge1", "judge2"):
        if by_flag[name]:
            providers.parse_spec(by_flag[name], f"--{name}", tuple(providers.PROVIDERS))
    # one judge of one's own: the published second one, which needs a key, is not meant
    lone = (args.judge1 or args.base_url1) and not (args.judge2 or args.base_url2)
    return {"judge": judge, "policy": args.policy or ("first" if lone else "published")}
