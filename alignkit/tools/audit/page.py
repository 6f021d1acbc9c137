"""Write an audit as one self-contained HTML page with counts, examples and plots."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from alignkit.data.text.policies import MEANING
from alignkit.tools.audit.findings import Findings
from alignkit.tools.page import write_page
from alignkit.tools.plots import COLORS, new_figure, png

_ROWS_LISTED = 40


def page(report: dict[str, Any], found: Findings) -> str:
    """Return the page's HTML.

    Args:
        report: The report that `Findings.to_dict` returned.
        found: The findings, for the lengths in the plots.
    """
    asked = ", ".join(
        f"{name} {escape(str(report[name]))}"
        for name in ("kind", "tokenizer", "max_length", "prompt_format")
    )
    told = "".join(f"<li>{escape(line)}</li>" for line in sentences(report))
    body = f"""<p class="quiet">{report["rows"]:,} rows; {asked}</p>
<ul>{told}</ul>
<h2>Defects</h2>{_defects(report)}
<h2>Lengths in {report["unit"]}</h2>{_lengths(report)}
{_plots(report, found)}
<h2>Examples</h2>{_examples(report)}
"""
    return write_page(f"Audit of {report['path']}", body)


def sentences(report: dict[str, Any]) -> list[str]:
    """Return sentences that sum up the report's numbers."""
    lines = []
    if sharing := report.get("prompt_sharing"):
        bias = report["length_bias"]
        lines.append(
            f"Sharing each prompt saves {sharing['saved_share']:.1%} of "
            f"{sharing['tokens_apart']:,} {report['unit']}."
        )
        lines.append(
            f"The chosen answer has {bias['chosen_mean']:.1f} {report['unit']} on average, the "
            f"rejected one {bias['rejected_mean']:.1f}; it is the longer one in "
            f"{bias['chosen_longer_share']:.1%} of rows."
        )
    lines.append(f"{report['repeated_prompt_share']:.1%} of rows repeat an earlier prompt.")
    if columns := ", ".join(report["columns_not_read"]):
        lines.append(f"Nothing is read from the columns {columns}.")
    if files := "; ".join(report["files_not_read"]):
        lines.append(files)
    return lines


def _defects(report: dict[str, Any]) -> str:
    rows = []
    for name in MEANING:
        if name in report:
            count, places = report[name], report["row_numbers"][name]
            listed = ", ".join(map(str, places[:_ROWS_LISTED]))
            listed += ", …" if len(places) > _ROWS_LISTED else ""
            share = f"{count / report['rows']:.1%}" if report["rows"] else ""
            rows.append(
                f"<tr{' class=found' if count else ''}><td>{name}</td><td class=n>{count:,}</td>"
                f"<td class=n>{share}</td><td>{escape(MEANING[name])}</td><td>{listed}</td></tr>"
            )
    head = (
        "<th>defect</th><th class=n>rows</th><th class=n>share</th><th>meaning</th><th>which</th>"
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _lengths(report: dict[str, Any]) -> str:
    if not report["lengths"]:
        return "<p>No row could be measured.</p>"
    names = next(iter(report["lengths"].values()))
    head = "<th>of</th>" + "".join(f"<th class=n>{name}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{part}</td>"
        + "".join(f"<td class=n>{value:,.0f}</td>" for value in summary.values())
        + "</tr>"
        for part, summary in report["lengths"].items()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _examples(report: dict[str, Any]) -> str:
    parts = []
    for name, shown in report["examples"].items():
        texts = "".join(
            f"<p class=quiet>row {each['row']}</p><pre>{escape(each['text'])}</pre>"
            for each in shown
        )
        parts.append(f"<details><summary>{name}</summary>{texts}</details>")
    return "".join(parts) or "<p>Nothing to show.</p>"


def _plots(report: dict[str, Any], found: Findings) -> str:
    if not found.lengths:
        return ""
    lengths = {name: np.array(values) for name, values in found.lengths.items()}
    pairs = "rejected" in lengths
    figure, axes = new_figure(3 if pairs else 2)
    whole = lengths["longest"] if "longest" in lengths else lengths["document"]
    _plot_whole(axes[0], whole, report)
    parts = {name: values for name, values in lengths.items() if name != "longest"}
    _plot_parts(axes[1], parts, report["unit"])
    if pairs:
        _plot_bias(axes[2], lengths["chosen"] - lengths["rejected"], report["unit"])
    data = base64.b64encode(png(figure)).decode()
    return f'<img alt="Histograms of lengths" src="data:image/png;base64,{data}">'


def _plot_whole(axis: Axes, values: Any, report: dict[str, Any]) -> None:
    limit = report["max_length"]
    over = float((values > limit).mean())
    top = max(float(np.percentile(values, 99.5)), limit * 1.1)
    axis.hist(values, bins=50, range=(0, top), color=COLORS[0])
    axis.axvline(limit, color=COLORS[1], label=f"max_length: {over:.1%} beyond")
    what = "documents" if report["kind"] == "text" else "prompt + longest answer"
    axis.set(title=what, xlabel=report["unit"], ylabel="rows")
    axis.legend()


def _plot_parts(axis: Axes, parts: dict[str, Any], unit: str) -> None:
    for color, (name, values) in zip(COLORS, parts.items(), strict=False):
        ordered = np.sort(values)
        axis.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=color, label=name)
    axis.set_xscale("log")
    axis.set(title="share of rows up to a length", xlabel=unit, ylim=(0, 1))
    axis.legend()


def _plot_bias(axis: Axes, difference: Any, unit: str) -> None:
    reach = max(1.0, float(np.percentile(np.abs(difference), 99)))
    axis.hist(difference, bins=61, range=(-reach, reach), color=COLORS[2])
    axis.axvline(0, color="black", linewidth=1)
    mean = float(difference.mean())
    axis.axvline(mean, color=COLORS[1], label=f"mean {mean:+.1f}")
    axis.set(title="chosen − rejected", xlabel=unit, ylabel="rows")
    axis.legend()
