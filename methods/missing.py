"""How a method's evaluation says that figures are missing: `reasons`, {figure: why}.

A summary has reasons in every system's dict, and at the top where the rows are not the method's.
"""

from __future__ import annotations

from scoring.evaluated import Evaluated, Table


def notes(system: str, reasons: dict[str, str]) -> list[str]:
    """One sentence per reason: which of a system's figures are missing, and why."""
    figures: dict[str, list[str]] = {}
    for figure, why in reasons.items():
        figures.setdefault(why, []).append(figure.replace("_", " "))
    return [f"{system}: no {', '.join(names)}: {why}" for why, names in figures.items()]


def not_the_methods(why: str) -> Evaluated:
    """The result for rows that lack what the method's figures are computed from."""
    return Evaluated({"systems": {}, "reasons": {"all": why}}, [])


def empty_tables(title: str, summary: dict) -> list[Table]:
    """What such a result shows."""
    return [Table(title, [], [], [f"no figures: {summary['reasons']['all']}"])]
