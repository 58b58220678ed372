"""Which files an upscale reads, and which it writes for each: known, and checked, before the first is made."""

from __future__ import annotations

import glob
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from .evaluation import pictures, stems

__all__ = ["beside", "plan"]


def plan(
    inputs: Sequence[str],
    out: Path | None,
    suffix: str,
    written: Callable[[Path], list[Path]] = lambda result: [result],
) -> list[tuple[Path, Path]]:
    """(source, result) for files, folders and patterns; written(result) are the files that a result comes with.

    A folder's pictures go to FOLDER<suffix>/NAME.png, other files to NAME<suffix>.png beside them; with `out`, all
    go to out/NAME.png, or one picture to the file `out`.

    A picture that is made of another one here was made by an earlier run, and is no source of this one, which a warning
    says; where there is an `out`, one that was asked for by its own name is.

    Raises ValueError where there is nothing, where `out` is a file for several pictures or of no format, and where a
    file would be written over a source or another result.
    """
    to_file = out is not None and _is_file(out)
    folders, files, by_name = _sources(inputs, out, suffix)

    def result_of(source: Path, name: str | Path) -> Path:
        return (out or source.parent) / f"{name}{'' if out else suffix}.png"

    made = [(source, result.with_name(f"{source.stem}.png")) for source, result in folders.items()]
    # a folder's picture may have been made alone before
    made += [(p, result_of(p, p.stem)) for p in (*files, *(folders if out is None else ()))]
    made_of: dict[Path, set[Path]] = defaultdict(set)  # a result that is or was written, less its suffix -> its sources
    for source, result in made:
        made_of[_place(result).with_suffix("")].add(source)

    def is_earlier(p: Path) -> bool:
        if out is not None and p in by_name:
            return False
        name = _place(p).with_suffix("")
        if p.suffix == ".png" and made_of[name] - {p}:
            return True
        marked = re.fullmatch(r"(.+)-(\d+|mean|std|trace)", name.name)
        if marked is None:
            return False
        base, mark = marked.groups()
        if p.suffix not in ((".png", ".gif", ".webp") if mark == "trace" else (".png",)):
            return False
        # holiday-1.png may be anybody's, where a result has no other mark
        told = out is None or mark == "trace" or p.with_name(f"{base}-mean.png").exists()
        return told and bool(made_of[name.with_name(base)] - {p})

    if earlier := sorted(p for p in (*files, *folders) if is_earlier(p)):
        more = f" and {len(earlier) - 1} more" if len(earlier) > 1 else ""
        warnings.warn(f"left out, as made by an earlier run: {earlier[0]}{more}", stacklevel=2)
    files = [p for p in files if not is_earlier(p)]
    names = stems([(out or p.parent) / p.name for p in files])
    jobs = {source: result for source, result in folders.items() if not is_earlier(source)}
    jobs |= {p: result_of(p, name.name) for p, name in zip(files, names, strict=True)}
    if not jobs:
        raise ValueError(f"nothing to enlarge: {' '.join(inputs)} has no pictures")
    if out is not None and to_file:
        if len(jobs) != 1:
            raise ValueError(f"--out {out} is one file for {len(jobs)} pictures: give a folder")
        jobs = dict.fromkeys(jobs, out)
    _check_apart(jobs, written)
    return list(jobs.items())


def _check_apart(jobs: dict[Path, Path], written: Callable[[Path], list[Path]]) -> None:
    """ValueError where a file would be written over a source, or for two of them."""
    owner = {_place(source): source for source in jobs}
    for source, result in jobs.items():
        for file in written(result):
            other = owner.setdefault(_place(file), source)
            if other != source or _place(file) == _place(source):
                raise ValueError(
                    f"{file} would be written for {source}, but is {other} or made of it: run them apart, or give "
                    "another --out"
                )


def _sources(inputs: Sequence[str], out: Path | None, suffix: str) -> tuple[dict[Path, Path], list[Path], set[Path]]:
    """Of folders, pictures and results; files, each once; and which of these were asked for by their names."""
    if not inputs or "" in inputs:
        raise ValueError("nothing to enlarge: give files, folders or patterns")
    folders: dict[Path, Path] = {}
    files: dict[Path, Path] = {}  # by their places
    by_name: set[Path] = set()
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            folder = out or path.resolve().with_name(path.resolve().name + suffix)
            folders |= {source: folder / f"{short}.png" for short, source in pictures(path).items()}
        elif path.exists():
            by_name.add(files.setdefault(_place(path), path))
        elif met := [Path(p) for p in sorted(glob.glob(name, recursive=True))]:
            for p in met:
                if p.is_file():
                    files.setdefault(_place(p), p)
        else:
            raise ValueError(f"{name}: no such file or folder")
    return folders, list(files.values()), by_name


def _place(path: Path) -> Path:
    """One for all ways to write it; a link is a file of its own."""
    return path.parent.resolve() / path.name


def _is_file(out: Path) -> bool:
    """Whether --out names a picture's file, not a folder; ValueError for a suffix that no format has."""
    if out.is_dir() or not out.suffix:
        return False
    known = sorted(suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE)
    if out.suffix.lower() not in known:
        raise ValueError(
            f"--out {out}: {out.suffix} is none of {' '.join(known)} (a folder of that name: make it first)"
        )
    return True


def beside(path: Path, word: str) -> Path:
    """NAME-word.png of NAME.png."""
    return path.with_name(f"{path.stem}-{word}{path.suffix}")
