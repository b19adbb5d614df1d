"""infer.py end to end on the tiny model.

What is drawn, what is refused, and kills that lose nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import DIALOGUES, ROOT, make_model, refused, write_jsonl
from safetensors.torch import load_file, save_file

import infer
import train
import utils
from decoding import beams, drawing, sampling
from decoding.beams import diverse
from decoding.replies import clean_reply
from decoding.sampling import GumbelNoise, sample
from trees import Segment, Tree, branch_prompts

ROWS = [{**DIALOGUES[i % 4], "context": f"{DIALOGUES[i % 4]['context']} ({i})"} for i in range(10)]


@pytest.fixture(scope="module")
def test_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "test.jsonl", ROWS)


@pytest.fixture(scope="module")
def checkpoint(tiny_dir, train_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.main(
        [
            "--model_name",
            str(tiny_dir),
            "--train_file",
            str(train_file),
            "--output_dir",
            str(out),
            "--max_steps",
            "2",
            "--lora_target_modules",
            "q_proj",
            "v_proj",
        ]
    )
    return out / "peft" / "check_2"


def draw(model, test_file, out, *more) -> list[dict]:
    infer.main(
        [
            "--model_name_or_path",
            str(model),
            "--test_file",
            str(test_file),
            "--save_file",
            str(out),
            "--batch_size",
            "4",
            "--max_new_tokens",
            "6",
            "--num_response_per_input",
            "3",
            *more,
        ]
    )
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_row_gets_its_responses_in_order_and_the_summary_says_how(
    checkpoint, test_file, tmp_path
):
    rows = draw(checkpoint, test_file, tmp_path / "a.jsonl")
    assert [r["context"] for r in rows] == [r["context"] for r in ROWS] and all(
        len(r["preds"]) == 3 for r in rows
    )
    summary = json.loads((tmp_path / "a.json").read_text())
    assert (
        summary["rows"] == 10
        and summary["responses"] == 30
        and summary["settings"]["method"] == "peft"
    )
    assert (
        summary["tokens_per_second"] > 0
        and summary["run"]["base_sha256"]
        and "row_hashes" not in summary["run"]
    )
    assert draw(checkpoint, test_file, tmp_path / "b.jsonl") == rows, "one seed, one result"
    assert draw(checkpoint, test_file, tmp_path / "c.jsonl", "--seed", "7") != rows


def test_a_rows_noise_is_its_own_and_follows_the_softmax():
    """Draws over p = (1/2, 1/4, 1/8, 1/8): total variation of 20,000 draws below 0.02.

    Row 1 ignores row 0's seed.
    """
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    scores = p.log().repeat(20_000, 1)

    def drawn(*seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        noisy = GumbelNoise(generators, 20_000 // len(seeds))(None, scores)
        return noisy.argmax(-1)

    shares = torch.bincount(drawn(1), minlength=4) / 20_000
    assert (shares - p).abs().sum() / 2 < 0.02
    assert torch.equal(drawn(1, 2)[10_000:], drawn(3, 2)[10_000:]) and not torch.equal(
        drawn(1, 2), drawn(3, 2)
    )


HALF = [2 / 3, 1 / 3, 0, 0]


@pytest.mark.parametrize(
    ("limits", "want"),
    [
        ({}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"top_k": 2}, HALF),
        ({"top_p": 0.7}, HALF),
        ({"min_p": 0.3}, HALF),
        ({"typical_p": 0.2}, [0, 1, 0, 0]),
        ({"top_n_sigma": 1.2}, HALF),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
    ],
)
def test_limits_and_temperature_shape_what_is_drawn(monkeypatch, limits, want):
    """p = (1/2, 1/4, 1/8, 1/8). Two best; 1/2 + 1/4 reach 0.7; 0.3 x 1/2 lies between 1/8 and 1/4;
    p^2 at 0.5.

    Typical: the entropy is 1.75 ln 2, nearest to it is -ln 1/4 = 2 ln 2 (off by 0.25 ln 2), and 1/4
    reaches 0.2.
    Deviations: logits -1, -2, -3, -3 times ln 2 have one of 0.957 ln 2; 1.2 of them reach from -1
    to -2.149.
    """
    scores, want = (
        torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log().repeat(20_000, 1),
        torch.tensor(want),
    )
    monkeypatch.setattr(sampling, "complete", lambda *args: args[-1](None, scores).argmax(-1))
    forest = [Tree(Segment([1], children=[Segment([2])] * 20_000))]
    shares = torch.bincount(sample(None, forest, [1], 0, 0, 1, **limits), minlength=4) / 20_000
    assert torch.equal(shares > 0, want > 0) and (shares - want).abs().sum() / 2 < 0.02


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.99999}])
def test_limits_that_leave_one_token_draw_the_greedy_response(tiny_model, tokenizer, limits):
    forest = [Tree(branch_prompts([[5, 6, 7, 8]] * 3, [1, 2, 3]))]
    out = sample(tiny_model, forest, [0], 0, 1, 8, **limits)
    ids = torch.tensor([[5, 6, 7, 8]])
    for _ in range(8):
        ids = torch.cat([ids, tiny_model(ids).logits[:, -1:].argmax(-1)], 1)
    greedy = ids[0, 4:].tolist()
    greedy = greedy[: greedy.index(1)] if 1 in greedy else greedy
    assert out == [[greedy] * 3]


def test_a_cut_file_is_repaired_and_finished_byte_for_byte(checkpoint, test_file, tmp_path, capsys):
    """Cut inside row 7, which is the third of its batch of four.

    Two rows of the batch are kept, the rest redone.
    """
    draw(checkpoint, test_file, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    cut = len(b"\n".join(whole.split(b"\n")[:6])) + 30
    (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
    shutil.copy(tmp_path / "whole.json", tmp_path / "cut.json")
    draw(checkpoint, test_file, tmp_path / "cut.jsonl", "--resume")
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    assert (tmp_path / "cut.jsonl.torn").read_bytes() == whole[cut - 29 : cut]
    assert "half a row" in capsys.readouterr().err


def test_resuming_a_finished_file_decodes_nothing_and_keeps_its_speed(
    tiny_dir, test_file, tmp_path, monkeypatch
):
    """Ten rows in batches of four: the last batch is not full, but done."""
    rows = draw(tiny_dir, test_file, tmp_path / "a.jsonl")
    summary = (tmp_path / "a.json").read_text()
    monkeypatch.setattr(sampling, "sample", lambda *args: pytest.fail("decoded again"))
    assert draw(tiny_dir, test_file, tmp_path / "a.jsonl", "--resume") == rows
    assert (tmp_path / "a.json").read_text() == summary


def test_a_killed_run_is_resumed_to_the_same_file(checkpoint, tmp_path):
    rows = [{**row, "context": f"{row['context']} {k}"} for k in range(4) for row in ROWS]
    file = write_jsonl(tmp_path / "many.jsonl", rows)
    argv = [
        "--model_name_or_path",
        str(checkpoint),
        "--test_file",
        str(file),
        "--batch_size",
        "2",
        "--max_new_tokens",
        "40",
        "--num_response_per_input",
        "3",
    ]
    infer.main([*argv, "--save_file", str(tmp_path / "whole.jsonl")])
    killed = tmp_path / "killed.jsonl"
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "infer.py"), *argv, "--save_file", str(killed)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 90
    while not (killed.exists() and killed.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and killed.read_bytes().count(b"\n") < 40
    infer.main([*argv, "--save_file", str(killed), "--resume"])
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.fixture(scope="module")
def finished(tiny_dir, test_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "a.jsonl"
    draw(tiny_dir, test_file, out)
    return out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "is already there"),
        (["--resume", "--temperature", "0.5"], "was made with temperature 1.0, now it is 0.5"),
        (["--resume", "--seed", "7"], "seed 42, now it is 7"),
        (["--resume", "--batch_size", "2"], "size 4, now it is 2"),
        (["--resume", "--test_file", "other.jsonl"], "data_sha256"),
        (["--resume", "--chat_template", "none"], "chat_template"),
    ],
)
def test_a_file_that_is_there_is_never_mixed_with_other_settings(
    tiny_dir, test_file, finished, tmp_path, monkeypatch, capsys, more, said
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "other.jsonl", ROWS[::-1])
    out = shutil.copytree(finished.parent, tmp_path / "outs") / finished.name
    assert said in refused(capsys, 2, draw, tiny_dir, test_file, out, *more)
    assert out.read_bytes() == finished.read_bytes()


def test_a_method_that_is_not_the_checkpoints_is_refused(checkpoint, test_file, tmp_path, capsys):
    said = refused(capsys, 2, draw, checkpoint, test_file, tmp_path / "a.jsonl", "--method", "otm")
    assert f"--method otm, but {checkpoint} is a peft model" in said and "--method peft" in said


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (
            lambda folder: os.truncate(folder / "adapter_model.safetensors", 1000),
            "has 1000 bytes and cannot be read",
        ),
        (lambda folder: (folder / "run.json").unlink(), "is incomplete (no run.json)"),
    ],
)
def test_a_broken_checkpoint_is_refused_with_what_is_wrong(
    checkpoint, test_file, tmp_path, capsys, harm, said
):
    broken = shutil.copytree(checkpoint, tmp_path / "check_2")
    harm(broken)
    assert said in refused(capsys, 2, draw, broken, test_file, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_an_adapter_on_another_base_of_the_same_shape_is_refused(
    checkpoint, tokenizer, test_file, tmp_path, capsys
):
    other = tmp_path / "other"
    make_model(len(tokenizer), seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    moved = shutil.copytree(checkpoint, tmp_path / "check_2")
    run = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**run, "base_model": str(other)}))
    (moved / "COMPLETE.json").unlink()
    said = refused(capsys, 2, draw, moved, test_file, tmp_path / "a.jsonl")
    assert f"was trained on base {run['base_sha256']}" in said and "--force_base" in said
    assert len(draw(moved, test_file, tmp_path / "a.jsonl", "--force_base")) == 10


def test_rows_that_were_trained_on_are_counted_and_refused_on_request(checkpoint, tmp_path, capsys):
    """Two of three rows: one word for word, one in other case and spaces."""
    seen = [
        DIALOGUES[0],
        {"context": DIALOGUES[1]["context"].upper() + "  "},
        {"context": "New.\nQuite."},
    ]
    file = write_jsonl(tmp_path / "mixed.jsonl", seen)
    draw(checkpoint, file, tmp_path / "a.jsonl")
    assert "2 of 3 rows were trained on (first: row 1)" in capsys.readouterr().err
    assert "2 of 3 rows" in refused(
        capsys, 2, draw, checkpoint, file, tmp_path / "b.jsonl", "--strict_split"
    )


def test_out_of_memory_halves_the_batch_with_the_same_seeds_and_stops_at_one_row(
    checkpoint, test_file, tmp_path, capsys, monkeypatch
):
    real, seen = sample, []

    def small(limit):
        def sample(model, trees, seeds, **rest):
            if len(trees) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            seen.extend(seeds)
            return real(model, trees, seeds, **rest)

        return sample

    whole = draw(checkpoint, test_file, tmp_path / "a.jsonl")
    monkeypatch.setattr(sampling, "sample", small(2))
    assert draw(checkpoint, test_file, tmp_path / "b.jsonl") == whole
    assert "out of memory with 4 rows, trying 2 (same seeds)" in capsys.readouterr().err
    assert seen == [int(utils.sha256(f"42-{i}")[:15], 16) for i in range(10)]
    monkeypatch.setattr(sampling, "sample", small(0))
    assert "out of memory in rows 1 to 4, even one at a time" in refused(
        capsys, 75, draw, checkpoint, test_file, tmp_path / "c.jsonl"
    )


def test_empty_and_cut_responses_are_counted_in_the_row_and_the_summary(
    tiny_dir, test_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        sampling, "sample", lambda model, trees, **rest: [[[], [5] * 6, [5]] for _ in trees]
    )
    rows = draw(tiny_dir, test_file, tmp_path / "a.jsonl")
    assert rows[0]["preds"][0] == "" and rows[0]["warnings"] == {"empty": 1, "cut": 1}
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["empty"] == 10 and summary["cut"] == 10


def test_warnings_that_rows_bring_along_are_not_counted_as_this_runs(
    tiny_dir, tmp_path, monkeypatch
):
    """An earlier --save_file as --test_file: old preds and warnings make way for the new ones."""
    file = write_jsonl(
        tmp_path / "old.jsonl", [{**ROWS[0], "preds": ["", "x"], "warnings": {"empty": 1}}]
    )
    monkeypatch.setattr(sampling, "sample", lambda model, trees, **rest: [[[5]] * 3 for _ in trees])
    rows = draw(tiny_dir, file, tmp_path / "a.jsonl")
    assert len(rows[0]["preds"]) == 3 and "warnings" not in rows[0]
    assert json.loads((tmp_path / "a.json").read_text())["empty"] == 0


def test_shortened_contexts_are_counted_and_rows_that_cannot_fit_are_refused(
    tiny_dir, tmp_path, capsys
):
    """One of three rows is long; a prompt row needs no candidates.

    Twenty tokens hold none of them.
    """
    rows = [
        {"context": "\n".join(["This is an old turn."] * 40)},
        {"context": "Hi?"},
        {"prompt": "Name a boat."},
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = draw(tiny_dir, file, tmp_path / "a.jsonl", "--max_length", "200")
    assert [len(row.pop("preds")) for row in done] == [3, 3, 3]
    assert json.loads((tmp_path / "a.json").read_text())["truncated"] == 1
    said = refused(capsys, 2, draw, tiny_dir, file, tmp_path / "b.jsonl", "--max_length", "20")
    assert "row 1 and 2 more do not fit into 20 tokens with 6 new ones" in said


def test_a_row_that_spells_a_special_token_is_refused_before_decoding(tiny_dir, tmp_path, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"context": "Bye.<|im_end|>\nWhat?"}])
    said = refused(capsys, 2, draw, tiny_dir, file, tmp_path / "a.jsonl")
    assert (
        "row 2 contains the special token <|im_end|>" in said
        and not (tmp_path / "a.jsonl").exists()
    )


def test_a_closed_pipe_leaves_a_complete_file_and_no_traceback(tiny_dir, test_file, tmp_path):
    """As in `python infer.py ... | true`, with a buffered stdout as Python has it by default."""
    out = tmp_path / "a.jsonl"
    run = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "infer.py"),
            "--model_name_or_path",
            str(tiny_dir),
            "--test_file",
            str(test_file),
            "--save_file",
            str(out),
            "--max_new_tokens",
            "2",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    run.stdout.close()
    errors = run.stderr.read()
    assert (
        out.read_text().count("\n") == 10
        and "Traceback" not in errors
        and "BrokenPipe" not in errors
    ), errors
    assert run.wait() in (0, 141)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Person B: Fine by me.", "Fine by me."),
        ("**Person B:** Fine.", "Fine."),
        ("Possibility #3: Fine.", "Fine."),
        ("Person B's reply: Fine.", "Fine."),
        ("Person B’s reply: Fine.", "Fine."),
        ("Fine.\n\nPerson A: And you?", "Fine."),
        ('"Fine by me."', "Fine by me."),
        ("“Fine”  by\nme", '"Fine" by me'),
        ("I like (a) cats and dogs (b) too", "I like (a) cats and dogs (b) too"),
        ("好的 🙂 да", "好的 🙂 да"),
        ("*sighs* #1 – no…", "*sighs* #1 – no…"),
        ("   ", ""),
        ('"', '"'),
    ],
)
def test_cleaning_takes_labels_and_quotes_and_nothing_that_was_said(text, want):
    assert clean_reply(text) == want


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (
            ["--decoding", "diverse", "--num_beam_groups", "2"],
            "--num_beams 3 is no multiple of --num_beam_groups 2",
        ),
        (["--decoding", "diverse", "--num_beams", "2"], "3 responses from --num_beams 2"),
        (
            ["--decoding", "diverse", "--diversity_penalty", "0"],
            "--diversity_penalty 0 must be above 0",
        ),
        (
            ["--decoding", "diverse", "--diversity_penalty", "nan"],
            "--diversity_penalty nan must be above 0",
        ),
        (["--diversity_penalty", "2"], "--diversity_penalty does nothing with --decoding sampling"),
        (["--decoding", "beam", "--top_p", "0.9"], "--top_p does nothing with --decoding beam"),
        (["--num_response_per_input", "0"], "--num_response_per_input 0 must be at least 1"),
        (["--temperature", "0"], "--temperature 0.0 with --decoding sampling must be above 0"),
        (["--typical_p", "0"], "--typical_p 0 must be above 0 and at most 1"),
        (["--top_n_sigma", "-1"], "--top_n_sigma -1 must be at least 0"),
        (["--overgenerate", "2"], "--overgenerate 2 is less than --num_response_per_input 3"),
        (["--select", "mmr"], "add --overgenerate M"),
        (["--overgenerate", "6", "--floor", "2"], "--min_relevance 2.0 is not a cosine"),
        (["--engine", "openai"], "--engine openai does not say which model"),
        (["--base_url", "http://x"], "add --engine openai:MODEL"),
        (
            ["--engine", "openai:m", "--decoding", "beam"],
            "--decoding beam does not work through a server",
        ),
        (
            ["--engine", "openai:m", "--typical_p", "0.5"],
            "--typical_p does not work through a server",
        ),
        (["--interactive"], "--interactive does not work with method base"),
        (["--decoding", "list", "--max_retries", "-1"], "--max_retries -1 must be at least 0"),
        (
            ["--decoding", "diverse", "--numbers", "per_group"],
            "--group_numbers per_group, but method base has one prompt",
        ),
    ],
)
def test_flags_that_do_not_fit_together_are_refused_with_their_numbers(
    tiny_dir, test_file, tmp_path, capsys, flags, what
):
    assert what in refused(capsys, 2, draw, tiny_dir, test_file, tmp_path / "a.jsonl", *flags)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("how", ["greedy", "beam", "diverse"])
def test_every_decoding_gives_n_responses_per_row_and_counts_what_sharing_saves(
    how, checkpoint, test_file, tmp_path
):
    rows = draw(checkpoint, test_file, tmp_path / "a.jsonl", "--decoding", how)
    assert len(rows) == 10 and all(len(row["preds"]) == 3 for row in rows)
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["prefill_tokens_without_sharing"] > 2.5 * summary["prefill_tokens"]
    assert summary["seconds_per_row_median"] <= summary["seconds_per_row_p95"]
    assert summary["settings"]["decoding"] == how


def test_diverse_uses_the_first_number_for_every_group_or_one_for_each(
    checkpoint, test_file, tmp_path, monkeypatch
):
    real, seen = diverse, []
    monkeypatch.setattr(
        beams,
        "diverse",
        lambda model, trees, **rest: (
            seen.append([len(tree.root.children) for tree in trees]) or real(model, trees, **rest)
        ),
    )
    first = draw(
        checkpoint, test_file, tmp_path / "a.jsonl", "--decoding", "diverse", "--limit", "2"
    )
    each = draw(
        checkpoint,
        test_file,
        tmp_path / "b.jsonl",
        "--decoding",
        "diverse",
        "--limit",
        "2",
        "--numbers",
        "per_group",
    )
    assert seen == [[1, 1], [3, 3]] and first != each


def test_more_responses_than_trained_numbers_use_them_in_turn_and_say_so(
    checkpoint, test_file, tmp_path, capsys
):
    """Numbers 1 to 9 were trained.

    Response 10 is asked for with number 1, response 11 with number 2.
    """
    draw(
        checkpoint,
        test_file,
        tmp_path / "a.jsonl",
        "--limit",
        "1",
        "--num_response_per_input",
        "11",
    )
    assert (
        "11 responses under 9 different prompts, which are used in turn" in capsys.readouterr().err
    )


def test_of_many_drawn_the_most_different_are_kept_and_all_are_recorded(
    tiny_dir, tokenizer, test_file, tmp_path, monkeypatch
):
    """Six drawn, three kept: one of each of the three groups of like embeddings."""

    class Embedder:
        def encode(self, texts):
            table = {
                "row": [1, 1, 1],
                "a": [1, 0.01, 0],
                "b": [1, 0, 0.01],
                "c": [0.01, 1, 0],
                "d": [0, 1, 0.01],
                "e": [0.01, 0, 1],
                "f": [0, 0.01, 1],
            }
            vectors = np.array(
                [table[text if text in table else "row"] for text in texts], dtype=float
            )
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr(drawing, "load_embedder", Embedder)
    letters = [tokenizer(letter)["input_ids"] for letter in "abcdef"]
    monkeypatch.setattr(sampling, "sample", lambda model, trees, **rest: [letters for _ in trees])
    for how in ("mmr", "dpp", "medoids"):
        rows = draw(
            tiny_dir,
            test_file,
            tmp_path / f"{how}.jsonl",
            "--overgenerate",
            "6",
            "--select",
            how,
            "--limit",
            "2",
        )
        for row in rows:
            assert {"abcdef".index(text) // 2 for text in row["preds"]} == {0, 1, 2} and row[
                "drawn"
            ] == list("abcdef")
    assert json.loads((tmp_path / "dpp.json").read_text())["settings"]["min_relevance"] == 0.25


@pytest.mark.parametrize("how", ["list", "verbalized"])
def test_answers_that_cannot_be_read_leave_the_row_short_and_counted(
    how, tiny_dir, test_file, tmp_path
):
    """The tiny model rambles without tags, and in lines that may pass as items of a list.

    Verbalized: none of 3 replies can be read, in either of two rounds, so 6 were asked for.
    Whatever a list gives, preds and missing make three. The summary adds the rows up.
    """
    rows = draw(
        tiny_dir,
        test_file,
        tmp_path / "a.jsonl",
        "--decoding",
        how,
        "--max_retries",
        "1",
        "--limit",
        "2",
    )
    missing = [3 - len(row["preds"]) for row in rows]
    assert [row.get("warnings", {}).get("missing", 0) for row in rows] == missing
    if how == "verbalized":
        assert all(row["preds"] == [] and row["asked"] == 6 and row["parsed"] == 0 for row in rows)
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["missing"] == sum(missing) and summary["responses"] == 6 - sum(missing)
    asked, parsed = (sum(row[name] for row in rows) for name in ("asked", "parsed"))
    assert summary["parse_rate"] == round(parsed / asked, 4)


def test_an_adapter_keeps_the_template_it_was_trained_with(checkpoint, test_file, tmp_path, capsys):
    said = refused(
        capsys, 2, draw, checkpoint, test_file, tmp_path / "a.jsonl", "--chat_template", "none"
    )
    assert "brings the template that it was trained with" in said


def test_a_resume_with_another_adapter_is_refused(checkpoint, test_file, tmp_path, capsys):
    """The same folder name, other weights: half a file must not be finished by another model."""
    copy = tmp_path / "check_2"
    shutil.copytree(checkpoint, copy)
    draw(copy, test_file, tmp_path / "a.jsonl", "--limit", "4")
    weights = load_file(copy / "adapter_model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        copy / "adapter_model.safetensors",
        {"format": "pt"},
    )
    (copy / "COMPLETE.json").unlink()
    said = refused(
        capsys, 2, draw, copy, test_file, tmp_path / "a.jsonl", "--limit", "4", "--resume"
    )
    assert "was made with weights" in said


def test_the_hint_after_out_of_memory_is_a_command_that_works(
    checkpoint, test_file, tmp_path, capsys, monkeypatch
):
    """It says: fewer or shorter responses into another --save_file (--resume would refuse them)."""
    real, full = sample, torch.OutOfMemoryError("CUDA out of memory")

    def no_room(model, trees, max_new_tokens, **rest):
        if max_new_tokens > 3:
            raise full
        return real(model, trees, max_new_tokens=max_new_tokens, **rest)

    monkeypatch.setattr(sampling, "sample", no_room)
    said = refused(capsys, 75, draw, checkpoint, test_file, tmp_path / "a.jsonl")
    assert "fewer or shorter responses into another --save_file" in said
    rows = draw(checkpoint, test_file, tmp_path / "b.jsonl", "--max_new_tokens", "3")
    assert len(rows) == 10


def test_settings_of_an_older_version_are_not_held_against_a_run(tiny_dir, test_file, tmp_path):
    """A flag that the older run did not know is not compared; one that it knew is."""
    whole = draw(tiny_dir, test_file, tmp_path / "a.jsonl")
    summary = json.loads((tmp_path / "a.json").read_text())
    del summary["settings"]["group_numbers"]
    (tmp_path / "a.json").write_text(json.dumps(summary))
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:4]))
    assert draw(tiny_dir, test_file, tmp_path / "a.jsonl", "--resume") == whole
