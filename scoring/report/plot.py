"""Plots of the page as inline SVG."""

from __future__ import annotations

from html import escape

from scoring.report.table import rows_of


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
