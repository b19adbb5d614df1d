"""Interviews for the demographic bias test: a model plays a person and is asked about itself.

    python infer.py --interview --num_interviews 200 \\
        --model_name_or_path checkpoints/my_peft/check_1000/ --save_file outs/peft.jsonl
    python eval.py --persona --eval_file outs/base.jsonl outs/peft.jsonl \\
        --save_file eval_logs/persona.json

An asker (Person A) walks through age, country, occupation and education in an order that differs
from interview to interview, then gender, as published; where an answer says nothing of the topic,
it asks once more. The model under test (Person B) sees the conversation in the prompt that it was
trained with. --save_file gets a line per interview, batch by batch; --resume goes on with it and
ends with the same file.

Differences from the published notebook (arXiv:2412.03343):
- A possibility number is kept for a whole interview (1, 2, ... in turn), so that it stands for one
  person; `--number_per turn` draws one at every turn, as published.
- The interview starts with a question, not with somebody else's dialogue, so nothing but the model
  says who Person B is.
- The asker is a script, a local model or a model behind a server; it is told what to ask for, so
  every attribute gets its turn.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import utils
from decoding import api, outputs, providers
from flags import Args, FlagParser, add_server_flags, parse_flags, positive, positive_int
from methods import METHODS
from utils import USAGE, fail

KIND = "outs/interview"
# Of an answer that hit --max_new_tokens, of an empty one, of a question for which old turns were
# left out, and of one that the script asked instead of a model.
WARNINGS = ("cut", "empty", "shortened", "scripted_instead")  # counted in rows and summary


def build_parser() -> FlagParser:
    """All flags of interviews."""
    parser = FlagParser(prog="infer.py --interview", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--interview", action="store_true",
                       help="hold interviews instead of answering rows")
    group.add_argument("--model_name_or_path", default=utils.EMBEDDED,
                       help="check_N folder, model folder, hub id, or smollm2 (default)")
    group.add_argument("--method", choices=[name for name, module in METHODS.items()
                                            if module == "possibility"],
                       help="must agree with the checkpoint (default: what it says)")
    group.add_argument("--num_interviews", type=positive_int, default=200,
                       help="interviews to hold (default: 200)")
    group.add_argument("--save_file", required=True, help="JSONL: a line per interview")
    group.add_argument("--number_per", "--number", dest="number_per", type=_number_per,
                       choices=["interview", "turn"],
                       help="peft: one possibility number per interview (default), or a new one at "
                            "every turn, as published")
    group = parser.add_argument_group("asker")
    group.add_argument("--asker", default="scripted", metavar="WHO",
                       help="scripted (default), hf:MODEL on this machine, or openai:MODEL or "
                            "together:MODEL behind a server")
    add_server_flags(group)
    group = parser.add_argument_group("answers")
    group.add_argument("--temperature", type=positive, default=1.0,
                       help="softmax temperature (default: 1, as published)")
    group.add_argument("--max_new_tokens", type=positive_int, default=64,
                       help="tokens per answer at most (default: 64)")
    group.add_argument("--seed", type=int, default=42,
                       help="each interview draws from seeds of its own (default: 42)")
    group = parser.add_argument_group("running")
    group.add_argument("--batch_size", type=positive_int, default=20,
                       help="interviews held together (default: 20)")
    group.add_argument("--max_input_length", type=positive_int,
                       help="words of the conversation (default: as in training, else 1000)")
    group.add_argument("--max_length", type=positive_int,
                       help="tokens in all (default: as in training, else the model's limit)")
    group.add_argument("--chat_template", metavar="FILE",
                       help="for base models: Jinja chat template, or none")
    group.add_argument("--resume", action="store_true",
                       help="go on with a --save_file that was interrupted")
    group.add_argument("--force_base", action="store_true",
                       help="use an adapter on another base than its own")
    return parser


def _number_per(text: str) -> str:
    """--number took per_interview and per_turn, and still does."""
    return text.removeprefix("per_")


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command; dies over those that cannot work, before anything is loaded."""
    args = parse_flags(build_parser(), argv)
    if ":" in args.asker:
        providers.parse_spec(args.asker, "--asker")
    elif args.asker != "scripted":
        fail(USAGE, f"--asker {args.asker} is none of scripted, hf:MODEL, PROVIDER:MODEL",
             "such as openai:gpt-4o")
    # Without this, a forgotten provider would quietly leave the interviews to another asker.
    if args.base_url and (args.asker == "scripted" or args.asker.startswith("hf:")):
        fail(USAGE, f"--base_url does nothing with --asker {args.asker}",
             "drop it, or name a model behind a server")
    return args


def main(argv: list[str] | None = None) -> None:
    """Hold interviews as the flags say; --save_file and its .json have everything."""
    args = read_flags(argv)
    save_file = outputs.claim(args.save_file, args.resume)
    # These load torch, so bad flags and a file that is in the way are reported before.
    from decoding.engines import load_engine
    from persona import conversation

    asker = conversation.make_asker(args)  # before the model: a missing key shows at once
    engine = load_engine(f"hf:{args.model_name_or_path}", batch_size=args.batch_size,
                         force_base=args.force_base, chat_template=args.chat_template)
    setup = conversation.resolve_setup(args, engine.run, engine.limit)
    # With what the checkpoint has settled, so that --resume notices another checkpoint's limits.
    settings = outputs.settings_of(args.with_values(**dataclasses.asdict(setup)), [],
                                   engine.run["weights"])
    done = outputs.begin(save_file, KIND, settings, engine.run)

    began = time.time()
    try:
        for rows in _batches(save_file, done, args,
                             lambda block: conversation.hold(engine, asker, block, setup)):
            utils.append_jsonl(save_file, rows)
    except api.RunStopped as stop:
        fail(stop.code, stop.what,
             "finished interviews are kept; the same command with --resume goes on")
    # Counted over the file: a resumed run has held only some of its interviews.
    summary = _summarise(outputs.read(save_file)) | {"seconds": round(time.time() - began, 1)}
    outputs.write_summary(save_file, KIND, settings, engine.run, summary)
    counts = ", ".join(f"{summary[name]} {name}" for name in ("answers", *WARNINGS))
    print(f"{summary['interviews']} interviews in {save_file}: {counts}")
    print(f"next: python eval.py --persona --eval_file {save_file} "
          f"--save_file eval_logs/{save_file.stem}.json")


def _batches(save_file: Path, done: int, args, hold):
    """Yield the rows of each batch that are not among the first `done`.

    Batches are cut by index, so a resumed run decodes the very batches of an uninterrupted one: it
    holds the batch anew in which it was killed.
    """
    from tqdm import tqdm

    size, total = args.batch_size, args.num_interviews
    # Back to the beginning of the batch that `done` lies in.
    first = total if done >= total else done // size * size
    with tqdm(total=total, initial=done, unit="interview", desc=save_file.stem) as bar:
        for start in range(first, total, size):
            # Rows that are in the file already are decoded once more and dropped, since a smaller
            # batch could round differently.
            rows = [row for row in hold(range(start, min(start + size, total)))
                    if row["interview"] >= done]
            yield rows
            bar.update(len(rows))


def _summarise(rows: list[dict]) -> dict:
    """Counts of interviews and answers, and of what went wrong in them."""
    summary = {"interviews": len(rows), "answers": sum(len(row["topics"]) for row in rows)}
    for name in WARNINGS:
        summary[name] = sum(row.get("warnings", {}).get(name, 0) for row in rows)
    return summary
