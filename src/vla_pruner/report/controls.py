"""The controls' results: a card each for the noise floor, random choice and blank images."""

from __future__ import annotations

from vla_pruner.evaluation.verdict import blank_image, noise_floor
from vla_pruner.report.results import Results
from vla_pruner.report.svg import Markup, element
from vla_pruner.wording import counted

_NONE = "-"


def controls(results: Results) -> Markup:
    """Return a card each for noise floor, random choice and blank images, with the fix if one was left out."""
    summary = results.summary
    cards = []
    again = noise_floor(summary)
    if again:
        arm = summary.of("again")[0]
        assert arm.difference is not None
        share = f"{arm.difference.gained + arm.difference.lost} of {arm.difference.pairs}"
        cards.append(_card("Noise floor", share, again[0].removeprefix("Noise floor: ").capitalize()))
    elif summary.of("again"):
        cards.append(_card("Noise floor", _NONE, "No pair of unpruned episodes is finished yet."))
    else:
        cards.append(_card("Noise floor", _NONE, "Not run: --controls again runs the unpruned policy twice."))
    if results.methods:
        cards.append(_random_card(results))
        blank = blank_image(summary)
        if blank:
            rate = summary.of("blank")[0].success
            cards.append(_card("Blank image", f"{100 * rate.value:.0f} % solved", blank[0]))
        elif summary.of("blank"):
            cards.append(_card("Blank image", _NONE, "No pair with blank images is finished yet."))
        else:
            cards.append(
                _card("Blank image", _NONE, "Not run: --controls blank shows whether the policy needs to see.")
            )
    return element("div", *cards, class_="cards")


def _random_card(results: Results) -> Markup:
    compared = [arm.against_random for arm in results.methods if arm.against_random and arm.against_random.pairs]
    if not compared and results.random_of:
        return _card("Random choice", _NONE, "No pair with tokens drawn at random is finished yet.")
    if not compared:
        return _card("Random choice", _NONE, "Not run: --controls random draws as many tokens: is choosing worth it?")
    beats = sum(one.low > 0 for one in compared)
    loses = sum(one.high < 0 for one in compared)
    rest = len(compared) - beats - loses
    said = [f"Choosing beats drawing as many tokens at random in {beats} of {counted(len(compared), 'arm')}"]
    if rest:
        said.append(f"in {rest} neither is shown")
    if loses:
        said.append(f"in {loses} drawing did better")
    unpaired = len(results.random_of) - len(compared)
    if unpaired:
        said.append(f"{counted(unpaired, 'more arm')} without a finished pair")
    return _card(
        "Random choice", f"{beats} of {len(compared)}", "; ".join(said) + " (95 % intervals of pairs, each as one)."
    )


def _card(title: str, figure: str, text: str) -> Markup:
    return element("div", element("h3", title), element("b", figure), element("p", text), class_="card")
