"""The page of dialogues: what Python puts into it, and what a real browser makes of it."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Parrot
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from parrot_edge.data.sources import Reader
from parrot_edge.errors import OutputError
from parrot_edge.view.page import open_page, write_page
from parrot_edge.view.shown import Shown, show

HOSTILE = {
    "script": "</script><script>window.ran = 1</script>",
    "image": '<img src="http://127.0.0.1:9/x" onerror="window.ran = 1">',
    "comment": "<!-- <script> -->",
    "attribute": '" onmouseover="window.ran = 1" x="',
    "template": "{{policy}} ${window.ran = 1} <!-- dialogues -->",
    "separators": "one\u2028two\u2029three",
    "right to left": "שלום \u202egnp.exe\u202c مرحبا",
    "NUL": "a\0b",
    "half a surrogate": "a\ud83db",
    "escapes": "a\x1b[31mb\x07",
}


def dialogue(*texts: str, **columns: Any) -> dict[str, Any]:
    """A row whose messages are from user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    return {"messages": messages, **columns}


ROWS = [
    dialogue("How do I boil eggs?", "Eight minutes.", "Thanks!", "Enjoy.", id="eggs", stop_reason="farewell"),
    dialogue(
        "Where is Ghent?", "In Belgium, and Ghent is old.", id="ghent", stop_reason="turns", topic="a city"
    ),
    dialogue("Tell me of tea", "word " * 50, id="tea", stop_reason="turns", usage={"cut_messages": 1}),
    dialogue("Is anyone there?", id="nobody", stop_reason="end"),
    *(dialogue(text, f"You said: {text}", id=name) for name, text in HOSTILE.items()),
]


def write_rows(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def shown(path: Path) -> list[Shown]:
    return list(Reader([str(path)], chosen=True).read(show))


# What Python puts into a page


def test_dialogue_is_described_by_its_measures_and_labels(tmp_path: Path) -> None:
    eggs, ghent, tea, nobody, *_ = shown(write_rows(tmp_path / "d.jsonl", *ROWS))
    assert eggs.measures == {"turns": 2, "words": 9, "context-dependent turns": 1, "topic shifts": 0}
    assert (eggs.labels["stop reason"], eggs.labels["opening"]) == (("farewell",), ("how",))
    assert (ghent.id, ghent.details) == ("ghent", {"stop_reason": "turns", "topic": "a city"})
    assert (tea.labels["flags"], nobody.labels["flags"]) == (("cut",), ("unanswered",))


@pytest.mark.parametrize(
    ("row", "flag"),
    [
        (dialogue("Hi", "Hello", truncated=True), "cut"),
        (dialogue("Sure! Here are three ideas for dinner:", "Thanks"), "wrong role"),
        (dialogue("Go on", "Yes.", "Go on", "Yes."), "repeated"),
        (dialogue("a\u202eb", "Hello"), "hidden characters"),
        (dialogue("a\0b", "Hello"), "hidden characters"),
        (dialogue("Hi", "Hello", flags=["mine"]), "mine"),
    ],
)
def test_flag_is_raised(row: dict[str, Any], flag: str, tmp_path: Path) -> None:
    (only,) = shown(write_rows(tmp_path / "d.jsonl", row))
    assert only.labels["flags"] == (flag,)


def test_rows_of_every_shape_are_shown(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversation": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"data": ["Hi", "Hello"]},
        {"prompt": {"text": "Hi", "role": "prompter", "replies": [{"text": "Hello", "role": "assistant"}]}},
        {"message_tree_id": "t", "message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter"},
        {"message_tree_id": "t", "message_id": "2", "parent_id": "1", "text": "Hello", "role": "assistant"},
    ]
    found = shown(write_rows(tmp_path / "d.jsonl", *rows))
    assert [[message.content for message in each.messages] for each in found] == [["Hi", "Hello"]] * 5


def test_page_is_refused_where_one_exists(parrot: Parrot, tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", ROWS[0])
    (tmp_path / "p.html").write_text("precious")
    done = parrot("view", "d.jsonl", "-o", "p.html")
    assert (done.returncode, done.stderr) == (
        1,
        "parrot: p.html exists; choose another name or pass --force to replace it\n",
    )
    assert (tmp_path / "p.html").read_text() == "precious"
    assert parrot("view", "d.jsonl", "-o", "p.html", "--force").returncode == 0
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")


def test_input_is_never_overwritten_by_its_own_page(parrot: Parrot, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", ROWS[0])
    before = path.read_bytes()
    done = parrot("view", "d.jsonl", "-o", "d.jsonl", "--force")
    assert done.returncode == 2
    assert "cannot be read and written at once" in done.stderr
    assert path.read_bytes() == before


def test_bad_row_is_named_and_leaves_no_page(parrot: Parrot, tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", ROWS[0], '{"messages": [{"role": "critic", "content": "x"}]}')
    done = parrot("view", "d.jsonl", "-o", "p.html")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("parrot: d.jsonl:2: message 1 has role 'critic'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]


def test_bad_rows_are_left_out_where_that_is_wanted(parrot: Parrot, tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", ROWS[0], "nope", '{"a": 1}')
    done = parrot("view", "d.jsonl", "-o", "p.html", "--on-error", "skip")
    assert done.returncode == 0
    assert done.stderr.startswith("parrot: 2 rows were left out, first d.jsonl:2: is not JSON")


def test_page_flows_through_a_pipe_and_an_empty_one_is_whole(parrot: Parrot) -> None:
    full, empty = parrot("view", input=json.dumps(ROWS[0])), parrot("view", input="")
    assert (full.returncode, full.stderr, empty.returncode) == (0, "", 0)
    assert empty.stderr == "parrot: <stdin> holds no dialogue; the page is empty\n"
    assert full.stdout.endswith("</html>\n")
    assert empty.stdout.endswith("</html>\n")


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), open_page(tmp_path / "no" / "p", force=False):
        pass
    with pytest.raises(ZeroDivisionError), open_page(tmp_path / "p.html", force=False):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


# What a browser makes of it


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or the one that playwright has installed."""
    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        try:
            found = next(filter(None, map(shutil.which, names)), None)
            browser = playwright.chromium.launch(executable_path=found)
        except Error as error:
            pytest.fail(f"needs Chromium: apt-get install chromium, or playwright install chromium ({error})")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_page_of(write_rows(folder / "rows.jsonl", *ROWS), folder / "a page.html")


def write_page_of(rows: Path, target: Path) -> Path:
    with open_page(target, force=False) as output:
        write_page(shown(rows), output, title="<b>rows</b> & </title>.jsonl")
    return target


Open = Callable[..., Page]


@pytest.fixture
def open_in(browser: Browser) -> Iterator[Open]:
    """Opens a file without a network; the test fails where the page reports or asks for anything."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, offline=True)
    faults: list[str] = []

    def open_file(path: Path, address: str = "", **size: int) -> Page:
        page = context.new_page()
        if size:
            page.set_viewport_size({"width": size["width"], "height": size["height"]})
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        asked: list[str] = []
        page.goto(path.as_uri() + address)
        expect(status(page)).not_to_contain_text("Opening")
        faults.extend(url for url in asked if not url.startswith(("file:", "blob:")))
        return page

    yield open_file
    context.close()
    assert faults == []


def status(page: Page) -> Any:
    return page.get_by_role("status")


def items(page: Page) -> list[str]:
    """The openings in the list."""
    return [text.split("\n")[0] for text in page.get_by_role("option").all_inner_texts()]


def messages(page: Page) -> list[str]:
    return page.locator(".message div").all_text_contents()


def test_page_lists_dialogues_and_opens_one(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file)
    expect(status(page)).to_have_text(f"{len(ROWS)} dialogues")
    assert items(page)[:2] == ["How do I boil eggs?", "Where is Ghent?"]
    page.get_by_role("option", name="Where is Ghent?").click()
    expect(page.get_by_role("heading", name="a city")).to_be_visible()
    assert messages(page) == ["Where is Ghent?", "In Belgium, and Ghent is old."]
    assert page.evaluate("decodeURIComponent(location.hash)") == "#ghent"
    assert page.title() == "Where is Ghent? · <b>rows</b> & </title>.jsonl"


def test_address_opens_its_dialogue(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file, "#tea")
    expect(page.locator(".message")).to_have_count(2)
    assert messages(page)[0] == "Tell me of tea"
    expect(page.get_by_role("option", selected=True)).to_contain_text("Tell me of tea")
    page.evaluate("location.hash = 'half%20a%20surrogate'")
    expect(page.locator(".message div").first).to_have_text("a\ufffdb")
    page.go_back()
    expect(page.locator(".message div").first).to_have_text("Tell me of tea")


def test_address_of_no_dialogue_says_so(open_in: Open, page_file: Path) -> None:
    expect(open_in(page_file, "#%E0%A4%A").get_by_role("main")).to_contain_text("No dialogue has the id")


def test_rows_with_one_id_have_addresses_of_their_own(open_in: Open, tmp_path: Path) -> None:
    rows = [dialogue(text, "Yes", id="same") for text in ("first", "second", "third")]
    path = write_page_of(write_rows(tmp_path / "d.jsonl", *rows), tmp_path / "p.html")
    expect(open_in(path, "#same~3").locator(".message div").first).to_have_text("third")
    expect(open_in(path, "#same").locator(".message div").first).to_have_text("first")


def test_search_finds_words_in_any_order_and_phrases_as_they_stand(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file)
    query = page.get_by_role("searchbox")
    query.fill("belgium GHENT")
    expect(status(page)).to_contain_text("1 of")
    assert items(page) == ["Where is Ghent?"]
    page.get_by_role("option").click()
    expect(page.locator("mark")).to_have_text(["Ghent", "Belgium", "Ghent"])
    query.fill('"ghent belgium"')
    expect(status(page)).to_contain_text("0 of")
    expect(page.get_by_role("listbox")).to_have_text("No dialogue passes.")
    query.fill("</script>")
    expect(status(page)).to_contain_text("1 of")
    page.get_by_role("button", name="Clear").click()
    expect(status(page)).to_have_text(f"{len(ROWS)} dialogues")


def test_what_is_typed_right_after_a_clear_stays_where_it_was_typed(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file)
    page.get_by_role("searchbox").fill("ghent")
    expect(status(page)).to_contain_text("1 of")
    seen = page.evaluate(
        "() => { document.querySelector('[data-part=reset]').click();"
        " document.querySelector('[aria-label=\"Least words\"]').focus();"
        " return document.querySelector('[data-part=status]').textContent }"
    )
    assert seen == f"{len(ROWS)} dialogues"
    page.keyboard.type("50")
    expect(status(page)).to_contain_text("1 of")
    assert items(page) == ["Tell me of tea"]


def test_pair_is_shown_with_both_answers(open_in: Open, tmp_path: Path) -> None:
    pair = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "What?", "id": "p"}
    as_messages = {**pair, "chosen": [{"role": "assistant", "content": "Hello"}], "id": "q"}
    path = write_page_of(write_rows(tmp_path / "d.jsonl", pair, as_messages), tmp_path / "p.html")
    page = open_in(path, "#q")
    seen = ["User · 1Hi", "Assistant · chosenHello", "Assistant · rejectedWhat?"]
    expect(page.locator(".message")).to_have_text(seen)


def test_filters_narrow_the_list_and_the_plots(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file)
    page.get_by_role("checkbox", name="turns").check()
    expect(status(page)).to_contain_text("2 of")
    assert items(page) == ["Where is Ghent?", "Tell me of tea"]
    expect(page.get_by_role("region", name="Overview")).to_contain_text("2 of 14 dialogues")
    page.get_by_role("checkbox", name="farewell").check()
    expect(status(page)).to_contain_text("3 of")
    page.get_by_role("checkbox", name="cut").check()
    expect(status(page)).to_contain_text("1 of")
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("spinbutton", name="Least words").fill("50")
    expect(status(page)).to_contain_text("1 of")
    assert items(page) == ["Tell me of tea"]
    expect(page.get_by_role("img", name="words of a dialogue: from 54 to 54, median 54")).to_be_visible()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_shown_and_never_run(name: str, open_in: Open, page_file: Path) -> None:
    page = open_in(page_file, "#" + name.replace(" ", "%20"))
    expect(page.locator(".message")).to_have_count(2)
    seen = HOSTILE[name].translate({0: "\u2400", 0x1B: "\u241b", 7: "\u2407", 0xD83D: "\ufffd"})
    assert messages(page) == [seen, f"You said: {seen}"]
    assert page.evaluate("window.ran") is None
    assert page.locator("main img").count() == 0


def test_no_text_of_a_dialogue_is_in_the_file_as_it_is(page_file: Path) -> None:
    """Only base64 carries dialogues; the title is escaped."""
    written = page_file.read_text()
    packed = re.findall(r'data-part="(?:index|chunk)">([^<]*)</script>', written)
    assert packed
    assert all(re.fullmatch(r"[A-Za-z0-9+/=]+", each) for each in packed)
    assert html.escape("<b>rows</b> & </title>.jsonl") in written
    assert "window.ran" not in written


def test_policy_of_the_page_refuses_scripts_that_are_not_its_own(browser: Browser, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.evaluate(
        "() => { const made = document.createElement('script');"
        " try { made.text = 'window.ran = 1' } catch {} document.body.append(made);"
        " try { document.body.innerHTML = '<img src=x onerror=\"window.ran = 1\">' } catch {} }"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    page.close()


def test_keyboard_alone_searches_walks_and_reads(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file)
    page.keyboard.press("Tab")  # the overview's button
    page.keyboard.press("Tab")
    page.keyboard.type("e")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.get_by_role("searchbox").fill("")
    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".message div").first).to_have_text("How do I boil eggs?")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".message div").first).to_have_text("Where is Ghent?")
    active = page.get_by_role("listbox").get_attribute("aria-activedescendant")
    assert page.get_by_role("option", selected=True).get_attribute("id") == active
    page.wait_for_function("() => location.hash === '#ghent'")
    page.keyboard.press("End")
    expect(page.locator(".message")).to_have_count(2)
    page.keyboard.press("Home")
    expect(page.locator(".message div").first).to_have_text("How do I boil eggs?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=2)).to_be_focused()


def test_screen_reader_is_told_what_is_what(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file, "#eggs")
    expect(page.locator(".message")).to_have_count(4)
    for role in ("main", "search", "listbox", "status", "navigation"):
        assert page.get_by_role(role).count() == 1, role
    assert page.get_by_role("heading", level=3).all_text_contents() == [
        "User · 1",
        "Assistant",
        "User · 2",
        "Assistant",
    ]
    first = page.get_by_role("option").first
    assert (first.get_attribute("aria-posinset"), first.get_attribute("aria-setsize")) == (
        "1",
        str(len(ROWS)),
    )
    unnamed = "() => [...document.querySelectorAll('input')].filter(e => !e.ariaLabel).length"
    assert page.evaluate(unnamed) == 0


def test_narrow_screen_shows_one_side_at_a_time(open_in: Open, page_file: Path) -> None:
    page = open_in(page_file, width=390, height=800)
    expect(page.get_by_role("main")).to_be_hidden()
    page.get_by_role("option").first.click()
    expect(page.get_by_role("listbox")).to_be_hidden()
    expect(page.locator(".message").first).to_be_visible()
    page.get_by_role("button", name="All dialogues").click()
    expect(page.get_by_role("listbox")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_empty_page_is_whole(open_in: Open, tmp_path: Path) -> None:
    with open_page(tmp_path / "p.html", force=False) as output:
        assert write_page([], output, title="none") == 0
    page = open_in(tmp_path / "p.html")
    expect(status(page)).to_have_text("0 dialogues")
    expect(page.get_by_role("listbox")).to_have_text("There is none.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(scheme: Any, browser: Browser, page_file: Path) -> None:
    """Contrast of at least 4.5, as WCAG 2.2 asks of text (1.4.3)."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(page_file.as_uri() + "#eggs")
    expect(page.locator(".message")).to_have_count(4)
    for selector in ("h1", ".status", ".item small", ".item[aria-selected=true] small", ".message h3",
                     ".user div", ".assistant div", ".about", "summary", ".chip b"):  # fmt: skip
        colours = page.locator(selector).first.evaluate(
            "(e) => { const colour = getComputedStyle(e).color;"
            " while (e && /, 0\\)$/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement;"
            " return [colour, getComputedStyle(e ?? document.body).backgroundColor] }"
        )
        assert contrast(*colours) >= 4.5, (selector, colours)
    page.close()


def contrast(*colours: str) -> float:
    """Contrast ratio of two CSS colours, after WCAG 2.2."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


# Speed

FILTER = """async ([selector, value]) => {
  const status = () => document.querySelector('[role=status]').textContent;
  const [target, before, start] = [document.querySelector(selector), status(), performance.now()];
  if (value === null) target.click();
  else Object.assign(target, { value }).dispatchEvent(new Event('input', { bubbles: true }));
  while (status() === before && performance.now() - start < 5000) await new Promise((go) => setTimeout(go));
  await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""


@pytest.mark.slow
def test_forty_thousand_dialogues_open_and_filter_quickly(browser: Browser, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstu", k=draw.randint(2, 9))) for _ in range(3000)]
    asked = [" ".join(draw.choices(words, k=12)) for _ in range(4000)]
    told = [" ".join(draw.choices(words, k=40)) for _ in range(4000)]
    with open(tmp_path / "d.jsonl", "w") as rows:
        for at in range(40_000):
            texts = [draw.choice(side) for _ in range(8) for side in (asked, told)]
            reason = draw.choice(["turns", "end", "farewell"])
            rows.write(json.dumps(dialogue(*texts, id=f"d{at}", stop_reason=reason)) + "\n")
    command = [sys.executable, "-m", "parrot_edge", "view", tmp_path / "d.jsonl", "-o", tmp_path / "p.html"]
    subprocess.run(command, check=True)
    page = browser.new_page()
    page.set_default_timeout(300_000)
    page.goto((tmp_path / "p.html").as_uri() + "#d17", wait_until="commit")
    expect(page.locator(".message")).to_have_count(16, timeout=300_000)
    opened = "performance.getEntriesByName('parrot open')[0].startTime"
    assert page.evaluate(opened) < 3000
    while not page.evaluate("performance.getEntriesByName('parrot searchable').length"):
        page.wait_for_timeout(100)
    page.evaluate("document.querySelector('details').open = true")
    for selector, value in (
        ("[type=checkbox]", None),
        ("[type=number]", "9"),
        ("[type=search]", words[0]),
        ("[type=search]", f"{words[1]} {words[2]}"),
        ("[type=search]", "found nowhere"),
    ):
        took = []
        for _ in range(5):
            took.append(page.evaluate(FILTER, [selector, value]))
            page.evaluate(FILTER, [selector, None if value is None else ""])
        assert min(took) < 200, (selector, value, took)  # the others may have waited for a busy machine
    page.close()
