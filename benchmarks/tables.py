"""The README's tables, from benchmarks/results/*.json.

    python benchmarks/tables.py benchmarks/results/ops-cpu.json        a Markdown table of each file named
    python benchmarks/tables.py --readme README.md                     every table of the README, in place

In the README a table stands between `<!-- table: ops-cpu -->` and `<!-- end -->`; the name is the file's. It may be
narrowed: `<!-- table: ops-cpu; home = cpp | torch; show op, ms -->`. A figure that no file holds is not written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return str(value)


def columns(records: list[Record]) -> list[str]:
    """Every key, in order of first appearance; those that start with _ are for machines."""
    return list(dict.fromkeys(key for record in records for key in record if not key.startswith("_")))


def cells(records: list[Record]) -> list[list[str]]:
    keys = columns(records)
    return [[key.replace("_", " ") for key in keys]] + [[_figure(r.get(key)) for key in keys] for r in records]


def text_table(records: list[Record]) -> str:
    rows = cells(records)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown_table(records: list[Record]) -> str:
    head, *rows = cells(records)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def narrowed(records: list[Record], clauses: list[str]) -> list[Record]:
    """Records with one of the values of every `key = value | value`, and the columns of `show a, b` in that order."""
    for clause in clauses:
        if clause.startswith("show "):
            keys = [key.strip() for key in clause.removeprefix("show ").split(",")]
            records = [{key: r.get(key) for key in keys} for r in records]
        else:
            key, _, values = (part.strip() for part in clause.partition("="))
            wanted = [value.strip() for value in values.split("|")]
            records = [r for r in records if _figure(r.get(key)) in wanted]
    if not records:
        raise ValueError(f"no record is left by {clauses}")
    return records


def table(name: str, folder: Path = RESULTS) -> str:
    """The Markdown table of one results file, `name` or `name; clause; ..`, with the machine it was measured on."""
    name, *clauses = (part.strip() for part in name.split(";"))
    data = json.loads((folder / f"{name}.json").read_text())
    data["results"] = narrowed(data["results"], clauses)
    e = data["environment"]
    parts = [e["device"], f"{e['threads']} threads", f"torch {e['torch']}", f"commit {e['commit']}"]
    return markdown_table(data["results"]) + "\n\n" + ", ".join(parts) + "."


def fill(text: str, folder: Path = RESULTS) -> str:
    """`text` with every table between its marks made anew."""
    pattern = re.compile(r"(<!-- table: ([^>]+?) -->\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda m: f"{m[1]}{table(m[2], folder)}\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results files to print as Markdown")
    parser.add_argument("--readme", type=Path, help="fill this file's tables in place")
    options = parser.parse_args()
    for path in options.files:
        print(table(path.stem, path.parent), end="\n\n")
    if options.readme:
        temporary = options.readme.with_suffix(".tmp")
        temporary.write_text(fill(options.readme.read_text()))
        os.replace(temporary, options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
