"""The repository itself: layout, layers, README commands, and things that must never be in it."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import infer
import train
from flags import first_pass, parse_flags
from persona import figures, interview

SCRIPTS = ("train.py", "infer.py", "eval.py")
# What each of the five files at the root may import of the toolkit; import-linter reads packages.
MAY_IMPORT = {
    "utils.py": set(),
    "flags.py": {"utils"},
    "eval.py": {"utils", "flags", "trees", "modeling", "decoding", "scoring", "methods", "persona"},
    "infer.py": {
        "utils",
        "flags",
        "trees",
        "modeling",
        "decoding",
        "scoring",
        "methods",
        "persona",
    },
    "train.py": {
        "utils",
        "flags",
        "trees",
        "modeling",
        "training",
        "decoding",
        "scoring",
        "methods",
        "persona",
        "infer",
    },
}
ROOMS = {"trees", "modeling", "training", "decoding", "scoring", "methods", "persona"}


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\n") if name]


def readme_commands() -> list[str]:
    """Every command of the README and CONTRIBUTING that runs a script or a tool of this project."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    lines = "\n".join(pages).replace("\\\n", " ").splitlines()
    ours = r"\s*(?:python|accelerate launch .*?) (?:\S*\.py|-m (?:data|benchmarks)\.\w+)(?: |$)"
    return [line.strip() for line in lines if re.match(ours, line)]


PUBLISHED = [  # these commands work as they stand, on a machine with a GPU and the hub
    "python train.py --train_file data/train_dialogs_1k.jsonl --loss_steps 100 --save_steps 500 "
    "--learning_rate 5e-5 --output_dir checkpoints --exp_name mistral_peft "
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 2 --num_response_per_input 4 "
    "--max_num_negatives_per_sample 30 --ul_weight 0.5 --max_steps 1000 --max_length 500 "
    "--max_input_length 300 --model_name mistralai/Mistral-7B-Instruct-v0.2 --warmup_steps -1",
    "python infer.py --model_name_or_path checkpoints/mistral_peft/check_1000/ "
    "--num_response_per_input 5 --method peft --temperature 0.75 --decoding sampling "
    "--test_file data/test_dialogs.jsonl --save_file outs/out.jsonl",
    "python eval.py --eval_file outs/out.jsonl --save_file eval_logs/out.pkl",
]


@pytest.mark.parametrize("command", PUBLISHED, ids=["train", "infer", "eval"])
def test_the_published_commands_stand_in_the_readme_whole(command):
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    assert command in " ".join(text.split())


def parser_for(script: str, argv: list[str]):
    """The parser that a command meets.

    That of its method, or of what --interview and --persona start.
    """
    first = first_pass(argv, "method", "interview", "persona")
    if script == "train.py":
        return train.build_parser(first["method"] or "peft")
    if script == "infer.py":
        return (
            interview.build_parser()
            if first["interview"]
            else infer.build_parser(first["method"] or "peft")
        )
    return (
        figures.build_parser()
        if first["persona"]
        else importlib.import_module("eval").build_parser()
    )


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_pages_parses(line, data_here):
    words = shlex.split(line, comments=True)
    if "-m" in words:
        tool = words.index("-m") + 1
        module = importlib.import_module(words[tool])
        assert module.read_flags(words[tool + 1 :])
        return
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, argv = words[place], words[place + 1 :]
    assert script in SCRIPTS, "a tool is run as python -m"
    args = parse_flags(parser_for(script, argv), argv)
    assert args.config is None or (ROOT / args.config).is_file()


def imports_of(path) -> set[str]:
    """The first names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_five_files_stand_at_the_root_and_import_only_what_is_below_them():
    files = {path.name for path in ROOT.glob("*.py")}
    assert files == set(MAY_IMPORT)
    scripts = {name.removesuffix(".py") for name in MAY_IMPORT}
    for name, allowed in MAY_IMPORT.items():
        assert imports_of(ROOT / name) & (ROOMS | scripts) <= allowed, name


def product_files() -> list:
    return [ROOT / name for name in MAY_IMPORT] + [
        path for room in sorted(ROOMS) for path in (ROOT / room).rglob("*.py")
    ]


def test_files_and_functions_stay_short_enough_to_read():
    """350 lines a file, 60 a function."""
    for path in product_files():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize(
    "words",
    [
        "OWN_INFERENCE",
        "OWN_EVALUATION",
        "OWN_ADAPTER",
        "OWN_PLAN",
        r"in vars\(args\)",
        r"vars\(args\)\.get",
        r"hasattr\(",
        r"^\s*args\.\w+ = ",
    ],
)
def test_methods_plug_in_by_hooks_and_args_stay_as_they_are_parsed(words):
    for path in product_files():
        assert not re.search(words, path.read_text(encoding="utf-8"), re.M), path


def test_no_unsafe_calls_keys_or_machine_paths_are_tracked():
    bad = [
        r"pickle\.load\b",
        "trust_remote_code" + "=True",
        r"yaml\.load\(",
        r"\bsk-[A-Za-z0-9]{20}",
        r"/home/\w+/",
        r"FIX" + "ME",
    ]
    for name in tracked():
        if name.endswith((".py", ".md", ".yaml", ".toml", ".ipynb", "Makefile")):
            text = (ROOT / name).read_text(encoding="utf-8")
            found = [
                pattern
                for pattern in bad
                if re.search(pattern, text) and name != "tests/test_repo.py"
            ]
            assert not found, f"{name}: {found}"


def test_nothing_large_or_generated_is_tracked():
    for name in tracked():
        assert not name.startswith(("checkpoints/", "outs/", "eval_logs/", ".venv/"))
        assert (ROOT / name).stat().st_size < 3_000_000, name


def test_requirements_are_pinned():
    for file in ("requirements.txt", "requirements-models.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                assert re.match(r"[\w.\[\]-]+(==[\d.]+|<\d+)(\s+#.*)?$", line), f"{file}: {line}"
