"""The certificate as a page: it says the verdict first, holds nothing foreign, and shows text as text."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from parrot_edge.convert.certificate_page import render_page, write_page

EDGES = [0.0, *(10.0**power for power in range(-6, 2))]


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def make_file(name: str, type_name: str, size: int, kl: float) -> dict[str, Any]:
    """What certificate.json holds of a file that passed."""
    case = {"checked": 20, "different": 0, "first": None}
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    return {
        "name": name,
        "type": type_name,
        "bytes": size,
        "bits_per_weight": 8.5,
        "sha256": "b179c952",
        "adapter": None,
        "failed": [],
        "notes": ["It names no licence."],
        "vocabulary": {"tokens": 49152, "different": 0},
        "template": case,
        "tokens": case,
        "ends": {
            "token": 2,
            "text": "<|im_end|>",
            "stops": True,
            "turn": {"places": 9, "trained": figure(0.5), "file": figure(0.51)},
            "dialogue": None,
        },
        "kl": {
            **{"mean": figure(kl), "limit": 0.01},
            "histogram": {"edges": EDGES, "counts": [1, 2, 3, 4, 3, 2, 1, 0]},
        },
        "agreement": figure(0.9),
        "perplexity": {
            "own": {"trained": figure(12), "file": figure(12.3), "ratio": figure(1.02)},
            "other": None,
        },
        "continuations": [
            {
                "messages": history,
                "next_role": "user",
                "trained": "how are you?",
                "file": "how was it?",
                "common": 4,
            }
        ],
        "speed": {"decode": 296.0, "prompt": 510.0, "sequences": 8, "threads": 2},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "passed": True,
        "trained": {
            **{"name": "ask", "role": "ask", "license": "mit", "quantization": "none", "dtype": "float32"},
            "base": {"name": "smollm2"},
        },
        "reference": {
            **{"dialogues": 14, "groups": 12, "targets": 900, "places": 800, "hard_texts": 6},
            **{"made_up": False, "missing": []},
        },
        "versions": {"parrot_edge": "0.1.0", "llama_cpp_python": "0.3.36"},
        "files": [
            make_file("ask-f16.gguf", "F16", 270_000_000, 0.0005),
            make_file("ask-Q8_0.gguf", "Q8_0", 144_000_000, 0.006),
        ],
    }


class Page(HTMLParser):
    """Tags in order, and what is open at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_verdict_comes_first(report: dict[str, Any]) -> None:
    page = Page(render_page(report))
    assert page.open == []
    assert "These files say what was trained." in page.text.partition("The files")[0]
    report["files"][1]["failed"] = ["ask-Q8_0.gguf differs; take more bits."]
    text = Page(render_page(report | {"passed": False})).text
    assert "1 of 2 files does not say what was trained." in text
    assert text.count("ask-Q8_0.gguf differs; take more bits.") == 1


def test_figures_and_continuations_are_shown(report: dict[str, Any]) -> None:
    text = " ".join(Page(render_page(report)).text.split())
    for shown in ("0.00050", "0.0060", "270 MB", "90.0 %", "12.30", "how are you?", "51.0 %", "b179c952"):
        assert shown in text


def test_nothing_foreign_is_loaded_or_run(report: dict[str, Any]) -> None:
    text = render_page(report)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"}.intersection(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"url\(|@import|https?:", text)


def test_text_stays_text(report: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=1>{{ 7*7 }}"
    plain = Page(render_page(report))

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return value + evil if isinstance(value, str) else value

    spoiled = Page(render_page(spoil(copy.deepcopy(report))))
    assert spoiled.tags == plain.tags
    assert "{{ 7*7 }}" in spoiled.text


def test_pictures_say_in_words_what_they_show(report: dict[str, Any]) -> None:
    text = render_page(report)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2
    for picture in pictures:
        label = re.search(r'role="img" aria-labelledby="([\w-]+)"', picture)
        assert label
        title = re.search(rf'<title id="{label[1]}">(.*?)</title>', picture, re.DOTALL)
        assert title
        assert "ask-Q8_0.gguf" in title[1]
        numbers = re.findall(r' (?:[xy][12]?|c[xy]|height|width)="([^"]+)"', picture)
        assert all(0 <= float(number) <= 700 for number in numbers)


def test_a_file_that_could_not_be_read_has_a_row(report: dict[str, Any], tmp_path: Path) -> None:
    broken = {"name": "cut.gguf", "type": None, "bytes": None, "failed": ["It is cut short."], "notes": []}
    report["files"] = [broken]
    write_page(report | {"passed": False}, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "It is cut short." in page.text
    assert "svg" not in page.tags
