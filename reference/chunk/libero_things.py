"""The things of LIBERO-Object, by the names of its scenes."""

from __future__ import annotations

THINGS = (
    "alphabet_soup", "bbq_sauce", "butter", "chocolate_pudding", "cream_cheese", "ketchup", "milk", "orange_juice",
    "salad_dressing", "tomato_sauce", "basket",
)  # fmt: skip
"""The things that the encoder marks; a task may be about any of them but the basket."""

TASKS = (
    "alphabet_soup", "cream_cheese", "salad_dressing", "bbq_sauce", "ketchup", "tomato_sauce", "butter", "milk",
    "chocolate_pudding", "orange_juice",
)  # fmt: skip
"""The thing of each of LIBERO-Object's ten tasks, in its order."""


def instruction(thing: str) -> str:
    """ "bbq_sauce" -> LIBERO-Object's instruction for it."""
    return f"pick up the {thing.replace('_', ' ')} and place it in the basket"
