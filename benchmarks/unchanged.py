"""Whether a refactoring has left everything that the toolkit computes as it was, bit for bit.

    python -m benchmarks.unchanged --checkout ../before
    python -m benchmarks.unchanged --checkout .

Trains every method for five micro-steps on a tiny model, draws from each in every way there is, and
prints a table and, as its last line, one JSON object with a hash for each run: of the adapter, or
of the texts. ../before is a checkout of the commit to compare with. Both last lines must be equal,
if they come from one machine and one environment: other kernels and versions round differently.

Only the checkout's train.py and infer.py are run; nothing of the toolkit is imported, so all
checkouts get the same data and the same model (base/model). A run that fails has "failed: ..." for
its hash. --only NAME_PREFIX does a part, such as `spt/` or `peft/beam`. Cost: about five minutes on
one core, most of it for imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

STEPS = 5
PRETRAINING_STEPS = 150  # enough for the form of replies, too few for one reply to be certain
SETTINGS = {  # one thread and no GPU: sums are then always taken in one order
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": ""}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# ---- data ---------------------------------------------------------------------------------------

DIALOGUES = [  # turns by Person A and B, A's the last, and what B may say
    ("Is it going to rain?\nThe sky is grey.\nThen where is my coat?",
     ["It hangs by the door.", "Take mine.", "Who needs a coat?", "Stay here and have tea."]),
    ("Who ate the last plum?",
     ["The dog did, at 5.", "I was not hungry.", "Buy 12 more.", "There never was one."]),
    ("I cannot find platform 9.\nAsk the man there.",
     ["He is asleep.", "It is behind the wall.", "Let us take the bus.", "Run to 8 and wait."]),
    ("My boat has a hole.\nHow big?\nAs big as a plum.\nAnd you sail?\nOnly near the shore.",
     ["Learn to swim first.", "Fill it with wax.", "Sell it to the dog.", "I wait on the wall."]),
]
SAYS_NEXT = "Write what Person B says next"
MANY = f"{SAYS_NEXT}.\n\nMany different replies would be good here.\n\nWrite"
REQUESTS = {  # much as the toolkit asks, so that the tiny model answers in the form asked for
    "reply": f"{SAYS_NEXT}, in at most 25 words.",
    "number": f"Person B could go on in many different ways. {SAYS_NEXT}: possibility number #",
    "list": f"{MANY} a list of 3 replies. Each must make sense on its own and say something else "
            "than every other one, not the same in other words. Keep each short, at most 25 words. "
            "One a line, numbered, and nothing else.",
    "tags": f"{MANY} 3 different replies, and for each the probability, between 0 and 1, that it "
            "is the one to come. Keep each short, at most 25 words. Put each into tags like this, "
            "and write nothing else:\n<response><text>the reply</text><probability>its probability"
            "</probability></response>",
}
PERSONAS = [["I keep bees.", "I live by the sea."], ["My dog is called 12."], ["I drive a bus."]]
PROMPTS = {  # of method diffuse
    "weights": {"response": "", "weights": [2, 1, 1]},
    "prefixes": {"response": ["Sure: ", "I say "]}}
VALUES = {"toxicity": ["nontoxic", "toxic"], "sentiment": ["neg", "neu", "pos"]}  # of control


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    """A row a line; a single row makes a JSON file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _talk(*contents: str) -> list[dict]:
    """Messages by user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(contents)]


def _write_data(folder: Path) -> None:
    """The training and test files of all methods."""
    contexts, replies = zip(*DIALOGUES, strict=True)
    rows = [{"context": context} for context in contexts]
    _write_jsonl(folder / "train.jsonl",
                 [row | {"candidates": some} for row, some in zip(rows, replies, strict=True)])
    _write_jsonl(folder / "test.jsonl", [*rows, {"prompt": "Name a use of a wall."}])
    _write_jsonl(folder / "personas.jsonl",
                 [row | {"persona": PERSONAS[i % 3], "response": replies[i][0]}
                  for i, row in enumerate(rows)])
    asks = ["Is tea hot? Use <sep>.", "Is the sea dry? Use <sep>.", "Is wax soft?", "Do dogs sail?"]
    _write_jsonl(folder / "task.jsonl", [{"messages": _talk(ask, some[1])}
                                         for ask, some in zip(asks, replies, strict=True)])
    queries = [f"What did {who} eat on day {day}?" for who in ("he", "the dog") for day in range(6)]
    _write_jsonl(folder / "diverse.jsonl", [{"messages": _talk(query, f"A plum and {i} eggs.")}
                                            for i, query in enumerate(queries)])
    _write_jsonl(folder / "queries.jsonl",
                 [{"query": query, "answer": "A plum."} for query in queries[:6]])
    for name, more in PROMPTS.items():
        prompt = {"request": f"Pick a number, {name}.", "targets": ["{1}", "{2}", "{12}"], **more}
        _write_jsonl(folder / "prompts" / f"{name}.json", [prompt])
    texts = [text for some in replies for text in some]
    _write_jsonl(folder / "control" / "train.jsonl", [
        {"text": text, "values": {name: each[i % len(each)] for name, each in VALUES.items()}}
        | ({"unconditioned": True} if i % 5 == 0 else {}) for i, text in enumerate(texts)])
    _write_jsonl(folder / "control" / "test.jsonl", [{"prompt": "The dog"}, {"prompt": "Let us"}])
    schema = {name: {"values": values, "thresholds": [], "scorer": "none", "version": "1"}
              for name, values in VALUES.items()}
    _write_jsonl(folder / "control" / "manifest.json", [{"schema": schema}])


# ---- the tiny model -----------------------------------------------------------------------------


def _dialogues() -> list[list[dict]]:
    """Requests with answers in the form that each asks for."""
    dialogues = []
    for context, replies in DIALOGUES:
        turns = [f"Person {'AB'[i % 2]}: {turn}" for i, turn in enumerate(context.split("\n"))]
        opening = "\n".join(["A conversation:", "", *turns, "", ""])
        for i, reply in enumerate(replies):
            items = [reply, replies[i - 1], replies[i - 2]]
            numbered = "\n".join(f"{k}. {item}" for k, item in enumerate(items, 1))
            tagged = "\n".join(f"<response><text>{item}</text><probability>0.{k}</probability>"
                               "</response>" for k, item in enumerate(items[:2], 3))
            dialogues += [_talk(opening + REQUESTS["reply"], reply),
                          _talk(f"{opening}{REQUESTS['number']}{i + 1}", reply),
                          _talk(opening + REQUESTS["list"], numbered),
                          _talk(opening + REQUESTS["tags"], tagged)]
    return dialogues


def _make_tokenizer(dialogues: list[list[dict]]):
    """A small trained tokenizer, byte-level as that of SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [turn["content"] for dialogue in dialogues for turn in dialogue],
        trainers.BpeTrainer(vocab_size=480, special_tokens=["<|im_end|>", "<|im_start|>"],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                            show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>",
                                   pad_token="<|im_end|>", chat_template=CHATML)


def _make_model(folder: Path) -> None:
    """A two-layer Llama that has learnt the form of replies; an untrained one would never end one.

    Without ends all replies would be cut at the limit, and lists and tags would hold nothing.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # as in the runs, so that the weights are the same everywhere
    torch.manual_seed(0)
    dialogues = _dialogues()
    tokenizer = _make_tokenizer(dialogues)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, initializer_range=0.1))
    texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(PRETRAINING_STEPS):
        chosen = [texts[i] for i in torch.randperm(len(texts))[:8]]
        batch = tokenizer(chosen, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                     labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- runs ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A command, the file that it writes, and how that file is read: bytes, preds or turns."""

    name: str
    argv: list[str]
    output: str
    read: str


def _train(method: str, data: str, *flags: str) -> Run:
    """Five micro-steps of a method."""
    name = f"checkpoints/{method}/check_{STEPS}/adapter_model.safetensors"
    return Run(f"{method}/weights", [
        "train.py", "--method", method, "--model_name", "base", "--train_file", data,
        "--max_steps", str(STEPS), "--num_train_epochs", "9", "--learning_rate", "1e-2",
        "--per_device_train_batch_size", "2", "--loss_steps", "1", *flags], name, "bytes")


def _draw(name: str, *flags: str, read: str = "preds") -> Run:
    """Replies of the model that a run's name starts with; batches of 3 leave the last one short."""
    system = name.partition("/")[0]
    model = "base" if system == "base" else f"checkpoints/{system}/check_{STEPS}"
    output = f"outs/{name.replace('/', '_')}.jsonl"
    argv = ["infer.py", "--max_new_tokens", "12", "--batch_size", "3", "--save_file", output]
    if "untuned" not in flags:  # that mode names its model with another flag
        argv += ["--model_name_or_path", model]
    if system in ("diffuse", "delia", "spt", "control"):  # old checkouts need to be told
        argv += ["--method", system]
    return Run(name, [*argv, *flags], output, read)


def _possibility_runs(system: str) -> list[Run]:
    """Every decoding of the base model or of peft."""
    beams = ("--num_beams", "6", "--num_beam_groups", "3")
    more = {
        "sampling": ["--temperature", "0.75"], "greedy": [], "beam": ["--num_beams", "4"],
        "diverse": beams, "diverse_per_group": [*beams, "--numbers", "per_group"],
        "list": [], "iterative": [], "verbalized": ["--max_new_tokens", "40"]}
    if system == "base":
        del more["diverse_per_group"]  # it has no numbers
    runs = [_draw(f"{system}/{name}", "--decoding", name.partition("_")[0], *flags)
            for name, flags in more.items()]
    runs += [_draw(f"{system}/top", "--top_p", "0.9", "--top_k", "40", "--min_p", "0.05"),
             _draw(f"{system}/typical", "--typical_p", "0.8", "--top_n_sigma", "1.5")]
    if system == "peft":  # choosing among replies does not know which model they are from
        runs += [_draw(f"peft/{how}", "--overgenerate", "10", "--floor", "0.05", "--select", how)
                 for how in ("dpp", "mmr", "medoids")]
    common = ["--test_file", "test.jsonl", "--num_response_per_input", "3"]
    runs = [run._replace(argv=run.argv + common) for run in runs]
    interview = _draw(f"{system}/interview", "--interview", "--num_interviews", "4", read="turns")
    return [*runs, interview]


def _spt_runs() -> list[Run]:
    """Every way to use soft prompts."""
    greedy, several = ["--decoding", "greedy"], ["--num_response_per_input", "3"]
    more = {f"{prompts}_{name}": ["--prompts", prompts, *flags]
            for name, flags in (("sampling", several), ("greedy", greedy))
            for prompts in ("chosen", "all", "sampled", "fused")}
    more |= {"beam": ["--decoding", "beam", *several], "prompt_id": ["--prompt_id", "2", *several]}
    return [_draw(f"spt/{name}", "--test_file", "personas.jsonl", *flags)
            for name, flags in more.items()]


def _all_runs() -> list[Run]:
    """All runs, each after the one that trains its model."""
    prompts = ["--train_prompts", "prompts", "--n_generations", "10", "--n_batch_size", "4"]
    task = ["--test_file", "task.jsonl"]
    control = ["--test_file", "control/test.jsonl"]
    want = ["--want", "sentiment=pos", "toxicity=nontoxic", "--num_response_per_input", "4"]
    return [
        *_possibility_runs("base"),
        _train("peft", "train.jsonl", "--max_length", "500"), *_possibility_runs("peft"),
        _train("otm", "train.jsonl", "--max_length", "500"),
        _train("diffuse", "prompts"),
        _draw("diffuse/lora", "--mode", "lora", *prompts),
        _draw("diffuse/untuned", "--mode", "untuned", "--model", "base", *prompts),
        _train("delia", "task.jsonl", "--new_tokens", "<sep>", "--diverse_file", "diverse.jsonl",
               "--diverse_ratio", "1.5", "--allow_foreign_cache", "--lr_warmup_steps", "2",
               "--gradient_accumulation_steps", "1"),
        _draw("delia/greedy", *task, "--decoding", "greedy"),
        _draw("delia/sampling", *task, "--num_response_per_input", "3"),
        _draw("delia/self_sample", "--self_sample", "--test_file", "queries.jsonl",
              "--num_response_per_input", "6", "--temperature", "1.2", "--max_new_tokens", "24",
              read="bytes"),
        _train("spt", "personas.jsonl", "--num_prompts", "3", "--prompt_length", "4"),
        *_spt_runs(),
        _train("control", "control/train.jsonl"),
        _draw("control/want", *control, *want), _draw("control/sweep", *control, "--sweep"),
        _draw("control/guidance", *control, *want, "--guidance", "1.5"),
    ]


def _chosen_runs(prefix: str) -> list[Run]:
    """The runs whose names start with a prefix, and those that train their models."""
    runs = _all_runs()
    systems = {run.name.partition("/")[0] for run in runs if run.name.startswith(prefix)}
    trained = {f"{system}/weights" for system in systems}
    return [run for run in runs if run.name.startswith(prefix) or run.name in trained]


def _digest(data: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(data).hexdigest()[:16]


def _carry_out(run: Run, checkout: Path, folder: Path) -> tuple[str, str]:
    """The hash of what a run writes and how many texts that is; or how it failed, and nothing."""
    command = [sys.executable, str(checkout / run.argv[0]), *run.argv[1:]]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **SETTINGS}, capture_output=True,
                          text=True, check=False)
    output = folder / run.output
    if done.returncode or not output.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no message"]
        tqdm.write("\n".join([f"{run.name} failed:", *lines[-15:]]), file=sys.stderr)
        errors = [line for line in lines if line.startswith("error: ")]  # a hint may follow
        return f"failed: {(errors or lines)[-1]}", ""
    content = output.read_bytes()
    if run.read == "bytes":
        return _digest(content), f"{len(content)} bytes"
    rows = [json.loads(line).get(run.read) for line in content.split(b"\n") if line]
    if None in rows:
        return f"failed: a row of {run.output} has no {run.read}", ""
    texts = [text for row in rows for text in row]
    return _digest(json.dumps(rows).encode()), f"{len(texts)} texts, {len(set(texts))} different"


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder that has train.py")
    parser.add_argument("--only", default="", metavar="PREFIX", help="runs whose names start so")
    return parser.parse_args(argv)


def main() -> None:
    flags = read_flags(None)
    checkout, runs = flags.checkout.resolve(), _chosen_runs(flags.only)
    if not (checkout / "train.py").is_file():
        sys.exit(f"--checkout {flags.checkout}: no train.py there")
    if not runs:
        sys.exit(f"--only {flags.only}: no run's name starts so")
    lines = []
    with tempfile.TemporaryDirectory(prefix="unchanged_") as name:
        folder = Path(name)
        _write_data(folder)
        _make_model(folder / "base")
        digests = {"base/model": _digest((folder / "base" / "model.safetensors").read_bytes())}
        with tqdm(runs, unit="run") as bar:  # in order: runs that train come first
            for run in bar:
                bar.set_postfix_str(run.name)
                digests[run.name], what = _carry_out(run, checkout, folder)
                lines.append(f"{run.name:24} {digests[run.name]:16}   {what}")
    print("\n".join(lines))
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
