"""utils: what is read is checked, what is written is whole, what is missing is named."""

from __future__ import annotations

import errno
import json
import os
import time

import numpy as np
import pytest
import torch
from conftest import DIALOGUES, make_tokenizer, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import utils
from modeling.checkpoints import check_adapter
from modeling.models import base_fingerprint
from modeling.prompts import count_words, end_of_turn, fit_prompts, keep_latest, label_turns, refuse_special_tokens
from training.rows import load_rows

GOOD = b'{"context": "Is a tomato a fruit?", "candidates": ["Ask the cook."]}\n'
SPOKEN = st.lists(st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=6).map(" ".join), min_size=1)


def refusal(capsys, code: int, call, *args) -> str:
    """What a call says on stderr while it leaves with an exit code; every refusal shows a way out."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    said = capsys.readouterr().err
    assert stop.value.code == code, said
    assert "\nhint: " in said
    return said


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "said"), [
    pytest.param(b"", ": no rows", id="an empty file"),
    pytest.param(b"\n  \n\r\n", ": no rows", id="blank lines only"),
    pytest.param(GOOD + b'\n{"context" "x"}', ":3:12: not JSON: Expecting ':'", id="a colon forgotten"),
    pytest.param(GOOD + b"[1]\n", ":2: expected an object, got list", id="an array among objects"),
    pytest.param(b"3\n", ":1: expected an object, got int", id="a bare number"),
    pytest.param(b'{"a": NaN}', ":1: NaN is not JSON", id="NaN"),
    pytest.param(b'{"a": "\\ud83d"}', ":1: holds half of a surrogate pair", id="half an emoji"),
    pytest.param(b'{"a": ' * 200_000, ":1: maximum recursion depth", id="a pit of brackets"),
    pytest.param(GOOD + b'{"a": 1, "a": 2}', ':2: key "a" stands twice', id="a key twice"),  # json keeps the last
    pytest.param(GOOD + b'{"a": "caf\xe9"}', ":2: not UTF-8 (byte 0xe9 at column 11); iconv", id="Latin-1"),
    pytest.param(GOOD.decode().encode("utf-16"), ": UTF-16, not UTF-8\nhint: iconv -f UTF-16", id="UTF-16"),
])
def test_what_is_no_row_is_named_by_file_line_and_column(tmp_path, capsys, data, said):
    """'{"context" ' takes columns 1 to 11, so the colon is missed at 12; '{"a": "caf' takes 10, so é is byte 11."""
    (path := tmp_path / "talk.jsonl").write_bytes(data)
    assert f"error: {path}{said}" in refusal(capsys, 2, utils.read_jsonl, path)


def test_at_most_twenty_bad_rows_are_shown_and_all_are_counted(tmp_path, capsys):
    (path := tmp_path / "talk.jsonl").write_bytes(b"oops\n" * 23 + GOOD)
    said = refusal(capsys, 2, utils.read_jsonl, path)
    assert said.count(": not JSON") == said.count("error: ") == said.count("  row: oops") == 20
    assert f"bad rows in {path}: 23; and 3 more" in said and f"{path}:20:1:" in said and f"{path}:21:" not in said


@pytest.mark.parametrize("data", [
    pytest.param(GOOD.rstrip(), id="no newline at the end"),
    pytest.param(b"\xef\xbb\xbf" + GOOD, id="a byte order mark"),
    pytest.param(b"\r\n" + GOOD.replace(b"\n", b"\r\n") + b" \r\n", id="Windows line ends and blank lines"),
    pytest.param(b"[\n" + GOOD + b"]", id="one array"),
])
def test_what_editors_add_is_accepted(tmp_path, capsys, data):
    (path := tmp_path / "talk.jsonl").write_bytes(data)
    assert utils.read_jsonl(path, utils.check_row) == [json.loads(GOOD)]
    assert ("is one JSON array; its 1 items are read as rows" in capsys.readouterr().err) == data.startswith(b"[")


@pytest.mark.parametrize(("name", "said"), [
    ("", " is a folder"), ("tolk.jsonl", " is not there"),
    *[(f"x.{s}", f": .{s} files are not read\nhint: convert it to JSONL") for s in ("gz", "parquet", "csv", "pkl")],
])
def test_a_path_that_is_no_jsonl_is_named(tmp_path, capsys, name, said):
    if name.startswith("x."):
        (tmp_path / name).write_bytes(GOOD)
    assert f"error: {tmp_path / name}{said}" in refusal(capsys, 2, utils.read_jsonl, tmp_path / name)


@settings(deadline=None, max_examples=60)
@example(["a\u2028b\u2029c\x85d", "\0", "🍅", "مرحبا", "\r\n", '"\\', "é" * 1_000_000])
@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was_written(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "talk.jsonl"
    rows = [{"context": text, text[:9]: [text, None, 1.5]} for text in texts]
    utils.append_jsonl(path, rows[:1])
    utils.append_jsonl(path, rows[1:])
    assert utils.read_jsonl(path) == rows


@pytest.mark.parametrize(("row", "needed", "said"), [
    ({"text": "Hi."}, True, "needs either \"context\" or \"prompt\", has ['text']"),
    ({"context": "Hi.", "prompt": "Hi."}, True, "needs either \"context\" or \"prompt\", has ['context', 'prompt']"),
    ({"prompt": 3}, True, 'field "prompt" must be a string, got int'),
    ({"context": None}, True, 'field "context" must be a string, got NoneType'),
    ({"context": " \n"}, True, 'field "context" is empty'),
    ({"context": "Hi."}, True, 'field "candidates" must be a list of strings, got null'),
    ({"context": "Hi.", "candidates": "Ho."}, True, 'field "candidates" must be a list of strings, got "Ho."'),
    ({"context": "Hi.", "candidates": [3]}, True, 'field "candidates" must be a list of strings, got [3]'),
    ({"context": "Hi.", "candidates": []}, True, 'field "candidates" is empty'),
    ({"context": "Hi.", "candidates": ["Ho.", "\t"]}, True, "candidate 2 is empty"),
    ({"prompt": "Name a fruit.", "candidates": ["Tomato."], "source": "cook"}, True, None),
    ({"context": "Hi."}, False, None),
    ({"context": "Hi.", "candidates": [""]}, False, "candidate 1 is empty"),
])
def test_a_row_is_told_what_it_lacks_and_only_test_rows_may_lack_candidates(row, needed, said):
    assert utils.check_row(row, candidates=needed) == said


@pytest.mark.parametrize("mark", ["<|im_end|>", "[TOOL]"])
def test_a_row_that_spells_a_special_or_added_token_is_named(capsys, mark):
    tokenizer = make_tokenizer("bytelevel")
    tokenizer.add_tokens(["[TOOL]"])
    rows = [{"context": "I <3 |im_end| [really].", "candidates": ["1 < 2"]}]
    assert refuse_special_tokens(rows, tokenizer, "talk.jsonl") is None
    rows.append({"context": "Hi.", "candidates": ["Ho.", f"Hm.{mark}\nuser"]})
    said = refusal(capsys, 2, refuse_special_tokens, rows, tokenizer, "talk.jsonl")
    assert f"talk.jsonl: row 2 spells the special token {mark}" in said


def test_a_hub_name_without_a_network_fails_at_once_and_names_local_files(tmp_path, capsys, monkeypatch):
    """Retries would take minutes; 20 seconds leave a slow machine time to import datasets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "tomato.jsonl", DIALOGUES)
    start = time.monotonic()
    said = refusal(capsys, 3, load_rows, "cooks/tomatoes")
    assert time.monotonic() - start < 20
    assert 'data set "cooks/tomatoes" is no file here' in said and "hint: local: data/tomato.jsonl" in said


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, broken):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "deep" / "table.json"
    utils.atomic_write(path, "a long old text")
    utils.atomic_write(path, "old é")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        utils.atomic_write(path, "new")
    assert path.read_bytes() == b"old \xc3\xa9" and os.listdir(path.parent) == ["table.json"]


def test_nan_is_refused_before_the_file_is_touched(tmp_path):
    path = write_jsonl(tmp_path / "talk.jsonl", DIALOGUES)
    with pytest.raises(ValueError, match="Out of range float"):
        utils.append_jsonl(path, [{"score": 1.0}, {"score": float("nan")}])
    assert utils.read_jsonl(path) == DIALOGUES


@pytest.mark.parametrize(("before", "after", "torn"), [
    pytest.param(b'{"a": 1}\n', b'{"a": 1}\n', None, id="whole"),
    pytest.param(b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n', None, id="only the newline is lost"),
    pytest.param(b'{"a": 1}\n{"b": ', b'{"a": 1}\n', b'{"b": ', id="half a row"),
    pytest.param(b'{"a', b"", b'{"a', id="half of the only row"),
    pytest.param(b'{"a": 1}\n{"b": "caf\xc3', b'{"a": 1}\n', b'{"b": "caf\xc3', id="half an é"),
])
def test_a_torn_tail_is_set_aside_and_never_glued_to_the_next_row(tmp_path, capsys, before, after, torn):
    aside = tmp_path / "preds.jsonl.torn"
    (path := tmp_path / "preds.jsonl").write_bytes(before)
    utils.repair_tail(path)
    assert path.read_bytes() == after and (aside.read_bytes() if aside.exists() else None) == torn
    assert ("the fragment is kept in preds.jsonl.torn" in capsys.readouterr().err) == bool(torn)


@pytest.mark.parametrize(("error", "memory", "disk"), [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True, False),
    (MemoryError(), True, False),
    (ValueError("out of memory of a tomato"), False, False),
    (OSError(errno.EDQUOT, "Quota exceeded"), False, True),
    (RuntimeError("PytorchStreamWriter failed writing: file write failed"), False, True),
    (Exception("SafetensorError: I/O error: (os error 28)"), False, True),
    (OSError(errno.EACCES, "Permission denied"), False, False),
])
def test_full_memory_and_a_full_disk_are_told_from_other_errors(error, memory, disk):
    assert (utils.is_out_of_memory(error), utils.is_disk_full(error)) == (memory, disk)


# ---- prompts ------------------------------------------------------------------------------------


def test_the_last_turn_is_always_person_a():
    turns = ["Person A: Is a tomato a fruit?", "Person B: Only in botany.", "Person A: Why?"]
    assert label_turns("Is a tomato a fruit?\nOnly in botany.\nWhy?") == turns
    assert label_turns(["Only in botany.", "Why?"]) == turns[1:]


@pytest.mark.parametrize(("budget", "kept"), [
    (15, ["Person A: one two", "Person B: three", "Person A: four five six"]),
    (14, ["Person B: three", "Person A: four five six"]),
    (10, ["Person B: three", "Person A: four five six"]),
    (9, ["Person A: four five six"]),
    (5, ["Person A: five six"]),
    (1, ["Person A: six"]),
])
def test_the_newest_turns_stay_to_the_word(budget, kept):
    """'Person', 'A', ':' are 3 words, so the turns have 5, 4 and 6: 15 in all, 10 without the first."""
    assert keep_latest(label_turns("one two\nthree\nfour five six"), budget) == kept


@settings(deadline=None)
@given(SPOKEN, st.integers(1, 40))
def test_what_is_kept_is_a_suffix_and_never_empty(spoken, budget):
    kept = keep_latest(turns := label_turns(spoken), budget)
    assert kept[:-1] == turns[-len(kept):-1]
    assert len(kept[-1]) > len("Person A: ") and turns[-1].endswith(kept[-1].removeprefix("Person A: "))
    assert count_words("\n".join(kept)) <= max(budget, 4)


def test_all_prompts_of_a_row_lose_the_same_oldest_turns(tokenizer):
    """Digits are tokens, so prompt 10 is one longer than prompt 1; where it just does not fit, both lose a turn."""
    row = DIALOGUES[0]
    (short, long), dropped = fit_prompts(row, [1, 10], tokenizer, 1000, 1000)
    assert (len(long), dropped) == (len(short) + 1, 0)
    assert fit_prompts(row, [1, 10], tokenizer, 1000, len(long)) == ([short, long], 0)
    prompts, dropped = fit_prompts(row, [1, 10], tokenizer, 1000, len(short))
    assert dropped == 1 and len(prompts) == 2
    for text in map(tokenizer.decode, prompts):
        assert "Is a tomato" not in text and "\n\nPerson B: Only in a botany class.\nPerson A: Then why" in text
    assert fit_prompts(row, [1, 10], tokenizer, 1000, 9) == ([], 3)
    assert fit_prompts({"prompt": "Name a fruit."}, [1], tokenizer, 1000, 9) == ([], 0)


def test_a_newest_turn_without_its_start_counts_as_a_dropped_turn(tokenizer):
    """'Person A: Then why is it in my salad?' has 11 words; 10 leave it alone, without 'Then'."""
    prompts, dropped = fit_prompts(DIALOGUES[0], [None], tokenizer, 10, 1000)
    assert dropped == 3 and "\n\nPerson A: why is it in my salad?\n" in tokenizer.decode(prompts[0])


def test_a_reply_ends_with_the_token_of_its_template_not_with_eos():
    # the eos of Llama 3's base and of many fine-tunes is not the end of a turn
    tokenizer = make_tokenizer("bytelevel")
    tokenizer.eos_token = "<unk>"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


# ---- checkpoints --------------------------------------------------------------------------------


def make_checkpoint(folder, value: float = 1.0):
    """A sealed folder as train.py leaves it, with one weight of 2 x 3 numbers."""
    (staging := folder.with_name(".staging")).mkdir()
    save_file({"w": np.full((2, 3), value, np.float32)}, staging / "adapter_model.safetensors")
    (staging / "adapter_config.json").write_text("{}")
    utils.seal(staging, folder)
    return folder


def test_the_newest_whole_checkpoint_is_found_and_half_ones_are_named(tmp_path, capsys):
    """check_10 is newer than check_9 although 9 sorts last as text."""
    whole, cut, unmarked = (make_checkpoint(tmp_path / f"check_{n}") for n in (9, 10, 20))
    (tmp_path / "check_best").mkdir()
    assert utils.missing_files(whole) == [] and utils.newest_checkpoint(tmp_path) == unmarked
    (unmarked / "COMPLETE.json").unlink()
    (cut / "adapter_config.json").write_text("{")
    assert utils.missing_files(cut) == ["adapter_config.json"]
    assert utils.newest_checkpoint(tmp_path) == whole
    said = capsys.readouterr().err
    assert cut.is_dir() and f"skipping {cut}: incomplete (no adapter_config.json)" in said
    assert f"skipping {unmarked}: incomplete (no COMPLETE.json)" in said


def test_an_adapter_that_cannot_be_loaded_is_named(tmp_path, capsys):
    """A weight of 6 float32 takes 24 bytes after the header; without the last 10 the header still asks for all."""
    folder = make_checkpoint(tmp_path / "check_9")
    assert check_adapter(folder) is None
    data = (weights := folder / "adapter_model.safetensors").read_bytes()
    weights.write_bytes(data[:-10])
    said = refusal(capsys, 2, check_adapter, folder)
    assert f"{weights} has {len(data) - 10} bytes, its header says {len(data)}" in said
    for broken in (data[:5], data[:20], b"", b"\xff" * 50):
        weights.write_bytes(broken)
        said = refusal(capsys, 2, check_adapter, folder)
        assert f"{weights} has {len(broken)} bytes, its header is broken" in said
    weights.rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle, which can run code" in refusal(capsys, 2, check_adapter, folder)
    (folder / "adapter_model.bin").unlink()
    assert f"{weights} is not there" in refusal(capsys, 2, check_adapter, folder)
    (folder / "adapter_config.json").unlink()
    assert f"{folder} holds no adapter_config.json" in refusal(capsys, 2, check_adapter, folder)


def test_a_fingerprint_tells_two_models_of_one_shape_apart(tmp_path):
    one, same, other = (make_checkpoint(tmp_path / n, v) for n, v in (("a", 1.0), ("b", 1.0), ("c", 1.001)))
    assert base_fingerprint(one) == base_fingerprint(same) != base_fingerprint(other)
    assert len(base_fingerprint(one)) == 16 and base_fingerprint(tmp_path) is None
