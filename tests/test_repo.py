"""The repository itself: README commands, layout, method modules, and things that must never be in it."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import time

import pytest
from conftest import ROOT, command

import infer
import train
from flags import parse_flags
from methods import METHODS, load_method

HOOKS = ["add_args", "load_rows", "prepare_model", "build_tree", "compute_loss", "decode_tree", "decode_messages"]
SCRIPTS = {"train.py": train, "infer.py": infer, "eval.py": importlib.import_module("eval")}
HANDED_OVER = {"--interview": interview, "--persona": demographics}  # a first word that hands a script over to a module


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\n") if name]


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r"\s*(python|accelerate launch .*?) ?\S*\.py ", line)]


def test_readme_shows_the_published_commands():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").split())
    for part in ("--exp_name mistral_peft --per_device_train_batch_size 1", "--max_num_negatives_per_sample 30",
                 "--model_name_or_path checkpoints/mistral_peft/check_1000/", "--save_file eval_logs/out.pkl"):
        assert part in text


@pytest.mark.parametrize("line", readme_commands() or ["none"])
def test_every_readme_command_parses(line):
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    argv = words[words.index(script) + 1:]
    if script not in SCRIPTS:
        assert (ROOT / script).is_file()
        return
    if argv[0] in HANDED_OVER:
        parse_flags(HANDED_OVER[argv[0]].build_parser, argv[1:])
        return
    args = parse_flags(SCRIPTS[script].build_parser, argv)
    if script == "train.py":
        train.check_flags(args)


@pytest.mark.parametrize("name", sorted(set(METHODS.values())))
def test_method_modules_hold_the_same_functions_in_one_order(name):
    source = inspect.getsource(importlib.import_module(f"methods.{name}"))
    places = [re.search(rf"^(?:def {hook}\(|{hook} = )", source, re.M) for hook in HOOKS]
    assert all(places), "a hook is missing"
    assert [p.start() for p in places] == sorted(p.start() for p in places)


def test_every_method_name_loads_its_module():
    assert {load_method(name).__name__ for name in METHODS} == {f"methods.{module}" for module in METHODS.values()}


def test_scripts_do_not_name_methods_beyond_their_defaults():
    """What only one method needs lives in that method's module."""
    for script in ("infer.py", "eval.py"):
        assert not re.search(r'== "(peft|otm|oto)"', (ROOT / script).read_text(encoding="utf-8"))


def test_configs_are_resolved_without_error(tmp_path):
    for path in sorted((ROOT / "configs" / "possibility").glob("*.yaml")):
        args = parse_flags(train.build_parser, ["--config", str(path)])
        train.check_flags(args)
        assert args.exp_name == path.stem or args.exp_name == "demo_peft"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_answers_before_anything_heavy_is_loaded(script, tmp_path):
    """Best of three, half a second: torch alone takes longer than that to import."""
    times = []
    for _ in range(3):
        start = time.time()
        done = command(script, "--help", cwd=tmp_path)
        times.append(time.time() - start)
        assert done.returncode == 0 and "--config" in done.stdout
    code = f"import sys; sys.argv = ['x', '--help']\nimport runpy\ntry: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    assert subprocess.run(["python3", "-c", code], capture_output=True, cwd=ROOT).returncode == 0
    assert min(times) < 0.5


def test_no_unsafe_calls_keys_or_machine_paths_are_tracked():
    bad = [r"pickle\.load\b", "trust_remote_code" + "=True", r"yaml\.load\(", r"\bsk-[A-Za-z0-9]{20}", r"/home/\w+/", r"FIX" + "ME"]
    for name in tracked():
        if name.endswith((".py", ".md", ".yaml", ".toml", ".ipynb", "Makefile")):
            text = (ROOT / name).read_text(encoding="utf-8")
            found = [pattern for pattern in bad if re.search(pattern, text) and name != "tests/test_repo.py"]
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
