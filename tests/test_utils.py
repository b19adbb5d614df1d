"""utils: what is read is checked, what is written is whole, what is missing is named."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import DIALOGUES, ROOT, refused, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st

import utils
from training.rows import load_rows

GOOD = b'{"context": "Is a tomato a fruit?", "candidates": ["Ask the cook."]}\n'


def refusal(capsys, *args) -> str:
    """A refusal of utils, which always shows a way out."""
    message = refused(capsys, 2, *args)
    assert "\nhint: " in message
    return message


def test_utils_needs_the_standard_library_only():
    """So `--help` and a bad flag answer at once; python -S has no installed packages."""
    subprocess.run([sys.executable, "-S", "-c", "import utils"], cwd=ROOT, check=True)


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "said"), [
    pytest.param(b"", ": no rows", id="an empty file"),
    pytest.param(b"\n  \n\r\n", ": no rows", id="blank lines only"),
    pytest.param(GOOD + b'\n{"context" "x"}', ":3:12: not JSON: Expecting ':'",
                 id="a colon forgotten"),
    pytest.param(GOOD + b"[1]\n", ":2: expected an object, got list", id="an array among objects"),
    pytest.param(b"3\n", ":1: expected an object, got int", id="a bare number"),
    pytest.param(b'{"a": NaN}', ":1: NaN is not JSON", id="NaN"),
    pytest.param(b'{"a": "\\ud83d"}', ":1: holds half of a surrogate pair", id="half an emoji"),
    pytest.param(b'{"a": ' * 200_000, ":1: maximum recursion depth", id="a pit of brackets"),
    # json itself would keep the last one
    pytest.param(GOOD + b'{"a": 1, "a": 2}', ':2: key "a" stands twice', id="a key twice"),
    pytest.param(GOOD + b'{"a": "caf\xe9"}', ":2: not UTF-8 (byte 0xe9 at column 11); iconv",
                 id="Latin-1"),
    pytest.param(GOOD.decode().encode("utf-16"), ": UTF-16, not UTF-8\nhint: iconv -f UTF-16",
                 id="UTF-16"),
])
def test_what_is_no_row_is_named_by_file_line_and_column(tmp_path, capsys, data, said):
    """'{"context" ' takes columns 1 to 11, so the colon is missed at 12.

    '{"a": "caf' takes 10 bytes, so é is byte 11.
    """
    (path := tmp_path / "talk.jsonl").write_bytes(data)
    assert f"error: {path}{said}" in refusal(capsys, utils.read_jsonl, path)


def test_at_most_twenty_bad_rows_are_shown_and_all_are_counted(tmp_path, capsys):
    (path := tmp_path / "talk.jsonl").write_bytes(b"oops\n" * 23 + GOOD)
    message = refusal(capsys, utils.read_jsonl, path)
    assert [message.count(part) for part in (": not JSON", "error: ", "  row: oops")] == [20] * 3
    assert f"bad rows in {path}: 23; and 3 more" in message
    assert f"{path}:20:1:" in message and f"{path}:21:" not in message


@pytest.mark.parametrize("data", [
    pytest.param(GOOD.rstrip(), id="no newline at the end"),
    pytest.param(b"\xef\xbb\xbf" + GOOD, id="a byte order mark"),
    pytest.param(b"\r\n" + GOOD.replace(b"\n", b"\r\n") + b" \r\n",
                 id="Windows line ends and blank lines"),
    pytest.param(b"[\n" + GOOD + b"]", id="one array"),
])
def test_what_editors_add_is_accepted(tmp_path, capsys, data):
    (path := tmp_path / "talk.jsonl").write_bytes(data)
    assert utils.read_jsonl(path, utils.check_row) == [json.loads(GOOD)]
    note = "is one JSON array; its 1 items are read as rows"
    assert (note in capsys.readouterr().err) == data.startswith(b"[")


@pytest.mark.parametrize(("name", "said"), [
    ("", " is a folder"), ("tolk.jsonl", " is not there"),
    *[(f"x.{suffix}", f": .{suffix} files are not read\nhint: convert it to JSONL")
      for suffix in ("gz", "parquet", "csv", "pkl")],
])
def test_a_path_that_is_no_jsonl_is_named(tmp_path, capsys, name, said):
    if name.startswith("x."):
        (tmp_path / name).write_bytes(GOOD)
    assert f"error: {tmp_path / name}{said}" in refusal(capsys, utils.read_jsonl, tmp_path / name)


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
    ({"context": "Hi.", "prompt": "Hi."}, True,
     "needs either \"context\" or \"prompt\", has ['context', 'prompt']"),
    ({"prompt": 3}, True, 'field "prompt" must be a string, got int'),
    ({"context": None}, True, 'field "context" must be a string, got NoneType'),
    ({"context": " \n"}, True, 'field "context" is empty'),
    ({"context": "Hi."}, True, 'field "candidates" must be a list of strings, got null'),
    ({"context": "Hi.", "candidates": "Ho."}, True,
     'field "candidates" must be a list of strings, got "Ho."'),
    ({"context": "Hi.", "candidates": [3]}, True,
     'field "candidates" must be a list of strings, got [3]'),
    ({"context": "Hi.", "candidates": []}, True, 'field "candidates" is empty'),
    ({"context": "Hi.", "candidates": ["Ho.", "\t"]}, True, "candidate 2 is empty"),
    ({"prompt": "Name a fruit.", "candidates": ["Tomato."], "source": "cook"}, True, None),
    ({"context": "Hi."}, False, None),
    ({"context": "Hi.", "candidates": [""]}, False, "candidate 1 is empty"),
])
def test_a_row_is_told_what_it_lacks_and_only_test_rows_may_lack_candidates(row, needed, said):
    assert utils.check_row(row, candidates=needed) == said


def test_a_hub_name_without_a_network_fails_at_once_and_names_local_files(
        tmp_path, capsys, monkeypatch):
    """Retries would take minutes; 20 seconds leave a slow machine time to import datasets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "tomato.jsonl", DIALOGUES)
    start = time.monotonic()
    message = refused(capsys, 3, load_rows, "cooks/tomatoes")
    assert time.monotonic() - start < 20
    assert 'data set "cooks/tomatoes" is no file here' in message
    assert "hint: local: data/tomato.jsonl" in message


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
        tmp_path, monkeypatch, broken):
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
    pytest.param(b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n', None,
                 id="only the newline is lost"),
    pytest.param(b'{"a": 1}\n{"b": ', b'{"a": 1}\n', b'{"b": ', id="half a row"),
    pytest.param(b'{"a', b"", b'{"a', id="half of the only row"),
    pytest.param(b'{"a": 1}\n{"b": "caf\xc3', b'{"a": 1}\n', b'{"b": "caf\xc3', id="half an é"),
])
def test_a_torn_tail_is_set_aside_and_never_glued_to_the_next_row(
        tmp_path, capsys, before, after, torn):
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


# ---- checkpoints and what made an outs file -----------------------------------------------------


def make_checkpoint(folder):
    """A sealed folder with the files of an adapter."""
    (staging := folder.with_name(".staging")).mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (staging / name).write_text("{}")
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
    notes = capsys.readouterr().err
    assert cut.is_dir() and f"skipping {cut}: incomplete (no adapter_config.json)" in notes
    assert f"skipping {unmarked}: incomplete (no COMPLETE.json)" in notes


def test_a_checkpoint_in_folders_is_whole_only_with_all_of_them(tmp_path):
    (staging := tmp_path / ".staging").mkdir()
    (staging / "deep").mkdir()
    (staging / "deep" / "state.pt").write_text("weights")
    utils.seal(staging, folder := tmp_path / "check_1")
    assert utils.missing_files(folder) == []
    (folder / "deep" / "state.pt").rename(folder / "state.pt")
    assert utils.missing_files(folder) == ["deep/state.pt"]


def test_the_method_of_a_checkpoint_is_read_without_its_weights(tmp_path):
    run = {"method": "spt", "args": {"K": 3}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert utils.read_run(str(tmp_path)) == run
    for name in ("smollm2", "owner/model", str(tmp_path / "nothing"), None):
        assert utils.read_run(name) == {"method": "base", "args": {}}


def test_what_made_an_outs_file_is_found_beside_it_and_half_a_file_is_named(tmp_path, capsys):
    outs = tmp_path / "x.jsonl"
    assert utils.made_by(outs) == {}
    (tmp_path / "x.json").write_text('{"settings": {"seed": 3}}')
    assert utils.made_by(str(outs)) == {"settings": {"seed": 3}}
    (tmp_path / "x.json").write_text('{"settings": ')
    assert f"{tmp_path / 'x.json'} is not JSON" in refusal(capsys, utils.made_by, outs)


@pytest.mark.parametrize(("row", "text"), [
    ({"prompt": "Name a fruit."}, "Name a fruit."), ({"context": "Hi.\nHo."}, "Hi.\nHo."),
    ({"prompt": "", "context": "Hi."}, "Hi."), ({"text": "A label."}, ""),
])
def test_what_a_row_asks_is_its_prompt_or_its_context(row, text):
    assert utils.text_of(row) == text
