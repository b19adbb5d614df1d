"""Dialogues with a persona: the toolkit's JSONL, and the text files of Persona-Chat and ConvAI2.

A row has `persona` (sentences about Person B, none of them empty; [] where the file has none),
`context` (turns joined by newlines, the last one by Person A), `response` (what Person B said), and
maybe `candidates`, `partner_persona` and `person`.

A line of a text file is a number and text. Number 1 starts a dialogue. Lines `your persona: ...`
and `partner's persona: ...` come first (one kind, both, or none of them), then utterances
`partner's words<TAB>reply`, maybe with `<TAB><TAB>candidate|candidate|...`. Every reply is a row of
its own, with all that was said before.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import utils
from utils import USAGE, fail

NUMBERED = re.compile(r"(\d+) (.*)")
PERSONA = re.compile(r"(your|partner's) persona:(.*)")


def read(path: str) -> list[dict]:
    """The rows of a .txt file in the published format, or of a JSONL file.

    Exits over faults, each with its file:line.
    """
    is_text = Path(path).suffix == ".txt"
    rows = read_convai2(Path(path)) if is_text else utils.read_jsonl(path, check_row)
    # the key is always there, so that later code need not ask for it
    return [{"persona": [], **row} for row in rows]


def check_row(row: dict) -> str | None:
    """What is wrong with a JSONL row, or None."""
    # utils.check_row also accepts a prompt, but that is no dialogue with a person
    if "context" not in row:
        return f'needs "context" and "response", has {sorted(row)[:5]}'
    if problem := utils.check_row(row, candidates=False):
        return problem
    response, persona = row.get("response"), row.get("persona", [])
    if not isinstance(response, str) or not response.strip():
        return f'field "response" must be a string with text, got {json.dumps(response)[:40]}'
    if not isinstance(persona, list) or not all(isinstance(s, str) for s in persona):
        return f'field "persona" must be a list of strings, got {json.dumps(persona)[:60]}'
    # an empty list is more likely a lost persona than a row without one
    if "persona" in row and not persona:
        return 'field "persona" is empty; leave it out where a row has none'
    for number, sentence in enumerate(persona, 1):
        if not sentence.strip():
            return f'field "persona": sentence {number} is empty'
    return None


def read_convai2(path: Path) -> list[dict]:
    """The rows of a text file; all lines are read before the first error stops the run."""
    rows, errors = [], []
    # splitlines() would also cut at U+2028 and the like, inside an utterance
    lines = _read_text(path).split("\n")
    # a download that broke off ends in the middle of a line
    if lines[-1]:
        errors.append(f"{path}:{len(lines)}: the last line does not end: the file is cut")
    dialogue, before = _Dialogue(), 0  # before: the number of the line above
    for place, line in enumerate(lines[:-1], 1):
        numbered = NUMBERED.fullmatch(line.rstrip("\r"))
        number = int(numbered[1]) if numbered else None
        if number == 1:  # also after a fault: the numbers tell where dialogues start
            if before and not dialogue.utterances:
                errors.append(f"{path}:{place - 1}: the dialogue ends before anybody speaks")
            dialogue = _Dialogue()
        row, problem = None, _numbering_fault(line, number, before)
        if not problem:
            row, problem = dialogue.read_line(numbered[2])
        if problem:
            errors.append(f"{path}:{place}: {problem}\n  line: {line[:100]}")
        elif row:
            rows.append(row)
        # a line without a number is one fault, and not a gap in the numbers as well
        before = before if number is None else number
    if before and not dialogue.utterances:
        errors.append(f"{path}:{len(lines) - 1}: the dialogue ends before anybody speaks")
    if errors:
        # the first error comes last, next to the count, where it is not scrolled away
        for error in errors[1 : utils.MAX_SHOWN_ERRORS]:
            print(f"error: {error}", file=sys.stderr)
        fail(USAGE, f"{errors[0]}\nbad lines in {path}: {len(errors)}",
             "mend the file, or fetch it again")
    if not rows:
        fail(USAGE, f"{path}: no rows", "a text file in the ConvAI2 format")
    return rows


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    if not path.is_file():
        fail(USAGE, f"{path} is {'a folder' if path.is_dir() else 'not there'}",
             "give a text or JSONL file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        fail(USAGE, f"{path}:{line}: not UTF-8", "iconv converts it")


def _numbering_fault(line: str, number: int | None, before: int) -> str | None:
    """What is wrong with a line's number, or None; before: the number of the line above."""
    if number is None:
        return "must be a number, a space and text" if line.strip() else "is empty"
    if number in (1, before + 1):
        return None
    if not before:
        return f"starts with number {number}: the first lines of the dialogue are missing"
    return f"number {number} follows {before}: lines are missing"


@dataclass
class _Dialogue:
    """What has been read so far of one dialogue of a text file."""

    persona: list[str] = field(default_factory=list)
    partner_persona: list[str] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    utterances: int = 0  # also counts those that are at fault

    def read_line(self, text: str) -> tuple[dict | None, str | None]:
        """The row that a line gives, if any, and what is wrong with the line, or None."""
        # an utterance may begin like a persona line, but a persona has no tab
        fact = None if "\t" in text else PERSONA.fullmatch(text)
        return (None, self._read_persona(fact)) if fact else self._read_utterance(text)

    def _read_persona(self, fact: re.Match) -> str | None:
        sentence = fact[2].strip()  # all after the first colon, further colons included
        (self.persona if fact[1] == "your" else self.partner_persona).append(sentence)
        if self.utterances:
            return "a persona line after the first utterance"
        return None if sentence else "a persona line without text"

    def _read_utterance(self, text: str) -> tuple[dict | None, str | None]:
        self.utterances += 1
        partner, _, rest = text.partition("\t")
        reply, _, candidates = rest.partition("\t\t")
        partner, reply = partner.strip(), reply.strip()
        if not partner or not reply:
            return None, "must be an utterance, a tab and the reply to it"
        # shared by the rows of a dialogue: personas are complete when the first utterance comes
        row = {"persona": self.persona, "partner_persona": self.partner_persona,
               "context": "\n".join([*self.turns, partner]), "response": reply}
        if candidates.strip():
            row["candidates"] = [text.strip() for text in candidates.split("|")]
        self.turns += [partner, reply]
        return row, None
