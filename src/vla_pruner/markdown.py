"""Tables as Markdown, in which results are kept and documents quote them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str | None], rows: Iterable[Sequence[str | None]], *, numbers: bool = False) -> str:
    """Return a whole table, without a line break at its end.

    Args:
        heads: of the columns; None: the column has no head.
        rows: the cells of each row; one that is shorter than the head ends in empty cells.
        numbers: whether all columns but the first are aligned to the right.

    Raises:
        ValueError: a row has more cells than there are columns.
    """
    return "\n".join([head(heads, numbers=numbers), *(row(cells, len(heads)) for cells in rows)])


def head(heads: Sequence[str | None], *, numbers: bool = False) -> str:
    """Return the two lines above the rows; arguments as of `table`."""
    return f"{row(heads)}\n|---|" + ("---:|" if numbers else "---|") * (len(heads) - 1)


def row(cells: Sequence[str | None], columns: int | None = None) -> str:
    """Return one line of a table, for those that print a row as soon as it is measured.

    Args:
        cells: from left to right; None is a cell without content. Text can neither end its cell nor its line.
        columns: the number of cells to fill up to, if they are fewer.

    Raises:
        ValueError: they are more.
    """
    missing = 0 if columns is None else columns - len(cells)
    if missing < 0:
        raise ValueError(f"a row of {len(cells)} cells does not fit into {columns} columns: {list(cells)}")
    return "|" + "".join(" |" if cell is None else f" {_inside(cell)} |" for cell in [*cells, *[None] * missing])


def _inside(cell: str) -> str:
    return " ".join(cell.splitlines()).replace("|", r"\|")
