"""What the table and the page say, that no text becomes markup, and the page in a real browser."""

from __future__ import annotations

import re
import shutil
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from modeling.prompts import label_turns
from scoring.evaluated import Table, figure, with_half
from scoring.report import plot, table
from scoring.report.page import letter, render

EVIL = '<script>document.title = "sprung"</script><img src=x onerror="document.title = 1">'


def spread(mean: float) -> dict:
    return figure(mean, round(mean - 0.1, 4), round(mean + 0.3, 4))


def system(yields, coherent, diversity, control=False, **more) -> dict:
    return {
        "control": control,
        "yield@2": spread(yields),
        "coherent": spread(coherent),
        "distinct_k": spread(diversity),
        "self_bleu": None,
        "rows": 3,
        "responses": 6,
        "empty": 1,
        "reasons": {"self_bleu": "one response a prompt"},
        **more,
    }


@pytest.fixture
def summary() -> dict:
    """Two systems and two controls, of which one is more diverse than both systems."""
    return {
        "kind": "common",
        "k": 2,
        "rows": 3,
        "controllability": {},
        "reasons": {},
        "judge": {"name": "proxy", "text": "a proxy with AUC 0.9"},
        "systems": {
            "base": system(0.5, 0.4, 1.5),
            "tuned": system(1.5, 0.8, 1.4),
            "control: random words": system(0.1, 0.02, 2.0, True),
            "control: repeated": system(0.4, 0.4, 1.0, True),
        },
        "differences": {
            "tuned - base": {
                "yield@2": figure(1.0, 0.4, 1.5),
                "coherent": figure(0.4, -0.1, 0.8),
                "distinct_k": figure(-0.1, -0.4, 0.2),
            }
        },
        "matched": {
            "tuned - base": {
                "measures": {"distinct_k": figure(0.05, -0.2, 0.3)},
                "prompts": 2,
                "left_out": 1,
                "responses": 4,
            }
        },
    }


def withheld() -> dict:
    """What two files with different numbers of replies a row have in common."""
    why = "the files have different numbers of replies a row: base 5, tuned 9"
    described = {"rows": 3, "responses": 15, "empty": 0, "control": False, "seconds_per_row": None}
    return {
        "kind": "eval/diffuse",
        "k": None,
        "drawn": None,
        "rows": 3,
        "judge": {"name": None, "text": f"no common figures: {why}"},
        "systems": {
            name: described | {"reasons": {"all common figures": why}} for name in ("base", "tuned")
        },
        "differences": {},
        "matched": {},
        "controllability": {},
        "settings": {},
        "reasons": {"common figures": why},
    }


METHODS_OWN = [
    Table(
        "KL to the target in nats",
        ["prompt", "base"],
        [["a <b>number</b>", "0.12"], ["a name", "—"]],
        ["a name: no model & no figure"],
    ),
    Table("nothing to compare", ["prompt", "base"], []),
]


@pytest.fixture
def prompts(summary) -> list[dict]:
    """Three dialogues. `base` yields 0, 2, 1, and the second time markup; `tuned` 2, 1, 2."""

    def reply(text, number=0, coherent=True):
        return {"text": text, "class": number, "coherent": coherent, "verdict": "0.91", "why": None}

    pages = []
    for n, context in enumerate(["Is it raining?", "Who ate <b>it</b>?", "Shall we go?"]):
        systems = {
            name: {
                "replies": [reply("Yes."), reply("No.", 1, None)],
                "similarity": [[1, 0.25], [0.25, 1]],
                "yield": None,
            }
            for name in summary["systems"]
        }
        systems["base"] |= {
            "replies": [reply(EVIL if n == 1 else "Maybe."), reply("", 1, False)],
            "yield": (0, 2, 1)[n],
        }
        systems["tuned"]["yield"] = (2, 1, 2)[n]
        pages.append({"text": context, "turns": label_turns(context), "systems": systems})
    return pages


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_has_metrics_as_rows_and_the_longer_half_of_each_interval(summary, capsys):
    table.print_common(summary)
    said = capsys.readouterr().out
    assert re.search(r"^yield@2 ↑ +0.50 ±0.30 +1.50 ±0.30 +0.10 ±0.30 +0.40 ±0.30$", said, re.M)
    assert re.search(r"^yield@2 +\+1.00 ±0.60\*$", said, re.M), "a star: clear"
    assert re.search(r"^coherent +\+0.40 ±0.50$", said, re.M), "no star"
    assert "a proxy with AUC 0.9" in said and "base: 3 rows, 6 responses, 1 empty" in said
    assert "+1.00 [+0.40, +1.50] against base" in " ".join(said.split())
    assert "2 prompts; 1 left out" in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_metric_that_a_control_leads_is_marked_and_others_are_not(summary, capsys):
    table.print_common(summary)
    said = capsys.readouterr().out
    assert "distinct_2 ↑ †" in said and "yield@2 ↑ †" not in said and "rewards noise" in said
    summary["systems"]["tuned"]["distinct_k"] = figure(2.0, 1.9, 2.1)
    table.print_common(summary)
    assert "†" not in capsys.readouterr().out


def test_nine_systems_stand_in_blocks_that_keep_every_figure_whole(summary, capsys):
    for i in range(5):
        summary["systems"][f"a_rather_long_name_{i}"] = system(1, 0.5, 1.5)
    table.print_common(summary)
    said = capsys.readouterr().out
    cells = "".join(re.findall("^yield.*", said, re.M))
    assert len(re.findall("(?<!\\+)1.00 ±0.30", cells)) == 5
    assert said.count("yield@2 ↑") == 2 and max(map(len, said.splitlines())) <= 100


def test_an_undefined_figure_is_a_dash_with_its_reason_never_a_zero(summary, prompts):
    for one in summary["systems"].values():
        one["coherent"] = one["yield@2"] = None
    summary["systems"]["base"]["coherent"] = figure(0.4, 0.3, 0.7)
    summary["systems"]["tuned"]["reasons"]["coherent"] = "no row is fully scored"
    text = render(summary, prompts)
    assert '<td class="none" title="no row is fully scored">—</td>' in text
    assert "nan" not in text.casefold() and "no reply was judged" in text
    assert with_half(None) == "—" and table.headline(summary) == []


def test_a_duration_has_no_interval_and_stands_alone(summary, prompts, capsys):
    summary["systems"]["base"]["seconds_per_row"] = figure(1.25)
    table.print_common(summary)
    assert re.search(r"^seconds a row ↓ +1.25 +— +— +—$", capsys.readouterr().out, re.M)
    assert "<td><b>1.25</b></td>" in render(summary, prompts)


def test_the_tables_of_a_method_stand_in_the_terminal_whole_with_their_notes(capsys):
    table.print_tables(METHODS_OWN)
    printed = capsys.readouterr().out
    assert re.search(r"^a <b>number</b> +0.12$", printed, re.M)
    assert "a name: no model & no figure" in printed


# ---- the page -----------------------------------------------------------------------------------


def test_texts_are_shown_and_never_become_markup(summary, prompts):
    summary["systems"] = {
        name.replace("tuned", "<u>tuned</u>"): of_system
        for name, of_system in summary["systems"].items()
    }
    summary["differences"], summary["matched"] = {}, {}
    for prompt in prompts:
        prompt["systems"]["<u>tuned</u>"] = prompt["systems"].pop("tuned")
        prompt["systems"]["base"]["replies"][0]["why"] = EVIL
    text = render(summary, prompts, METHODS_OWN)
    assert text.count("<script>") == 1 and "<img" not in text and "<u>" not in text
    assert "<b>it" not in text and "<b>number" not in text
    assert "&lt;script&gt;document.title" in text and "Who ate &lt;b&gt;it" in text


def test_the_page_asks_no_server_for_anything(summary, prompts):
    text = render(summary, prompts, METHODS_OWN)
    written = text.replace(str(escape(EVIL)), "")
    assert not re.search(r"(src|href)=\"?[^\"#]|url\(|@import|https?://", written)
    assert "default-src 'none'" in text


def test_every_reply_has_its_class_and_verdict_and_every_pair_its_cosine(summary, prompts):
    text = render(summary, prompts)
    assert text.count('<li class="reply') == 24 and text.count('<li class="reply none"') == 9
    assert text.count("✗ 0.91") == 3 and "<em>empty</em>" in text
    assert text.count("<title>1 and 2: 0.25</title>") == 12 and "mean cosine 0.25" in text
    assert [letter(i) for i in (0, 25, 26)] == ["A", "Z", "A2"]


def test_spaces_of_a_reply_are_kept(summary, prompts):
    prompts[0]["systems"]["base"]["replies"][0]["text"] = "Rain:\n  a   line\n  and another"
    assert "<p>Rain:\n  a   line\n  and another</p>" in render(summary, prompts)


def test_the_tables_of_a_method_stand_on_the_page(summary, prompts):
    text = render(summary, prompts, METHODS_OWN)
    assert "<h3>KL to the target in nats</h3>" in text and text.count("<table>") == 1
    row = '<tr><th scope="row">a &lt;b&gt;number&lt;/b&gt;</th><td>0.12</td></tr>'
    assert row in text and "<li>a name: no model &amp; no figure</li>" in text
    assert "Figures of the method" not in render(summary, prompts)


def test_where_the_common_figures_are_withheld_the_page_says_why_once_and_shows_the_rest():
    text = render(withheld(), [], METHODS_OWN)
    assert text.count("different numbers of replies a row") == 1
    assert "KL to the target" in text and "base: 3 rows, 15 responses" in text
    for absent in ("All figures", "The replies", "<script>", "None"):
        assert absent not in text


@given(st.floats(0, 1), st.floats(0.001, 60))
def test_points_stand_in_the_frame_of_the_plot(x, y):
    left, top, right, bottom = plot.FRAME
    scatter = plot.scatter([plot.Point("a", figure(x, 0, 1), figure(y, y / 2, y))])
    [mark] = scatter.marks
    assert left <= mark.x <= right and top - 0.1 <= mark.y_ends[1] <= mark.y_ends[0] <= bottom
    assert mark.x_ends == (left, right) and len(scatter.y_lines) <= plot.MAX_STEPS + 2


@given(st.lists(st.tuples(st.floats(200, 600), st.floats(150, 300)), min_size=2, max_size=4))
def test_labels_of_points_do_not_cover_each_other(points):
    taken = []
    for x, y in points:
        box = plot.place_label(x, y, 90, taken).box
        taken += [box] if box else []
    assert all(
        a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
        for i, a in enumerate(taken)
        for b in taken[:i]
    )


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    driver = pytest.importorskip(
        "selenium.webdriver", reason="pip install selenium (requirements-dev.txt)"
    )
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = driver.ChromeOptions()
    options.binary_location = paths[0]
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "force-prefers-reduced-motion",
            f"user-data-dir={profile}",
            "window-size=1200,900",
        ):
            options.add_argument(f"--{flag}")
        window = driver.Chrome(options, Service(paths[1]))
        yield window
        window.quit()


@pytest.fixture
def page(browser, summary, prompts, tmp_path):
    (tmp_path / "x.html").write_text(render(summary, prompts, METHODS_OWN), encoding="utf-8")
    browser.get(f"file://{tmp_path / 'x.html'}")
    return browser


def numbers(page) -> list[str]:
    return page.execute_script(
        "return [...document.querySelectorAll('.prompt')]"
        ".filter(p => !p.hidden).map(p => p.dataset.n)"
    )


def test_a_browser_shows_the_page_without_errors_or_requests(page):
    assert page.title == "tuned against base", "the scripts in the replies have not run"
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_prompts_are_found_and_sorted(page):
    find = page.find_element("id", "find")
    assert numbers(page) == ["1", "2", "3"]
    find.send_keys("RAINING")
    assert numbers(page) == ["1"] and page.find_element("id", "count").text == "1 of 3 prompts"
    find.send_keys("\ue00c")  # Escape
    # yields 0, 2, 1 and 2, 1, 2; differences 2, -1, 1
    for key, want in (("y0", "231"), ("y1", "132"), ("d1", "132")):
        page.execute_script(
            "const sort = document.getElementById('sort');"
            "sort.value = arguments[0]; sort.onchange()",
            key,
        )
        assert "".join(numbers(page)) == want, key
    page.find_element("id", "up").click()
    assert "".join(numbers(page)) == "231"


def test_the_keyboard_alone_opens_a_prompt(page):
    from selenium.webdriver import ActionChains

    keys = ActionChains(page)
    keys.send_keys("j").send_keys("j").send_keys("\ue007").perform()  # Enter
    opened = "return [...document.querySelectorAll('.prompt')].map(p => p.open)"
    assert page.execute_script(opened) == [False, True, False]
    assert "document.title" in page.find_element("css selector", ".prompt[open] .reply p").text
    keys.send_keys("/").send_keys("jk").perform()
    assert page.execute_script("return document.activeElement.value") == "jk"


def test_systems_and_plots_are_switched_and_controls_are_hidden_at_first(page):
    page.find_element("id", "open").click()

    def shown() -> list[bool]:
        return [
            page.find_element("css selector", f".system.of{i}").is_displayed() for i in range(4)
        ]

    assert shown() == [True, True, False, False]
    page.execute_script("for (const id of ['show0', 'show2']) document.getElementById(id).click()")
    assert shown() == [False, True, True, False]


def test_dark_is_dark_and_light_is_light(page):
    def brightness() -> int:
        colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    found = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        found.append(brightness())
    assert found[0] > 700 and found[1] < 120
