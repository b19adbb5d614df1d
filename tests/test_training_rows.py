"""Rows, their trees, their order and number: all that is settled before a model is loaded."""

from __future__ import annotations

import math
from types import SimpleNamespace

import datasets
import pytest
from conftest import DIALOGUES, refused, write_jsonl
from training_cases import command_for
from transformers import Trainer

import train
from flags import Args
from methods import defaults
from methods.possibility import training
from training.rows import load_rows
from training.trainer import Forest, Schedule, TreeStream, make_schedule
from trees import LIKELIHOOD, Segment, Tree

# ---- rows, order and schedule -------------------------------------------------------------------


def test_a_hub_data_set_is_read_from_its_train_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(DIALOGUES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("grandma/dialogues") == DIALOGUES
    assert asked == [("grandma/dialogues", "train")]


def test_a_bad_row_of_a_hub_data_set_is_named(monkeypatch, capsys):
    rows = datasets.Dataset.from_list([DIALOGUES[0], DIALOGUES[1] | {"candidates": []}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    message = refused(capsys, 2, load_rows, "grandma/dialogues")
    assert 'grandma/dialogues, row 2: field "candidates" is empty' in message


def test_a_data_set_that_is_neither_here_nor_at_the_hub_names_the_files_that_are(capsys):
    message = refused(capsys, 3, load_rows, "nobody/nothing")
    assert '"nobody/nothing" is no file here' in message and "data/train_dialogs_1k" in message


def test_the_limit_is_applied_once_and_by_the_method(tmp_path, train_file):
    args = train.read_flags(["--train_file", str(train_file), "--limit", "3"])
    assert training.load_rows(args) == DIALOGUES[:3]


def test_every_epoch_has_its_own_order_of_all_rows_whatever_was_looked_at_before():
    """Five rows; items 0-4 are epoch 0, 5-9 epoch 1. A stream read backwards gives the same."""
    def build_tree(row, tokenizer, args, rng):
        return row["number"], rng.random()

    method = SimpleNamespace(order_rows=defaults.shuffled, build_tree=build_tree)
    rows = [{"number": number} for number in range(5)]

    def stream():
        return TreeStream(method, rows, None, Args(seed=3), 10)

    forth = [stream()[item] for item in range(10)]
    back = stream()
    assert [back[item] for item in reversed(range(10))] == forth[::-1]
    orders = [[number for number, _ in forth[start:start + 5]] for start in (0, 5)]
    assert sorted(orders[0]) == sorted(orders[1]) == [0, 1, 2, 3, 4] and orders[0] != orders[1]
    assert len({draw for _, draw in forth}) == 10, "every row draws anew every epoch"


def test_a_forest_builds_a_tree_when_it_is_looked_at_and_once():
    built = []

    def build_tree(row, tokenizer, args, rng):
        built.append(row)
        return Tree(Segment([1], children=[Segment([2], LIKELIHOOD)]))

    forest = Forest(SimpleNamespace(build_tree=build_tree), ["a", "b", "c"], None, Args(seed=0))
    assert len(forest) == 3 and built == []
    assert forest[1] is forest[1] and built == ["b"]
    assert len(list(forest)) == 3 and sorted(built) == ["a", "b", "c"]


@pytest.mark.parametrize(("rows", "epochs", "max_steps", "processes", "total"), [
    (10, 3, -1, 1, 15),  # 30 contexts, 2 a step
    (10, 3, -1, 2, 8),  # 4 a step over two processes: 7.5, the last one half full
    (10, 3, 7, 1, 7),
])
def test_a_schedule_counts_micro_steps(rows, epochs, max_steps, processes, total):
    args = Args(per_device_train_batch_size=2, num_train_epochs=epochs, max_steps=max_steps,
                gradient_accumulation_steps=4)
    schedule = make_schedule(rows, args, processes)
    assert schedule == Schedule(2 * processes, total, 4)
    assert schedule.updates == math.ceil(total / 4)
    assert [schedule.micro_steps(updates) for updates in (0, 1, schedule.updates)] == \
        [0, 4, total]


def test_parameter_groups_are_those_of_transformers(tiny_model):
    """All tensors of a layer and the embedding: the norms have no decay."""
    tiny_model.model.layers[0].requires_grad_(False)
    groups = defaults.one_rate(tiny_model, Args(weight_decay=0.1))
    decayed = Trainer.get_decay_parameter_names(None, tiny_model)
    named = [(name, p) for name, p in tiny_model.named_parameters() if p.requires_grad]
    expected = [[p for name, p in named if (name in decayed) is decays] for decays in (True, False)]
    for group, params, decay in zip(groups, expected, (0.1, 0.0), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in params]
        assert group["weight_decay"] == decay
    assert all(group["params"] for group in groups)


# ---- before a run -------------------------------------------------------------------------------


DRY_RUN = """\
method peft: 1 rows, 124 tokens as trees, 360 as padded rows (2.9 times)

---- row 1 ----
  <|im_start|>user
A conversation:

Person A: Mine sings.

Person B could go on in many different ways. Write what Person B says next: possibility number #
  3<|im_end|>
<|im_start|>assistant

+ Mine deletes the keyboard.<|im_end|>
- Give her a‹ to›wel.
  4<|im_end|>
<|im_start|>assistant

+ Give her a towel.<|im_end|>
- Mine‹ d›eletes the‹ ke›yboard.
tree 124 tokens, padded rows 4 x 90 = 360: 2.9 times
"""


def test_a_dry_run_prints_what_every_number_learns_and_unlearns(tiny_dir, tmp_path, capsys):
    """Numbers 3 and 4 share the prompt. Each learns its reply to the end token (+), and unlearns
    the first token of the other's content words (-): mine, give, her, a and the are none."""
    row = {"context": "Mine sings.",
           "candidates": ["Mine deletes the keyboard.", "Give her a towel."]}
    file = write_jsonl(tmp_path / "one.jsonl", [row])
    train.main(command_for(tiny_dir, file, tmp_path, "--num_response_per_input", "2", "--dry_run"))
    assert capsys.readouterr().out == DRY_RUN
    assert not (tmp_path / "peft").exists(), "nothing is trained"


def test_rows_that_do_not_fit_are_counted_and_all_of_them_is_an_error(tiny_dir, tmp_path, capsys):
    """The first row has 200 words in one reply: 600 tokens and more never fit into 400."""
    long = {"context": "Hi.\nHello.",
            "candidates": [" ".join(["spaghetti"] * 200), "b", "c", "d"]}
    file = write_jsonl(tmp_path / "two.jsonl", [long, DIALOGUES[0]])
    train.main(command_for(tiny_dir, file, tmp_path, "--max_length", "400", "--dry_run"))
    assert "1 rows do not fit and are dropped" in capsys.readouterr().out
    file = write_jsonl(tmp_path / "bad.jsonl", [long])
    message = refused(capsys, 2, train.main,
                      command_for(tiny_dir, file, tmp_path, "--max_length", "400"))
    assert "no row fits into --max_length 400" in message
    assert "hint: raise --max_length" in message
