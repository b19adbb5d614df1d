"""Control tokens: method control.

Conditional training after Korbak et al., "Pretraining Language Models with Human Preferences", arXiv:2302.08582, with
several attributes as in a UCL COMP0087 project (2023). Every text is labelled by scorers (attributes.py), its values
stand before it as tokens of their own, and the model learns the text and its end:

    L = mean over tokens of -log p(x_t | c, x_<t)        c: the control tokens, in nats

With c the text is asked for; without, the model is unconditioned (a share of the texts has no tokens). Guidance g
(classifier-free; Ho and Salimans, arXiv:2207.12598; for language models Sanchez et al., arXiv:2306.17806) draws from

    z = z_unconditioned + g (z_conditioned - z_unconditioned)

A row is plain text, no chat: start, start, control tokens, text, end of turn. The start stands twice so that a branch
without tokens and prompt has one of its own below the shared context.

Differences from the project's code:
- Pretrained weights and an adapter; random weights only with --from_scratch (the project's models all start from them).
- Tokens stand first, also where a prompt follows (there they stand after it, where no text ever had them).
- Scorer and threshold are one for training and evaluation; VADER has a neutral band (there ties are negative).
- Unused special tokens of the tokenizer serve, if it has enough, else rows are added; all start at the mean row.
- Control tokens are never generated: their logits are put to -1e9 in any decoding.
- The learning rate is constant (there a cosine after 1 % of warm-up), and all models get equally many updates.
- Texts of any document are in one split; equal texts stand once; prompts are left-padded and not scored.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import utils

# trees imports torch, so it is imported where it is used: --help must answer in half a second.

DEFAULTS = dict(learning_rate=5e-4, num_train_epochs=1, max_steps=-1, max_length=64, per_device_train_batch_size=16,
                weight_decay=0.0, lora_r=16, lora_alpha=32.0, lora_dropout=0.0, lora_target_modules=["all-linear"])
SPARE = re.compile(  # special tokens that a tokenizer keeps in reserve, or whose use (repositories, notebooks) is not chat
    r"<\|?(?:reserved_(?:special_)?token_\d+|reserved\d+|unused_?\d+|extra_?\d+)\|?>|\[(?:control_\d+|unused\d+)\]|<SPECIAL_\d+>"
    r"|<(?:repo_?name|file_sep|filename|gh_stars|issue_(?:start|comment|closed)|jupyter_(?:start|text|code|output|script)|empty_output)>")


def add_args(group) -> None:
    group.set_defaults(**DEFAULTS)
    group.add_argument("--attributes", nargs="+", metavar="NAME",
                       help="whose tokens stand before the texts; none for no tokens (default: all of the manifest)")
    group.add_argument("--manifest", metavar="FILE", help="scorers and thresholds (default: manifest.json beside --train_file)")
    group.add_argument("--from_scratch", action="store_true", help="random weights of the model's architecture, all trained, no adapter")


# ---- data ---------------------------------------------------------------------------------------


def load_rows(args) -> list[dict]:
    """The labelled texts; settles the schema, the attributes and, later, the tokens."""
    path = Path(args.manifest or Path(args.train_file).with_name("manifest.json"))
    try:
        args.schema = json.loads(path.read_text(encoding="utf-8"))["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        utils.die(2, f"{path} is no manifest of data/build_control.py", "it lies beside the train file; or give --manifest FILE")
    asked = list(args.schema) if args.attributes is None else [] if args.attributes == ["none"] else args.attributes
    refuse_unknown({name: None for name in asked}, args.schema, f"--attributes: {path}")
    args.attributes = [name for name in args.schema if name in asked]  # one order, whatever was typed
    args.control_tokens = args.banned_ids = None
    if args.from_scratch and args.load_in_4bit:
        utils.die(2, "--from_scratch trains all weights, which 4-bit ones cannot be", "drop --load_in_4bit")
    return utils.read_jsonl(args.train_file, lambda row: check_row(row, args.schema))


def check_row(row: dict, schema: dict) -> str | None:
    """What is wrong with a labelled text, or None."""
    if not isinstance(row.get("text"), str) or not any(c.isalpha() for c in row["text"]):
        return 'field "text" must be a string with letters'
    values = row.get("values")
    if not isinstance(values, dict):
        return 'needs "values", one for each attribute; data/build_control.py writes them'
    for name, own in schema.items():
        if values.get(name) not in own["values"]:
            return f'"values": {name} must be one of {", ".join(own["values"])}, got {json.dumps(values.get(name))}'
    return None


def refuse_unknown(want: dict[str, str | None], schema: dict, where: str) -> None:
    """Die over attributes and values that a schema does not have."""
    for name, value in want.items():
        if name not in schema:
            utils.die(2, f"{where} does not know the attribute {name!r}", f"it knows {', '.join(schema)}")
        if value is not None and value not in schema[name]["values"]:
            utils.die(2, f"{where}: {name} is never {value!r}", f"its values are {', '.join(schema[name]['values'])}")


# ---- tokens -------------------------------------------------------------------------------------


def assign_tokens(tokenizer, schema: dict) -> dict[str, str]:
    """The token of every attribute=value of a schema, in its order: spare special tokens, or tokens added to the tokenizer.

    Spare ones serve only if there are enough for all. The same tokenizer and schema always give the same tokens.
    """
    names = [f"{name}={value}" for name, own in schema.items() for value in own["values"]]
    own = [f"<|{name}|>" for name in names]
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    spare = sorted((token for token in known if SPARE.fullmatch(token)), key=known.get)
    if len(spare) < len(names):
        tokenizer.add_special_tokens({"additional_special_tokens": own}, replace_extra_special_tokens=False)
        spare = own
    return dict(zip(names, spare, strict=False))


def settle_tokens(tokenizer, args) -> None:
    """Fix args.control_tokens and args.banned_ids, once a run."""
    if args.control_tokens is None:
        args.control_tokens = assign_tokens(tokenizer, args.schema)
        args.banned_ids = tokenizer.convert_tokens_to_ids(list(args.control_tokens.values()))


def start_ids(tokenizer) -> list[int]:
    """Where every text starts: the mark between documents that the base was trained with, twice (module docstring)."""
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    start = known.get("<|endoftext|>", tokenizer.bos_token_id)
    return [tokenizer.eos_token_id if start is None else start] * 2


def encode(tokenizer, want: dict[str, str], control_tokens: dict[str, str], text: str) -> tuple[list[int], list[int]]:
    """(start and control tokens, text) as ids, tokens in the order of the schema; one function for training and decoding."""
    tokens = [token for name, token in control_tokens.items() if name.split("=")[1] == want.get(name.split("=")[0])]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return start_ids(tokenizer) + tokenizer.convert_tokens_to_ids(tokens), ids


# ---- training -----------------------------------------------------------------------------------


def prepare_model(model, tokenizer, args):
    """An adapter and the rows of the control tokens, all else frozen; with --from_scratch all weights, at random."""
    import torch

    settle_tokens(tokenizer, args)
    if args.from_scratch:
        model = type(model)(model.config).to(model.device)  # float32, as initialised by the architecture
        utils.fit_embeddings(model, tokenizer)
        return model
    utils.fit_embeddings(model, tokenizer)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[args.banned_ids] = weight.mean(0)
    model = utils.add_lora(model, tokenizer, args, trainable_token_indices=args.banned_ids)
    utils.ban_tokens(model.get_base_model(), args.banned_ids)  # they are only read: tied rows learn nothing as outputs
    return model


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """Start and tokens as context, text and end as likelihood; None if it does not fit into --max_length."""
    from trees import LIKELIHOOD, Segment, Tree, padded_shape

    settle_tokens(tokenizer, args)
    want = {} if row.get("unconditioned") else {name: row["values"][name] for name in args.attributes}
    context, text = encode(tokenizer, want, args.control_tokens, row["text"])
    tree = Tree(Segment(context, children=[Segment(text + [utils.end_of_turn(tokenizer)], LIKELIHOOD)]))
    return tree if padded_shape(tree)[1] <= args.max_length else None


def compute_loss(model, batch: dict, args):
    """Mean of -log p over all tokens of texts and their ends, in nats."""
    import trees

    loss = -trees.score(model, batch).mean()
    return loss, {"loss": loss.detach()}


# ---- decoding -----------------------------------------------------------------------------------


def decode_tree(row: dict, tokenizer, args):
    """A branch per reply, each under its own condition; with guidance, a twin of unconditioned branches."""
    from trees import Tree, branch_prompts

    if "wants" not in row:
        utils.die(2, "this checkpoint was trained with --method control", "infer.py --method control --want NAME=VALUE ...")
    prompts = [sum(encode(tokenizer, want, args.control_tokens, row["prompt"]), []) for want in row["given"][: args.num_branches]]
    if max(map(len, prompts)) > args.max_length - args.max_new_tokens:
        return None
    numbers = list(range(1, len(prompts) + 1))
    tree = Tree(branch_prompts(prompts, numbers))
    if row["guidance"] != 1:
        plain = sum(encode(tokenizer, {}, args.control_tokens, row["prompt"]), [])
        tree.twin, tree.guidance = Tree(branch_prompts([plain] * len(prompts), numbers)), row["guidance"]
    return tree


def decode_messages(row: dict, args) -> list[str]:
    """Servers take messages, which cannot hold control tokens."""
    utils.die(2, "--engine openai cannot send control tokens", "--engine hf")


def add_infer_args(parser) -> None:
    """The flags that infer.py has for this method."""
    group = parser.add_argument_group("method control")
    next(a for a in parser._actions if a.dest == "test_file").required = False
    group.set_defaults(num_response_per_input=1, max_new_tokens=24, model_name_or_path=None)
    group.add_argument("--want", nargs="+", metavar="NAME=VALUE", default=[], help="what is asked for, such as toxicity=nontoxic sentiment=pos")
    group.add_argument("--sweep", nargs="*", metavar="NAME[=VALUE,VALUE]",
                       help="every combination of values, and of none, of these attributes (default: all that were trained), "
                            "with --num_response_per_input replies to each (default: 1)")
    group.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 is off (default), 0 is unconditioned")
    group.add_argument("--untrained", choices=["skip", "token"],
                       help="allow attributes that the checkpoint was not trained on, for baselines. skip: without their tokens, so "
                            "what changes is chance; token: with them, as published, though they mean nothing to it")


def inference_rows(args) -> list[dict]:
    """Rows with prompt, wants (a condition per reply), given (those that get tokens) and guidance.

    Without --test_file, --limit rows of no prompt.

    Settles the number of replies a row, and the tokens of the checkpoint.
    """
    run = read_run(args)
    trained = run["args"]
    args.control_tokens = trained["control_tokens"]
    known = trained["schema"] if args.untrained else {n: trained["schema"][n] for n in trained["attributes"]}
    where = f"{args.model_name_or_path} (trained on {', '.join(trained['attributes']) or 'no attribute'})"
    if args.engine != "hf":
        decode_messages({}, args)
    if args.guidance != 1 and args.decoding not in ("sampling", "greedy"):
        utils.die(2, f"--guidance does nothing with --decoding {args.decoding}", "drop it, or --decoding sampling")
    if args.guidance < 0:
        utils.die(2, f"--guidance {args.guidance} must be at least 0")
    if args.overgenerate or args.decoding not in ("sampling", "greedy", "beam", "diverse"):
        utils.die(2, "control tokens stand before plain text: no --overgenerate, no decoding by asking", "--decoding sampling")
    wants = wanted(args, known, where)
    args.num_response_per_input = args.num_drawn = len(wants)
    args.num_branches = 1 if args.decoding in ("beam", "diverse") else len(wants)
    if args.test_file:
        rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False) or
                                (None if "prompt" in row else 'needs "prompt": control tokens continue plain text'))[: args.limit]
    else:
        rows, args.test_file = [{"prompt": ""}] * (args.limit or 1), "no prompt"
    given = [{n: v for n, v in want.items() if n in trained["attributes"] or args.untrained == "token"} for want in wants]
    return [{"prompt": row["prompt"], "wants": wants, "given": given, "guidance": args.guidance} for row in rows]


def wanted(args, known: dict, where: str) -> list[dict[str, str]]:
    """The condition of every reply to a row; dies over attributes and values that the checkpoint does not know."""
    from attributes import combinations

    if args.sweep is not None:
        if args.want or args.decoding in ("beam", "diverse"):
            utils.die(2, "--sweep asks for all combinations, so it takes neither --want nor beams", "drop one of them")
        options = {}
        for word in args.sweep or known:
            name, _, values = word.partition("=")
            refuse_unknown({name: None}, known, where)
            options[name] = values.split(",") if values else known[name]["values"]
            for value in options[name]:
                refuse_unknown({name: value}, known, where)
        return combinations({name: options[name] for name in known if name in options}) * args.num_response_per_input
    pairs = [word.partition("=") for word in args.want]
    if bad := [word for word, (name, equals, value) in zip(args.want, pairs, strict=True) if not (name and equals and value)]:
        utils.die(2, f"--want {bad[0]} is not NAME=VALUE", "such as sentiment=pos")
    want = {name: value for name, _, value in pairs}
    if len(want) < len(pairs):
        utils.die(2, f"--want {' '.join(args.want)}: an attribute stands twice", "each text has one value of it")
    refuse_unknown(want, known, where)
    order = [name for name in known if name in want]
    return [{name: want[name] for name in order}] * args.num_response_per_input


def read_run(args) -> dict:
    """run.json of the checkpoint; dies where it is none of this method."""
    folder = Path(args.model_name_or_path or "")
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run = {}
    if args.model_name_or_path is None or run.get("method") != "control":
        utils.die(2, f"--model_name_or_path {args.model_name_or_path} is no checkpoint of --method control", "train it with train.py --method control")
    return run


def infer_flags(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that draw from what was trained, one reply per combination of values."""
    return ["--method", "control", "--model_name_or_path", f"{checkpoint}/", "--sweep", "--limit", "10", "--top_p", "0.9",
            "--save_file", f"outs/{args.exp_name}.jsonl"]
