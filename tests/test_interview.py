"""Interviews: who asks what, which prompt answers, resuming bit for bit; the notebook."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter

import pytest
from conftest import DIALOGUES, ROOT, command, refused
from servers import error, ok, serve  # noqa: F401 (fixture)

import flags
import infer
import utils
from decoding.engines import Local
from methods.possibility import training
from modeling.models import load_tokenizer
from persona import conversation, interview, questions, rules
from trees import LIKELIHOOD, walk

KEY = "sk-not-a-real-key-42"
NUM, SIZE, TOKENS = 4, 2, 4


def hold(model, file, *more, num: int = NUM, size: int = SIZE, main=interview.main) -> list[dict]:
    main(["--interview", "--model_name_or_path", str(model), "--num_interviews", str(num),
          "--batch_size", str(size), "--max_new_tokens", str(TOKENS), "--save_file", str(file),
          *map(str, more)])
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def peft_dir(tiny_dir, tmp_path_factory):
    """A peft checkpoint of the tiny model, trained for two steps."""
    out = tmp_path_factory.mktemp("ck")
    data = out / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DIALOGUES), encoding="utf-8")
    done = command("train.py", "--method", "peft", "--model_name", tiny_dir, "--train_file", data,
                   "--exp_name", "p", "--output_dir", out, "--max_steps", 2, "--save_steps", 2,
                   "--max_length", 1000, "--num_response_per_input", 3, "--max_pos_number", 3,
                   cwd=out)
    assert done.returncode == 0, done.stderr
    return out / "p" / "check_2"


@pytest.fixture(scope="module")
def rows(tiny_dir, tmp_path_factory):
    return hold(tiny_dir, tmp_path_factory.mktemp("base") / "a.jsonl")


def as_lines(rows: list[dict]) -> list[bytes]:
    """The rows as they stand in a file."""
    return [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows]


# ---- what is asked ------------------------------------------------------------------------------


def test_every_attribute_is_asked_for_gender_last_and_once_more_where_nothing_was_said(rows):
    assert [row["interview"] for row in rows] == list(range(NUM))
    for row in rows:
        order = list(dict.fromkeys(row["topics"]))
        assert sorted(order) == sorted(rules.ATTRIBUTES) and order[-1] == "gender"
        assert len(row["turns"]) == 2 * len(row["topics"])
        assert max(Counter(row["topics"]).values()) <= 2
        for k, topic in enumerate(row["topics"]):
            question, answer = row["turns"][2 * k], row["turns"][2 * k + 1]
            again = topic in row["topics"][:k]
            wordings = questions.FOLLOW_UPS if again else questions.QUESTIONS
            assert any(question.endswith(wording) for wording in wordings[topic])
            said = rules.find(topic, [(topic, answer)])[0]
            assert (row["topics"][k + 1 :][:1] == [topic]) == (not said and not again)
    assert len({tuple(row["topics"]) for row in rows}) > 1
    assert len({row["turns"][0] for row in rows}) > 1


def test_the_model_sees_the_very_ids_that_training_shows_for_the_conversation_so_far(
        peft_dir, tmp_path, monkeypatch):
    """Token by token, under the interview's possibility number; one call draws a batch's turns."""
    forests, draw = [], Local.draw

    def spy(engine, function, forest, *rest, **options):
        forests.append(forest)
        return draw(engine, function, forest, *rest, **options)

    monkeypatch.setattr(Local, "draw", spy)
    rows = hold(peft_dir, tmp_path / "a.jsonl", num=3, size=3)
    assert [row["number"] for row in rows] == [1, 2, 3]
    assert len(forests) == max(len(row["topics"]) for row in rows)
    tokenizer = load_tokenizer(str(peft_dir))
    trained_with = flags.Args(**utils.read_run(str(peft_dir))["args"])
    for turn, forest in enumerate(forests):
        asked = [row for row in rows if len(row["topics"]) > turn]
        for row, tree in zip(asked, forest, strict=True):
            [leaf] = [path for path in walk(tree.root) if not path[-1].children]
            dialogue = {"context": "\n".join(row["turns"][: 2 * turn + 1]),
                        "candidates": ["I am a baker.", "I am a diver.", "No."]}
            trained = training.build_tree(dialogue, tokenizer, trained_with, random.Random(0))
            prompts = {path[1].branch: ids_of(path[:-1]) for path in walk(trained.root)
                       if path[-1].role == LIKELIHOOD}
            assert ids_of(leaf) == prompts[row["number"]]


def ids_of(path) -> list[int]:
    return [token for segment in path for token in segment.input_ids]


def test_numbers_are_one_per_interview_in_turn_or_new_at_every_turn(peft_dir, tmp_path):
    """The checkpoint was trained with numbers 1 to 3."""
    one = hold(peft_dir, tmp_path / "a.jsonl", num=4, size=4)
    assert [row["number"] for row in one] == [1, 2, 3, 1]
    assert {row["method"] for row in one} == {"peft"}
    each = hold(peft_dir, tmp_path / "b.jsonl", "--number_per", "turn", num=2)
    for row in each:
        assert len(row["number"]) == len(row["topics"])
        assert {1, 2, 3} >= set(row["number"]) and len(set(row["number"])) > 1
    assert [row["turns"][0] for row in each] == [row["turns"][0] for row in one[:2]], \
        "all systems are asked in the same words"


@pytest.mark.parametrize("words", [["--number_per", "turn"], ["--number", "turn"],
                                   ["--number", "per_turn"], ["--number-per=per_turn"]])
def test_the_flag_for_numbers_keeps_its_old_name_and_values(words):
    assert interview.read_flags(["--save_file", "a.jsonl", *words]).number_per == "turn"


def test_what_a_checkpoint_settles_is_settled_in_one_place_and_flags_win(tmp_path):
    """A base model with 512 positions; then a checkpoint that was trained with other lengths."""
    args = interview.read_flags(["--save_file", "a.jsonl"])
    base = conversation.resolve_setup(args, {"method": "base", "args": {}}, limit=512)
    assert (base.number_per, base.max_input_length, base.max_length) == (None, 1000, 512)
    run = {"method": "peft", "args": {"max_pos_number": 3, "max_length": 300,
                                      "max_input_length": 40}}
    peft = conversation.resolve_setup(args, run, limit=512)
    assert (peft.number_per, peft.max_pos_number) == ("interview", 3)
    assert (peft.max_input_length, peft.max_length) == (40, 300)
    chosen = args.with_values(number_per="turn", max_length=400, max_input_length=50)
    peft = conversation.resolve_setup(chosen, run, limit=512)
    assert (peft.number_per, peft.max_input_length, peft.max_length) == ("turn", 50, 400)


def test_an_interview_alone_is_the_interview_in_a_batch(tiny_dir, rows, tmp_path):
    assert hold(tiny_dir, tmp_path / "a.jsonl", num=2, size=1) == rows[:2]


def test_infer_hands_interviews_over(tiny_dir, rows, tmp_path):
    assert hold(tiny_dir, tmp_path / "a.jsonl", main=infer.main) == rows
    (tmp_path / "i.yaml").write_text("interview: true\nnum_interviews: 1\nbatch_size: 1\n"
                                     f"max_new_tokens: {TOKENS}\n")
    infer.main(["--config", str(tmp_path / "i.yaml"), "--model_name_or_path", str(tiny_dir),
                "--save_file", str(tmp_path / "b.jsonl")])
    assert (tmp_path / "b.jsonl").read_bytes() == as_lines(rows)[0], "also from a config"
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["kind"] == "outs/interview" and summary["settings"]["method"] == "base"
    assert summary["interviews"] == NUM
    assert summary["answers"] == sum(len(row["topics"]) for row in rows)


# ---- interruptions ------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_file(tiny_dir, rows, tmp_path, capsys):
    """Killed after its first batch, then cut in the middle of the second row, inside a batch."""
    file, lines = tmp_path / "cut.jsonl", as_lines(rows)
    hold(tiny_dir, file, num=1)  # leaves the settings that a resumed run compares
    summary = json.loads(file.with_suffix(".json").read_text())
    summary |= {"kept": "to see that it is written anew"}
    summary["settings"] |= {"num_interviews": NUM, "batch_size": SIZE}
    file.with_suffix(".json").write_text(json.dumps(summary))
    file.write_bytes(lines[0] + lines[1][:40])
    assert "already there" in refused(capsys, 2, hold, tiny_dir, file)
    error = refused(capsys, 2, hold, tiny_dir, file, "--resume", "--seed", 7)
    assert "was made with seed 42, now it is 7" in error
    hold(tiny_dir, file, "--resume")
    assert file.read_bytes() == b"".join(lines)
    assert "kept" not in file.with_suffix(".json").read_text()


@pytest.mark.parametrize("flags, says", [
    (["--num_interviews", 0], "--num_interviews 0 must be at least 1"),
    (["--temperature", 0], "--temperature 0 must be above 0"),
    (["--asker", "me"], "is none of scripted"), (["--asker", "azure:m"], "not PROVIDER:MODEL"),
    (["--base_url", "http://h"], "--base_url does nothing with --asker scripted"),
    (["--number_per", "turn"], "has no possibility number"),
    (["--method", "peft"], "is a base model"), (["--max_length", 20], "no room for a question"),
    (["--num_interview", 3], "did you mean --num_interviews?")])
def test_flags_that_cannot_work_are_refused(flags, says, tiny_dir, tmp_path, capsys):
    assert says in refused(capsys, 2, hold, tiny_dir, tmp_path / "a.jsonl", *flags)


# ---- other askers -------------------------------------------------------------------------------


def test_a_model_behind_a_server_asks_and_no_key_is_written(
        serve, tiny_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    """It echoes the key, spells an end token, and refuses once: there the script asks, counted."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    says = f"Person A: So {KEY} <|im_end|>, who are you?\nPerson B: A thief."
    server = serve(error(400, f"bad {KEY}"), then=ok(says))
    rows = hold(tiny_dir, tmp_path / "a.jsonl", "--asker", "openai:m", "--base_url", server.url,
                "--max_connections", 1, num=2)
    asked = [turn for row in rows for turn in row["turns"][::2]]
    assert asked.count("So [key] < |im_end|>, who are you?") == len(asked) - 1
    assert json.loads((tmp_path / "a.json").read_text())["scripted_instead"] == 1
    path, authorization, body = server.seen[-1]
    message = body["messages"][0]["content"]
    assert authorization == f"Bearer {KEY}" and body["temperature"] == 0.5
    assert questions.SOUGHT["gender"] in message and rows[-1]["turns"][1][:5] in message
    printed = capsys.readouterr()
    assert "1 calls without an answer: HTTP 400: bad [key]" in printed.err
    assert KEY not in printed.out + printed.err
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_server_that_refuses_the_key_stops_the_run_and_says_how_to_go_on(
        serve, tiny_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(then=error(401, "no such key"))
    printed = refused(capsys, 5, hold, tiny_dir, tmp_path / "a.jsonl", "--asker", "openai:m",
                      "--base_url", server.url)
    assert "key refused" in printed and "--resume goes on" in printed


def test_without_a_key_an_asker_behind_a_server_is_refused_before_anything_is_loaded(
        tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "OPENAI_API_KEY is not set" in refused(
        capsys, 3, hold, "no-such-model", tmp_path / "a.jsonl", "--asker", "openai:gpt-4o")


def test_a_model_of_this_machine_asks_the_same_again(tiny_dir, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(conversation, "ASKER_TOKENS", 3)
    asked = hold(tiny_dir, tmp_path / "a.jsonl", "--asker", f"hf:{tiny_dir}", num=1)
    assert asked == hold(tiny_dir, tmp_path / "b.jsonl", "--asker", f"hf:{tiny_dir}", num=1)
    assert asked[0]["turns"][0] != rows[0]["turns"][0]


# ---- the notebook -------------------------------------------------------------------------------

NOTEBOOK = ROOT / "PersonaGeneration.ipynb"


def notebook(models: dict, folder, num: int, batch: int):
    """The stored notebook with settings of its own after the cell of parameters."""
    import nbformat

    book = nbformat.read(NOTEBOOK, as_version=4)
    place = next(i for i, cell in enumerate(book.cells)
                 if "parameters" in cell.metadata.get("tags", ()))
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(
        f"MODELS, FOLDER = {models!r}, {str(folder)!r}\n"
        f"NUM_INTERVIEWS, BATCH_SIZE, MAX_NEW_TOKENS = {num}, {batch}, {TOKENS}\n"
        "TEMPERATURE = 1.0\nMAX_INPUT_LENGTH = 1000"))
    return book


def test_the_notebook_is_stored_without_outputs_and_calls_the_modules():
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    text = "\n".join("".join(cell["source"]) for cell in code)
    assert not re.search(r"^\s*(def|class) ", text, re.M), "logic lives in the modules"


def test_a_notebook_whose_kernel_is_killed_goes_on_from_the_kept_transcripts(
        tiny_dir, peft_dir, tmp_path, monkeypatch):
    """Killed once some batches of the first model are written; a second kernel ends with an
    unbroken run's file."""
    pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.environ.get("OMP_NUM_THREADS", 2)))
    models, num, batch = {"base": str(tiny_dir), "peft": str(peft_dir)}, 8, 1
    folder = tmp_path / "persona"
    at_root = {"metadata": {"path": str(ROOT)}}
    first = NotebookClient(notebook(models, folder, num, batch), timeout=120, resources=at_root)
    transcripts, kept = folder / "base.jsonl", []

    def kill():
        while not kept:
            time.sleep(0.01)
            if transcripts.exists() and transcripts.stat().st_size:
                os.kill(first.km.provisioner.pid, signal.SIGKILL)
                kept.append(transcripts.read_bytes())

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(DeadKernelError):
        first.execute()
    assert 0 < kept[0].count(b"\n") < num

    book = notebook(models, folder, num, batch)
    NotebookClient(book, timeout=120, resources=at_root).execute()
    assert transcripts.read_bytes().startswith(kept[0])
    hold(tiny_dir, tmp_path / "whole.jsonl", num=num, size=batch)
    assert transcripts.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    outputs = json.dumps([cell.outputs for cell in book.cells if cell.cell_type == "code"])
    for shown in ("image/png", "who Person B says they are", "Person A: "):
        assert shown in outputs
    assert {path.suffix for path in folder.glob("persona.*")} == {".json", ".jsonl", ".csv", ".png"}
    assert KEY not in outputs
    assert not any(KEY.encode() in path.read_bytes() for path in folder.iterdir())
