"""eval.py and the local coherence proxy: what is judged, what the table says, what is refused."""

from __future__ import annotations

import importlib
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import DIALOGUES, write_jsonl

import judges
import utils

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
    model, tokenizer, _ = utils.load_checkpoint(str(tiny_dir))
    judge = judges.LocalProxy(model, tokenizer, embedder)
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

    given, blank = judges.transcript(row)
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
        judges.LocalProxy(proxy.model, proxy.tokenizer, proxy.embedder).calibrate(ROWS[:9])
    assert stop.value.code == 2 and "needs 10 rows with candidates" in capsys.readouterr().err


def test_the_threshold_balances_both_errors():
    """True 0.9 0.8 0.4, false 0.5 0.2 0.1: at 0.5 a third of each side is on the wrong side."""
    scores, truth = np.array([0.9, 0.8, 0.4, 0.5, 0.2, 0.1]), np.array([1, 1, 1, 0, 0, 0])
    assert judges.balanced_threshold(scores, truth) == 0.5


def test_the_embedded_proxy_tells_true_from_mismatched_replies(embedded, embedder):
    """20 dialogues of the shipped test set; chance would be 0.5."""
    rows = utils.read_jsonl("data/test_dialogs.jsonl", utils.check_row)[:20]
    judge = judges.LocalProxy(*embedded, embedder)
    judge.calibrate(rows)
    assert judge.auc > 0.9 and min(judge.feature_auc) > 0.85 and judge.num_pairs == 120


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


@pytest.fixture
def ready(monkeypatch, proxy, embedder):
    """eval.main with the judge that is loaded already."""
    monkeypatch.setattr(scoring, "load_judge", lambda args, rows: (proxy, embedder))


def test_two_systems_are_compared_row_by_row(outs, tmp_path, ready, capsys):
    """Three equal replies: SBERT diversity 0, yield at most 1; the difference is paired and has an interval."""
    save = tmp_path / "logs" / "x.json"
    scoring.main(["--eval_file", str(outs / "echo.jsonl"), str(outs / "varied.jsonl"), "--save_file", str(save)])
    summary = json.loads(save.read_text())
    echo, varied = summary["systems"]["echo"], summary["systems"]["varied"]
    assert echo["sbert_diversity"] == [0, 0, 0] and echo["yield@3"][2] <= 1 and echo["seconds_per_row"] == 0.5
    assert varied["empty"] == 12 and varied["responses"] == 36 and varied["coherent"][0] <= 2 / 3 + 1e-9
    mean, low, high = summary["differences"]["varied - echo"]["sbert_diversity"]
    assert low <= mean <= high and mean == pytest.approx(varied["sbert_diversity"][0], abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "x.jsonl").read_text().splitlines()]
    assert len(lines) == 72 and {"system", "row", "context", "response", "coherence", "coherent"} <= set(lines[0])
    said = capsys.readouterr().out
    assert "a proxy" in said and "AUC" in said and "12 empty" in said and "varied - echo" in said
    scoring.main(["--show", str(save)])
    assert "varied - echo" in capsys.readouterr().out


def test_the_published_pickle_name_works_and_holds_plain_dicts(outs, tmp_path, ready):
    scoring.main(["--eval_file", str(outs / "echo.jsonl"), "--save_file", str(tmp_path / "out.pkl")])
    lines = pickle.loads((tmp_path / "out.pkl").read_bytes())  # noqa: S301 - written by this test
    assert len(lines) == 36 and all(type(line) is dict for line in lines)
    assert (tmp_path / "out.json").exists() and (tmp_path / "out.jsonl").exists()


def test_one_response_a_row_has_no_diversity_rather_than_a_zero(tmp_path, ready, capsys):
    write_jsonl(tmp_path / "one.jsonl", [{**row, "preds": [row["candidates"][0]]} for row in ROWS])
    scoring.main(["--eval_file", str(tmp_path / "one.jsonl"), "--save_file", str(tmp_path / "x.json")])
    assert "sbert_diversity" not in json.loads((tmp_path / "x.json").read_text())["systems"]["one"]
    assert "—" in capsys.readouterr().out


def test_files_of_other_rows_are_refused(outs, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "preds": ["a", "b", "c"]} for row in ROWS[:5]])
    said = refused(capsys, 2, ["--eval_file", outs / "echo.jsonl", other, "--save_file", tmp_path / "x.json"])
    assert "holds other rows than" in said and "(5 and 12)" in said and "one --test_file" in said


@pytest.mark.parametrize(("text", "said"), [
    ('{"context": "a\\nb", "preds": "c"}', 'bad.jsonl:1: needs "preds", a list of strings'),
    ('{"context": "a\\nb", "preds": []}', 'bad.jsonl:1: needs "preds", a list of strings'),
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


def test_rows_that_differ_in_their_number_of_responses_are_refused(tmp_path, capsys):
    file = write_jsonl(tmp_path / "mixed.jsonl", [{**r, "preds": ["a", "b"][: 1 + i % 2]} for i, r in enumerate(ROWS)])
    said = refused(capsys, 2, ["--eval_file", file, "--save_file", tmp_path / "x.json"])
    assert "different numbers of preds" in said
