(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const PACE = 220, REST = 6; // milliseconds a control step; steps that the end of a looping episode is shown for
  const cells = data.grid * data.grid, tokens = cells * data.cameras, size = data.frame_size;

  function load(arm, then) {
    return arm.frames.map((frame) => {
      const image = new Image(); image.onload = then; image.src = "data:image/jpeg;base64," + frame; return image;
    });
  }

  function paint(canvas, arm, images, now, dim) {
    const last = images.length - 1, index = Math.min(now, last), image = images[index];
    if (!image.complete) return "";
    const pen = canvas.getContext("2d"), cell = size / data.grid;
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const kept = index < last ? arm.kept[index] : null;
    canvas.dataset.dimmed = kept && dim ? tokens - kept.length : 0;
    if (kept && dim) {
      const stays = new Set(kept);
      pen.fillStyle = arm.pruned === "freeze" ? "rgba(40, 90, 190, .62)" : "rgba(8, 10, 16, .78)";
      for (let id = 0; id < tokens; id++) {
        const place = id % cells, left = Math.floor(id / cells) * size;
        if (!stays.has(id)) pen.fillRect(left + (place % data.grid) * cell, Math.floor(place / data.grid) * cell, cell, cell);
      }
    }
    if (index === last) return (arm.success ? "solved" : "not solved") + " after " + last + " steps";
    if (kept) return kept.length + " of " + tokens + " tokens " + (arm.pruned === "freeze" ? "live" : "kept");
    return arm.pruned ? "not pruned in this step" : "all " + tokens + " tokens";
  }

  function fit(canvas) { canvas.width = size * data.cameras; canvas.height = size; canvas.setAttribute("role", "img"); }

  if (!data.units.length) {
    get("hero-figure").hidden = true; get("films").textContent = "No episode was recorded.";
    return;
  }

  (() => { // the picture at the top
    const unit = data.units[0], arm = unit.arms[data.hero], canvas = get("hero"), button = get("hero-play");
    let now = 0, timer = null;
    const images = load(arm, draw), last = images.length - 1;
    fit(canvas);
    canvas.setAttribute("aria-label", unit.task + ", " + arm.title + ": what the policy sees, pruned patches dimmed");
    function draw() {
      const said = paint(canvas, arm, images, now, true);
      canvas.dataset.step = Math.min(now, last);
      if (said) get("hero-told").textContent = unit.task + ", " + arm.title + ", step " + Math.min(now, last) + ": " + said + ".";
    }
    function play() {
      timer = setInterval(() => { now = now >= last + REST ? 0 : now + 1; draw(); }, PACE);
      button.textContent = "Pause"; button.setAttribute("aria-label", "Pause the picture");
    }
    function stop() {
      clearInterval(timer); timer = null;
      button.textContent = "Play"; button.setAttribute("aria-label", "Play the picture");
    }
    button.onclick = () => (timer ? stop() : play());
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) { now = Math.min(5, last); stop(); draw(); } else play();
  })();

  const task = get("task"), step = get("step"), films = get("films"), where = get("where"), play = get("play"), dim = get("dim");
  let shown = [], timer = null;
  data.units.forEach((unit, index) => task.add(new Option(unit.task + ", seed " + unit.seed, index)));

  function open() {
    const unit = data.units[task.value];
    films.replaceChildren();
    shown = unit.arms.map((arm) => {
      const film = document.createElement("div"), title = document.createElement("h3");
      const canvas = document.createElement("canvas"), note = document.createElement("p");
      film.className = "film"; title.textContent = arm.title;
      fit(canvas);
      film.append(title, canvas, note); films.append(film);
      return { arm, canvas, note, images: load(arm, draw) };
    });
    step.max = Math.max(...unit.arms.map((arm) => arm.frames.length)) - 1;
    step.value = Math.min(5, step.max);
    draw();
  }

  function draw() {
    const now = Number(step.value);
    where.textContent = "step " + now + " of " + step.max;
    step.setAttribute("aria-valuetext", where.textContent);
    for (const { arm, canvas, note, images } of shown) {
      const said = paint(canvas, arm, images, now, dim.checked);
      if (!said) continue;
      canvas.setAttribute("aria-label", arm.title + ", " + where.textContent + ": " + said);
      note.textContent = said;
      note.className = now < images.length - 1 ? "" : arm.success ? "yes" : "no";
    }
  }

  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
  play.onclick = () => {
    if (timer) return stop();
    if (Number(step.value) >= Number(step.max)) step.value = 0;
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (Number(step.value) >= Number(step.max)) return stop();
      step.value = Number(step.value) + 1; draw();
    }, PACE);
  };
  task.onchange = open; step.oninput = draw; dim.onchange = draw;
  open();
})();
