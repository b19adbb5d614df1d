"""Where the responses under evaluation come from: their files, what produced them, their models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import utils
from modeling.checkpoints import load_checkpoint
from modeling.embedder import load_embedder
from scoring import answers
from utils import EMBEDDED, USAGE, fail, info, made_by


class NoModel(Exception):
    """The model that drew a file's responses cannot be asked; the text says why."""


class Sources:
    """The files of the systems under evaluation, by the systems' names.

    Beside a file outs/X.jsonl lies outs/X.json, which infer.py writes: its settings, the run.json
    of the checkpoint that it used, and its speed. Files from elsewhere may lack it.
    """

    def __init__(self, files: Mapping[str, str | Path]):
        self.files = {name: Path(file) for name, file in files.items()}
        self.summaries = {name: made_by(file) for name, file in self.files.items()}

    def summary(self, name: str) -> dict:
        """All of outs/X.json; empty where it is not there."""
        return self.summaries[name]

    def settings(self, name: str) -> dict | None:
        """The settings that a system's responses were drawn with; None where they are unknown."""
        return self.summaries[name].get("settings")

    def run(self, name: str) -> dict | None:
        """The run.json of the checkpoint that drew a system's responses; None if unknown."""
        return self.summaries[name].get("run")

    def model(self, name: str) -> tuple:
        """(model, tokenizer, run) of the model that drew a system's responses, loaded anew.

        Raises NoModel where the model is unknown or behind a server, is not there any more, or has
        other weights than those that drew the responses: its figures would be of another model.
        """
        settings = self.settings(name)
        if settings is None:
            beside = self.files[name].with_suffix(".json")
            raise NoModel(f"{beside} does not say which model drew the responses")
        if settings["engine"] != "hf":
            raise NoModel("the responses come from a server, which does not show its model")
        # a folder that was deleted is a reason; load_checkpoint would end the whole evaluation
        checkpoint = settings["model_name_or_path"]
        if _is_path(checkpoint) and not Path(checkpoint).is_dir():
            raise NoModel(f"{checkpoint} is not there")
        model, tokenizer, run = load_checkpoint(
            checkpoint, chat_template=settings.get("chat_template"))
        # The name is no proof: a folder may have been trained anew under it.
        if run["weights"] != settings["weights"]:
            raise NoModel(f"{checkpoint} has changed since the responses were drawn")
        return model, tokenizer, run

    # One for all systems, so a text that several of them give is embedded once.
    @cached_property
    def embedder(self):
        """The sentence embedder, which remembers every text that it has seen."""
        return load_embedder()


def read_systems(files: list[str], limit: int | None) -> dict[str, list[dict]]:
    """The rows of every file by its stem; all files must hold the same rows.

    Rows with fewer responses than others of their file, since a list could not be read or a server
    refused, are padded with empty ones, which count as incoherent. Rows of a file are all of one
    kind, verifiable (scoring/answers.py) or not.
    """
    systems: dict[str, list[dict]] = {}
    for file in files:
        rows = utils.read_jsonl(file, _one_kind_check())[:limit]
        name = Path(file).stem
        # Stems are the systems' names, and the keys of every figure.
        if name in systems:
            fail(USAGE, f"--eval_file: two files are called {name}", "rename one")
        first = next(iter(systems.values()), rows)
        # differences are paired by row: the same prompts in the same order
        if [_identity(row) for row in rows] != [_identity(row) for row in first]:
            fail(USAGE, f"{file} holds other rows than {files[0]} ({len(rows)} and {len(first)})",
                 "compare files made from one --test_file")
        # Most figures count among k replies, so all rows of a file need the same k.
        k = max(len(row["preds"]) for row in rows)
        if not k:
            fail(USAGE, f"{file} holds no responses at all",
                 "look into its warnings, and draw again")
        if missing := sum(k - len(row["preds"]) for row in rows):
            info(f"{file}: {missing} of {k * len(rows)} responses are missing; they count as "
                 "empty")
        systems[name] = [row | {"preds": row["preds"] + [""] * (k - len(row["preds"]))}
                         for row in rows]
    return systems


def _identity(row: dict) -> tuple:
    """What must be equal in two rows for their replies to be compared."""
    # by the same prompt, two versions of a file may hold other right answers
    return utils.row_hash(row), row.get("answers"), row.get("rule"), row.get("category")


def _one_kind_check() -> Callable[[dict], str | None]:
    """A check of a file's rows in turn: each is right by itself, and of the first one's kind."""
    kinds: list[bool] = []

    def check(row: dict) -> str | None:
        kinds.append(answers.is_verifiable(row))
        if kinds[-1] != kinds[0]:
            have, first = ("has", "has none") if kinds[-1] else ("has no", "has")
            return (f'{have} "answers" or "rule" and the first row {first}: the two kinds have '
                    "different figures; evaluate them apart")
        return _check_response(row)

    return check


def _check_response(row: dict) -> str | None:
    """What is wrong with a row of outs/X.jsonl, or None."""
    preds = row.get("preds")
    if not isinstance(preds, list) or not all(isinstance(text, str) for text in preds):
        return 'needs "preds", a list of strings; infer.py writes them'
    if row.get("prompt") == "":
        return None  # a continuation of nothing, as control tokens allow it
    if answers.is_verifiable(row):
        return answers.check_row(row)
    return utils.check_row(row, candidates=False)


def _is_path(checkpoint: str) -> bool:
    """Whether a model's name can only be a folder: a hub id has one slash, and none at its end."""
    return checkpoint != EMBEDDED and (checkpoint.count("/") != 1 or checkpoint.endswith("/"))
