"""The five methods side by side.

One list of hooks, configs that parse, checkpoints that say their method.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from types import ModuleType

import pytest
from conftest import DIALOGUES, ROOT, refused, write_jsonl

import infer
import methods
import train
from flags import FlagParser
from training.flags import add_training_args

PAPERS = sorted(set(methods.METHODS.values()))
HOOKS = {  # file -> hook: its arguments, in the order in which they stand in every file
    "flags": {
        "add_train_args": "parser",
        "check_train": "args",
        "add_infer_args": "parser",
        "check_infer": "args",
    },
    "training": {
        "load_rows": "args",
        "prepare_tokenizer": "tokenizer args",
        "prepare_model": "model tokenizer rows args",
        "describe": "model tokenizer rows args",
        "build_tree": "row tokenizer args rng",
        "compute_loss": "model batch args step",
        "order_rows": "rows args rng",
        "parameter_groups": "model args",
        "after_pass": "model forest rows args saves",
        "save": "model folder state_dict",
    },
    "inference": {
        "resolve": "args run",
        "load_rows": "args run",
        "prepare_rows": "engine rows args",
        "decode_tree": "row tokenizer args",
        "messages": "row args",
        "clean": None,
        "finish": "save_file summary args",
        "talk": "engine args",
        "next_command": "args checkpoint",
    },
    "evaluation": {"measure": "systems sources args", "tables": "summary"},
}
COMMON = ("method", "help", "config", "print_config")


def folder(paper: str, part: str) -> ModuleType:
    return importlib.import_module(f"methods.{paper}.{part}")


@pytest.mark.parametrize("part", HOOKS)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_defines_every_hook_in_one_order_with_one_signature(paper, part):
    """A hook is a function or a visible line (`order_rows = defaults.shuffled`), never left out."""
    module = folder(paper, part)
    source = inspect.getsource(module)
    places = [re.search(rf"^(?:def {hook}\(|{hook} = )", source, re.M) for hook in HOOKS[part]]
    assert all(places), dict(zip(HOOKS[part], places, strict=True))
    assert [place.start() for place in places] == sorted(place.start() for place in places)
    for hook, arguments in HOOKS[part].items():
        if arguments:  # clean may be str.strip, which has no signature of ours
            assert " ".join(inspect.signature(vars(module)[hook]).parameters) == arguments, hook


@pytest.mark.parametrize("paper", PAPERS)
def test_a_papers_package_is_its_docstring_alone(paper):
    """So that importing its flags loads no torch."""
    text = (ROOT / "methods" / paper / "__init__.py").read_text(encoding="utf-8")
    assert (
        "arXiv" in text and text.rstrip().endswith('"""') and "import " not in text.split('"""')[2]
    )


def flags_of(paper: str, hook: str, common: FlagParser) -> set[str]:
    """The flags that a method adds to a parser which has the common ones."""
    before = {action.dest for action in common._actions}
    vars(folder(paper, "flags"))[hook](common)
    return {action.dest for action in common._actions} - before


@pytest.mark.parametrize("paper", PAPERS)
def test_scripts_know_no_flag_of_a_single_method(paper):
    """Whatever only one method needs is read in that method's folder."""
    method = next(name for name, own in methods.METHODS.items() if own == paper)
    training = FlagParser()
    add_training_args(training, method)
    own = flags_of(paper, "add_train_args", training)
    trunk = [ROOT / "train.py", *(ROOT / "training").glob("*.py")]
    plain = {action.dest for action in infer.build_parser("base")._actions}
    drawing = {action.dest for action in infer.build_parser(method)._actions} - plain
    rooms = [
        ROOT / "infer.py",
        ROOT / "eval.py",
        ROOT / "utils.py",
        *(ROOT / "decoding").glob("*.py"),
    ]
    for names, files in ((own, trunk), (drawing - {"model_name"}, rooms)):
        for file in files:
            used = set(re.findall(r"\bargs\.(\w+)", file.read_text(encoding="utf-8")))
            assert not used & names, f"{file.name} reads {used & names} of {paper}"


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_is_read_without_error_and_names_its_run(path, data_here):
    args = train.read_flags(["--config", str(path)])
    assert methods.METHODS[args.method] == path.parent.name
    assert args.exp_name and args.train_file


# ---- a checkpoint says what made it -------------------------------------------------------------

MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"Is {i} odd?"},
            {"role": "assistant", "content": "Yes." if i % 2 else "No."},
        ]
    }
    for i in range(4)
]
DIALOGUE = [{"persona": ["I sail."], "context": "Hi.", "response": "Hello."}]
LABELLED = [{"text": f"It is {i} o'clock.", "values": {"length": "low"}} for i in range(4)]
WORDS = {"values": ["low", "high"], "thresholds": [0.5], "scorer": "words", "version": "1"}
LORA = ["--lora_target_modules", "q_proj", "v_proj"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Per kind: the rows or prompts to train on, and the flags that train and draw."""
    home = tmp_path_factory.mktemp("inputs")
    prompt = {"request": "Name a tree.", "response": "", "targets": ["oak", "elm"]}
    (home / "trees.json").write_text(json.dumps(prompt))
    (home / "manifest.json").write_text(json.dumps({"schema": {"length": WORDS}}))
    files = {
        name: str(write_jsonl(home / f"{name}.jsonl", rows))
        for name, rows in (
            ("peft", DIALOGUES),
            ("delia", MESSAGES),
            ("spt", DIALOGUE),
            ("control", LABELLED),
            ("base", DIALOGUES),
        )
    }
    tree = str(home / "trees.json")
    return {
        "peft": (["--train_file", files["peft"], *LORA], ["--test_file", files["peft"]]),
        "diffuse": (
            ["--train_file", tree, *LORA],
            ["--train_prompts", tree, "--n_generations", "2"],
        ),
        "delia": (
            ["--train_file", files["delia"], "--diverse_ratio", "0", *LORA],
            ["--test_file", files["delia"]],
        ),
        "spt": (["--train_file", files["spt"]], ["--test_file", files["spt"]]),
        "control": (["--train_file", files["control"]], ["--condition", "length=high"]),
    }


@pytest.fixture(scope="module")
def checkpoints(inputs, tiny_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints")
    for method, (training, _) in inputs.items():
        train.main(
            [
                "--method",
                method,
                "--model_name",
                str(tiny_dir),
                "--output_dir",
                str(out),
                "--max_steps",
                "1",
                "--per_device_train_batch_size",
                "1",
                "--gradient_accumulation_steps",
                "1",
                *training,
            ]
        )
    return {method: out / method / "check_1" for method in inputs}


@pytest.mark.parametrize("method", ["peft", "diffuse", "delia", "spt", "control"])
def test_a_checkpoint_needs_no_method_flag(method, checkpoints, inputs, tmp_path):
    """Its run.json names the method, whose flags are there and whose rows are read."""
    out = tmp_path / "out.jsonl"
    infer.main(
        [
            "--model_name_or_path",
            str(checkpoints[method]),
            *inputs[method][1],
            "--save_file",
            str(out),
            "--max_new_tokens",
            "3",
            "--limit",
            "1",
        ]
    )
    row = json.loads(out.read_text().split("\n")[0])
    assert len(row["preds"]) >= 1
    assert json.loads(out.with_suffix(".json").read_text())["settings"]["method"] == method


def test_rows_of_another_kind_are_refused_by_what_they_lack(checkpoints, tmp_path, capsys):
    """A delia checkpoint without --method once took a row with a prompt for messages, and broke."""
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Name a boat."}])
    said = refused(
        capsys,
        2,
        infer.main,
        [
            "--model_name_or_path",
            str(checkpoints["delia"]),
            "--test_file",
            str(file),
            "--save_file",
            str(tmp_path / "out.jsonl"),
        ],
    )
    assert f'{file}:1: field "messages" must be a list of turns' in said


@pytest.mark.parametrize("method", ["diffuse", "delia", "spt", "control"])
def test_another_methods_flag_is_refused_and_not_ignored(method, checkpoints, capsys):
    said = refused(
        capsys,
        2,
        infer.read_flags,
        [
            "--model_name_or_path",
            str(checkpoints["peft"]),
            "--method",
            method,
            "--test_file",
            "x",
            "--save_file",
            "y",
            "--tomato",
            "1",
        ],
    )
    assert "option --tomato is unknown for this method" in said


def test_test_rows_that_were_trained_on_are_told_for_every_kind_of_row(
    checkpoints, inputs, tmp_path, capsys
):
    """Of messages the last question counts, of dialogues with a persona the context."""
    for method in ("delia", "spt"):
        infer.main(
            [
                "--model_name_or_path",
                str(checkpoints[method]),
                *inputs[method][1],
                "--save_file",
                str(tmp_path / f"{method}.jsonl"),
                "--max_new_tokens",
                "2",
            ]
        )
        count = {"delia": 4, "spt": 1}[method]
        assert f"{count} of {count} rows were trained on" in capsys.readouterr().err, method


@pytest.mark.parametrize("method", ["peft", "diffuse", "delia", "spt", "control"])
def test_the_next_command_of_training_is_one_that_infer_takes(method, checkpoints, data_here):
    """train.py prints it; whoever follows it must not meet an unknown flag."""
    args = argparse.Namespace(
        method=method,
        exp_name=method,
        run_name=method,
        output_dir=str(checkpoints[method].parents[1]),
        config=None,
        train_file=["x"],
        test_prompts=[],
        model_name="smollm2",
        leave_out=None,
        leave_in=None,
        n_generations=2,
        max_new_tokens=3,
    )
    command = methods.load(method, "inference").next_command(args, checkpoints[method])
    assert infer.read_flags([str(word) for word in command]).method == method
