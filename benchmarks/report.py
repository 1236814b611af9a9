"""Write the figures of a run: JSON, Markdown with figures in SVG, and text for the terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.measure import Row

_PACKAGES = ("rq", "celery", "dramatiq", "redis", "psycopg", "procrastinate", "pgqueuer")
_WIDTH, _LINE, _LEFT = 720, 22, 250
_BASE_COLOUR, _COLOUR = "#9aa5b1", "#2f6f9f"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def machine() -> dict[str, Any]:
    """Return what a reader must know of the machine, and nothing that names it."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": f"{os.cpu_count()} x {model}",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "packages": versions,
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def number(value: float) -> str:
    """Return a figure with three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def text_of(rows: Sequence[Row]) -> str:
    """Return a table for the terminal."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"  x{row.ratio:.2f} of {row.base}"
        spread = f"[{number(row.low)} .. {number(row.high)}]"
        lines.append(f"  {row.name:{width}}  {number(row.median):>9} {row.unit}  {spread}{ratio}")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], command: str) -> str:
    """Return all figures as JSON."""
    return json.dumps(
        {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "machine": machine(),
            "rows": [row.as_dict() for row in rows],
        },
        indent=1,
    )


def markdown(run: Mapping[str, Any], figures: Path | None = None) -> str:
    """Return the tables of a run, as `as_json` has written it; draw a figure for each into a folder."""
    about = run["machine"]
    packages = ", ".join(f"{name} {at}" for name, at in about["packages"].items())
    lines = [
        f"`{run['command']}`, {run['at'][:10]}. {about['cpu']}, {about['system']}, "
        f"Python {about['python']}, {packages}. Load of the machine at the end: "
        f"{', '.join(map(str, about['load']))}.",
        "",
    ]
    for title, group in groupby(run["rows"], key=lambda row: row["table"]):
        rows = list(group)
        better = "more is better" if rows[0]["is_rate"] else "less is better"
        lines += [f"### {title}", ""]
        if figures is not None:
            name = "".join(c if c.isalnum() else "-" for c in title.lower()) + ".svg"
            (figures / name).write_text(svg(title, rows))
            lines += [f"![{title}]({figures.name}/{name})", ""]
        lines += [
            f"| {rows[0]['unit']}, {better} | median | quartiles | ratio |",
            "|---|---|---|---|",
        ]
        for row in rows:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} of {row['base']}"
            spread = f"{number(row['low'])} to {number(row['high'])}"
            lines.append(f"| {row['name']} | {number(row['median'])} | {spread} | {ratio} |")
        lines += ["", f"{rows[0]['rounds']} rounds.", ""]
    return "\n".join(lines)


def into_manual(page: Path, run: Mapping[str, Any]) -> None:
    """Replace the figures in the page of the manual by those of this run."""
    figures = page.parent / "figures"
    figures.mkdir(exist_ok=True)
    for old in figures.glob("*.svg"):
        old.unlink()
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{markdown(run, figures)}\n{END}{after}")


def svg(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the medians as bars, with a line from quartile to quartile."""
    most = max(row["high"] for row in rows) or 1.0
    scale = (_WIDTH - _LEFT - 90) / most
    height = _LINE * len(rows) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="18" font-weight="bold">{escape(title)} ({escape(rows[0]["unit"])})</text>',
    ]
    for nth, row in enumerate(rows):
        y = 30 + nth * _LINE
        width = max(1.0, row["median"] * scale)
        colour = _BASE_COLOUR if row["ratio"] is None else _COLOUR
        low, high = _LEFT + row["low"] * scale, _LEFT + row["high"] * scale
        out += [
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(row["name"])}</text>',
            f'<rect x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="14" fill="{colour}"/>',
            f'<line x1="{low:.1f}" y1="{y + 9}" x2="{high:.1f}" y2="{y + 9}" stroke="#222222"/>',
            f'<text x="{max(high, _LEFT + width) + 6:.1f}" y="{y + 13}">'
            f"{number(row['median'])}</text>",
        ]
    return "\n".join([*out, "</svg>", ""])
