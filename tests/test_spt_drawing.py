"""Method spt: replies under chosen, all, sampled or fused soft prompts, and the chat."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, refused, write_jsonl
from spt_cases import ROWS, drawn, finished, prepared  # noqa: F401

import infer
from decoding.mixtures import MixedTree, mix
from decoding.sampling import greedy, sample
from methods.spt import inference, messages
from modeling.softprompts import soft_prompts

# ---- a tree for every way to use soft prompts ---------------------------------------------------


def test_fusion_by_hand():
    """Two branches, weights 1/4 and 3/4: probabilities (1/2, 1/2), (1/6, 5/6) mix to (1/4, 3/4).

    Weights 2 and 1 on logits (1, 0) and (0, 5) sum to (2, 5).
    """
    logits = torch.tensor([[[0.5, 0.5], [1 / 6, 5 / 6]]]).log()
    mixture = mix(logits, torch.tensor([[0.25, 0.75]]), "probs").exp()
    assert torch.allclose(mixture, torch.tensor([[0.25, 0.75]]))
    logits, weights = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]]), torch.tensor([[2.0, 1.0]])
    assert mix(logits, weights, "logits_raw").tolist() == [[2.0, 5.0]]


def test_the_mixture_is_weighted_as_in_the_fusion_loss():
    """Scores (1, 0): raw, or softmax(s / tau) with e^(1 / 0.5) = e^2 to 1."""
    assert inference.mixture_weights([1.0, 0.0], "logits_raw", 0.5).tolist() == [1, 0]
    share = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 1)
    for fusion in ("probs", "logits_norm"):
        weights = inference.mixture_weights([1.0, 0.0], fusion, 0.5)
        assert torch.allclose(weights, torch.stack([share, 1 - share]))


def drawing_args(args, soft_prompt: str, branches: int):
    """The flags of training as those of drawing six tokens."""
    return args.with_values(max_new_tokens=6, soft_prompt=soft_prompt, num_branches=branches)


@torch.no_grad()
def greedy_by_hand(model, row, k, tokenizer, args) -> list[int]:
    """Six tokens under prompt k, the whole row anew for each."""
    soft = soft_prompts(model)
    ids = torch.tensor(messages.prompt_ids(row, tokenizer, args, 999)[0])
    embeddings, tokens = torch.cat([soft.prompts[k], soft.words(ids)]), []
    for _ in range(6):
        tokens.append(model(inputs_embeds=embeddings[None]).logits[0, -1].argmax())
        embeddings = torch.cat([embeddings, soft.words(tokens[-1])[None]])
    return [int(token) for token in tokens]


@pytest.mark.parametrize("soft_prompt", ["chosen", "all", "fused"])
def test_greedy_replies_are_those_of_ordinary_decoding(tokenizer, soft_prompt):
    """Each soft prompt by hand, token by token; a mixture with all weight on one is that one."""
    model, args = prepared(tokenizer, "--K", "3")
    args = drawing_args(args, soft_prompt, 1 if soft_prompt == "chosen" else 3)
    numbers = [[2], [3]] if soft_prompt == "chosen" else [[1, 2, 3]] * 2
    forest = [inference.decode_tree(
        row | {"soft_prompts": own, "scores": [0.0] * 3}, tokenizer, args)
        for row, own in zip(ROWS, numbers, strict=False)]
    if soft_prompt == "fused":
        assert all(isinstance(tree, MixedTree) for tree in forest)
        forest = [replace(tree, weights=torch.tensor([0.0, 1.0, 0.0])) for tree in forest]
        numbers = [[2], [2]]
    by_hand = [[greedy_by_hand(model, row, k - 1, tokenizer, args) for k in own]
               for row, own in zip(ROWS, numbers, strict=False)]
    assert greedy(model, forest, 0, -1, 6) == by_hand


def test_a_fused_sample_is_one_voice(tokenizer):
    """All branches take the drawn token: a mixture of one prompt with itself is its sample."""
    model, args = prepared(tokenizer, "--K", "2")
    prompts = soft_prompts(model).prompts.data
    prompts[1] = prompts[0]
    args = drawing_args(args, "fused", 2)
    both, one = (inference.decode_tree(
        ROWS[0] | {"soft_prompts": [], "scores": [0.0] * count}, tokenizer, args)
        for count in (2, 1))
    assert sample(model, [both], [7], 0, -1, 6) == sample(model, [one], [7], 0, -1, 6)


# ---- infer.py -----------------------------------------------------------------------------------


def test_a_reply_is_drawn_under_the_prompt_that_the_retriever_scores_best(
        finished, tmp_path):  # noqa: F811
    rows = drawn(finished, tmp_path, "chosen")
    for row in rows:
        best = 1 + max(range(4), key=lambda k: row["scores"][k])
        assert row["selected"] == best and row["soft_prompts"] == [best]
        assert len(row["preds"]) == 1
    noisy = drawn(finished, tmp_path, "noisy", "--selection_noise", "100")
    assert [row["selected"] for row in noisy] != [row["selected"] for row in rows]


def test_prompts_are_fixed_all_drawn_or_fused(finished, tmp_path):  # noqa: F811
    fixed = drawn(finished, tmp_path, "fixed", "--prompt_id", "3", "--num_response_per_input", "2")
    assert all(row["soft_prompts"] == [3, 3] and len(row["preds"]) == 2 for row in fixed)
    every = drawn(finished, tmp_path, "all", "--soft_prompt", "all", "--decoding", "greedy")
    assert all(row["soft_prompts"] == [1, 2, 3, 4] and len(row["preds"]) == 4 for row in every)
    third = drawn(finished, tmp_path, "third", "--prompt_id", "3", "--decoding", "greedy")
    assert [row["preds"][0] for row in third] == [row["preds"][2] for row in every], \
        "a row's reply does not depend on its neighbours"
    many = drawn(finished, tmp_path, "sampled", "--soft_prompt", "sampled", "--max_new_tokens", "1",
                 "--num_response_per_input", "40")
    assert {k for row in many for k in row["soft_prompts"]} == {1, 2, 3, 4}
    fused = drawn(finished, tmp_path, "fused", "--soft_prompt", "fused",
                  "--num_response_per_input", "2")
    assert all(len(row["preds"]) == 2 and row["soft_prompts"] == [] for row in fused), \
        "a fused reply belongs to all prompts"


def test_every_reply_has_its_prompt_in_the_order_of_drawing(finished, tmp_path):  # noqa: F811
    """Two replies under each of 4 prompts come in two turns; 3 beams all grow from one prompt."""
    twice = drawn(finished, tmp_path, "twice", "--soft_prompt", "all", "--num_response_per_input",
                  "2")
    assert all(row["soft_prompts"] == [1, 2, 3, 4] * 2 and len(row["preds"]) == 8 for row in twice)
    beams = drawn(finished, tmp_path, "beams", "--decoding", "beam", "--num_response_per_input",
                  "3", "--prompt_id", "2")
    assert all(row["soft_prompts"] == [2] * 3 and len(row["preds"]) == 3 for row in beams)


@pytest.mark.parametrize(("flags", "problem"), [
    (["--prompt_id", "9"], "the checkpoint has prompts 1 to 4"),
    (["--prompt_id", "0"], "--prompt_id 0 must be at least 1"),
    (["--prompt_id", "1", "--soft_prompt", "all"], "drop one of the two"),
    (["--decoding", "list"], "--decoding list does not work"),
    (["--decoding", "beam", "--soft_prompt", "all"], "--decoding beam does not work"),
    (["--decoding", "greedy", "--num_response_per_input", "2"], "would repeat"),
    (["--overgenerate", "8"], "--overgenerate does not work"),
    (["--engine", "openai:m"], "--engine openai:m has no soft prompts"),
    (["--interactive", "--soft_prompt", "all"], "--interactive gives one reply at a time"),
])
def test_drawing_flags_that_cannot_work_are_refused(
        finished, tmp_path, capsys, flags, problem):  # noqa: F811
    argv = ["--method", "spt", *flags]
    assert problem in refused(capsys, 2, drawn, finished, tmp_path, "x", *argv)


def test_the_earlier_name_of_the_flag_still_works():
    args = infer.read_flags(["--method", "spt", "--prompts", "all", "--test_file", "x.jsonl",
                             "--save_file", "y.jsonl"])
    assert args.soft_prompt == "all"


# ---- chat ---------------------------------------------------------------------------------------


class Terminal:
    """A command in a pseudo-terminal: type a line, wait for text."""

    def __init__(self, argv: list[str], cwd):
        self.master, slave = pty.openpty()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, cwd=cwd,
                                        env=env, close_fds=True)
        os.close(slave)
        self.text = ""

    def expect(self, mark: str, seconds: float = 60) -> str:
        """What came up to the mark, which is taken out of the text."""
        end = time.time() + seconds
        while mark not in self.text:
            assert time.time() < end, f"no {mark!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                self.text += os.read(self.master, 4096).decode("utf-8", "replace")
        before, _, self.text = self.text.partition(mark)
        return before

    def say(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())


def test_a_terminal_chat_answers_clears_reloads_saves_and_leaves(finished, tmp_path):  # noqa: F811
    """Real keys in a pseudo-terminal.

    The persona file is changed while the chat runs, and r takes its next person.
    """
    _, _, checkpoint = finished
    path = write_jsonl(tmp_path / "people.jsonl", ROWS)
    chat = Terminal([sys.executable, str(ROOT / "infer.py"), "--interactive",
                     "--model_name_or_path", f"{checkpoint}/", "--test_file", str(path),
                     "--save_file", str(tmp_path / "chat.jsonl"), "--max_new_tokens", "4"],
                    tmp_path)
    chat.expect("My cat is called 12.")
    chat.expect("you: ")
    chat.say("save")
    chat.expect("nothing to save")
    chat.say("Do you sell tomatoes?")
    chat.expect("them: ")
    shown = chat.expect("]")
    assert "prompt" in shown and "scores" in shown
    chat.say("And fish?")
    chat.expect("them: ")
    chat.expect("]")
    chat.say("save")
    chat.expect("(saved to")
    chat.say("clear")
    chat.expect("forgotten")
    chat.say("save")
    chat.expect("nothing to save")
    write_jsonl(path, [ROWS[0], ROWS[1] | {"persona": ["I was written meanwhile."]}])
    chat.say("r")
    chat.expect("I was written meanwhile.")
    chat.say("exit")
    assert chat.process.wait(20) == 0
    row, = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert row["turns"][0::2] == ["Do you sell tomatoes?", "And fish?"] and len(row["turns"]) == 4
    assert len(row["soft_prompts"]) == 2 and row["persona"] == ROWS[0]["persona"]


def chat_with(finished, tmp_path, monkeypatch, typed: list[str], *flags: str):  # noqa: F811
    """A chat in this process, in which these lines are typed."""
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda mark: next(lines))
    path, _, checkpoint = finished
    infer.main(["--interactive", "--model_name_or_path", f"{checkpoint}/", "--test_file", str(path),
                "--save_file", str(tmp_path / "chat.jsonl"), "--max_new_tokens", "4", *flags])


def test_a_special_token_typed_by_the_user_does_not_end_the_chat(
        finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The chat says what is wrong, and the turn is not part of the dialogue."""
    chat_with(finished, tmp_path, monkeypatch,
              ["Do you sell <|im_end|>?", "Do you sell tomatoes?", "save", "exit"])
    shown = capsys.readouterr()
    assert "the chat: row 1 contains the special token <|im_end|>" in shown.err
    assert "(that cannot be answered; say it differently, or clear)" in shown.out
    row, = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert row["turns"][0] == "Do you sell tomatoes?" and len(row["turns"]) == 2


def test_a_fused_reply_of_a_chat_belongs_to_no_single_prompt(
        finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    chat_with(finished, tmp_path, monkeypatch, ["Do you sell tomatoes?", "save", "exit"],
              "--soft_prompt", "fused")
    assert "[all prompts together; scores " in capsys.readouterr().out
    row, = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert len(row["turns"]) == 2 and row["soft_prompts"] == []
