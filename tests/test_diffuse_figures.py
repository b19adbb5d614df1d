"""Method diffuse: how replies and the model's probabilities are compared with the targets."""

from __future__ import annotations

import json
import math
from importlib import import_module

import numpy as np
import pytest
import torch
from diffuse_cases import (  # noqa: F401
    able_dir,
    diffuse_config,
    prompt_dir,
    sampled,
    trained,
    write_prompt,
)

from benchmarks import diffuse_transfer
from methods.diffuse import evaluation
from methods.diffuse.prompts import read_prompt
from methods.diffuse.training import target_sequences
from modeling.prompts import encode_prompt
from scoring import metrics, statistics
from scoring.sources import Sources

LN = math.log
# Ten replies: {1} x 4, {2} x 2, {7} x 2 (no target), 2 without braces
ROW = {"prompt": "A number?", "response": [""], "targets": ["{1}", "{2}", "{3}"],
       "weights": [0.5, 0.25, 0.25], "eos": True, "file": "data/numbers/a.json", "task": "numbers",
       "preds": ["{1}"] * 4 + ["{2}"] * 2 + ["{7}"] * 2 + ["no"] * 2}


# ---- by hand ------------------------------------------------------------------------------------


def test_exact_fit_by_hand():
    """w = (1/2, 1/2), p = (1/2, 1/4): KL = ln(2) / 2 = 0.3466; outside 1/4.

    TV = (0 + 1/4 + 1/4) / 2 = 1/4; the entropy of w is ln 2.
    """
    fit = metrics.exact_fit([0.5, 0.5, 0.0], [LN(0.5), LN(0.25), LN(0.2)])
    want = {"kl": LN(2) / 2, "outside": 0.25, "tv": 0.25, "floor": LN(2)}
    assert fit == pytest.approx(want)


def test_entropy_of_counts_and_its_correction_by_hand():
    """(2, 1, 1): (1/2) ln 2 + 2 (1/4) ln 4 = 1.0397; Miller-Madow adds (3 - 1) / 8 = 0.25."""
    assert statistics.entropy([2, 1, 1, 0]) == pytest.approx(1.5 * LN(2))
    assert statistics.miller_madow([2, 1, 1, 0]) == pytest.approx(1.5 * LN(2) + 0.25)
    assert statistics.entropy([]) is None and statistics.miller_madow([0]) is None


def test_the_corrected_entropy_is_nearer_to_the_truth_and_its_interval_covers_it():
    """1,000 draws of 200 equal names, 60 times: the plug-in entropy is low by about 0.1.

    Of 95 % intervals at least 85 % cover ln 200.
    """
    rng = np.random.default_rng(0)
    samples = [rng.multinomial(1000, [1 / 200] * 200) for _ in range(60)]
    plain = np.mean([statistics.entropy(sample) for sample in samples])
    corrected = np.mean([statistics.miller_madow(sample) for sample in samples])
    assert plain < LN(200) - 0.08 and abs(corrected - LN(200)) < 0.02
    intervals = [statistics.entropy_interval(sample, 300) for sample in samples]
    assert np.mean([own["low"] <= LN(200) <= own["high"] for own in intervals]) >= 0.85


def test_chi_square_by_hand():
    """Counts (30, 10) against equal weights: 2 x 10^2 / 20 = 10; (20, 20) fits perfectly."""
    bad = statistics.chi_square([30, 10], [0.5, 0.5])
    good = statistics.chi_square([20, 20], [0.5, 0.5])
    assert bad["chi_square"] == pytest.approx(10) and bad["dof"] == 1 and bad["p_value"] < 0.01
    assert good["chi_square"] == 0 and good["p_value"] == 1
    assert statistics.chi_square([0, 0], [0.5, 0.5]) is None


def test_answers_are_read_from_the_first_braces_and_bare_targets_from_the_reply():
    targets = ["{1}", "{2}"]
    assert evaluation.find_answer("Sure! {2} or {1}", targets) == "{2}"
    assert evaluation.find_answer("two", targets) is None
    assert evaluation.find_answer(" red ", ["red", "blue"]) == "red"
    assert evaluation.find_answer("red and more", ["red"], eos=False) == "red"
    assert evaluation.find_answer("{Ana}\n{F}\n{poet}", ["{Bo}\n{M}"]) == "{Ana}\n{F}"


def test_of_targets_that_start_each_other_the_longest_is_the_answer():
    """"10 is it" also starts with 1; where 10 has weight 0, it is no valid 1, but a new answer."""
    for targets in (["1", "10"], ["10", "1"]):
        assert evaluation.find_answer("10 is it", targets, eos=False) == "10"
        assert evaluation.find_answer("1 is it", targets, eos=False) == "1"
    row = {"targets": ["1", "10"], "weights": [1.0, 0.0], "eos": False,
           "preds": ["10 is it", "1 is it", "1", "2"]}
    figures = evaluation.sample_figures(row, None)
    assert figures["counts"] == {"1": 2, "10": 1, "2": 1}
    assert figures["valid"]["mean"] == 0.5 and figures["new"]["mean"] == 0.5


def test_sample_figures_by_hand():
    """{2} was not trained on; expected counts of the 6 valid answers: 3, 1.5 and 1.5."""
    figures = evaluation.sample_figures(ROW, {"{1}", "{3}"})
    assert figures["coverage"] == 3 and figures["covered"] == 2 and figures["new_distinct"] == 1
    shares = [figures[name]["mean"] for name in ("parsed", "valid", "new", "unseen_valid")]
    assert shares == [0.8, 0.6, 0.2, 0.2]
    assert figures["counts"] == {"{1}": 4, "{2}": 2, "{7}": 2}
    assert figures["entropy_plugin"] == pytest.approx(statistics.entropy([4, 2, 2]))
    assert figures["entropy"]["mean"] == pytest.approx(statistics.miller_madow([4, 2, 2]))
    chi_square = (4 - 3) ** 2 / 3 + (2 - 1.5) ** 2 / 1.5 + 1.5
    assert figures["chi_square"] == pytest.approx(chi_square)


def test_targets_of_several_lines_are_also_counted_line_by_line():
    """Two of three names, one of two sexes; a reply with one group alone holds no answer."""
    row = ROW | {"targets": ["{Ana}\n{F}", "{Bo}\n{M}"], "weights": [0.5, 0.5],
                 "preds": ["{Ana}\n{F}", "{Bo}\n{F}", "{Ana}"]}
    figures = evaluation.sample_figures(row, set())
    assert figures["parsed"]["mean"] == pytest.approx(2 / 3)
    assert [field["coverage"] for field in figures["fields"]] == [2, 1]


def test_the_probability_of_a_target_is_that_of_its_ordinary_rows(tiny_model, tokenizer, tmp_path):
    """Two response prefixes: p is the sum over both; the target of weight 0 has a probability."""
    row = read_prompt(write_prompt(tmp_path / "a.json", response=["", "It is "],
                                   weights=[1, 0, 3]))
    context = encode_prompt(tokenizer, row["prompt"])
    want = []
    for ids in target_sequences(row, tokenizer):
        logps = tiny_model(torch.tensor([context + ids])).logits[0].log_softmax(-1).double()
        start = len(context) - 1
        want.append(sum(logps[start + i, token] for i, token in enumerate(ids)).exp().item())
    got = np.exp(evaluation.target_logps(tiny_model, tokenizer, row))
    np.testing.assert_allclose(got, np.array(want).reshape(3, 2).sum(1), rtol=1e-4)


# ---- what is missing, and why -------------------------------------------------------------------


def test_what_cannot_be_measured_is_none_with_a_reason(tmp_path):
    """A second request has no targets; nothing says which model drew the replies."""
    rows = [ROW, ROW | {"targets": [], "weights": [], "file": "data/numbers/b.json"}]
    result = evaluation.measure({"a": rows}, Sources({"a": tmp_path / "a.jsonl"}), None)
    system = result.summary["systems"]["a"]
    first, second = system["prompts"].values()
    for name in evaluation.EXACT:
        assert first[name] is None and system["reasons"][name] == first["reasons"][name]
        assert "does not say which model" in first["reasons"][name]
    assert second["valid"] is None
    assert second["reasons"]["valid"] == "the request has no targets"
    assert second["coverage"] == 3 and "coverage" not in second["reasons"]
    mean = system["tasks"]["numbers (all)"]
    assert mean["coverage"] == 3 and mean["valid"] is None
    assert mean["reasons"]["valid"] == "1 prompts lack it"
    assert list(result.files) == ["_plots/numbers_a.png"]
    prompts, tasks = evaluation.tables(result.summary)
    assert [row[0] for row in prompts.rows] == ["numbers/a", "numbers/b"]
    assert "a: no kl, tv, outside: " in tasks.notes[0]


def test_what_was_seen_is_unknown_in_a_file_without_training_requests(tmp_path):
    """--split test: None with a reason. With a request that trained on {1}: {2}, 2 of 10."""
    def prompts_of(*rows: dict) -> list[dict]:
        sources = Sources({"a": tmp_path / "a.jsonl"})
        result = evaluation.measure({"a": list(rows)}, sources, None)
        return list(result.summary["systems"]["a"]["prompts"].values())

    test = ROW | {"split": "test"}
    alone, = prompts_of(test)
    assert alone["unseen_valid"] is None and alone["valid"]["mean"] == 0.6
    assert "holds no training request" in alone["reasons"]["unseen_valid"]
    train = ROW | {"split": "train", "file": "data/numbers/b.json", "targets": ["{1}"],
                   "weights": [1.0]}
    _, beside = prompts_of(train, test)
    assert beside["unseen_valid"]["mean"] == 0.2


def test_requests_of_one_folder_and_file_name_keep_apart(tmp_path):
    """x/numbers/a.json and y/numbers/a.json; a_b/c.json and a/b_c.json would share a plot's name.
    """
    names = [("x/numbers/a.json", "numbers"), ("y/numbers/a.json", "numbers"),
             ("a_b/c.json", "a_b"), ("a/b_c.json", "a"), ("x/numbers/b.json", "numbers")]
    rows = [ROW | {"file": file, "task": task} for file, task in names]
    result = evaluation.measure({"a": rows}, Sources({"a": tmp_path / "a.jsonl"}), None)
    assert list(result.summary["systems"]["a"]["prompts"]) == [
        "numbers/a (row 1)", "numbers/a (row 2)", "a_b/c (row 3)", "a/b_c (row 4)", "numbers/b"]
    assert list(result.files) == [
        "_plots/numbers_a (row 1).png", "_plots/numbers_a (row 2).png",
        "_plots/a_b_c (row 3).png", "_plots/a_b_c (row 4).png", "_plots/numbers_b.png"]
    assert len(evaluation.tables(result.summary)[0].rows) == 5


def test_rows_without_targets_have_no_figures_of_the_method(tmp_path):
    sources = Sources({"a": tmp_path / "a.jsonl"})
    result = evaluation.measure({"a": [{"prompt": "a", "preds": ["b"]}]}, sources, None)
    table, = evaluation.tables(result.summary)
    assert table.notes == ["no figures: the rows have no targets"] and not result.files


# ---- a run --------------------------------------------------------------------------------------


def test_samples_follow_the_exact_probabilities_and_the_tuned_model_the_target(
        sampled, embedder, tmp_path, capsys):  # noqa: F811
    """H(1/2, 1/4, 1/4) = 1.5 ln 2; tv <= sqrt(kl / 2) (Pinsker)."""
    save = tmp_path / "out.json"
    main = import_module("eval").main  # `eval` is a builtin function
    main(["--eval_file", *map(str, sampled), "--save_file", str(save)])
    shown = capsys.readouterr().out
    summary = json.loads(save.read_text())
    systems = summary["diffuse"]["systems"]
    before, after = (systems[mode]["prompts"]["numbers/a"] for mode in ("untuned", "lora"))
    assert summary["kind"] == "eval/diffuse"
    assert after["kl"] < 0.06 < before["kl"] and after["tv"] < 0.17 < before["tv"]
    assert after["valid"]["mean"] > 0.9 > before["valid"]["mean"] and after["outside"] < 0.1
    assert after["entropy"]["low"] <= 1.5 * LN(2) + 0.12
    assert abs(after["entropy"]["mean"] - 1.5 * LN(2)) < 0.15
    lines = [json.loads(line) for line in (tmp_path / "out.diffuse.jsonl").read_text().splitlines()]
    tuned = next(line for line in lines if line["system"] == "lora")
    for target, logp in zip(tuned["targets"], tuned["logps"], strict=True):
        assert tuned["counts"][target] / 150 == pytest.approx(math.exp(logp), abs=0.14)
    png = (tmp_path / "out_plots" / "numbers_a.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    assert "numbers/a" in shown
    main(["--show", str(save)])
    assert "numbers/b" in capsys.readouterr().out


def test_transfer_leaves_every_task_out_and_goes_on_with_what_is_there(
        able_dir, tmp_path, capsys):  # noqa: F811
    """Two tasks of two prompts: each is sampled before and after training on the other.

    A second run draws nothing anew.
    """
    for task in ("a", "b"):
        for name in ("x", "y"):
            write_prompt(tmp_path / task / f"{name}.json", request=f"{task}{name}?")
    (tmp_path / "c.yaml").write_text(
        f"model: {able_dir}\nmethod: diffuse\ntrain_prompts: [{tmp_path}/a, {tmp_path}/b]\n"
        "output_dir: x\n")
    argv = ["--config", tmp_path / "c.yaml", "--n_iters", 2, "--n_generations", 12,
            "--max_new_tokens", 4, "--out_dir", tmp_path / "out"]
    results = []
    for _ in range(2):
        diffuse_transfer.main(list(map(str, argv)))
        shown = capsys.readouterr()
        results.append(json.loads(shown.out.splitlines()[-1])["tasks"])
    assert results[0] == results[1] and set(results[0]) == {"a", "b"}
    assert "before → after" in shown.out and "this run is finished" in shown.err
    for task, line in results[0].items():
        before, after = (
            [json.loads(row) for row in (tmp_path / "out" / f"{task}_{mode}.jsonl").open()]
            for mode in diffuse_transfer.MODES)
        assert [row["task"] for row in before] == [task, task]
        assert before[0]["preds"] != after[0]["preds"]
        assert line["prompts"] == 2 and line["kl"]["after"] < line["kl"]["before"]
    run = json.loads((tmp_path / "out" / "a_lora.json").read_text())["run"]
    assert "without_a" in run["args"]["run_name"]
    assert (tmp_path / "out" / "a_plots" / "a_x.png").is_file()
    import_module("eval").main(["--show", str(tmp_path / "out" / "a.json")])
    assert "a/x" in capsys.readouterr().out
