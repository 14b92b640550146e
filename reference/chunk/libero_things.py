"""The things of LIBERO-Object, by the names of its scenes."""

from __future__ import annotations

THINGS = (
    "alphabet_soup", "bbq_sauce", "butter", "chocolate_pudding", "cream_cheese", "ketchup", "milk", "orange_juice",
    "salad_dressing", "tomato_sauce", "basket",
)  # fmt: skip
"""What the encoder marks; all but the basket are what a task may be about."""

TASKS = (
    "alphabet_soup", "cream_cheese", "salad_dressing", "bbq_sauce", "ketchup", "tomato_sauce", "butter", "milk",
    "chocolate_pudding", "orange_juice",
)  # fmt: skip
"""What each of LIBERO-Object's ten tasks is about, in its order."""


def instruction(thing: str) -> str:
    """ "bbq_sauce" -> LIBERO-Object's instruction for it."""
    return f"pick up the {thing.replace('_', ' ')} and place it in the basket"
