"""Flags and configs.

What is mistyped is named with its neighbour, and a file's value counts as a flag's.
"""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import command, make_tokenizer, refused, write_jsonl

import infer
import train
from flags import RETIRED_FLAGS, Args
from methods.possibility import training
from modeling.models import load_tokenizer
from modeling.prompts import encode_prompt


def flags(folder, text: str, *argv: str, script=train):
    """A script's flags, read from a config with this text and the given command line."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return script.read_flags(["--config", str(path), *argv])


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--lora_rnk", "8"],
            "option --lora_rnk is unknown for this method\nhint: did you mean --lora_r?",
        ),
        (
            ["--max-stps=9"],
            "option --max_stps is unknown for this method\nhint: did you mean --max_steps?",
        ),
        (
            ["--max_step", "9"],
            "option --max_step is unknown for this method\nhint: did you mean --max_steps?",
        ),  # no prefixes
        (
            ["--tomato"],
            "option --tomato is unknown for this method\n"
            "hint: python train.py --help lists all flags",
        ),
        (
            ["salad.jsonl"],
            "unexpected argument 'salad.jsonl'\nhint: python train.py --help lists all flags",
        ),
        (
            ["--max_steps", "many"],
            "--max_steps invalid int value: 'many'\nhint: python train.py --help",
        ),
        (["--method", "base"], "--method base cannot be trained\nhint: one of peft, otm, oto"),
    ],
)
def test_an_unknown_flag_is_told_its_neighbour(capsys, words, said):
    assert f"error: {said}" in refused(capsys, 2, train.read_flags, ["--train_file", "x", *words])


@pytest.mark.parametrize(("key", "near"), [("lora_rnk", "lora_r"), ("train-fil", "train_file")])
def test_an_unknown_key_is_named_with_file_line_and_neighbour(tmp_path, capsys, key, near):
    """Two comment or blank lines and one good key stand above, so the bad one is on line 4."""
    said = refused(
        capsys, 2, flags, tmp_path, f"# dinner\nseed: 1\n\n{key}: 8\n", "--train_file", "x"
    )
    assert (
        f'{tmp_path}/run.yaml:4: key "{key}" is unknown' in said
        and f"hint: did you mean --{near}?" in said
    )


@pytest.mark.parametrize("name", RETIRED_FLAGS)
def test_a_retired_flag_says_what_replaces_it_on_the_command_line_and_in_a_file(
    tmp_path, capsys, name
):
    dashed = "--" + name.replace("_", "-")
    said = refused(capsys, 2, train.read_flags, ["--train_file", "x", dashed, "0.1"])
    assert f"error: option --{name} was removed\nhint: {RETIRED_FLAGS[name]}" in said
    said = refused(capsys, 2, flags, tmp_path, f"{name}: 0.1\n", "--train_file", "x")
    assert f'run.yaml:1: key "{name}" was removed\nhint: {RETIRED_FLAGS[name]}' in said


def test_every_flag_that_a_retired_one_points_to_exists():
    scripts = [train.build_parser("peft"), infer.build_parser("base")]
    known = {action.dest for parser in scripts for action in parser._actions}
    for name, hint in RETIRED_FLAGS.items():
        assert name not in known
        assert {
            word.strip(";,.()")[2:] for word in hint.split() if word.startswith("--")
        } <= known, hint


def test_a_missing_required_flag_is_named(capsys):
    said = refused(capsys, 2, train.read_flags, ["--seed", "1"])
    assert "required: --train_file\nhint: python train.py --help" in said


# ---- config files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(
            "- seed: 1\n", ": must be a mapping of flag names to values, got list", id="a list"
        ),
        pytest.param(
            "", ": must be a mapping of flag names to values, got NoneType", id="an empty file"
        ),
        pytest.param(
            "seed: 1\nlimit: 2\nseed: 3\n", ":3: key 'seed' stands twice", id="a key twice"
        ),
        pytest.param("seed: 1\nlimit: [2\n", ":3: not valid YAML: ", id="a bracket left open"),
        pytest.param(
            "max_steps: many\n",
            ":1: max_steps must be of type int, got 'many'",
            id="a word for a number",
        ),
        pytest.param(
            "seed: 1\nmax_steps: 2.5\n",
            ":2: max_steps must be of type int, got 2.5",
            id="half a step",
        ),
        pytest.param(
            "max_steps: true\n",
            ":1: max_steps must be of type int, got True",
            id="yes for a number",
        ),
        pytest.param(
            "seed: [1, 2]\n", ":1: seed must be one value, got [1, 2]", id="a list for a value"
        ),
        pytest.param(
            "lora_target_modules: q_proj\n",
            ":1: lora_target_modules must be a list, got 'q_proj'",
            id="a value for a list",
        ),
        pytest.param(
            "clip_norm: 'yes'\n",
            ":1: clip_norm must be true or false, got 'yes'",
            id="a word for a switch",
        ),
        pytest.param(
            "number: 1\n", ":1: number must be true or false, got 1", id="a number for a switch"
        ),
        pytest.param(
            "attn_implementation: flash\n",
            ":1: attn_implementation must be one of sdpa, eager, flex_attention, got 'flash'",
            id="no choice",
        ),
    ],
)
def test_a_bad_config_is_refused_with_file_and_line(tmp_path, capsys, text, said):
    assert f"error: {tmp_path}/run.yaml{said}" in refused(
        capsys, 2, flags, tmp_path, text, "--train_file", "x"
    )


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system"]
)
def test_a_tag_that_would_run_code_is_refused_and_runs_nothing(tmp_path, capsys, value):
    said = refused(
        capsys, 2, flags, tmp_path, f"seed: 1\nexp_name: {value.format(tmp_path / 'ran')}\n"
    )
    assert "run.yaml:2: unsafe tag: " in said and "hint: use plain key: value lines" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["", "supper.yaml"])
def test_a_config_that_is_missing_or_a_folder_is_named(tmp_path, capsys, name):
    said = refused(capsys, 2, train.read_flags, ["--config", str(tmp_path / name)])
    assert (
        f"config {tmp_path / name} is not a file\nhint: give a YAML file; examples are in configs/"
        in said
    )


def test_1e_4_in_a_file_is_a_number(tmp_path, capsys):
    # YAML 1.1 wants a dot in a float and reads 1e-4 as text
    assert yaml.safe_load("1e-4") == "1e-4"
    with pytest.raises(SystemExit) as stop:
        flags(tmp_path, "learning_rate: 1e-4\n", "--train_file", "x", "--print_config")
    assert stop.value.code == 0
    assert "learning_rate: 0.0001\n" in capsys.readouterr().out


def test_a_printed_config_gives_the_same_flags_when_read_back(tmp_path, capsys):
    argv = [
        "--train_file",
        "talk é.jsonl",
        "--clip_norm",
        "--number",
        "--no_ul",
        "--lora_target_modules",
        "q",
        "v",
        "--learning_rate",
        "3e-5",
        "--resume",
    ]
    meant = vars(train.read_flags(argv))
    with pytest.raises(SystemExit):
        train.read_flags([*argv, "--print_config"])
    again = vars(flags(tmp_path, capsys.readouterr().out))
    assert again == meant | {"config": str(tmp_path / "run.yaml")}
    assert meant["resume"] == "newest" and meant["numbered_prompts"] is True


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    """Defaults: seed 42, save_steps 500, loss_steps 100."""
    text = "train_file: a.jsonl\nseed: 1\nsave_steps: 2\n"
    args = flags(tmp_path, text, "--seed", "3")
    assert (args.train_file, args.seed, args.save_steps, args.loss_steps) == ("a.jsonl", 3, 2, 100)


def test_hyphens_count_as_underscores_in_names_but_not_in_values(tmp_path):
    text = "train-file: a-b.jsonl\nclip-norm: true\n"
    args = flags(tmp_path, text, "--max-steps=7", "--exp-name", "my-run")
    assert (args.train_file, args.clip_norm, args.max_steps, args.exp_name) == (
        "a-b.jsonl",
        True,
        7,
        "my-run",
    )


@pytest.mark.parametrize(
    ("word", "value"), [("--number", True), ("--no_number", False), ("--no-number", False)]
)
def test_a_switch_with_two_sides_is_turned_off_by_either_spelling(word, value):
    assert train.read_flags(["--train_file", "x", "--no_ul", word]).numbered_prompts is value


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("clip_norm: true", "clip_norm", True),
        ("clip_norm: false", "clip_norm", False),
        ("clip_norm: yes", "clip_norm", True),  # YAML 1.1's other word for true
        ("number: true", "numbered_prompts", True),  # an alias
        ("numbered_prompts: null", "numbered_prompts", True),  # derived: there is unlikelihood
        ("exp_name: 2412", "exp_name", "2412"),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("method: oto", "exp_name", "oto"),  # the method's own default
    ],
)
def test_a_value_in_a_file_is_what_its_flag_would_have_been(tmp_path, text, name, value):
    read = getattr(flags(tmp_path, text, "--train_file", "x"), name)
    assert read == value and type(read) is type(value)


# ---- flags against each other -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--max_steps 0",
            "--max_steps 0 trains nothing\nhint: give a positive number, or -1 for whole epochs",
        ),
        ("--max_steps -2", "--max_steps -2 trains nothing"),
        (
            "--save_steps 9 --gradient_accumulation_steps 4",
            "--save_steps 9 is no multiple of --gradient_accumulation_steps 4\n"
            "hint: checkpoints are made between updates; use 12",
        ),
        *[
            (f"--{name} {value}", f"--{name} {value} must be at least 1")
            for name, value in (
                ("per_device_train_batch_size", 0),
                ("gradient_accumulation_steps", 0),
                ("num_train_epochs", -1),
                ("save_steps", -500),
                ("loss_steps", 0),
                ("max_length", 0),
                ("max_input_length", -1),
                ("limit", 0),
                ("lora_r", 0),
            )
        ],
        *[
            (f"--{name} {value}", f"--{name} {value} must be at least 0")
            for name, value in (
                ("learning_rate", -1),
                ("weight_decay", "nan"),
                ("max_grad_norm", "inf"),
                ("lora_alpha", -2),
            )
        ],
        ("--learning_rate fast", "--learning_rate 'fast' is not a number"),
        ("--limit 2.5", "--limit '2.5' is not a whole number"),
        ("--lora_dropout 1.5", "--lora_dropout 1.5 must be a share, 0 to 1"),
    ],
)
def test_training_flags_that_cannot_work_are_refused(capsys, words, said):
    argv = ["--train_file", "x", *words.split()]
    assert f"error: {said}" in refused(capsys, 2, train.read_flags, argv)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--temperature 0",
            "--temperature 0.0 with --decoding sampling must be above 0\n"
            "hint: 0.75 is the published",
        ),
        ("--temperature -1", "--temperature -1.0 with --decoding sampling must be above 0"),
        ("--top_p 0", "--top_p 0 must be above 0 and at most 1"),
        ("--top_p 1.1", "--top_p 1.1 must be above 0 and at most 1"),
        ("--min_p 1", "--min_p 1 must be at least 0 and below 1"),
        ("--top_k -1", "--top_k -1 must be at least 0"),
        ("--num_response_per_input 0", "--num_response_per_input 0 must be at least 1"),
        ("--max_new_tokens 0", "--max_new_tokens 0 must be at least 1"),
        ("--batch_size -8", "--batch_size -8 must be at least 1"),
        ("--timeout 0", "--timeout 0 must be above 0"),
    ],
)
def test_decoding_flags_that_cannot_work_are_refused(capsys, words, said):
    argv = ["--test_file", "x", "--save_file", "y", *words.split()]
    assert f"error: {said}" in refused(capsys, 2, infer.read_flags, argv)


@pytest.mark.parametrize(
    "words", ["", "--max_steps -1", "--save_steps 12 --gradient_accumulation_steps 4"]
)
def test_flags_that_work_are_let_through(words):
    assert train.read_flags(["--train_file", "x", *words.split()]).train_file == "x"


def test_a_decodings_own_flags_have_defaults_there_and_do_nothing_elsewhere():
    """Five responses: five beams, each a group of its own, under one prompt."""
    args = infer.read_flags(["--test_file", "x", "--save_file", "y", "--decoding", "diverse"])
    assert (args.num_beams, args.num_beam_groups, args.num_branches) == (5, 5, 1)
    assert (args.diversity_penalty, args.group_numbers, args.temperature) == (5.0, "first", 1.0)
    each = infer.read_flags(
        ["--test_file", "x", "--save_file", "y", "--decoding", "diverse", "--numbers", "per_group"]
    )  # the flag's former name
    assert each.num_branches == 5


def test_flags_are_read_only_once_they_are_parsed():
    args = train.read_flags(["--train_file", "x"])
    with pytest.raises(AttributeError, match="read-only"):
        args.seed = 7
    changed = args.with_values(seed=7)
    assert (args.seed, changed.seed, changed.train_file) == (42, 7, "x")
    assert isinstance(changed, Args)


@pytest.mark.parametrize(
    ("script", "groups"),
    [
        (
            "train.py",
            ["method:", "data:", "model:", "training:", "output:", "methods peft, otm, oto:"],
        ),
        (
            "infer.py",
            [
                "what:",
                "decoding:",
                "choosing:",
                "server:",
                "running:",
                "--decoding sampling, list, iterative, verbalized:",
                "--decoding beam, diverse:",
                "--decoding diverse:",
                "--decoding list, iterative, verbalized:",
            ],
        ),
        ("eval.py", ["what:"]),
    ],
)
def test_help_shows_the_groups_and_loads_nothing_heavy(tmp_path, script, groups):
    done = command(script, "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "argparse" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "peft", "sklearn", "nltk"}
    assert set(groups) <= set(done.stdout.splitlines())


# ---- flags against data and tokenizers ----------------------------------------------------------


def test_rows_with_few_or_equal_candidates_are_used_and_counted(tmp_path, capsys):
    """Asked for 2: row 1 has one; row 2 repeats itself but for case and full stop.

    Row 3's repeat is its third.
    """
    lists = [["Ho."], ["Ho.", "ho", "Hm."], ["Ho.", "Hm.", "Ho."], ["Ho.", "Hm."]]
    path = write_jsonl(
        tmp_path / "talk.jsonl", [{"context": "Hi.", "candidates": c} for c in lists]
    )
    args = flags(tmp_path, f"train_file: {json.dumps(str(path))}\nnum_response_per_input: 2\n")
    assert [row["candidates"] for row in training.load_rows(args)] == lists
    said = capsys.readouterr().err
    assert (
        "1 of 4 rows have fewer than 2 candidates" in said
        and "1 of 4 rows repeat a candidate" in said
    )


def test_a_tokenizer_without_chat_template_needs_one_or_none(tmp_path, capsys):
    tokenizer = make_tokenizer("bytelevel")
    tokenizer.chat_template = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    template = tmp_path / "ask.jinja"
    template.write_text("Q: {{ messages[0]['content'] }} A:")
    said = refused(capsys, 2, load_tokenizer, tmp_path)
    assert (
        f"{tmp_path} has no chat template\nhint: pass --chat_template none for plain prompts"
        in said
    )
    said = refused(capsys, 2, load_tokenizer, tmp_path, "axe.jinja")
    assert "--chat_template axe.jinja is not a file\nhint: give a Jinja file, or none" in said
    for choice, text in (("none", "Why?\n"), (str(template), "Q: Why? A:")):
        loaded = load_tokenizer(tmp_path, choice)
        assert loaded.decode(encode_prompt(loaded, "Why?")) == text
        assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id
