"""eval.py and the local coherence proxy: what is judged, what the table says, what is refused."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import servers
import torch
from conftest import DIALOGUES, ROOT, write_jsonl
from servers import ok, rated, wait_for

import utils
from modeling.checkpoints import load_checkpoint
from modeling.embedder import Embedder
from scoring import judge_local

serve, real_server = servers.serve, servers.real_server
scoring = importlib.import_module("eval")  # a built-in has the same name

ROWS = [{**row, "context": f"{row['context']} ({i})"} for i in range(3) for row in DIALOGUES]  # 12 rows


def refused(capsys, code, argv) -> str:
    with pytest.raises(SystemExit) as stop:
        scoring.main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert stop.value.code == code, said
    return said


@pytest.fixture(scope="module")
def proxy(tiny_dir, embedder):
    """The local judge with the tiny model, calibrated on 12 rows."""
    model, tokenizer, _ = load_checkpoint(str(tiny_dir))
    judge = judge_local.LocalProxy(model, tokenizer, embedder)
    judge.calibrate(ROWS)
    return judge


# ---- the judge ----------------------------------------------------------------------------------


def test_pmi_is_the_difference_of_two_plain_scores_per_token(proxy):
    """Each reply scored on its own: (log p(reply | transcript) - log p(reply | empty transcript)) / tokens."""
    row, replies = ROWS[0], ["Ask the cook.", "A pepper is one too."]

    def logp(prefix: str, reply: str) -> tuple[float, int]:
        ids = [proxy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prefix, " " + reply)]
        logits = proxy.model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
        start = len(ids[0])
        return sum(logits[start + i - 1, t].item() for i, t in enumerate(ids[1])), len(ids[1])

    given, blank = judge_local.transcript(row)
    assert given.endswith("Person A: Then why is it in my salad? (0)\nPerson B:") and "salad" not in blank
    want = [(logp(given, r)[0] - logp(blank, r)[0]) / logp(given, r)[1] for r in replies]
    np.testing.assert_allclose(proxy.pmi(row, replies), want, rtol=1e-4)


def test_the_cosine_feature_is_that_of_context_and_reply(proxy, embedder):
    a, b = embedder.encode([ROWS[1]["context"], "Trust the man."], normalize_embeddings=True)
    assert proxy.measure(ROWS[1], ["Trust the man."])[0, 1] == pytest.approx(float(a @ b), abs=1e-5)


def test_an_empty_reply_is_incoherent_and_counted_not_skipped(proxy):
    probability, features = proxy.score(ROWS[0], ["", "Ask the cook, he has tomatoes.", "  "])
    assert probability[0] == probability[2] == 0 and probability[1] > 0
    assert probability.shape == (3,) and features.shape == (3, 2)


def test_a_proxy_needs_enough_rows_to_set_its_threshold(proxy, capsys):
    with pytest.raises(SystemExit) as stop:
        judge_local.LocalProxy(proxy.model, proxy.tokenizer, proxy.embedder).calibrate(ROWS[:9])
    assert stop.value.code == 2 and "needs 10 rows with candidates" in capsys.readouterr().err


def test_the_threshold_balances_both_errors():
    """True 0.9 0.8 0.4, false 0.5 0.2 0.1: at 0.5 a third of each side is on the wrong side."""
    scores, truth = np.array([0.9, 0.8, 0.4, 0.5, 0.2, 0.1]), np.array([1, 1, 1, 0, 0, 0])
    assert judge_local.balanced_threshold(scores, truth) == 0.5


def test_the_embedded_proxy_tells_true_from_mismatched_replies(embedded, embedder):
    """12 dialogues of the shipped test set; chance would be 0.5."""
    rows = utils.read_jsonl("data/test_dialogs.jsonl", utils.check_row)[:12]
    judge = judge_local.LocalProxy(*embedded, embedder)
    judge.calibrate(rows)
    assert judge.auc > 0.9 and min(judge.feature_auc) > 0.85 and judge.num_pairs == 72


# ---- the script ---------------------------------------------------------------------------------


@pytest.fixture
def outs(tmp_path):
    """Two systems over the same rows: `echo` repeats one good reply, `varied` gives the references."""
    (tmp_path / "outs").mkdir()
    echo = [{**row, "preds": [row["candidates"][0]] * 3} for row in ROWS]
    varied = [{**row, "preds": [*row["candidates"][:2], ""]} for row in ROWS]
    write_jsonl(tmp_path / "outs" / "echo.jsonl", echo)
    write_jsonl(tmp_path / "outs" / "varied.jsonl", varied)
    (tmp_path / "outs" / "echo.json").write_text('{"seconds_per_row": 0.5}')
    return tmp_path / "outs"


@pytest.fixture(scope="module")
def remembering(embedder):
    """The embedder, asked for each text once in this file."""
    return Embedder(embedder)


@pytest.fixture
def ready(monkeypatch, remembering, proxy, tiny_dir):
    """eval.main with the embedder and the calibrated local judge that are loaded already."""
    load = load_checkpoint
    monkeypatch.setattr(utils, "load_embedder", lambda: remembering)
    monkeypatch.setattr(utils, "load_checkpoint", lambda name: load(str(tiny_dir) if name == utils.EMBEDDED else name))
    monkeypatch.setattr(judges, "LocalProxy", lambda *parts: proxy)
    monkeypatch.setattr(proxy, "calibrate", lambda rows, progress: None)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_systems_are_compared_row_by_row(outs, tmp_path, ready, capsys):
    """Three equal replies: SBERT diversity 0, yield at most 1; the difference is paired and has an interval."""
    save = tmp_path / "logs" / "x.json"
    scoring.main(["--eval_file", str(outs / "echo.jsonl"), str(outs / "varied.jsonl"), "--save_file", str(save)])
    summary = json.loads(save.read_text())
    echo, varied = summary["systems"]["echo"], summary["systems"]["varied"]
    assert echo["sbert_diversity"] == pytest.approx([0, 0, 0], abs=1e-4) and echo["yield@3"][2] <= 1 and echo["seconds_per_row"] == 0.5
    assert varied["empty"] == 12 and varied["responses"] == 36 and varied["coherent"][0] <= 2 / 3 + 1e-4
    assert echo["distinct_k"] == [1, 1, 1] and echo["duplicates"][0] == pytest.approx(2 / 3, abs=1e-3) and echo["self_bleu"][0] > 99
    mean, low, high = summary["differences"]["varied - echo"]["sbert_diversity"]
    assert low <= mean <= high and mean == pytest.approx(varied["sbert_diversity"][0], abs=1e-3)
    assert summary["settings"]["self_bleu"].startswith("nrefs:2|") and summary["settings"]["ead_vocabulary"] == 30522
    lines = lines_of(tmp_path / "logs" / "x.jsonl")
    assert len(lines) == 72 and {"system", "row", "context", "response", "class", "coherence", "coherent"} <= set(lines[0])
    said = capsys.readouterr().out
    assert "a proxy" in said and "AUC" in said and "12 empty" in said and "minus echo" in said and "x.html" in said
    scoring.main(["--show", str(save)])
    again = capsys.readouterr().out
    assert "minus echo" in again and again in said, "the same table"


def test_every_figure_has_an_interval_that_holds_it_and_every_missing_one_a_reason(outs, tmp_path, ready):
    scoring.main(["--eval_file", str(outs / "varied.jsonl"), "--save_file", str(tmp_path / "x.json")])
    for system in json.loads((tmp_path / "x.json").read_text())["systems"].values():
        figures = {key: value for key, value in system.items() if isinstance(value, list)}
        assert len(figures) >= 18 and all(low <= mean <= high for mean, low, high in figures.values())
        assert {key for key, value in system.items() if value is None} == set(system["reasons"])


def test_controls_show_what_diversity_alone_rewards(outs, tmp_path, ready, capsys):
    """Repeating one reply is one class; moved replies are as diverse as they were, and incoherent more often."""
    flags = ["--eval_file", str(outs / "varied.jsonl"), "--save_file", str(tmp_path / "x.json")]
    scoring.main(flags)
    systems = json.loads((tmp_path / "x.json").read_text())["systems"]
    assert [name for name, s in systems.items() if s["control"]] == ["control: random words", "control: shuffled", "control: repeated"]
    assert systems["control: repeated"]["distinct_k"][0] == 1 and systems["control: shuffled"]["distinct-1"][0] == systems["varied"]["distinct-1"][0]
    assert systems["control: shuffled"]["coherent"][0] < systems["varied"]["coherent"][0]
    assert all(line["system"] == "varied" for line in lines_of(tmp_path / "x.jsonl")), "no line is about a control"
    capsys.readouterr()
    scoring.main([*flags, "--no_controls"])
    assert "control:" not in capsys.readouterr().out


def test_json_prints_the_summary_and_nothing_else(outs, tmp_path, ready, capsys):
    scoring.main(["--eval_file", str(outs / "echo.jsonl"), "--save_file", str(tmp_path / "x.json"), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "x.json").read_text())


def test_the_published_pickle_name_works_and_holds_plain_dicts_with_the_published_keys(outs, tmp_path, ready):
    scoring.main(["--eval_file", str(outs / "echo.jsonl"), "--save_file", str(tmp_path / "out.pkl")])
    lines = pickle.loads((tmp_path / "out.pkl").read_bytes())  # noqa: S301 - written by this test
    assert len(lines) == 36 and all(type(line) is dict for line in lines)
    assert list(lines[0]) == ["context", "response", "prompt", "chat_out", "chat_score", "gpt4_out", "gpt4_score"]
    assert lines[0]["chat_score"] == {"Coherence rating:": None} and lines[0]["gpt4_score"] is None, "the proxy rates nothing"
    assert all((tmp_path / f"out.{kind}").exists() for kind in ("json", "jsonl", "html"))


def test_one_response_a_row_has_no_diversity_rather_than_a_zero(tmp_path, ready, capsys):
    write_jsonl(tmp_path / "one.jsonl", [{**row, "preds": [row["candidates"][0]]} for row in ROWS])
    scoring.main(["--eval_file", str(tmp_path / "one.jsonl"), "--save_file", str(tmp_path / "x.json")])
    one = json.loads((tmp_path / "x.json").read_text())["systems"]["one"]
    assert one["sbert_diversity"] is None and one["self_bleu"] is None and one["vendi"][0] == 1
    assert one["reasons"]["sbert_diversity"] == "one response a prompt has nothing to differ from"
    assert "SBERT" not in capsys.readouterr().out


@pytest.mark.parametrize("preds", [["", ""], ["?!", "..."], ["漢字", "漢 字"], ["a", "a"]], ids=["empty", "marks", "han", "equal"])
def test_odd_replies_have_figures_or_reasons_and_never_nan(tmp_path, ready, preds):
    write_jsonl(tmp_path / "odd.jsonl", [{**row, "preds": preds} for row in ROWS])
    scoring.main(["--eval_file", str(tmp_path / "odd.jsonl"), "--save_file", str(tmp_path / "x.json")])
    text = (tmp_path / "x.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text)["systems"]["odd"]["distinct_k"][2] <= 2


def test_files_that_differ_in_their_seed_alone_tell_whether_numbers_mean_something(tmp_path, ready, capsys):
    """Number 1 always gives the first reference and number 2 the second, whatever the seed."""
    for seed in (1, 2):
        write_jsonl(tmp_path / f"seed{seed}.jsonl", [{**row, "preds": row["candidates"][:2]} for row in ROWS])
        (tmp_path / f"seed{seed}.json").write_text(json.dumps({"settings": {"method": "peft", "seed": seed, "temperature": 0.7}}))
    files = [str(tmp_path / f"seed{seed}.jsonl") for seed in (1, 2)]
    scoring.main(["--eval_file", *files, "--save_file", str(tmp_path / "x.json"), "--no_controls"])
    found = json.loads((tmp_path / "x.json").read_text())["controllability"]["seed1 + seed2"]
    assert found["stable"] == 1 and found["coincide"] == 0 and found["excess"] > 0 and found["prompts"] == 12
    assert "a number keeps its class over seeds in 100 %" in " ".join(capsys.readouterr().out.split())


# ---- judges behind a server ---------------------------------------------------------------------

TEXTS = [row["candidates"][i] for row in DIALOGUES for i in range(2)]


@pytest.fixture
def asked(tmp_path, ready, monkeypatch):
    """asked(server, *flags): eval.py on `varied` of four rows with replies in common by a judge; code, summary, log."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    write_jsonl(tmp_path / "varied.jsonl", [{**row, "preds": [*row["candidates"][:2], "", row["candidates"][0]]} for row in DIALOGUES])

    def run(server, *flags, save="x.json"):
        code = 0
        try:
            scoring.main(["--eval_file", str(tmp_path / "varied.jsonl"), "--save_file", str(tmp_path / save), "--judge1", "openai:m",
                          "--base_url1", server.url, "--no_canaries", *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        return code, json.loads((tmp_path / save).with_suffix(".json").read_text())

    return run


def rate_second_low(body: dict) -> tuple:
    """3 of 10 for the second reply of each dialogue, 9 for the first."""
    question = body["messages"][0]["content"]
    return rated(3 if any(text in question for text in TEXTS[1::2]) else 9)


def test_a_judge_behind_a_server_rates_each_different_reply_once(asked, serve, tmp_path):
    """Each row: 9, 3, empty, 9 again. Coherent: 2 of 4; one class of two coherent, equal replies; mean rating 7."""
    server = serve(then=rate_second_low)
    code, summary = asked(server)
    varied = summary["systems"]["varied"]
    assert code == 0 and len(server.seen) == 8, "one judge named: policy first; empty and equal replies and controls are not sent"
    assert varied["coherent"] == [0.5, 0.5, 0.5] and varied["yield@4"] == [1, 1, 1] and varied["rating"][0] == 7
    assert varied["incoherence_rate"][0] == 0.5 and varied["unscored"] == {} and varied["empty"] == 4
    assert summary["systems"]["control: shuffled"]["coherent"] is None
    assert "--judge_controls" in summary["systems"]["control: shuffled"]["reasons"]["coherent"]
    assert summary["systems"]["control: shuffled"]["sbert_diversity"] is not None
    line = lines_of(tmp_path / "x.jsonl")[1]
    assert (line["rating"], line["coherent"], line["unscored"]) == (3, False, None)
    assert "It takes up what was said." in (tmp_path / "x.html").read_text()


def test_the_published_policy_asks_the_second_judge_about_low_ratings_and_the_pickle_says_so(asked, serve, tmp_path):
    first, second = serve(then=rate_second_low), serve(then=rated(8))
    code, summary = asked(first, "--judge2", "openai:n", "--base_url2", second.url, save="out.pkl")
    assert code == 0 and summary["systems"]["varied"]["coherent"][0] == 0.75 and len(second.seen) == 4
    lines = pickle.loads((tmp_path / "out.pkl").read_bytes())  # noqa: S301 - written by this test
    assert lines[0]["chat_score"] == {"Coherence rating:": 9} and lines[0]["gpt4_out"] is lines[0]["gpt4_score"] is None
    assert lines[1]["chat_score"] == {"Coherence rating:": 3} and lines[1]["gpt4_score"] == {"Coherence rating:": 8}
    assert "Rating: 3" in lines[1]["chat_out"] and TEXTS[1] in lines[1]["prompt"]


def test_unscored_replies_are_counted_by_reason_and_never_a_zero(asked, serve, capsys):
    """The first reply of every row gets prose: its rows have no yield, and the share of coherent replies is of the others."""
    def prose(body):
        return ok("I like it.") if any(text in body["messages"][0]["content"] for text in TEXTS[::2]) else rated(9)

    code, summary = asked(serve(then=prose))
    varied = summary["systems"]["varied"]
    assert code == 4 and varied["unscored"] == {"parse": 8} and varied["yield@4"] is None
    assert varied["coherent"][0] == 0.5 and varied["reasons"]["yield@4"] == "no row is fully scored"
    said = capsys.readouterr()
    assert "8 unscored (8 parse)" in said.out and "8 of 16 replies are unscored" in said.err
    assert asked(serve(then=prose), "--fail_on_error", 0.6)[0] == 0


def test_when_nothing_is_scored_the_table_shows_dashes(asked, serve, capsys):
    code, summary = asked(serve(then=ok("No.")), "--no_controls")
    assert code == 4 and summary["systems"]["varied"]["rating"] is None
    said = capsys.readouterr().out
    assert "12 unscored" in said and "yield@4" not in said and "distinct_4" in said


def test_controls_are_sent_on_request_and_canaries_unless_told_not_to(asked, serve, tmp_path, capsys):
    server = serve(then=rate_second_low)
    _, summary = asked(server, "--judge_controls")
    assert summary["systems"]["control: random words"]["coherent"] is not None and len(server.seen) > 8
    server = serve(then=rated(5))
    scoring.main(["--eval_file", str(tmp_path / "varied.jsonl"), "--save_file", str(tmp_path / "y.json"), "--judge1", "openai:m",
                  "--base_url1", server.url])
    assert len(server.seen) == 8 + 20
    assert "0 of 10 replies that try to talk it round were rated above" in " ".join(capsys.readouterr().out.split())


def test_a_missing_key_shows_before_any_row_is_read(tmp_path, monkeypatch, capsys):
    """The file to evaluate does not even exist."""
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    said = refused(capsys, 3, ["--judge", "api", "--eval_file", tmp_path / "none.jsonl", "--save_file", tmp_path / "x.json"])
    assert "TOGETHER_API_KEY is not set" in said and "--judge local" in said


@pytest.mark.parametrize(("flags", "says"), [
    (["--judge", "gpt"], "--judge gpt is none of local, api, hf:MODEL"),
    (["--judge", "local", "--judge1", "openai:m"], "--judge1 does nothing with --judge local"),
    (["--judge1", "m"], 'judge "m" is not PROVIDER:MODEL'),
    (["--fail_on_error", "5"], "--fail_on_error 5.0 is a share"), (["--limit", "0"], "--limit 0 must be above 0"),
])
def test_flags_that_cannot_work_are_refused_before_anything_is_read(tmp_path, capsys, flags, says):
    assert says in refused(capsys, 2, ["--eval_file", tmp_path / "none.jsonl", "--save_file", tmp_path / "x.json", *flags])


def test_a_chat_model_on_this_machine_can_judge(asked, tmp_path, tiny_dir, capsys):
    scoring.main(["--eval_file", str(tmp_path / "varied.jsonl"), "--save_file", str(tmp_path / "h.json"), "--judge", f"hf:{tiny_dir}"])
    summary = json.loads((tmp_path / "h.json").read_text())
    assert 1 <= summary["systems"]["varied"]["rating"][0] <= 10 and summary["judge"]["canaries"]["scored"] == 10
    assert "% of its probability" in " ".join(capsys.readouterr().out.split())


RUN = """
import importlib, sys; sys.path.insert(0, {root!r})
import numpy as np
import utils

class Letters:  # an embedder that loads in no time: unit vectors from the letters of a text
    tokenizer = range(30522)

    def encode(self, texts, **options):
        vectors = np.array([np.random.default_rng(list(text.encode())).normal(size=8) for text in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

load_embedder = Letters
utils.run(importlib.import_module("eval").main)
"""


def test_a_judge_run_killed_at_ten_moments_goes_on_and_asks_nothing_twice(serve, tmp_path):
    """60 replies, some 5 of them judged before each kill. What the log holds is never asked again; the table is the same."""
    rows = [{"prompt": f"Question {i}", "candidates": ["x"], "preds": [f"reply {i}-{j}." for j in range(4)]} for i in range(15)]
    file, rng = write_jsonl(tmp_path / "out.jsonl", rows), random.Random(7)

    def slow(body):
        time.sleep(0.02)
        return rated(sum(map(ord, re.search(r"reply \d+-\d", body["messages"][0]["content"])[0])) % 10 + 1)

    server = serve(then=slow)
    script, errors = RUN.format(root=str(ROOT)), open(tmp_path / "errors.txt", "w")  # noqa: SIM115
    log = tmp_path / "killed.judgements.jsonl"

    def start(name):
        flags = ["--eval_file", file, "--save_file", tmp_path / f"{name}.json", "--judge1", "openai:m", "--base_url1", server.url,
                 "--max_connections", 2, "--no_canaries"]
        return subprocess.Popen([sys.executable, "-c", script, *map(str, flags)], cwd=tmp_path, stdout=subprocess.PIPE,
                                stderr=errors, env={**os.environ, "OPENAI_API_KEY": "sk-none"})

    def texts_of(calls):
        return {re.search(r"reply \d+-\d+\.", body["messages"][0]["content"])[0] for _, _, body in calls}

    for kill in range(11):
        before = len(server.seen)
        judged = {line["reply"] for line in map(json.loads, log.read_text().splitlines()[:-1])} if log.exists() else set()
        process = start("killed")
        if kill < 10:
            wait_for(lambda p=process, n=before + 3: len(server.seen) >= n or p.poll() is not None, 20)
            time.sleep(rng.random() * 0.06)
            process.kill()
        said = process.communicate(timeout=30)[0].decode()
        assert process.returncode == (-9 if kill < 10 else 0), (tmp_path / "errors.txt").read_text()[-2000:]
        assert not judged & texts_of(server.seen[before:])
    whole = start("whole")
    assert whole.communicate(timeout=30)[0].decode().replace("whole", "killed") == said and whole.returncode == 0
    summaries = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole")]
    assert summaries[0] == summaries[1] and summaries[0]["systems"]["out"]["unscored"] == {}


def test_a_real_server_judges(asked, real_server, tmp_path, monkeypatch):
    """Two rows, four different replies, by the embedded model; 32 tokens are too few for most of its ratings."""
    url, folder = real_server
    server = type("Server", (), {"url": f"{url}/v1"})
    code, summary = asked(server, "--judge1", f"openai:{folder}", "--max_tokens1", 32, "--temperature1", 0, "--limit", 2,
                          "--fail_on_error", 1)
    log = lines_of(tmp_path / "x.judgements.jsonl")
    assert code == 0 and len(log) == 4 and all(folder in line["served_model"] and line["tokens"] > 50 for line in log)
    scored = sum(line["score"] is not None for line in log)
    assert summary["judge"]["stages"] == [f"openai:{folder}"] and (scored == 4) == (summary["systems"]["varied"]["unscored"] == {})


# ---- what is refused ----------------------------------------------------------------------------


def test_files_of_other_rows_are_refused(outs, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "preds": ["a", "b", "c"]} for row in ROWS[:5]])
    said = refused(capsys, 2, ["--eval_file", outs / "echo.jsonl", other, "--save_file", tmp_path / "x.json"])
    assert "holds other rows than" in said and "(5 and 12)" in said and "one --test_file" in said


@pytest.mark.parametrize(("text", "said"), [
    ('{"context": "a\\nb", "preds": "c"}', 'bad.jsonl:1: needs "preds", a list of strings'),
    ('{"context": "a\\nb", "preds": []}', "bad.jsonl holds no responses at all"),
    ('{"preds": ["c"]}', 'bad.jsonl:1: needs either "context" or "prompt"'),
])
def test_a_row_without_responses_is_named(tmp_path, capsys, text, said):
    (tmp_path / "bad.jsonl").write_text(text + "\n")
    assert said in refused(capsys, 2, ["--eval_file", tmp_path / "bad.jsonl", "--save_file", tmp_path / "x.json"])


def test_a_pickle_is_never_read(tmp_path, capsys):
    """A pickle that would create a file when loaded: it is refused and the file does not appear."""
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "old.pkl").write_bytes(pickle.dumps(Trap()))
    said = refused(capsys, 2, ["--eval_file", tmp_path / "old.pkl", "--save_file", tmp_path / "x.json"])
    assert ".pkl files are not read" in said and not (tmp_path / "sprung").exists()


def test_responses_that_a_row_lacks_are_empty_ones_and_counted(tmp_path, capsys):
    """Rows of one, two and no responses have up to two: 12 rows lack 4 x 1 + 4 x 2 of 24. Another file needs two a row as well."""
    file = write_jsonl(tmp_path / "mixed.jsonl", [{**r, "preds": ["a", "b"][: (1, 2, 0)[i % 3]]} for i, r in enumerate(ROWS)])
    rows = scoring.read_systems([str(file)], None)["mixed"]
    assert [row["preds"] for row in rows[:3]] == [["a", ""], ["a", "b"], ["", ""]]
    assert "12 of 24 responses are missing; they count as empty" in capsys.readouterr().err
    other = write_jsonl(tmp_path / "three.jsonl", [{**r, "preds": ["a", "b", "c"]} for r in ROWS])
    said = refused(capsys, 2, ["--eval_file", file, other, "--save_file", tmp_path / "x.json"])
    assert "three.jsonl has 3 preds a row" in said and "mixed.jsonl has 2" in said
