"""One HTML page that needs nothing else."""

from __future__ import annotations

from html import escape

from scoring.report.plot import draw_scatter
from scoring.report.table import ARROWS, clear, notes, rewards_noise, rows_of


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
