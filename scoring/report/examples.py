"""What systems answered to a few requests whose answers a program checks, side by side."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST = 40  # characters of a reply that are shown
WRONG, REPEATED = "✗", "↺"  # before a reply, since colours and struck letters do not reach a file
LEGEND = f"{WRONG} wrong, {REPEATED} repeated"


def sign_of(reply: dict) -> str:
    """The signs that stand before a reply: none before a right one that is new."""
    return WRONG * (reply["answer"] is None) + REPEATED * reply["repeated"]


def print_examples(console: Console, examples: list[dict]) -> None:
    """examples: [{"row", "prompt", "systems": {name: [{"text", "answer", "repeated"}]}}]."""
    if not examples:
        return
    console.print(f"examples ({LEGEND}):", markup=False)
    for example in examples:
        console.print(f"{example['row']}. {example['prompt']}", markup=False, style="bold")
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=24, overflow="fold")
        table.add_column()
        for name, replies in example["systems"].items():
            # Texts and not markup: a reply may hold [x], which rich would read as a style.
            table.add_row(Text(f"   {name}"), Text(", ").join(_styled(replies)))
        console.print(table)
    console.print()


def _styled(replies: list[dict]) -> Iterator[Text]:
    for reply in replies:
        # On one line: a line break within a reply would tear the list of answers apart.
        text = " ".join(reply["text"].split())
        text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
        style = "dim strike" if reply["answer"] is None else "dim" if reply["repeated"] else ""
        sign = sign_of(reply)
        yield Text.assemble((f"{sign} " if sign else "", "dim"), (text or "(empty)", style))
