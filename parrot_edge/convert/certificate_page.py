"""The certificate as one page that a person reads: no scripts, nothing from the network, light or dark.

It shows what certificate.json holds, through the template certificate_page.html, and knows nothing of how
it was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from parrot_edge.machine import format_bytes, plural
from parrot_edge.store import replacing

_WIDTH, _ROW = 640, 46  # of the plots, in their own units


def write_page(report: Mapping[str, Any], target: Path) -> None:
    """Write the page of a report, whole or not at all; raises `OSError`."""
    with replacing(target) as draft:
        draft.write_text(render_page(report), encoding="utf-8")


def render_page(report: Mapping[str, Any]) -> str:
    """The page as HTML; whatever is in the report, it stays text."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=_figure, interval=_interval, percent=_percent, bytes=format_bytes)
    files = report["files"]
    measured = [file for file in files if file.get("kl")]
    failed = [file for file in files if file["failed"]]
    page = Path(__file__).with_name("certificate_page.html").read_text(encoding="utf-8")
    return environment.from_string(page).render(
        **report,
        verdict=_verdict(len(files), len(failed)),
        bad=failed,
        measured=measured,
        histograms=_draw_histograms(measured),
        sizes=_draw_sizes(measured) if len(measured) > 1 else None,
        stories=_gather_stories(measured),
        checks=[(file, _list_checks(file)) for file in files],
        texts=plural(report["reference"]["hard_texts"], "hard text"),
        dialogues=plural(report["reference"]["dialogues"], "dialogue"),
        speeds=next((file["speed"] for file in files if file.get("speed")), None),
    )


def _verdict(count: int, failed: int) -> str:
    """The page's first sentence.

    >>> _verdict(1, 0), _verdict(3, 1)
    ('This file says what was trained.', '1 of 3 files does not say what was trained.')
    """
    if not failed:
        return "This file says what was trained." if count == 1 else "These files say what was trained."
    if count == 1:
        return "This file does not say what was trained."
    return f"{failed} of {count} files {'does' if failed == 1 else 'do'} not say what was trained."


def _figure(value: Any, digits: int = 2) -> str:
    """A figure, or a plain number, with so many digits that tell something.

    >>> _figure({"value": 0.00031416, "low": 0, "high": 1}), _figure(12.345, 3), _figure(None), _figure(0.0)
    ('0.00031', '12.3', '–', '0')
    """
    if isinstance(value, Mapping):
        value = value["value"]
    if value is None or not math.isfinite(value):
        return "–" if value is None else "∞"
    if not value:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 7)}f}"


def _interval(value: Any, digits: int = 2) -> str:
    """The ends of a figure's interval."""
    return f"{_figure(value['low'], digits)} to {_figure(value['high'], digits)}" if value else ""


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value['value']:.1f} %"


def _list_checks(file: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """What was looked at beside the figures: whether it is right, and what it is."""
    checks = []
    if found := file.get("vocabulary"):
        checks.append((not found["different"], f"vocabulary of {found['tokens']:,} tokens"))
    if found := file.get("tokens"):
        checks.append((not found["different"], f"token ids of {plural(found['checked'], 'text')}"))
    if found := file.get("template"):
        checks.append((not found["different"], f"{plural(found['checked'], 'prompt')} of the chat template"))
    if found := file.get("ends"):
        checks.append((found["stops"], f"programs stop at {found['text']} (token {found['token']})"))
    return checks


def _gather_stories(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt with what the trained model and every file wrote next."""
    told = [file for file in files if file.get("continuations")]
    if not told:
        return []
    return [
        {
            "history": first["messages"],
            "next_role": first["next_role"],
            "trained": first["trained"],
            "files": [
                {
                    "name": file["name"],
                    "same": said["file"][: said["common"]],
                    "other": said["file"][said["common"] :],
                    "equal": said["file"] == said["trained"],
                }
                for file in told
                for said in [file["continuations"][number]]
            ],
        }
        for number, first in enumerate(told[0]["continuations"])
    ]


# Plots: numbers for the template, which draws them


def _on_log(value: float, low: float, high: float) -> float:
    """Where a value is between two others on a logarithmic scale, 0 to 1.

    >>> _on_log(0.1, 0.01, 1), _on_log(0, 0.01, 1), _on_log(5, 0.01, 1)
    (0.5, 0.0, 1.0)
    """
    if value <= low:
        return 0.0
    return min(1.0, math.log(value / low) / math.log(high / low))


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if exponent >= -4 else f"1e{exponent}"


def _draw_histograms(files: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A row for each file: where its KL divergences lie, on one logarithmic scale."""
    if not files:
        return None
    edges = files[0]["kl"]["histogram"]["edges"]
    low, high = edges[1], edges[-1]
    step = _WIDTH / (len(edges) - 1)  # the first bin holds all that is less than `low`

    def place(value: float) -> float:
        return round(step + (_WIDTH - step) * _on_log(value, low, high), 1)

    rows = []
    for number, file in enumerate(files):
        counts, total = file["kl"]["histogram"]["counts"], max(1, sum(file["kl"]["histogram"]["counts"]))
        bottom = (number + 1) * (_ROW + 24) - 4
        bars = [
            {
                "x": round(at * step + 0.5, 1),
                "height": round(max(1.0, _ROW * count / max(counts)), 1),
                "tip": f"{100 * count / total:.1f} % between {edges[at]:.2g} and {edges[at + 1]:.2g}",
            }
            for at, count in enumerate(counts)
            if count
        ]
        rows.append(
            {
                "name": file["name"],
                "bottom": bottom,
                "bars": bars,
                "mean": place(file["kl"]["mean"]["value"] if file["kl"]["mean"] else high),
                "limit": place(file["kl"]["limit"]),
                "text": f"{file['name']}: mean {_figure(file['kl']['mean'])}, limit {file['kl']['limit']:g}",
            }
        )
    exponents = range(round(math.log10(low)), round(math.log10(high)) + 1)
    return {
        "width": _WIDTH,
        "height": len(rows) * (_ROW + 24) + 38,
        "bar": round(step - 1, 1),
        "row": _ROW,
        "rows": rows,
        "axis": len(rows) * (_ROW + 24) - 4,
        "ticks": [{"x": place(10.0**exponent), "label": _power(exponent)} for exponent in exponents],
    }


def _draw_sizes(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A point for each file: its size, and its KL divergence on a logarithmic scale."""
    known = [file for file in files if file["kl"]["mean"]]
    values = [file["kl"][key] for file in known for key in ("limit",) if file["kl"][key] > 0]
    values += [file["kl"]["mean"]["value"] for file in known if file["kl"]["mean"]["value"] > 0]
    low = 10.0 ** math.floor(math.log10(min(values, default=1e-4)))
    high = 10.0 ** math.ceil(math.log10(max(values, default=1) * 1.2))
    most = max((file["bytes"] for file in known), default=1) * 1.15
    left, top, height = 56, 10, 240

    def across(size: float) -> float:
        return round(left + (_WIDTH - left) * size / most, 1)

    def down(value: float) -> float:
        return round(top + height * (1 - _on_log(value, low, high)), 1)

    points, taken = [], list[float]()
    for file in sorted(known, key=lambda file: -file["kl"]["mean"]["value"]):
        mean = file["kl"]["mean"]
        y = down(mean["value"])
        label = y + 4
        while any(abs(label - other) < 15 for other in taken):
            label += 15
        taken.append(label)
        x = across(file["bytes"])
        points.append(
            {
                "x": x,
                "y": y,
                "low": down(mean["low"]),
                "high": down(mean["high"]),
                "limit": down(file["kl"]["limit"]),
                "failed": bool(file["failed"]),
                "label": file["type"] if _is_single(file, known) else file["name"],
                "label_x": x + 11 if x < 0.8 * _WIDTH else x - 11,
                "label_y": label,
                "anchor": "start" if x < 0.8 * _WIDTH else "end",
                "text": f"{file['name']}: {format_bytes(file['bytes'])}, {_figure(mean)} nats",
            }
        )
    exponents = range(round(math.log10(low)), round(math.log10(high)) + 1)
    step = 10 ** math.floor(math.log10(most))
    step = step // 2 if most / step < 3 else step
    return {
        "width": _WIDTH,
        "height": top + height + 44,
        "left": left,
        "bottom": top + height,
        "top": top,
        "points": points,
        "rows": [{"y": down(10.0**exponent), "label": _power(exponent)} for exponent in exponents],
        "columns": [
            {"x": across(size), "label": format_bytes(size)}
            for size in range(0, int(most) + 1, max(1, int(step)))
        ],
    }


def _is_single(file: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the file is the only one of its type."""
    return sum(other["type"] == file["type"] for other in files) == 1
