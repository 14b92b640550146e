"""The picture of README.md and of the documentation's first page.

    python -m benchmarks.picture                       # runs one demo episode of a task, then draws
    python -m benchmarks.picture --report report.html  # draws from a report that `vla-pruner demo` wrote

The demo's report draws what the cameras see and what was pruned, in Chromium; the times are those of the committed
run, benchmarks/results/demo/results.json. Needs Meta-World (without --report), Pillow, selenium and Chromium with its
driver. Writes docs/assets/step.webp, and beside it the times that it shows (step.json).
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vla_pruner.demo.table import labels
from vla_pruner.report.page import source
from vla_pruner.timing import STAGES

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "assets" / "step.webp"
RUN = ROOT / "benchmarks" / "results" / "demo" / "results.json"
LARGEST = 300_000
"""Bytes of the picture."""
WIDTH = 920
SHOWN = ("unpruned", "recommended")

_PAGE = Template("""<!doctype html><meta charset="utf-8"><style>
$style
:root { color-scheme: light; --vision: #7a8ca8; --prefill: #2f6fde; --pruning: #e0853a; --decode: #3aa58b;
  --other: #c3cad6; }
body { width: ${width}px; max-width: none; padding: 18px 20px 14px; background: #fff; }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
h2 { font-size: 17px; margin: 0 0 8px; } h2 span { font-weight: 400; color: var(--soft); }
img { width: 100%; display: block; border-radius: 6px; }
.row { display: grid; grid-template-columns: 1fr max-content; gap: 10px; align-items: center; margin-top: 10px; }
.bar { display: flex; height: 18px; border-radius: 3px; overflow: hidden; } .bar i { display: block; height: 100%; }
.ms { font-weight: 600; font-variant-numeric: tabular-nums; }
.key { display: flex; gap: 6px 18px; flex-wrap: wrap; margin-top: 12px; font-size: 13px; color: var(--soft); }
.key b { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.vision { background: var(--vision); } .prefill { background: var(--prefill); } .pruning { background: var(--pruning); }
.decode { background: var(--decode); } .other { background: var(--other); } .frozen { background: rgb(40, 90, 190); }
</style><div class="both">$cards</div><div class="key">$key</div>""")

_PICTURE = """
const data = JSON.parse(document.getElementById("data").textContent), [unit, arm, step] = arguments;
const task = document.getElementById("task"), slider = document.getElementById("step");
task.value = unit; task.onchange(); slider.value = step; slider.oninput();
const film = document.querySelectorAll("#films .film")[arm];
return [film.querySelector("canvas").toDataURL("image/png"), film.querySelector("p").textContent];
"""


def write_picture(report: Path, results: Path, out: Path, task: str | None = None, step: int = 5) -> None:
    """Draw the picture.

    Args:
        report: what `vla-pruner demo` wrote, with its player.
        results: the results.json whose times are shown.
        task: of the report; None: the first that the report plays.
        step: a control step in which the pruned arm prunes.

    Raises:
        SystemExit: the report has no such task or step, or the picture is too large.
    """
    run = json.loads(results.read_text(encoding="utf-8"))
    arms = {arm["arm"]: arm for arm in run["arms"]}
    words = labels(run.get("compiled") is not None)
    with tempfile.TemporaryDirectory() as profile, _chromium(profile) as driver:
        driver.get(report.resolve().as_uri())
        data = json.loads(driver.execute_script('return document.getElementById("data").textContent'))
        tasks = [unit["task"] for unit in data["units"]]
        if task is not None and task not in tasks:
            raise SystemExit(f"The report plays {', '.join(tasks)}; --task {task} is none of them.")
        unit = 0 if task is None else tasks.index(task)
        kept = data["units"][unit]["arms"][data["hero"]]["kept"]
        if step >= len(kept) or kept[step] is None:
            raise SystemExit(f"Step {step} of {tasks[unit]} was not pruned; the steps from 0 are {len(kept)}.")
        _wait(driver, unit, step)
        cards = []
        longest = max(_pruned(arms[key])["p50"] for key in SHOWN)
        for key, column in zip(SHOWN, (0, data["hero"]), strict=True):
            picture, said = driver.execute_script(_PICTURE, unit, column, step)
            cards.append(_card(arms[key], picture, said, longest))
        page = Path(profile) / "picture.html"
        drawn = _PAGE.substitute(style=source("base.css"), width=WIDTH, cards="".join(cards), key=_key(arms, words))
        page.write_text(drawn, encoding="utf-8")
        driver.get(page.as_uri())
        shot = driver.find_element("tag name", "body").screenshot_as_png
    _save(shot, out)
    shown = {key: round(_pruned(arms[key])["p50"], 1) for key in SHOWN}
    out.with_suffix(".json").write_text(json.dumps({"milliseconds": shown}) + "\n", encoding="utf-8")


def _pruned(arm: dict[str, Any]) -> dict[str, Any]:
    return arm["milliseconds_pruned_steps"] if arm["method"] else arm["milliseconds_all_steps"]


def _card(arm: dict[str, Any], picture: str, said: str, longest: float) -> str:
    times = _pruned(arm)
    pieces = "".join(
        f'<i class="{stage}" style="width:{100 * times["stages"][stage] / longest:.2f}%"></i>' for stage in STAGES
    )
    title = arm["title"].split(" (")[0]
    return (
        f'<div><h2>{escape(title)} <span>· {escape(said)}</span></h2><img src="{picture}">'
        f'<div class="row"><div class="bar">{pieces}</div><span class="ms">{times["p50"]:.1f} ms a step</span></div>'
        "</div>"
    )


def _key(arms: dict[str, Any], words: dict[str, str]) -> str:
    used = [stage for stage in STAGES if any(_pruned(arms[key])["stages"][stage] >= 0.05 for key in SHOWN)]
    parts = [f'<span><b class="{stage}"></b>{escape(words[stage])}</span>' for stage in used]
    return '<span><b class="frozen"></b>frozen patch: readable, no longer computed</span>' + "".join(parts)


def _wait(driver: Any, unit: int, step: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    drawn = "return [...document.querySelectorAll('#films p')].every((one) => one.textContent)"
    driver.execute_script(_PICTURE, unit, 0, step)
    WebDriverWait(driver, 20).until(lambda one: one.execute_script(drawn))


def _chromium(profile: str) -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--force-device-scale-factor=1.5", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--window-size={WIDTH + 60},700")
    options.add_argument(f"--user-data-dir={profile}")
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def _save(png: bytes, out: Path) -> None:
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").save(out, format="WEBP", quality=82, method=6)
    size = out.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{out} has {size:,} bytes, and at most {LARGEST:,} are meant.")
    print(f"{out}: {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--report", type=Path, help="a report of `vla-pruner demo` (default: one episode is run)")
    parser.add_argument("--results", type=Path, default=RUN, help="whose times are shown (default: %(default)s)")
    parser.add_argument("--task", default="push", help="the task that is shown (default: %(default)s)")
    parser.add_argument("--step", type=int, default=6, help="its control step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="(default: %(default)s)")
    asked = parser.parse_args()
    if asked.report is not None:
        write_picture(asked.report, asked.results, asked.out, asked.task, asked.step)
        return
    from rich.console import Console

    from vla_pruner.demo import DemoSettings, run_demo

    with tempfile.TemporaryDirectory() as folder:
        run_demo(
            DemoSettings(tasks=(asked.task,), episodes=1, out=Path(folder), compile=False), Console(highlight=False)
        )
        write_picture(Path(folder) / "report.html", asked.results, asked.out, asked.task, asked.step)


if __name__ == "__main__":
    main()
