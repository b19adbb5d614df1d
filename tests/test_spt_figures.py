"""Method spt: what is measured of replies to a person, and of the choice among soft prompts."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from spt_cases import ROWS, finished, reference_logps, spt_args  # noqa: F401

import infer
from methods.spt import evaluation, published
from modeling.checkpoints import load_checkpoint
from scoring import metrics, statistics
from scoring.evaluated import figure
from scoring.sources import Sources

PREDS = ["Never.", "Ask my cat.", "No!"]


class Embedder:
    """Two texts are alike if they have equal length."""

    def encode(self, texts):
        return np.eye(200)[[len(text) for text in texts]]


# ---- by hand ------------------------------------------------------------------------------------


def test_reference_figures_by_hand():
    """a b c against b c d e: 2 common of 3 and 4. a b a: 2 of 3 distinct words, 2 of 2 pairs.

    An empty text is one token.
    """
    assert metrics.token_f1("a b c", "b c d e") == pytest.approx(4 / 7)
    assert metrics.token_f1("A", "a") == 0
    assert metrics.plain_distinct(["a b a"], 1) == pytest.approx(2 / 3)
    assert metrics.plain_distinct(["a b a"], 2) == 1
    assert metrics.plain_distinct(["", "a."], 1) == 1 and metrics.plain_distinct([""], 2) is None
    text = "the cat sat on the mat"
    score, signature = metrics.corpus_bleu([text], [text])
    assert score == pytest.approx(100) and "tok:13a" in signature and "smooth:exp" in signature
    assert metrics.persona_overlap("My cat sleeps.", ["I have a cat."]) == pytest.approx(0.5)
    assert metrics.persona_overlap("I am.", ["I have a cat."]) is None


def test_an_interval_over_persons_is_wider_than_one_over_rows():
    """Two persons, ten equal rows each: a resample of persons has mean 0, 1/2 or 1."""
    values, people = [0.0] * 10 + [1.0] * 10, ["a"] * 10 + ["b"] * 10
    assert statistics.cluster_interval(values, people) == figure(0.5, 0.0, 1.0)
    of_rows = statistics.interval(values)
    assert of_rows["mean"] == 0.5 and 0.2 < of_rows["low"] < of_rows["high"] < 0.8


def test_one_person_has_no_interval():
    assert statistics.cluster_interval([1.0, None, 2.0], ["a", "a", "a"]) == figure(1.5)
    assert statistics.cluster_interval([None], ["a"]) is None
    assert statistics.cluster_interval([1.0, 2.0], ["a", "b"])["low"] == 1.0


def test_choice_figures_by_hand():
    """nll (2, 1, 3), selected 1: random 2, oracle 1, regret 1, no agreement.

    The reply that is compared is the one under prompt 1, which comes second.
    """
    row = ROWS[0] | {"preds": PREDS, "soft_prompts": [2, 1, 3], "selected": 1}
    figures = evaluation.row_figures(row, [2.0, 1.0, 3.0], Embedder())
    assert [figures[name] for name in evaluation.OF_PROMPTS] == [2.0, 2.0, 1.0, 1.0, 0.0]
    assert figures["F1"] == figures["R-1"] == figures["embedding"] == 1.0
    assert figures["sbert_diversity"] == 1.0


def test_the_first_reply_is_compared_where_prompts_are_unknown():
    assert evaluation.reply_of({"preds": PREDS}) == "Never."
    assert evaluation.reply_of({"preds": PREDS, "selected": 1}) == "Never."


def test_a_fused_reply_is_the_first_one_also_in_files_that_name_all_prompts(tmp_path):
    """Prompt 3 of 4 is selected. One reply: there is no third; four replies: the first again."""
    old = {"soft_prompts": [1, 2, 3, 4], "selected": 3}
    assert evaluation.reply_of({"preds": ["Never."]} | old) == "Never."
    assert evaluation.reply_of({"preds": ["Never.", "No!"], "soft_prompts": [], "selected": 1}
                               ) == "Never."
    rows = [row | {"preds": [row["response"], "No!", "Never.", "Yes, with my whole heart!"]} | old
            for row in ROWS]
    result = measured(tmp_path, rows,
                      {"method": "spt", "engine": "openai", "soft_prompt": "fused"})
    assert result.summary["systems"]["a"]["figures"]["embedding"]["mean"] == 1
    assert all(line["soft_prompts"] == [] for line in result.lines)


def test_gain_over_the_baseline_is_the_mean_over_columns():
    """11 against 10 is 10 % more, 3 against 2 is 50 %: 30 %; what one of them lacks is left out."""
    columns = dict.fromkeys(published.COLUMNS)
    better, baseline = {"F1": 11.0, "BLEU": 3.0, "R-1": 9.0}, {"F1": 10.0, "BLEU": 2.0}
    assert published.mean_gain(columns | better, columns | baseline) == pytest.approx(30)
    assert published.mean_gain(columns, columns | baseline) is None


# ---- what is missing, and why -------------------------------------------------------------------


def measured(tmp_path, rows: list[dict], settings: dict | None):
    """The evaluation of a file a.jsonl, with or without a.json that says how it was drawn."""
    if settings is not None:
        (tmp_path / "a.json").write_text(json.dumps({"settings": settings}))
    sources = Sources({"a": tmp_path / "a.jsonl"})
    sources.embedder = Embedder()  # instead of the one that is loaded at the first use
    return evaluation.measure({"a": rows}, sources, None)


@pytest.mark.parametrize(("settings", "selected", "why"), [
    (None, {"selected": 1}, "does not say which model"),
    ({"method": "peft", "engine": "hf"}, {}, "method peft has no soft prompts"),
    ({"method": "spt", "engine": "openai"}, {"selected": 1}, "the responses come from a server"),
])
def test_nlls_that_cannot_be_measured_are_none_with_a_reason(tmp_path, settings, selected, why):
    rows = [row | {"preds": ["Never."]} | selected for row in ROWS]
    result = measured(tmp_path, rows, settings)
    system = result.summary["systems"]["a"]
    for name in evaluation.OF_PROMPTS:
        assert system["figures"][name] is None and why in system["reasons"][name]
    assert system["choice_gain"] is None and why in system["reasons"]["choice_gain"]
    assert system["figures"]["embedding"] is not None and "embedding" not in system["reasons"]
    notes = evaluation.tables(result.summary)[1].notes
    assert any("no nll, random, oracle, regret, agreement" in note and why in note
               for note in notes)


def test_rows_without_a_true_reply_have_no_figures_of_the_method(tmp_path):
    rows = [row | {"preds": ["Never."]} for row in ROWS]
    del rows[2]["response"]
    result = measured(tmp_path, rows, None)
    table, = evaluation.tables(result.summary)
    assert table.notes == ["no figures: row 3 of a has no response to compare replies with"]
    assert not result.lines and not result.files


# ---- a run --------------------------------------------------------------------------------------


def drawn(finished, folder: Path, name: str, *flags: str) -> str:  # noqa: F811
    """The file of replies drawn from the checkpoint."""
    path, _, checkpoint = finished
    file = str(folder / f"{name}.jsonl")
    infer.main(["--method", "spt", "--model_name_or_path", f"{checkpoint}/", "--test_file",
                str(path), "--max_new_tokens", "5", "--save_file", file, *flags])
    return file


def test_the_published_table_has_one_value_under_every_heading(
        finished, embedder, tmp_path, capsys):  # noqa: F811
    """Two files of one checkpoint: under all prompts, and four replies under the first one."""
    files = [drawn(finished, tmp_path, "one", "--soft_prompt", "all"),
             drawn(finished, tmp_path, "two", "--prompt_id", "1", "--num_response_per_input", "4")]
    capsys.readouterr()
    main = import_module("eval").main  # `eval` is a builtin function
    main(["--eval_file", *files, "--save_file", str(tmp_path / "e.json")])
    shown = capsys.readouterr().out

    header, *lines = (tmp_path / "e.csv").read_text().splitlines()
    assert header == "system," + ",".join(published.COLUMNS)
    assert [len(line.split(",")) for line in lines] == [12, 12]
    assert len((tmp_path / "e.spt.jsonl").read_text().splitlines()) == 8
    summary = json.loads((tmp_path / "e.json").read_text())
    assert summary["kind"] == "eval/spt"
    one, two = summary["spt"]["systems"].values()
    assert one["persons"] == 3 and one["responses"] == 16
    assert sum(one["usage"].values()) == pytest.approx(1) and two["usage"]["1"] == 1
    assert one["figures"]["oracle"]["mean"] <= one["figures"]["nll"]["mean"]
    assert one["figures"]["oracle"] == two["figures"]["oracle"]
    assert one["published"]["AVG gain"] == 0, "the first file is the baseline"

    notice = f"BLEU: {one['bleu_signature']}; BERTScore: bert-score is not installed"
    assert "nrefs:1|" in notice and notice in " ".join(shown.split())
    assert one["published"]["BERT-F1"] is None
    assert one["reasons"]["BERT-F1"] == "bert-score is not installed"
    main(["--show", str(tmp_path / "e.json")])
    assert "published columns" in capsys.readouterr().out


def test_nll_of_the_figures_is_that_of_ordinary_rows(finished, tokenizer):  # noqa: F811
    model = load_checkpoint(str(finished[2]))[0]
    nlls = evaluation.prompt_nlls(model, tokenizer, ROWS[1], max_length=1000, max_input_length=250)
    with torch.no_grad():
        want = [-reference_logps(model, ROWS[1], k, tokenizer, spt_args()).mean().item()
                for k in range(4)]
    assert nlls == pytest.approx(want, abs=1e-4)


def test_a_row_that_does_not_fit_leaves_no_nll(finished, tokenizer):  # noqa: F811
    model = load_checkpoint(str(finished[2]))[0]
    assert evaluation.prompt_nlls(model, tokenizer, ROWS[0], 20, 250) is None


def test_a_changed_checkpoint_leaves_no_nll_and_keeps_the_other_figures(
        finished, tmp_path):  # noqa: F811
    """The weights of outs/X.json are not those of the checkpoint any more."""
    file = Path(drawn(finished, tmp_path, "a"))
    beside = file.with_suffix(".json")
    summary = json.loads(beside.read_text())
    summary["settings"]["weights"] = "another one"
    beside.write_text(json.dumps(summary))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    system = measured(tmp_path, rows, summary["settings"]).summary["systems"]["a"]
    assert system["figures"]["nll"] is None and "has changed since" in system["reasons"]["nll"]
    assert sum(system["usage"].values()) == pytest.approx(1)
