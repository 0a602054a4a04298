"""What `gkd inspect` found, for a terminal: short tables and histograms of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH = 40


def report_text(report: Mapping[str, Any]) -> str:
    """Lines about one store."""
    size = report["part_bytes"]
    lines = [
        f"{report['kind']} store {report['url']}",
        f"  fingerprint   {report['fingerprint'][:16]}, format {report['format_version']}",
        *(f"  made from     {name} {value[:16]}" for name, value in report["inputs"].items()),
        f"  parts         {report['num_parts']:,}, {size_text(report['num_bytes'])} in all; "
        f"each {' / '.join(size_text(size[name]) for name in ('min', 'median', 'max'))} (min / median / max)",
    ]
    lines += [f"  {name:<13} {_value(value)}" for name, value in report["facts"].items()]
    lines += _tensors(report["tensors"])
    for score, info in report["scores"].items():
        lines.append(f"  score {score}: {', '.join(f'{name} {_value(value)}' for name, value in info.items())}")
    for bound in report["bounds"]:
        lines.append(
            f"  bound of {bound['loss']} ({bound['score']}): argument ± {_value(bound['argument_bound'])}, "
            f"KL ≤ {_value(bound['kl_bound'])}, loss ± {_value(bound['lsp_bound'])}"
        )
    for structure in report["structure"]:
        lines += _structure(structure, report["parts_read"], report["num_parts"])
    lines += [f"  note          {note}" for note in report["notes"]]
    lines += _parts(report["parts"])
    return "\n".join(lines)


def size_text(num_bytes: float) -> str:
    """``1.5 MB``; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _value(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(_value, value)) or "none" if isinstance(value, list) else str(value)


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [[t["name"], ", ".join(t["dtypes"]), f"{t['num_elements']:,}", size_text(t["num_bytes"])] for t in tensors]
    return _table(["tensor", "dtype", "elements", "bytes"], rows)


def _parts(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    if not parts:
        return []
    names = list(parts[0]["counts"])
    rows = [
        [str(p["part"]), p["key"], size_text(p["num_bytes"]), *(f"{p['counts'].get(n, 0):,}" for n in names)]
        for p in parts
    ]
    return _table(["part", "object", "bytes", *names], rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    text = head[:2]
    return [
        "  " + "  ".join(
            f"{cell:<{width}}" if head[column] in text else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]  # fmt: skip


def _structure(found: Mapping[str, Any], parts_read: int, num_parts: int) -> list[str]:
    term = "plain softmax of scores" if found["loss"] == "none" else f"loss {found['loss']}"
    width = "" if found["sigma"] is None else f", sigma {_value(found['sigma'])}"
    sample = "" if parts_read == num_parts else f", {parts_read:,} of {num_parts:,} parts"
    head = [
        f"  {term} ({found['score']}, {found['kernel']}{width}{sample}): {found['num_nodes']:,} nodes with neighbours",
        f"    cut edges           {_percent(found['cut_fraction'])}",
        f"    lost teacher mass   {_percent(found['lost_mass'])}",
        f"    entropy             mean {_value(found['mean_entropy'])} nats",
    ]
    step, counts = found["entropy"]["bin_nats"], found["entropy"]["counts"]
    head += _histogram([f"{i * step:.2f} to {(i + 1) * step:.2f}" for i in range(len(counts))], counts)
    bins, shares = found["entropy_share"]["bins"], found["entropy_share"]["counts"]
    if any(shares):
        head.append("    entropy / log(number of neighbours), nodes with two or more")
        head += _histogram([f"{i / bins:.2f} to {(i + 1) / bins:.2f}" for i in range(bins)], shares)
    return head


def _histogram(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return []
    largest, span = max(counts), range(filled[0], filled[-1] + 1)
    return [f"      {names[i]}  {'#' * -(-_WIDTH * counts[i] // largest):<{_WIDTH}}  {counts[i]:,}" for i in span]


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2%}"
