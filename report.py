"""How an evaluation is shown: the table in the terminal, and one HTML page that needs nothing else.

Both read the summary that eval.py writes as eval_logs/X.json. The page also gets the rows, with every reply, its class
and its verdict. It holds its styles, its script and its drawings inline, asks no server for anything, and is whole
without JavaScript but for searching and sorting.
"""

from __future__ import annotations

from html import escape

METRICS = [  # key in the summary, name, unit or meaning, whether more is better (1), worse (-1) or neither (0), digits
    ("together", [
        ("yield@k", "yield@{k}", "different and coherent replies of {k}", 1, 2),
        ("utility_k", "utility@{k}", "rating of the first reply of each class, discounted by 0.8 a reply", 1, 2),
    ]),
    ("coherence", [
        ("coherent", "coherent", "share of the judged replies", 1, 2),
        ("rating", "rating", "mean of the judge's ratings, 1 to 10", 1, 2),
        ("cosine", "cosine", "embeddings of context and reply", 1, 2),
    ]),
    ("diversity of meaning", [
        ("distinct_k", "distinct_{k}", "classes of equivalent replies of {k}", 1, 2),
        ("effective_number", "effective number", "exp of the semantic entropy", 1, 2),
        ("semantic_entropy", "semantic entropy", "nats over the classes", 1, 2),
        ("sbert_diversity", "SBERT diversity", "1 - mean cosine of the pairs", 1, 2),
        ("vendi", "Vendi", "effective number by embedding eigenvalues", 1, 2),
        ("duplicates", "duplicates", "share of replies equal to an earlier one", -1, 2),
    ]),
    ("diversity of words", [
        ("self_bleu", "Self-BLEU", "each reply against the others, 0 to 100", -1, 1),
        ("distinct-1 per prompt", "distinct-1 a prompt", "different words / words", 1, 2),
        ("distinct-2 per prompt", "distinct-2 a prompt", "different word pairs / word pairs", 1, 2),
        ("distinct-1", "distinct-1 corpus", "over all replies; falls with their number", 1, 3),
        ("distinct-2", "distinct-2 corpus", "over all replies; falls with their number", 1, 3),
        ("ead-1", "EAD-1 corpus", "distinct words / expected distinct words", 1, 3),
        ("ead-2", "EAD-2 corpus", "distinct pairs / expected distinct pairs", 1, 3),
    ]),
    ("size", [
        ("words", "words", "a reply", 0, 1),
        ("characters", "characters", "a reply", 0, 1),
        ("seconds_per_row", "seconds a row", "as infer.py measured it", -1, 2),
    ]),
]
ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # which way is better, if one is


def rows_of(summary: dict):
    """(section, key, name, meaning, better, digits) of every metric that some system has."""
    k = summary["k"]
    for section, group in METRICS:
        for key, name, meaning, better, digits in group:
            key = key.replace("@k", f"@{k}")
            if any(system.get(key) is not None for system in summary["systems"].values()):
                yield section, key, name.format(k=k), meaning.format(k=k), better, digits


def mean_of(figure) -> float | None:
    return figure[0] if isinstance(figure, list) else figure


def rewards_noise(summary: dict, key: str, better: int) -> bool:
    """Whether a degenerate control beats every system on a metric."""
    values = {c: [better * mean_of(s[key]) for s in summary["systems"].values() if s.get(key) is not None and s["control"] == c]
              for c in (True, False)}
    return bool(better and values[True] and values[False] and max(values[True]) > max(values[False]))


def short(figure, digits: int, sign: str = "") -> str:
    """'4.42 ±0.28' (the longer side of the interval), or a dash where there is no figure."""
    if figure is None:
        return "—"
    if not isinstance(figure, list):
        return f"{figure:{sign}.{digits}f}"
    return f"{round(figure[0], digits) + 0.0:{sign}.{digits}f} ±{max(figure[2] - figure[0], figure[0] - figure[1]):.{digits}f}"


def clear(figure) -> bool:
    """Whether a difference's interval leaves out zero."""
    return figure is not None and not figure[1] <= 0 <= figure[2]


def headline(summary: dict) -> list[str]:
    """One sentence a system: its yield, and the difference from the first with its interval."""
    k, names = summary["k"], [name for name, s in summary["systems"].items() if not s["control"]]
    said = []
    for name in names:
        figure = summary["systems"][name].get(f"yield@{k}")
        if figure is None:
            continue
        text = f"{name}: {figure[0]:.2f} of {k} replies are coherent and different"
        difference = summary["differences"].get(f"{name} - {names[0]}", {}).get(f"yield@{k}")
        if difference:
            text += f", {difference[0]:+.2f} [{difference[1]:+.2f}, {difference[2]:+.2f}] against {names[0]}"
        said.append(text)
    return said


def canary_text(result: dict) -> str:
    """How many replies that try to talk the judge round got more than the same reply without the attempt."""
    if not result["scored"]:
        return "; none of its canaries was scored"
    above = result["above_clean_twin"]
    return f"; {above} of {result['scored']} replies that try to talk it round were rated above their clean twins"


# ---- terminal -----------------------------------------------------------------------------------


def print_table(summary: dict) -> None:
    """Metrics as rows and systems as columns, then the paired differences, the judge, and what was left out."""
    from rich.console import Console

    console = Console(highlight=False)
    width = max(60, console.width) if console.is_terminal else 100
    console = Console(width=width, highlight=False)
    systems = summary["systems"]
    metrics = list(rows_of(summary))
    noisy = {key for _, key, _, _, better, _ in metrics if rewards_noise(summary, key, better)}
    cells = [(section, name + ARROWS[better] + " †" * (key in noisy),
              {s: short(systems[s].get(key), digits) for s in systems}) for section, key, name, _, better, digits in metrics]
    print_blocks(console, f"{summary['rows']} prompts x {summary['k']} replies; mean ± 95 % interval", cells,
                 {name: name.replace(": ", ":\n") for name in systems})
    first = next(iter(systems))
    columns = {name: name.removesuffix(f" - {first}").replace(": ", ":\n") for name in summary["differences"]}
    digits_of = {key: (section, name, digits) for section, key, name, _, _, digits in metrics}
    cells = []
    for key, (section, name, digits) in digits_of.items():
        figures = {c: summary["differences"][c].get(key) for c in columns}
        if any(figures.values()):
            cells.append((section, name, {c: short(f, digits, "+") + "*" * clear(f) for c, f in figures.items()}))
    matched = summary["matched"]
    for key in digits_of:
        figures = {c: matched[c]["measures"].get(key) if c in matched else None for c in columns}
        if any(figures.values()):
            cells.append(("at equal coherence", f"{digits_of[key][1]}, eq. coh.", {c: short(f, digits_of[key][2], "+") + "*" * clear(f)
                                                             for c, f in figures.items()}))
    if cells:
        print_blocks(console, f"minus {first}, paired by prompt; * the interval leaves out 0", cells, columns)
    for text in [*headline(summary), *notes(summary)]:
        console.print(text, markup=False)
    if noisy:
        console.print("† a degenerate control beats every system: this figure rewards noise or repetition")


def print_blocks(console, title: str, rows: list[tuple[str, str, dict]], columns: dict[str, str]) -> None:
    """rows of (section, name, cells by column), in as many tables as the width asks for."""
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    names = list(columns)
    fits = max(1, (console.width - 22) // 15)
    for start in range(0, len(names), fits):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in names[start : start + fits]:
            table.add_column(plain(columns[name]), justify="right", max_width=13, overflow="fold",
                             style="dim" if name.startswith("control") else None)
        for i, (section, name, cells) in enumerate(rows):
            if i and section != rows[i - 1][0]:
                table.add_section()
            table.add_row(name, *(cells[c] for c in names[start : start + fits]))
        console.print(table)
        console.print()


def notes(summary: dict) -> list[str]:
    """The judge with its agreement, then per system what was empty or unscored, and further measurements."""
    said = [summary["judge"]["text"]]
    for name, system in summary["systems"].items():
        if system["control"]:
            continue
        text = f"{name}: {system['rows']} rows, {system['responses']} responses, {system['empty']} empty"
        if system.get("unscored") is not None:
            why = ", ".join(f"{count} {reason}" for reason, count in system["unscored"].items())
            text += f", {sum(system['unscored'].values())} unscored" + (f" ({why})" if why else "")
        if (rate := system.get("incoherence_rate")) is not None:
            text += f"; Incoherence rate: {100 * mean_of(rate):.1f}"
        said.append(text)
    for pair, matched in summary["matched"].items():
        if matched["left_out"] and "control" not in pair:
            said.append(f"{pair} at equal coherence: {matched['prompts']} prompts; {matched['left_out']} left out, "
                        "where one of the two has fewer than two coherent replies")
    for name, c in summary["controllability"].items():
        said.append(f"{name}: mutual information of number and class {c['excess']:.3f} nats above chance (p {c['p_value']:.3f}); "
                    f"a number keeps its class over seeds in {100 * c['stable']:.0f} %, two numbers coincide in {100 * c['coincide']:.0f} %")
    return said


# ---- the page -----------------------------------------------------------------------------------


def render(summary: dict, prompts: list[dict]) -> str:
    """The page as one string of HTML.

    prompts: {"text", "turns": labelled turns or None, "systems": {name: {"replies": [{"text", "class", "coherent",
    "verdict", "why"}], "similarity": rows of cosines or None, "yield": a number or None}}}, in the order of the file.
    """
    systems = list(summary["systems"])
    colours = {}
    for name in systems:
        colours[name] = "var(--quiet)" if summary["systems"][name]["control"] else f"var(--s{(len(colours)) % 6})"
    real = [name for name in systems if not summary["systems"][name]["control"]]
    chips = "".join(
        f'<label class="chip" style="--c:{colours[name]}"><input type="checkbox" id="show{i}"'
        f'{" checked" if name in real else ""}><i></i>{escape(name)}</label>' for i, name in enumerate(systems))
    hide = "".join(f"body:has(#show{i}:not(:checked)) .of{i}{{display:none}}" for i in range(len(systems)))
    orders = [("n", "order of the file")] + [(f"y{i}", f"yield of {name}") for i, name in enumerate(systems) if name in real]
    orders += [(f"d{i}", f"yield of {name} minus {real[0]}") for i, name in enumerate(systems) if name in real[1:]]
    options = "".join(f'<option value="{key}">{escape(text)}</option>' for key, text in orders)
    rows = "".join(draw_prompt(n, prompt, systems, real, colours, summary) for n, prompt in enumerate(prompts, 1))
    cards = "".join(draw_card(name, real[0], summary, colours[name]) for name in real)
    said = "".join(f"<li>{escape(text)}</li>" for text in notes(summary))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{escape(" against ".join(reversed(real)))}</title><style>{CSS}{hide}</style></head><body>
<a class=skip href="#prompts">to the replies</a>
<header><p class=kicker>{summary["rows"]} prompts × {summary["k"]} replies</p>
<h1>Different, <em>and</em> good?</h1><div class=cards>{cards}</div></header>
<main>
<section><h2>Diversity against coherence</h2>{draw_scatter(summary, colours)}</section>
<section><h2>All figures</h2>{draw_figures(summary, colours)}</section>
{draw_differences(summary, colours)}
<section><h2>How it was judged</h2><ul class=notes>{said}</ul></section>
<section id=prompts><h2>The replies</h2>
<form class=bar onsubmit="return false"><input type=search id=find placeholder="find in prompts and replies   ( / )" aria-label="find in prompts and replies">
<label>sort by <select id=sort>{options}</select></label><label><input type=checkbox id=up> lowest first</label>
<button type=button id=open>open all</button><output id=count aria-live=polite></output></form>
<fieldset class=chips><legend>systems shown</legend>{chips}</fieldset>
<p class=hint>Replies of one colour and letter count as one answer. Keys: <kbd>j</kbd> <kbd>k</kbd> next and previous prompt,
<kbd>Enter</kbd> open, <kbd>/</kbd> find.</p>
<div id=list>{rows}</div></section>
</main><script>{SCRIPT}</script></body></html>
"""


def draw_card(name: str, first: str, summary: dict, colour: str) -> str:
    """A system's yield in large figures, and what it gains on the first system."""
    k, figure = summary["k"], summary["systems"][name].get(f"yield@{summary['k']}")
    if figure is None:
        return f'<div class=card style="--c:{colour}"><h3>{escape(name)}</h3><p class=big>—</p><p>no reply was judged</p></div>'
    gain = summary["differences"].get(f"{name} - {first}", {}).get(f"yield@{k}")
    gained = f"<p class=gain><b>{gain[0]:+.2f}</b> [{gain[1]:+.2f}, {gain[2]:+.2f}] against {escape(first)}</p>" if gain else ""
    at = [100 * v / k for v in figure]
    return (f'<div class=card style="--c:{colour}"><h3>{escape(name)}</h3><p class=big>{figure[0]:.2f}<small>of {k}</small></p>'
            f'<svg class=bar aria-hidden=true><line class=track x1=0 x2="100%" y1=6 y2=6 /><line x1="{at[1]:.1f}%" x2="{at[2]:.1f}%" '
            f'y1=6 y2=6 /><circle cx="{at[0]:.1f}%" cy=6 r=5 /></svg><p>replies are coherent and different from each other '
            f"<small>[{figure[1]:.2f}, {figure[2]:.2f}]</small></p>{gained}</div>")


def draw_prompt(n: int, prompt: dict, systems: list[str], real: list[str], colours: dict, summary: dict) -> str:
    """A prompt that opens: its turns, and a column of replies for each system."""
    k = summary["k"]
    yields = {name: prompt["systems"][name]["yield"] for name in systems}
    sorting = "".join(f' data-y{i}="{yields[name]}"' for i, name in enumerate(systems)
                      if name in real and yields[name] is not None)
    sorting += "".join(f' data-d{i}="{yields[name] - yields[real[0]]}"' for i, name in enumerate(systems)
                       if name in real[1:] and yields[name] is not None and yields[real[0]] is not None)
    pips = "".join(f'<span class="pip of{i}" style="--c:{colours[name]};--v:{yields[name] / k:.3f}" '
                   f'title="yield of {escape(name)}: {yields[name]} of {k}">{yields[name]}</span>'
                   for i, name in enumerate(systems) if yields[name] is not None)
    turns = prompt["turns"] or [prompt["text"]]
    talk = "".join(f'<p class="turn {turn[:8].casefold().replace(" ", "-").strip(":") if prompt["turns"] else "task"}">'
                   f"{escape(turn)}</p>" for turn in turns)
    columns = "".join(draw_replies(i, name, prompt["systems"][name], colours[name], k) for i, name in enumerate(systems))
    return (f'<details class=prompt data-n="{n}"{sorting}><summary><span class=number>{n}</span>'
            f"<span class=say>{escape(turns[-1])}</span><span class=pips>{pips}</span></summary>"
            f"<div class=talk>{talk}</div><div class=columns>{columns}</div></details>")


def draw_replies(i: int, name: str, answers: dict, colour: str, k: int) -> str:
    """One system's replies to one prompt: heat map, then a card a reply with its class and verdict."""
    cards = []
    for reply in answers["replies"]:
        verdict = {True: "yes", False: "no", None: "none"}[reply["coherent"]]
        mark = {"yes": "✓", "no": "✗", "none": "–"}[verdict]
        word = {"yes": "coherent", "no": "not coherent", "none": "not judged"}[verdict]
        why = f"<details class=why><summary>why</summary>{escape(reply['why'])}</details>" if reply["why"] else ""
        cards.append(
            f'<li class="reply {verdict}" style="--c:var(--k{reply["class"] % 9})"><span class=letter title="class {letter(reply["class"])}">'
            f'{letter(reply["class"])}</span><span class=verdict title="{word}">{mark} {escape(reply["verdict"])}</span>'
            f"<p>{escape(reply['text']) or '<em>empty</em>'}</p>{why}</li>")
    classes = len({reply["class"] for reply in answers["replies"]})
    count = f"{classes} different of {k}" + ("" if answers["yield"] is None else f", {answers['yield']} of them coherent")
    return (f'<section class="system of{i}" style="--c:{colour}"><h3>{escape(name)}</h3><p class=count>{count}</p>'
            f"{draw_heat(answers['similarity'])}<ol>{''.join(cards)}</ol></section>")


def letter(number: int) -> str:
    """A, B, ... Z, then A2, B2 ..."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number % 26] + (str(number // 26 + 1) if number > 25 else "")


def draw_heat(similarity: list[list[float]] | None) -> str:
    """The cosines of a prompt's replies as a square of tinted cells."""
    if not similarity or len(similarity) < 2:
        return ""
    n, square = len(similarity), "h1v1h-1z"
    pairs = [(a, b, similarity[a][b]) for a in range(n) for b in range(a)]
    cells = "".join(f"<g opacity={max(0, cosine):.2f}><title>{b + 1} and {a + 1}: {cosine:.2f}</title>"
                    f'<path d="M{a} {b}{square}M{b} {a}{square}"/></g>' for a, b, cosine in pairs)
    cells += f'<path d="{"".join(f"M{a} {a}{square}" for a in range(n))}"/>'
    return (f'<svg class=heat viewBox="0 0 {n} {n}" role=img aria-label="similarity of the replies, mean cosine '
            f'{sum(cosine for *_, cosine in pairs) / len(pairs):.2f}">{cells}</svg>')


def draw_figures(summary: dict, colours: dict) -> str:
    """Every metric of every system, each with its interval as a bar on the metric's own scale."""
    systems = summary["systems"]
    head = "".join(f'<th scope=col style="--c:{colours[name]}"><i></i>{escape(name)}</th>' for name in systems)
    body, section = [], None
    for part, key, name, meaning, better, digits in rows_of(summary):
        if part != section:
            body.append(f'<tr class=part><th scope=rowgroup colspan="{len(systems) + 1}">{part}</th></tr>')
            section = part
        figures = {s: systems[s].get(key) for s in systems}
        high = max((f[2] if isinstance(f, list) else f) for f in figures.values() if f is not None)
        low = min([0.0] + [f[1] for f in figures.values() if isinstance(f, list)])
        noise = '<sup title="a degenerate control beats every system: this figure rewards noise or repetition">†</sup>'
        noise = noise if rewards_noise(summary, key, better) else ""
        body.append(f"<tr><th scope=row><b>{name}</b>{ARROWS[better]}{noise}<small>{meaning}</small></th>"
                    + "".join(draw_cell(figures[s], (low, max(high, 1e-9)), digits, colours[s], systems[s].get("reasons", {}).get(key, ""))
                              for s in systems) + "</tr>")
    return (f'<div class=wide><table class=figures><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
            "<p class=hint>Brackets: 95 % intervals over prompts (bootstrap; corpus figures: jackknife). Arrows: which way is better. Greyed columns are degenerate "
            "controls: a figure that they lead (†) rewards noise or repetition.</p>")


def draw_cell(figure, scale: tuple[float, float], digits: int, colour: str, reason: str, sign: str = "") -> str:
    """A table cell: the mean, its interval in figures, and both on a line from scale[0] to scale[1]."""
    if figure is None:
        return f'<td class=none title="{escape(reason)}">—</td>'
    if not isinstance(figure, list):
        return f"<td><b>{figure:{sign}.{digits}f}</b></td>"
    figure = [round(v, digits) + 0.0 for v in figure]  # no minus before a zero
    at = [100 * (v - scale[0]) / (scale[1] - scale[0]) for v in figure]
    zero = '<line class=zero x1="50%" x2="50%" y1=0 y2=12 />' if sign else ""  # differences have it in the middle
    mark = " class=vague" if sign and not clear(figure) else ""
    return (f'<td{mark}><div class=cell><b>{figure[0]:{sign}.{digits}f}</b>'
            f'<svg class=bar style="--c:{colour}" aria-hidden=true><line class=track x1=0 x2="100%" y1=6 y2=6 />{zero}'
            f'<line x1="{at[1]:.1f}%" x2="{at[2]:.1f}%" y1=6 y2=6 /><circle cx="{at[0]:.1f}%" cy=6 r=4 /></svg></div>'
            f"<small>[{figure[1]:{sign}.{digits}f}, {figure[2]:{sign}.{digits}f}]</small></td>")


def draw_differences(summary: dict, colours: dict) -> str:
    """Each system minus the first, paired by prompt, then the same at equal coherence."""
    pairs = summary["differences"]
    if not pairs:
        return ""
    first = next(iter(summary["systems"]))
    name_of = {pair: pair.removesuffix(f" - {first}") for pair in pairs}
    head = "".join(f'<th scope=col style="--c:{colours[name_of[p]]}"><i></i>{escape(name_of[p])}</th>' for p in pairs)
    body = []

    def add(label: str, meaning: str, digits: int, figures: dict) -> None:
        if any(figures.values()):
            far = max(max(abs(f[1]), abs(f[2])) for f in figures.values() if f) or 1.0
            body.append(f"<tr><th scope=row><b>{label}</b><small>{meaning}</small></th>" + "".join(
                draw_cell(figures[p], (-far, far), digits, colours[name_of[p]], "not defined for both", "+") for p in pairs) + "</tr>")

    shown = {key: (name, digits) for _, key, name, _, _, digits in rows_of(summary)}
    for key, (name, digits) in shown.items():
        add(name, "", digits, {p: pairs[p].get(key) for p in pairs})
    matched = summary["matched"]
    if any(f for m in matched.values() for f in m["measures"].values()):
        body.append(f'<tr class=part><th scope=rowgroup colspan="{len(pairs) + 1}">at equal coherence: equally many coherent replies a prompt</th></tr>')
        for key, (name, digits) in shown.items():
            add(name, "of the coherent replies alone", digits,
                {p: matched[p]["measures"].get(key) if p in matched else None for p in pairs})
    return (f"<section><h2>Minus {escape(first)}</h2><div class=wide><table class=figures><thead><tr><td></td>{head}</tr></thead>"
            f'<tbody>{"".join(body)}</tbody></table></div><p class=hint>Paired by prompt, with 95 % bootstrap intervals. '
            "The upright line is zero; differences whose interval holds it are grey.</p></section>")


def draw_scatter(summary: dict, colours: dict) -> str:
    """Diversity (three measures to choose from) over the share of coherent replies, with interval bars."""
    shown = [(key, name, meaning) for _, key, name, meaning, _, _ in rows_of(summary)
             if key in ("distinct_k", "sbert_diversity", "vendi", "effective_number")]
    placed = [(key, name, meaning, points) for key, name, meaning in shown
              if (points := [(s, f["coherent"], f[key], f["control"]) for s, f in summary["systems"].items()
                             if f.get("coherent") and f.get(key)])]
    if not placed:
        return "<p>No system has both figures.</p>"
    buttons = "".join(f'<label><input type=radio name=measure id=m{i}{" checked" if not i else ""}>{name}</label>'
                      for i, (_, name, _, _) in enumerate(placed))
    rules = "".join(f"body:has(#m{i}:not(:checked)) #plot{i}{{display:none}}" for i in range(len(placed)))
    plots = "".join(draw_points(i, name, meaning, points, colours) for i, (_, name, meaning, points) in enumerate(placed))
    return (f"<style>{rules}</style><fieldset class=switch><legend>diversity as</legend>{buttons}</fieldset>{plots}"
            "<p class=hint>Up is more diverse, right is more coherent; noise (up, left) and repetition (down) are easy, the upper "
            "right corner is not. Hollow diamonds are degenerate controls, bars are 95 % intervals.</p>")


def draw_points(number: int, name: str, meaning: str, points: list[tuple], colours: dict) -> str:
    """One plot: points of (system, coherent [mean, low, high], diversity [mean, low, high], control)."""
    width, height, left, top, right, bottom = 860, 480, 64, 48, 28, 52
    most = max(y[2] for _, _, y, _ in points)
    step = next((s for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20) if most / s <= 6), most)
    ceiling = step * -(-most // step) or 1
    at_x = lambda v: left + v * (width - left - right)  # noqa: E731
    at_y = lambda v: height - bottom - v / ceiling * (height - top - bottom)  # noqa: E731
    grid = "".join(f'<line class=grid x1="{at_x(i / 5):.1f}" x2="{at_x(i / 5):.1f}" y1="{top}" y2="{height - bottom}"/>'
                   f'<text x="{at_x(i / 5):.1f}" y="{height - bottom + 20}" text-anchor=middle>{20 * i} %</text>' for i in range(6))
    grid += "".join(f'<line class=grid x1="{left}" x2="{width - right}" y1="{at_y(i * step):.1f}" y2="{at_y(i * step):.1f}"/>'
                    f'<text x="{left - 10}" y="{at_y(i * step) + 4:.1f}" text-anchor=end>{i * step:g}</text>'
                    for i in range(round(ceiling / step) + 1))
    marks, taken = [], [(at_x(x[0]) - 9, at_y(y[0]) - 9, at_x(x[0]) + 9, at_y(y[0]) + 9) for _, x, y, _ in points]
    for system, x, y, control in points:
        cx, cy = at_x(x[0]), at_y(y[0])
        shape = (f'<path class=hollow d="M{cx:.1f} {cy - 7:.1f}l7 7l-7 7l-7 -7z"/>' if control
                 else f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="8"/>')
        title = f"{system}: coherent {x[0]:.2f} [{x[1]:.2f}, {x[2]:.2f}], {name} {y[0]:.2f} [{y[1]:.2f}, {y[2]:.2f}]"
        marks.append(f'<g style="--c:{colours[system]}"><title>{escape(title)}</title>'
                     f'<line class=err x1="{at_x(x[1]):.1f}" x2="{at_x(x[2]):.1f}" y1="{cy:.1f}" y2="{cy:.1f}"/>'
                     f'<line class=err x1="{cx:.1f}" x2="{cx:.1f}" y1="{at_y(y[1]):.1f}" y2="{at_y(y[2]):.1f}"/>{shape}</g>')
        marks.append(f'<text class="label{" quiet" if control else ""}" style="--c:{colours[system]}" '
                     f"{place_label(cx, cy, 8.4 * len(system), taken, width)}>{escape(system)}</text>")
    return (f'<svg class=scatter id=plot{number} viewBox="0 0 {width} {height}" role=img aria-label="{name} over coherent share">'
            f'{grid}<text class=axis x="{at_x(0.5):.0f}" y="{height - 8}" text-anchor=middle>coherent replies</text>'
            f'<text class=axis transform="translate(16 {at_y(ceiling / 2):.0f}) rotate(-90)" text-anchor=middle>{name}: {meaning}</text>'
            f'{"".join(marks)}</svg>')


def place_label(cx: float, cy: float, length: float, taken: list[tuple], width: float) -> str:
    """Where a point's label covers no point and no other label: right or left of it, above or below; notes the box."""
    for down in (-14, 26, -32, 44, -50, 62):
        for left in (cx + 12, cx - 12 - length):
            box = (left, cy + down - 13, left + length, cy + down + 4)
            free = all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in taken)
            if free and left > 64 and box[2] < width - 8 and box[1] > 2:
                taken.append(box)
                anchor, at = ("start", left) if left > cx else ("end", cx - 12)
                return f'x="{at:.1f}" y="{cy + down:.1f}" text-anchor={anchor}'
    return f'x="{cx + 12:.1f}" y="{cy - 14:.1f}"'


CSS = """
:root{--page:#faf9f6;--card:#fff;--ink:#1c1b19;--soft:#6b675f;--line:#e4e0d7;--quiet:#9a958a;--good:#1a7f4b;--bad:#b8432f;
--s0:#5b6b8c;--s1:#c2521b;--s2:#1f7a8c;--s3:#8a3f8f;--s4:#5f7d1e;--s5:#b03060;
--k0:#2f6fb5;--k1:#c2521b;--k2:#2b8a57;--k3:#8a4fbf;--k4:#b88a00;--k5:#c03a72;--k6:#15838f;--k7:#7a6a52;--k8:#6a7f1f;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--page:#15161a;--card:#1d1f25;--ink:#eceae4;--soft:#a09c92;--line:#32343c;--quiet:#7d7a73;
--good:#5fcf94;--bad:#f08a76;--s0:#9db0d8;--s1:#f59a62;--s2:#5fc3d6;--s3:#d08fd6;--s4:#b0cf63;--s5:#f08fb4;
--k0:#7fb2ee;--k1:#f59a62;--k2:#6fd19b;--k3:#c29cf0;--k4:#e8c451;--k5:#f08fb4;--k6:#62cbd6;--k7:#c4b498;--k8:#b6cc6a}}
*{box-sizing:border-box}@media(prefers-reduced-motion:no-preference){html{scroll-behavior:smooth}}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 28px}header{padding-top:56px}
h1{font:600 clamp(34px,5vw,54px)/1.05 Charter,"Iowan Old Style",Georgia,"Noto Serif","DejaVu Serif",serif;letter-spacing:-.02em;margin:0 0 18px}
h1 em{color:var(--s1)}h2{font:600 24px/1.2 Charter,"Iowan Old Style",Georgia,"Noto Serif","DejaVu Serif",serif;margin:0 0 16px}
.kicker{margin:0 0 8px;color:var(--soft);letter-spacing:.08em;text-transform:uppercase;font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:16px;margin-top:26px}
.card{background:var(--card);border:1px solid var(--line);border-top:4px solid var(--c);border-radius:14px;padding:16px 20px}.card h3{margin:0;font-size:15px;color:var(--c)}
.card p{margin:4px 0;font-size:14.5px}.card .big{font-size:52px;line-height:1.1;font-weight:650;letter-spacing:-.03em;font-variant-numeric:tabular-nums}.big small{font-size:17px;letter-spacing:0;margin-left:8px}
.card svg.bar{max-width:none;margin:4px 0 6px;flex:none;width:100%}.gain{color:var(--soft)}.gain b{color:var(--ink)}main>section{margin:52px 0}
.hint,small,.count{color:var(--soft);font-size:13.5px}.hint{max-width:85ch}
.skip{position:absolute;left:-999px}.skip:focus{left:12px;top:12px;background:var(--card);padding:8px 14px;z-index:9}
:focus-visible{outline:3px solid var(--s1);outline-offset:2px;border-radius:4px}
fieldset{border:0;padding:0;margin:0 0 14px;display:flex;flex-wrap:wrap;gap:8px;align-items:center}legend{float:left;color:var(--soft);margin-right:10px;font-size:14px}
.switch label,.chip,button,select,input[type=search]{border:1px solid var(--line);background:var(--card);color:var(--ink);border-radius:999px;padding:5px 14px;font:inherit;font-size:14px;cursor:pointer}
.switch input,.chip input{position:absolute;opacity:0}.switch label:has(:checked){background:var(--ink);color:var(--page);border-color:var(--ink)}
.switch label:has(:focus-visible),.chip:has(:focus-visible){outline:3px solid var(--s1);outline-offset:2px}
.chip{color:var(--soft)}.chip:has(:checked){color:var(--ink);border-color:var(--c)}
.chip i,th i{display:inline-block;width:10px;height:10px;border-radius:50%;border:2px solid var(--c);margin-right:7px}.chip:has(:checked) i,th i{background:var(--c)}
.scatter{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:14px}
.scatter text{font-size:13px;fill:var(--soft)}.scatter .axis{font-size:14px}.scatter .label{font-size:15px;font-weight:600;fill:var(--c);paint-order:stroke;stroke:var(--card);stroke-width:4px}.scatter .quiet{font-weight:400;font-size:13px}
.grid{stroke:var(--line)}.scatter circle{fill:var(--c)}.err{stroke:var(--c);stroke-width:2.5;stroke-linecap:round;opacity:.75}.hollow{fill:var(--card);stroke:var(--c);stroke-width:2}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:14px;padding:6px 18px 12px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}thead th{text-align:left;font-weight:600;padding:12px 10px;vertical-align:bottom;line-height:1.25;min-width:112px}.cell{display:flex;gap:10px;align-items:center}.cell b{min-width:44px}td small{font-size:12.5px}.vague b{font-weight:400;color:var(--soft)}
tbody th{text-align:left;font-weight:400;padding:8px 14px 8px 0;min-width:215px;max-width:260px}tbody th b{font-weight:600}tbody th small{display:block;line-height:1.3}
tbody td{padding:8px 10px;vertical-align:top;white-space:nowrap}tbody tr+tr:not(.part){border-top:1px solid var(--line)}
.part th{color:var(--soft);text-transform:uppercase;letter-spacing:.07em;font-size:12px;padding-top:22px;max-width:none}.none{color:var(--quiet)}
.bar line{stroke:var(--c);stroke-width:3;stroke-linecap:round}svg.bar{display:block;flex:none;width:74px;height:12px;overflow:visible}svg.bar .track{stroke:var(--line);stroke-width:1}svg.bar .zero{stroke:var(--soft);stroke-width:1}svg.bar circle{fill:var(--c)}
sup{line-height:0;color:var(--bad);font-weight:700}.notes{padding-left:20px;max-width:90ch}.notes li{margin:4px 0}
form.bar{position:sticky;top:0;z-index:3;display:flex;flex-wrap:wrap;gap:12px;align-items:center;padding:12px 0;background:var(--page)}form label{font-size:14px;color:var(--soft)}
input[type=search]{flex:1;min-width:220px;cursor:text}output{color:var(--soft);font-size:14px}
.prompt{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:8px 0;content-visibility:auto;contain-intrinsic-size:auto 50px}
.prompt>summary{display:flex;gap:14px;align-items:center;padding:11px 16px;cursor:pointer;list-style:none}.prompt>summary::-webkit-details-marker{display:none}
.prompt[open]>summary{border-bottom:1px solid var(--line)}.prompt[open]>summary .say{font-weight:600}
.number{color:var(--quiet);min-width:2ch;text-align:right;font-variant-numeric:tabular-nums}.say{flex:1;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.pips{display:flex;gap:6px}.pip{position:relative;width:46px;height:22px;border-radius:6px;text-align:center;font-size:13px;line-height:22px;font-weight:600;background:linear-gradient(90deg,color-mix(in srgb,var(--c) 38%,transparent) calc(var(--v)*100%),color-mix(in srgb,var(--c) 9%,transparent) 0)}
.talk{padding:16px 18px 4px;display:flex;flex-direction:column;gap:6px;max-width:760px}.turn{margin:0;padding:7px 14px;border-radius:14px;background:var(--page);width:fit-content;white-space:pre-wrap;overflow-wrap:anywhere}
.person-b{align-self:flex-end;border:1px solid var(--line);background:none}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:18px;padding:14px 18px 20px}
.system{position:relative;border-top:3px solid var(--c);padding-top:10px}.system h3{margin:0;font-size:16px}.count{margin:0 0 10px;min-height:20px}
.heat{position:absolute;right:0;top:10px;width:46px;height:46px;border-radius:4px;background:var(--page)}.heat path{fill:var(--c)}
.system ol{list-style:none;margin:14px 0 0;padding:0;display:grid;gap:8px}
.reply{border-left:4px solid var(--c);background:color-mix(in srgb,var(--c) 9%,var(--card));border-radius:0 10px 10px 0;padding:8px 12px}
.reply p{margin:3px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}.reply.no p{color:var(--soft)}
.letter{font-weight:700;color:var(--c);font-size:13px}.verdict{float:right;font-size:13px;color:var(--soft)}.yes .verdict{color:var(--good)}.no .verdict{color:var(--bad)}
.why{font-size:13.5px;color:var(--soft);white-space:pre-wrap}.why summary{cursor:pointer}kbd{border:1px solid var(--line);border-radius:5px;padding:0 6px;background:var(--card);font-size:12.5px}
@media print{form.bar,.chips,.switch,.skip{display:none}.prompt{break-inside:avoid}}
@media(max-width:640px){header,main{padding:0 14px}.pips{display:none}}
"""

SCRIPT = """
const list = document.getElementById("list"), prompts = [...list.children], find = document.getElementById("find"),
      sort = document.getElementById("sort"), up = document.getElementById("up"), open = document.getElementById("open"),
      texts = prompts.map(p => p.textContent.toLowerCase()), shown = () => [...list.children].filter(p => !p.hidden);
function arrange() {
  const words = find.value.toLowerCase().trim();
  prompts.forEach((p, i) => p.hidden = !texts[i].includes(words));
  const key = sort.value, way = key == "n" || up.checked ? 1 : -1, value = p => Number(p.dataset[key] ?? -99);
  list.append(...[...prompts].sort((a, b) => way * (value(a) - value(b)) || a.dataset.n - b.dataset.n));
  document.getElementById("count").value = `${shown().length} of ${prompts.length} prompts`;
}
find.oninput = sort.onchange = up.onchange = arrange;
open.onclick = () => { const any = shown().some(p => !p.open); shown().forEach(p => p.open = any); open.textContent = any ? "close all" : "open all"; };
document.onkeydown = event => {
  const typing = /INPUT|SELECT|TEXTAREA/.test(event.target.tagName) && !/checkbox|radio/.test(event.target.type);
  if (event.key == "Escape" && event.target == find) { find.value = ""; arrange(); find.blur(); }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key == "/") { event.preventDefault(); find.focus(); }
  if (event.key == "j" || event.key == "k") {
    const all = shown(), here = all.indexOf(document.activeElement.closest(".prompt"));
    const next = all[Math.min(all.length - 1, Math.max(0, here + (event.key == "j" ? 1 : -1)))];
    if (next) next.querySelector("summary").focus();
  }
};
arrange();
"""
