"""CSV files."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.data import Dataset, scaled, split
from mpicoll.train.errors import InputError
from mpicoll.train.readers.files import unzipped

AnyArray = npt.NDArray[Any]
DELIMITERS = ",;\t"


def read_csv(path: Path, label: str | None, regression: bool, seed: int) -> Dataset:
    """A table of numbers with one sample per line, separated by comma, semicolon or tab; a gzipped one too.

    ``label`` is the column to predict, by its number from 1 or its name; None: the last. A first line that
    names it, or has no number in the other columns, is a header. Classes may have any names and are numbered
    in sorted order. In regression the values to predict are standardised like the features, so that a mean
    squared error of 1 is that of always predicting the mean.
    """
    lines = _table(path)
    first = [cell.strip() for cell in lines[0][1]]
    column = _column(path, first, label)
    features = [j for j in range(len(first)) if j != column]
    has_header = first[column] == label or not any(_is_number(first[j]) for j in features)
    rows = lines[has_header:]
    if len(rows) < 2:
        raise InputError(f"{path}: expected at least 2 lines with samples, found {len(rows)}")

    x = _numbers(path, rows, features)
    if regression:
        y = _numbers(path, rows, [column])
        return scaled(split(f"csv:{path}", 0, x, y, seed), axis=0)
    y, classes = _class_numbers(path, rows, column)
    return scaled(split(f"csv:{path}", classes, x, y, seed), axis=0)


Line = tuple[int, list[str]]  # the line's number in the file, from 1, and its cells


def _table(path: Path) -> list[Line]:
    """The lines that are not empty; all have the same number of cells, at least 2."""
    try:
        text = unzipped(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a CSV file, which is text in UTF-8, but: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: expected a CSV file, found it empty")
    if "\0" in text:
        raise InputError(f"{path}: expected a CSV file, which is text, found bytes of zero")

    text_lines = text.splitlines()
    first = next(line for line in text_lines if line.strip())
    reader = csv.reader(text_lines, delimiter=max(DELIMITERS, key=first.count), strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}: expected a CSV file, but line {reader.line_num}: {error}") from error
    if not lines:
        raise InputError(f"{path}: expected a CSV file, found only empty cells")

    width = len(lines[0][1])
    if width < 2:
        raise InputError(
            f"{path}: expected the label and at least one more column, "
            f"separated by comma, semicolon or tab, found one column"
        )
    for number, row in lines:
        if len(row) != width:
            raise InputError(
                f"{path}: expected {width} columns as in line {lines[0][0]}, line {number} has {len(row)}"
            )
    return lines


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _column(path: Path, first: list[str], label: str | None) -> int:
    """The label's column, from 0."""
    if label is None:
        return len(first) - 1
    if label.isdecimal() and 1 <= int(label) <= len(first):
        return int(label) - 1
    if label in first:
        return first.index(label)
    raise InputError(
        f"{path}: expected --label to be a column, by number from 1 to {len(first)} or by name, "
        f"found {label!r}; the first line is: {', '.join(first)}"
    )


def _numbers(path: Path, rows: list[Line], columns: list[int]) -> AnyArray:
    """These columns as float64 [rows, columns]."""
    try:
        values = np.array([[float(row[j]) for j in columns] for _, row in rows])
    except ValueError:
        values = np.array([np.nan])
    if np.isfinite(values).all():
        return values
    for number, row in rows:
        for j in columns:
            if not _is_number(row[j]) or not math.isfinite(float(row[j])):
                raise InputError(
                    f"{path}: expected a finite number in line {number}, column {j + 1}, found {row[j]!r}"
                )
    raise AssertionError("a cell that is no finite number must have been found")


def _class_numbers(path: Path, rows: list[Line], column: int) -> tuple[AnyArray, int]:
    """The label of each row as a number from 0, and how many classes there are."""
    labels = [row[column].strip() for _, row in rows]
    if "" in labels:
        number = rows[labels.index("")][0]
        raise InputError(f"{path}: expected a label in line {number}, column {column + 1}, found it empty")
    names, y = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"{path}: expected at least 2 classes, found one, {labels[0]!r}; see --label")
    if len(names) == len(labels) > 2:
        raise InputError(
            f"{path}: expected classes, but all {len(labels)} labels differ; "
            f"for values to predict use --task regression, for another column --label"
        )
    return y.astype(np.int64), len(names)
