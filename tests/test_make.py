"""The Makefile: what `make demo` and `make control` run are commands that the scripts accept."""

from __future__ import annotations

import importlib
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

import infer
import train
from data import build_control

RUN = "venv/bin/python"  # neither made nor started here
READERS = {  # what reads the flags of each script
    "train.py": train.read_flags,
    "infer.py": infer.read_flags,
    "eval.py": importlib.import_module("eval").read_flags,  # `import eval` would hide a builtin
    "-m data.build_control": build_control.read_flags,
}


def dry_run(target: str, folder) -> list[str]:
    """The commands that make would run for a target in a new checkout, one a line."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for path in (ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder)
    done = subprocess.run(["make", "-n", target, f"RUN={RUN}"], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ").splitlines()


def steps_of(target: str, folder) -> dict[str, list]:
    """The flags of every Python command of a target, as each script reads them, by script."""
    folder.mkdir()
    steps = {script: [] for script in READERS}
    for line in dry_run(target, folder):
        words = shlex.split(line.partition(">")[0], comments=True)
        if words[0] == RUN and words[1:3] != ["-m", "pip"]:
            length = 2 if words[1] == "-m" else 1
            script = " ".join(words[1 : 1 + length])
            steps[script].append(READERS[script](words[1 + length :]))
    return steps


def test_make_demo_draws_from_the_base_and_from_what_it_trains_and_compares_them(
        tmp_path, data_here):
    """Each step reads what an earlier one writes; each can go on where it stopped."""
    steps = steps_of("demo", tmp_path / "checkout")
    [training] = steps["train.py"]
    base, tuned = steps["infer.py"]
    compared, shown = steps["eval.py"]
    folder_made = f"{training.output_dir}/{training.run_name}/check_{training.max_steps}/"
    assert (training.method, base.method, tuned.method) == ("otm", "base", "otm")
    assert tuned.model_name_or_path == folder_made
    assert training.model_name == base.model_name_or_path == "smollm2"
    assert compared.eval_file == [base.save_file, tuned.save_file]
    assert shown.show == compared.save_file
    assert training.resume and base.resume and tuned.resume
    same = ("test_file", "limit", "num_response_per_input", "decoding", "temperature", "seed")
    assert {name: vars(base)[name] for name in same} == {name: vars(tuned)[name] for name in same}


def test_make_control_trains_and_draws_four_models_of_labelled_texts(tmp_path, data_here):
    steps = steps_of("control", tmp_path / "checkout")
    [labelled] = steps["-m data.build_control"]
    trained, drawn = steps["train.py"], steps["infer.py"]
    assert len(trained) == len(drawn) == 4
    for training, drawing in zip(trained, drawn, strict=True):
        assert training.train_file == f"{labelled.out_dir}/train.jsonl"
        assert drawing.model_name_or_path == \
            f"{training.output_dir}/{training.run_name}/check_{training.max_steps}"
    compared, _ = steps["eval.py"]
    assert sorted(compared.eval_file) == sorted(args.save_file for args in drawn)


def test_the_checks_of_continuous_integration_are_ruff_the_layers_and_all_tests(tmp_path):
    lines = dry_run("lint", tmp_path) + dry_run("test", tmp_path)
    assert f"{RUN} -m ruff check ." in lines and f"{RUN} -m pytest" in lines
    assert ".venv/bin/lint-imports" in lines
    assert "make lint test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
