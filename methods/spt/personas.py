"""Dialogues with a persona: the toolkit's JSONL, and the text files of Persona-Chat and ConvAI2.

A row has `persona` (sentences about Person B, none of them empty; [] where the file has none), `context` (turns joined by
newlines, the last one by Person A), `response` (what Person B said), and maybe `candidates`, `partner_persona` and `person`.

A line of a text file is a number and text. Number 1 starts a dialogue; `your persona: ...` and `partner's persona: ...` lines
come first (self, other, both, or none of them), then `partner's words<TAB>reply`, maybe with `<TAB><TAB>cand|cand|...`.
Every reply is a row of its own, with all that was said before.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import utils
from utils import USAGE, fail, info

PERSONA = re.compile(r"(your|partner's) persona:(.*)")
NUMBERED = re.compile(r"(\d+) (.*)")


def read(path: str) -> list[dict]:
    """The rows of a .txt file in the published format, or of a JSONL file; dies over faults by file:line."""
    rows = read_convai2(Path(path)) if Path(path).suffix == ".txt" else utils.read_jsonl(path, check_row)
    return [{"persona": [], **row} for row in rows]


def check_row(row: dict) -> str | None:
    """What is wrong with a JSONL row, or None."""
    if "context" not in row:
        return f'needs "context" and "response", has {sorted(row)[:5]}'
    if problem := utils.check_row(row, candidates=False):
        return problem
    response, persona = row.get("response"), row.get("persona", [])
    if not isinstance(response, str) or not response.strip():
        return f'field "response" must be a string with text, got {json.dumps(response)[:40]}'
    if not isinstance(persona, list) or not all(isinstance(s, str) for s in persona):
        return f'field "persona" must be a list of strings, got {json.dumps(persona)[:60]}'
    if "persona" in row and not persona:
        return 'field "persona" is empty; leave it out where a row has none'
    if any(not s.strip() for s in persona):
        return f'field "persona": sentence {[not s.strip() for s in persona].index(True) + 1} is empty'
    return None


def read_convai2(path: Path) -> list[dict]:
    """The rows of a text file; all lines are read before the first error stops the run."""
    if not path.is_file():
        fail(USAGE, f"{path} is {'a folder' if path.is_dir() else 'not there'}", "give a text or JSONL file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fail(USAGE, f"{path}:{path.read_bytes()[: error.start].count(10) + 1}: not UTF-8", "iconv converts it")
    rows, errors = [], []
    lines = text.split("\n")
    if lines[-1]:
        errors.append(f"{path}:{len(lines)}: the last line does not end: the file is cut")
    persona: dict[str, list[str]] = {"your": [], "partner's": []}
    turns: list[str] = []
    before = said = 0  # the number of the line before, and of utterances in this dialogue
    for place, line in enumerate(lines[:-1], 1):
        numbered = NUMBERED.fullmatch(line.rstrip("\r"))
        number = int(numbered[1]) if numbered else None
        problem = None
        if number == 1:
            if before and not said:
                errors.append(f"{path}:{place - 1}: the dialogue ends before anybody speaks")
            persona, turns, said = {"your": [], "partner's": []}, [], 0
        if number is None:
            problem = "must be a number, a space and text" if line.strip() else "is empty"
        elif number != before + 1 and number != 1:
            problem = f"number {number} follows {before}: lines are missing" if before else \
                f"starts with number {number}: the first lines of the dialogue are missing"
        elif fact := PERSONA.fullmatch(numbered[2]) if "\t" not in numbered[2] else None:
            sentence = fact[2].strip()  # all after the first colon, further colons included
            problem = "a persona line after the first utterance" if said else None if sentence else "a persona line without text"
            persona[fact[1]].append(sentence)
        else:
            partner, _, rest = numbered[2].partition("\t")
            reply, _, candidates = rest.partition("\t\t")
            said += 1
            if not partner.strip() or not reply.strip():
                problem = "must be an utterance, a tab and the reply to it"
            else:
                rows.append({"persona": persona["your"], "partner_persona": persona["partner's"],
                             "context": "\n".join([*turns, partner.strip()]), "response": reply.strip()})
                if candidates.strip():
                    rows[-1]["candidates"] = [c.strip() for c in candidates.split("|")]
                turns += [partner.strip(), reply.strip()]
        if number is not None:
            before = number
        if problem:
            errors.append(f"{path}:{place}: {problem}\n  line: {line[:100]}")
    if before and not said:
        errors.append(f"{path}:{len(lines) - 1}: the dialogue ends before anybody speaks")
    if errors:
        for error in errors[1 : utils.MAX_SHOWN_ERRORS]:
            info(f"error: {error}")
        fail(USAGE, f"{errors[0]}\nbad lines in {path}: {len(errors)}", "mend the file, or fetch it again")
    if not rows:
        fail(USAGE, f"{path}: no rows", "a text file in the ConvAI2 format")
    return rows
