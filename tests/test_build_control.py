"""data/build_control.py: texts split, cleaned, scored and labelled for method control."""

from __future__ import annotations

import importlib.metadata
import json
import math

import pytest
from conftest import write_jsonl
from control_cases import DOCUMENTS

from data import build_control
from methods.control import attributes


@pytest.fixture
def build(tmp_path, capsys):
    """Run the builder on documents: its manifest, rows by file, and what it printed."""

    def run(documents: list[dict], *flags: str):
        build_control.main(["--input", str(write_jsonl(tmp_path / "docs.jsonl", documents)),
                            "--out_dir", str(tmp_path / "d"), "--min_words", "2",
                            "--valid_share", "0.2", *flags])
        rows = {}
        for name in ("train", "valid", "prompts"):
            text = (tmp_path / "d" / f"{name}.jsonl").read_text()
            rows[name] = [json.loads(line) for line in text.splitlines()]
        manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
        return manifest, rows, capsys.readouterr().out

    return run


def test_cleaning_puts_a_space_for_what_it_takes_off_and_keeps_letters_of_all_scripts():
    text = "one.\nline — café, “ça va”? @bob see https://x.y/z  now"
    assert build_control.clean(text) == "one. line — café, “ça va”? see now"
    assert build_control.clean("RT hello\tworld") == "hello world"
    assert build_control.clean("rtx is a card") == "rtx is a card"


def test_sentences_end_at_marks_before_capitals_but_not_after_abbreviations():
    text = 'He saw Dr. No. "Really?" she said. It cost 3.50 e.g. in May!\nNew line'
    assert build_control.sentences(text) == [
        "He saw Dr. No.", '"Really?" she said.', "It cost 3.50 e.g. in May!", "New line"]


def test_dropped_texts_are_counted_by_the_first_reason(build):
    texts = ["I love this.", "i love this", "12 34 56", "Hm", "Write to me at a@b.com today",
             "<|im_start|> is a token", "I hate this.", "It is a chair.",
             "You stupid idiot, damn you."]
    others = ["A table stands there.", "Here is a lamp."]
    manifest, rows, _ = build([{"texts": texts}, {"texts": others}], "--threshold", "toxicity=q0.5")
    assert {name: rule["dropped"] for name, rule in manifest["filters"].items()} == {
        "no letters": 1, "length": 1, "personal data": 1, "special token": 1, "duplicate": 1}
    kept = sum(len(rows[split]) for split in ("train", "valid"))
    assert kept == len(texts) - 5 + len(others)


def test_a_document_is_in_one_split_and_the_scores_are_of_the_written_text(build):
    manifest, rows, _ = build(DOCUMENTS, "--threshold", "toxicity=q0.8")
    train, valid = ({row["document"] for row in rows[split]} for split in ("train", "valid"))
    assert valid and not train & valid
    score, version = attributes.load_scorer("vaderSentiment")
    for row in rows["train"] + rows["valid"]:
        assert row["scores"]["sentiment"] == pytest.approx(score([row["text"]])[0], abs=1e-4)
        assert row["values"] == attributes.values_of(row["scores"], manifest["schema"])
    installed = importlib.metadata.version("vaderSentiment")
    assert manifest["schema"]["sentiment"]["version"] == version == installed


def test_the_same_seed_writes_the_same_files_and_another_one_does_not(build):
    flags = ("--attributes", "sentiment", "--drop_rate", "0.3")
    first, again = (build(DOCUMENTS, *flags)[:2] for _ in range(2))
    other = build(DOCUMENTS, *flags, "--seed", "7")[1]
    assert first == again and first[1] != other


def test_the_share_without_tokens_lies_within_binomial_bounds(build):
    """Standard deviation sqrt(0.1 x 0.9 n); four of them on either side."""
    words = ("good", "bad", "here", "away", "blue")
    documents = [{"texts": [f"Chair {i} is {word}." for word in words]} for i in range(120)]
    manifest, rows, _ = build(documents, "--attributes", "sentiment", "--drop_rate", "0.1")
    n, without = len(rows["train"]), sum("unconditioned" in row for row in rows["train"])
    assert manifest["unconditioned"] == without
    assert abs(without - 0.1 * n) < 4 * math.sqrt(0.09 * n)


def test_balancing_leaves_equally_many_texts_of_every_combination(build):
    manifest, rows, _ = build(DOCUMENTS, "--attributes", "sentiment", "question", "--balance")
    joint = manifest["counts"]["train"]["joint"]
    assert len(set(joint.values())) == 1 and sum(joint.values()) == len(rows["train"])
    assert set(joint) == set(manifest["counts_before_choosing"]["train"]["joint"])


@pytest.mark.parametrize(("flags", "problem"), [
    (("--threshold", "toxicity=1.5"), "no text is toxic"),
    (("--threshold", "sentiment=0.05,-0.05"), "rising"),
    (("--threshold", "toxicity=high"), "neither numbers nor quantiles"),
    (("--threshold", "length=3"), "none of --attributes"),
    (("--drop_rate", "1"), "share"),
    (("--attributes", "beauty"), "invalid choice")])
def test_bad_flags_say_what_is_wrong(build, capsys, flags, problem):
    with pytest.raises(SystemExit) as stop:
        build(DOCUMENTS, *flags)
    assert stop.value.code == 2 and problem in capsys.readouterr().err


def test_a_file_without_letters_is_refused_with_its_counts(build, capsys):
    with pytest.raises(SystemExit) as stop:
        build([{"texts": ["12 34", "!!! ???", "5 + 5"]}])
    assert stop.value.code == 2 and "3 no letters" in capsys.readouterr().err
