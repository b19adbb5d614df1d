"""data/check.py finds what it promises and says where; data/build_chitchat.py splits by prompt."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, refused, write_jsonl

import utils
from data import build_chitchat, build_oto, check, check_report, check_view
from scoring import checks
from utils import USAGE

ROWS = [
    {"context": "Is a tomato a fruit?\nOnly in a botany class.",
     "candidates": ["My salad never took that class.", "Ask the cook, he grows them.",
                    "What about the cucumber, then?"]},
    {"context": "The cat sat on my keyboard again.\nWhat did she write?\nHalf of my tax report.",
     "candidates": ["Is it better than your half?", "Mine only deletes things, be glad.",
                    "Send it, nobody reads them anyway."]},
    {"context": "Grandma wants to learn to surf.\nAt 81?\nShe bought a yellow suit.",
     "candidates": ["Then I will hold the towel.", "The sea is cold until June.", "Does she still swim on Fridays?"]},
]


@pytest.fixture
def loaded_embedder(embedder, monkeypatch):
    """Let the tools take the session's embedder instead of loading it again."""
    for tool in (check, build_chitchat):
        monkeypatch.setattr(tool, "load_embedder", lambda: embedder)


def leave_out_plots(monkeypatch) -> None:
    """They take most of a small run's time; one test draws them."""
    monkeypatch.setattr(check_view, "plot_distributions", lambda *args: None)
    monkeypatch.setattr(check_view, "plot_openings", lambda *args: None)


@pytest.fixture
def run_check(tmp_path, capsys, monkeypatch, loaded_embedder):
    """Write rows to files, run the check on them: exit code, the JSON line, stderr, stdout."""

    def run(*files: list[dict], flags: tuple[str, ...] = (), plots: bool = False):
        if not plots:
            leave_out_plots(monkeypatch)
        paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in zip("abc", files, strict=False)]
        code = 0
        try:
            check.main([*paths, "--limit_proxy", "0", "--plot_dir", str(tmp_path / "plots"), *flags])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        last = json.loads(out.strip().split("\n")[-1])
        return code, {Path(name).stem: figures for name, figures in last["files"].items()} | {
            "violations": last["violations"]}, err, out

    return run


def with_row(index: int, **changes) -> list[dict]:
    """The clean rows with one of them changed."""
    return [row | changes if i == index else row for i, row in enumerate(ROWS)]


def with_candidate(text: str) -> list[dict]:
    """The clean rows with the second candidate of row 2 replaced."""
    return with_row(1, candidates=[ROWS[1]["candidates"][0], text, ROWS[1]["candidates"][2]])


# ---- figures ------------------------------------------------------------------------------------


def test_clean_rows_pass_and_their_counts_are_those_on_paper(run_check, tmp_path):
    """2, 3 and 3 turns; candidates of 6 6 5, 6 6 6, 6 6 6 words, so 53 words by 9; 1, 1 and 1 of 9 are questions."""
    code, report, err, _ = run_check(ROWS, plots=True)
    figures = report["a"]
    assert code == 0 and report["violations"] == 0 and set(figures["violations"].values()) == {0}, err
    assert (figures["rows"], figures["candidates"]) == (3, 9)
    assert figures["candidates_per_row"] == {"min": 3, "median": 3.0, "mean": 3.0, "max": 3}
    assert figures["turns"] == {"min": 2, "median": 3.0, "mean": 2.67, "max": 3}
    assert figures["candidate_words"] == {"min": 5, "median": 6.0, "mean": 5.89, "max": 6}
    assert figures["question_share"] == 0.3333
    for name in ("check_distributions.png", "check_openings.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_distinct_n_and_diversity_use_the_first_candidates_only(run_check):
    """Five times one sentence of four words, then one other: 4 distinct of 20 words, diversity 0."""
    row = {"prompt": "Say it again.", "candidates": ["fog over the harbour"] * 5 + ["seven green umbrellas danced"]}
    code, report, *_ = run_check([row])
    assert code == 2 and report["a"]["violations"]["duplicate"] == 4
    assert report["a"]["distinct_pool"] == 5
    assert report["a"]["distinct_1"] == 4 / 20 and report["a"]["distinct_2"] == 3 / 15
    assert report["a"]["sbert_diversity"] == pytest.approx(0, abs=1e-3)  # float32 dot products


def test_the_table_has_a_column_per_file_and_names_what_was_skipped(run_check):
    _, report, _, out = run_check(ROWS, [{"prompt": "Name a colour of the sea.", "candidates": ["grey", "teal"]}])
    assert "a.jsonl" in out and "b.jsonl" in out
    assert "skipped: --limit_proxy 0" in out and "not enforced below 100 rows" in out
    assert set(report["a"]["skipped"]) == {"proxy_auc", "opening"}


def test_a_missing_profanity_model_is_named_and_not_passed_over(run_check, monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)  # makes the import fail
    code, report, _, out = run_check(ROWS)
    assert code == 0 and "profanity" in report["a"]["skipped"]
    assert "skipped: pip install alt-profanity-check" in out


def test_the_proxy_is_given_the_rows_and_is_skipped_for_too_few():
    """A stand-in for judge_local.LocalProxy, which has tests of its own."""

    class Judge:
        def calibrate(self, rows, limit, progress):
            self.auc, self.seen = 0.75, list(progress(rows))[:limit]

    rows = [ROWS[0]] * 10
    judge, report = Judge(), check_report.Report("x.jsonl", rows, list(range(1, 11)))
    check._measure_proxy(report, judge, limit=4)
    assert report.figures["proxy_auc"] == 0.75 and len(judge.seen) == 4
    few = check_report.Report("x.jsonl", rows[:9], list(range(1, 10)))
    check._measure_proxy(few, judge, limit=4)
    assert few.skipped["proxy_auc"] == "skipped: needs 10 rows"


# ---- every kind of violation is found, at its line ----------------------------------------------

CASES = {
    "num_candidates": (with_row(1, candidates=["Is it better than your half?"]), "1 candidates, --min_candidates is 2"),
    "turns": (with_row(1, context="My keyboard has hair between the keys again."), "1 turns, not 2 to 10"),
    "length": (with_candidate("Poor cat."), "candidate 2 has 2 words, not 4 to 40"),
    "speaker_label": (with_candidate("Person B: mine only deletes things."), "candidate 2 holds a speaker label"),
    "language": (with_candidate("Моя только удаляет всё подряд."), "candidate 2 has 0% ASCII letters"),
    "personal_data": (with_candidate("Write to cat.lover@example.org about it."),
                      "candidate 2 holds an e-mail address: cat.lover@example.org"),
    "duplicate": (with_candidate("is it better  than your half?!"), "candidate 2 equals candidate 1"),
    "near_duplicate": (with_candidate("Is it better than your own half?"), "candidate 2 nearly equals"),
    "duplicate_context": (with_row(1, context=ROWS[0]["context"]), "context equals {a}:1"),
    "near_duplicate_context": (with_row(1, context="Is a tomato a fruit?\nOnly in botany classes."),
                               "context nearly equals {a}:1 (cosine 0.9"),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_violation_is_found_and_named_with_file_and_line(kind, run_check, tmp_path):
    rows, message = CASES[kind]
    flags = ("--min_candidates", "2") if kind == "num_candidates" else ()
    code, report, err, _ = run_check(rows, flags=flags)
    path = tmp_path / "a.jsonl"
    found = {k: n for k, n in report["a"]["violations"].items() if n}
    assert code == 2 and found == {kind: 1} and report["violations"] == 1
    assert f"{path}:2: " in err and message.format(a=path) in err
    assert "error: 1 violations" in err


def test_strong_profanity_is_found_and_a_statement_of_identity_is_not(run_check):
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed")
    code, report, err, _ = run_check(with_candidate("That fucking cat is an asshole."))
    assert code == 2 and report["a"]["violations"]["profanity"] == 1 and "a.jsonl:2: candidate 2 has profanity" in err
    code, report, _, _ = run_check(with_candidate("I am gay"), flags=("--min_words", "3"))  # scores 0.977: to be read
    assert code == 0 and report["a"]["profanity_suspects"] == 1


def test_rows_in_another_latin_language_are_found(run_check):
    german = ["Meine löscht nur Dateien, sei also froh und gib ihr zur Belohnung etwas Fisch.",
              "Schick es ab, das liest im Finanzamt ohnehin niemand mehr vor dem nächsten Sommer.",
              "Und war es wenigstens besser als das, was du bis gestern geschrieben hast?"]
    code, report, err, _ = run_check(with_row(1, candidates=german))
    assert code == 2 and report["a"]["violations"]["language"] == 1 and "a.jsonl:2: has 0% common English words" in err
    assert run_check(with_row(1, candidates=german), flags=("--any_language",))[0] == 0


def test_an_opening_that_too_many_rows_share_is_found_where_it_first_stands():
    """100 rows of 2 candidates: 3 of 200 is 1.5 % and passes, 5 of 200 is 2.5 % and does not; 4 of 100 contexts."""
    rows = [{"context": f"{i} begins row {i}\nyes", "candidates": [f"a{i} b c d", f"e{i} f g h"]} for i in range(100)]
    for i in (3, 4, 5):
        rows[i]["candidates"][0] = f"Would you rather{' very' * i} have tea"
    for i in (10, 11, 12, 13, 14):
        rows[i]["candidates"][0] = f"Have you TRIED{' very' * i} hard"
    for i in (20, 21, 22, 23):
        rows[i]["context"] = f"Did you hear, {i}\nyes"
    report = check_report.Report("x.jsonl", rows, list(range(1, 101)))
    check._check_openings(report, check.read_flags(["x.jsonl"]))
    assert report.violations == [
        (21, "opening", '4.0% of the contexts begin with "did you hear" (4 of 100), the limit is 3.0%'),
        (11, "opening", '2.5% of the candidates begin with "have you tried" (5 of 200), the limit is 2.0%')]


def test_near_duplicates_across_two_files_name_both_places(run_check, tmp_path):
    other = with_row(2, context="Grandma wants to learn how to surf.\nAt 81?\nShe bought a yellow suit.")[2:]
    code, report, err, _ = run_check(ROWS, other)
    assert code == 2 and report["a"]["violations"]["near_duplicate_context"] == 0
    assert report["b"]["violations"]["near_duplicate_context"] == 1
    assert f"{tmp_path / 'b.jsonl'}:1: context nearly equals {tmp_path / 'a.jsonl'}:3" in err


def test_lines_are_counted_in_the_file_and_not_in_the_rows(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_text("\ufeff\n" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert check_report.read_report(str(path)).lines == [2, 4, 6]
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")  # one array: its items are the rows
    assert check_report.read_report(str(path)).lines == [1, 2, 3]


def test_at_most_twenty_violations_are_shown_and_all_are_counted(run_check):
    short_rows = [{"context": f"Chapter {word}.\nNext.", "candidates": ["Yes.", "No, never."]}
                  for word in "apple bread candle desert engine forest garden harbour island jungle kettle".split()]
    code, report, err, _ = run_check(short_rows, flags=("--max_cosine", "1"))
    assert code == 2 and report["violations"] == 22 and err.count("not 4 to 40") == 20
    assert "22 violations, 2 of them not shown" in err


def test_prompts_of_any_task_have_no_limits_on_length(run_check):
    rows = [{"prompt": "A: 7\nB: 9\nWhich one is odd?", "candidates": ["Both.", "neither this nor that " * 20]}]
    code, _, err, _ = run_check(rows)
    assert code == 0, err


def test_broken_rows_and_repeated_files_stop_before_anything_is_measured(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": "a\\nb", "candidates": ["fine words all here"]}\n{"context": 3}\n', encoding="utf-8")
    assert f'{path}:2: field "context" must be a string' in \
        refused(capsys, USAGE, check.main, [str(path)])
    assert "given twice" in refused(capsys, USAGE, check.main, [str(path), str(path)])


@pytest.mark.parametrize("text, found", [
    ("mail bo@mail.example.com now", "an e-mail address: bo@mail.example.com"),
    ("see https://example.org/a?b", "a URL: https://example.org/a?b"),
    ("my page is kittens.com", "a URL: kittens.com"),
    ("card 4111 1111 1111 1111 ok", "a card-like number: 4111 1111 1111 1111"),
    ("call (801) 555-0123 today", "a phone number: (801) 555-0123"),
    ("call +44 20 7946 0958.", "a phone number: +44 20 7946 0958"),
    ("call 020 7946 0958.", "a phone number: 020 7946 0958"),
    ("call 555-0123", "a phone number: 555-0123"),
    ("born 1998-04-10, died 2018-04-10 12:30", None),
    ("it cost 1,250,000 or 12 000 000 kroner", None),
    ("pi is 3.14159265358979 roughly", None),
    ("room 101, bus 42 at 9.15, flight BA 2490", None),
    ("I said...no. Well.Never", None),
])
def test_personal_data_is_known_by_its_form(text, found):
    assert checks.find_personal_data(text) == found


@pytest.mark.parametrize("text, labelled", [
    ("Person A: hello", True), ("**Person B:** hello", True), ("A: hello", True), ("user: hi", True),
    ("fine\nAssistant: hi", True), ("<speaker1> hi", True),
    ("A person: that is all I saw", False), ("Listen: it rings", False), ("a: lower case list", False),
    ("My assistant: a cat", False),
])
def test_speaker_labels_are_told_from_colons(text, labelled):
    assert bool(checks.SPEAKER_LABEL.search(text)) == labelled


def test_duplicates_are_paired_with_the_most_similar_earlier_text():
    """Unit vectors at 0, 60 and 10 degrees: cos 10 = 0.985 to the first, cos 50 = 0.64 to the second."""
    angles = np.radians([0, 60, 10, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = checks.find_duplicates(["one", "two", "three", " TWO. "], vectors, 0.9)
    assert found == [(2, 0, pytest.approx(0.9848, abs=1e-4)), (3, 1, None)]


# ---- build_chitchat -----------------------------------------------------------------------------


@pytest.mark.parametrize("text, greeting", [
    ("Hello!", True), ("hey hows it going? anyone there?", True), ("Hi! How are you doing today?", True),
    ("helllloooo", True), ("Hello! Do you like peanut butter?", False), ("history", False), ("Hi, I would fly.", False),
])
def test_greetings_are_told_from_answers(text, greeting):
    assert build_chitchat.is_greeting(text) == greeting


def test_every_filter_drops_its_reply_and_the_counts_add_up(embedder):
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed")
    prompt = "What if pigs could fly?"
    kept = ["Bacon would rain from the sky when a pig lands.", "Then pigs would need a licence to fly, and wings."]
    replies = [("", "I would fly too, I think."), (prompt, "hey there!"), (prompt, "Bacon!"),
               (prompt, "Person B: pigs would fly south"), (prompt, "Flying pigs? Mail me at pig@example.com"),
               (prompt, "fucking flying pigs, what shit is that"), (prompt, "Hello! What if pigs could fly?"),
               (prompt, kept[0]), (prompt, kept[0].upper()), (prompt, kept[1]),
               (prompt, "My sister studies applied statistics in Ohio.")]
    on_topic, dropped = build_chitchat.filter_replies(replies, embedder)
    assert dict(dropped) == dict.fromkeys(build_chitchat.FILTERS, 1)
    assert on_topic == {prompt: kept}


def test_prompts_are_split_24_3_7_and_none_stands_in_two_splits():
    prompts = [f"prompt {i}" for i in range(34)]
    splits = build_chitchat.split_prompts(prompts, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 24, "val": 3, "test": 7}
    assert sorted(p for part in splits.values() for p in part) == sorted(prompts)
    assert splits == build_chitchat.split_prompts(prompts[::-1], seed=0), "the order of the prompts must not matter"
    assert splits != build_chitchat.split_prompts(prompts, seed=1)


def test_the_start_of_the_real_data_set_is_built_and_passes_the_check(tmp_path, capsys, monkeypatch, loaded_embedder):
    """700 conversations of the wheel, since embedding all of it takes half a minute."""
    conversations = 700
    leave_out_plots(monkeypatch)
    for module in ("chitchat_dataset", "profanity_check"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install --no-deps -r requirements-models.txt")
    replies = list(build_chitchat.read_replies())
    assert len(replies) == 7168 and len({prompt for prompt, _ in replies if prompt}) == 34
    monkeypatch.setattr(build_chitchat, "read_replies", lambda: iter(replies[:conversations]))
    build_chitchat.main(["--out_dir", str(tmp_path)])
    last = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    files = [tmp_path / f"{split}.jsonl" for split in ("train", "val", "test")]
    rows = [utils.read_jsonl(file, utils.check_row) for file in files]
    assert [len(part) for part in rows] == [24, 3, 7] and len({r["context"] for part in rows for r in part}) == 34
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    kept = sum(len(row["candidates"]) for part in rows for row in part)
    assert kept + sum(f["dropped"] for f in manifest["filters"].values()) == conversations
    assert manifest["licence"] == "MIT" and "Brigham Young" in manifest["notes"]
    assert manifest["splits"] == last["splits"]
    assert manifest["splits"]["test"]["sha256"] == utils.sha256(files[2].read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    check.main([*map(str, files), "--min_turns", "1", "--min_words", "3", "--max_words", "60", "--max_cosine", "1",
                "--limit_proxy", "0", "--plot_dir", str(tmp_path / "plots")])
    assert json.loads(capsys.readouterr().out.strip().split("\n")[-1])["violations"] == 0


# ---- all tools ----------------------------------------------------------------------------------


def test_one_to_one_rows_are_the_first_candidates_each_as_a_row(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    pairs = tmp_path / "pairs.jsonl"
    build_oto.main(["--input_file", str(rows), "--save_file", str(pairs), "--num_candidates", "2"])
    expected = [{**row, "candidates": [reply]} for row in ROWS for reply in row["candidates"][:2]]
    assert utils.read_jsonl(pairs, utils.check_row) == expected
    assert f"--method oto --train_file {pairs} --max_steps 6" in capsys.readouterr().out


def test_the_one_to_one_file_of_the_repository_is_made_from_its_one_to_many_file(tmp_path):
    build_oto.main(["--input_file", str(ROOT / "data" / "train_dialogs_1k.jsonl"),
                    "--save_file", str(tmp_path / "pairs.jsonl")])
    made = (tmp_path / "pairs.jsonl").read_bytes()
    assert made == (ROOT / "data" / "train_dialogs_4k.jsonl").read_bytes()


@pytest.mark.parametrize("words", [
    ("-m", "data.check"), (str(ROOT / "data" / "check.py"),)], ids=["module", "file"])
def test_a_tool_starts_as_a_module_and_from_its_file(words, tmp_path):
    """In any folder: `make` installs the project, so that both forms find the rooms."""

    def python(*words: str):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)

    if python("-c", "import flags").returncode:
        pytest.skip("the project is not installed: pip install --no-deps -e .")
    done = python(*words, "nowhere.jsonl")
    assert done.returncode == USAGE and "error: nowhere.jsonl is not there" in done.stderr
