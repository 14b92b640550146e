(() => {
  "use strict";
  const films = JSON.parse(document.getElementById("films-data").textContent);
  const get = (id) => document.getElementById(id);
  if (!films.length) return;
  const film = get("film"), arm = get("film-arm"), slider = get("film-step"), play = get("film-play"), dim = get("film-dim");
  const where = get("film-where"), panels = get("film-panels"), told = get("film-told"), chart = get("film-chart");
  const PACE = 260, CELL = 14; // milliseconds a step; canvas pixels a patch
  const SCALE = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]; // viridis
  const BOTH = "#ffffff", SEMANTIC = "#e69f00", ACTION = "#3b8ee0";
  let timer = null, now = 0, shown = null, views = [];

  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const unpack = (text, total) => {
    const packed = bytes(text);
    return Array.from({ length: total }, (_, id) => Boolean((packed[id >> 3] >> (id & 7)) & 1));
  };
  const colour = (share) => {
    const place = share * (SCALE.length - 1), low = Math.min(Math.floor(place), SCALE.length - 2), rest = place - low;
    return SCALE[low].map((value, channel) => Math.round(value + rest * (SCALE[low + 1][channel] - value)));
  };
  const make = (tag, text, kind) => {
    const one = document.createElement(tag);
    if (text) one.textContent = text;
    if (kind) one.className = kind;
    return one;
  };
  const picture = (frame) => {
    const image = new Image();
    image.onload = () => draw();
    image.src = "data:image/jpeg;base64," + frame;
    return image;
  };

  /** A canvas with a caption; `paint(pen, canvas, step)` draws a control step. */
  function view(box, title, kind, paint) {
    const figure = make("figure", "", "panel"), canvas = make("canvas"), note = make("small");
    figure.append(make("figcaption", title), canvas, note);
    canvas.dataset.panel = kind;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title);
    box.append(figure);
    views.push((step) => { note.textContent = paint(canvas.getContext("2d"), canvas, step) || ""; canvas.dataset.step = step; });
  }

  function cells(grid, each) {
    const [first, rows, columns] = grid;
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) each(first + row * columns + column, row, column);
  }

  function photograph(pen, canvas, images, step) {
    const image = images[Math.min(step, images.length - 1)];
    if (!image.complete || !image.naturalWidth) return false;
    if (canvas.width !== 2 * image.naturalWidth || canvas.height !== 2 * image.naturalHeight) {
      canvas.width = 2 * image.naturalWidth;
      canvas.height = 2 * image.naturalHeight;
    }
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    return true;
  }

  function photo(box, title, one, camera, images, kind) {
    view(box, title, kind, (pen, canvas, step) => {
      const at = Math.min(step, one.steps.length - 1);
      if (!photograph(pen, canvas, images, at)) return "";
      let dropped = 0;
      if (one.kept && one.pruned[at] && camera.grid) {
        const kept = one.keptAt(at), [, rows, columns] = camera.grid, width = canvas.width / columns, height = canvas.height / rows;
        cells(camera.grid, (id, row, column) => {
          if (kept[id]) return;
          dropped++;
          if (!dim.checked) return;
          pen.fillStyle = one.fate === "freeze" || one.fate === "reuse" ? "rgba(20, 60, 150, .66)" : "rgba(8, 10, 16, .8)";
          pen.fillRect(Math.round(column * width), Math.round(row * height), Math.ceil(width), Math.ceil(height));
        });
      }
      canvas.dataset.dropped = dropped;
      if (step >= one.steps.length) return (one.success ? "solved" : "not solved") + " after " + one.actions + " actions";
      if (!one.kept) return "all tokens";
      if (!one.pruned[at]) return "not pruned in this step";
      const all = camera.grid ? camera.grid[1] * camera.grid[2] : one.total;
      return all - dropped + " of " + all + (one.fate === "drop" ? " tokens kept" : " tokens live");
    });
  }

  function heat(box, title, one, camera, name) {
    view(box, title, name, (pen, canvas, step) => {
      const [, rows, columns] = camera.grid, at = Math.min(step, one.steps.length - 1), text = one.maps[name][at];
      canvas.width = columns * CELL;
      canvas.height = rows * CELL;
      if (!text) return "no map in this step";
      const scores = bytes(text), kept = name === "action" && one.fate === "drop" && one.pruned[at] ? one.keptAt(at) : null;
      const top = one.maps["top_" + name][at] && unpack(one.maps["top_" + name][at], one.total);
      cells(camera.grid, (id, row, column) => {
        const x = column * CELL, y = row * CELL;
        pen.fillStyle = kept && !kept[id] ? "#777f8c" : "rgb(" + colour(scores[id] / 255).join() + ")";
        pen.fillRect(x, y, CELL, CELL);
        if (top && top[id]) { pen.strokeStyle = "#fff"; pen.lineWidth = 1.4; pen.strokeRect(x + 1.5, y + 1.5, CELL - 3, CELL - 3); }
      });
      return kept ? "grey: dropped, no action token reads it" : top ? "outlined: the " + one.maps.k + " highest" + (one.cameras.length > 1 ? " of all cameras" : "") : "";
    });
  }

  function agreement(box, title, one, camera, images) {
    view(box, title, "agreement", (pen, canvas, step) => {
      const at = Math.min(step, one.steps.length - 1);
      if (!photograph(pen, canvas, images, at)) return "";
      pen.fillStyle = "rgba(8, 10, 16, .72)";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      const semantic = one.maps.top_semantic[at], action = one.maps.top_action[at];
      if (!semantic || !action) return "no maps in this step";
      const first = unpack(semantic, one.total), second = unpack(action, one.total);
      const [, rows, columns] = camera.grid, width = canvas.width / columns, height = canvas.height / rows;
      cells(camera.grid, (id, row, column) => {
        if (!first[id] && !second[id]) return;
        pen.fillStyle = first[id] && second[id] ? BOTH : first[id] ? SEMANTIC : ACTION;
        pen.globalAlpha = 0.78;
        pen.fillRect(column * width + 1, row * height + 1, width - 2, height - 2);
        pen.globalAlpha = 1;
      });
      if (one.maps.agree[at] === null) return "";
      const share = Math.round(100 * one.maps.agree[at]) + " % ";
      return share + (one.fate === "drop" && one.pruned[at] ? "of what was kept is among the highest of the semantic map" : "of the k highest are in both");
    });
  }

  function prepare(one) {
    if (one.ready) return;
    one.ready = true;
    const unpacked = [];
    one.keptAt = (at) => (unpacked[at] ||= unpack(one.kept[at], one.total));
    one.cameras.forEach((camera) => { camera.images = camera.frames.map(picture); });
  }

  function load() {
    stop();
    const of = films[film.value], keep = arm.selectedIndex;
    arm.replaceChildren(...of.arms.map((one, place) => new Option(one.title + (one.success ? " (solved)" : " (not solved)"), place)));
    const first = of.arms.findIndex((one) => one.kept);
    arm.value = keep > 0 && keep < of.arms.length ? keep : Math.max(0, first);
    build();
  }

  function build() {
    const of = films[film.value], base = of.arms[0], one = of.arms[arm.value];
    shown = one;
    views = [];
    panels.replaceChildren();
    prepare(base);
    prepare(one);
    one.cameras.forEach((camera, place) => {
      const row = make("div", "", "panel-row"), name = one.cameras.length > 1 ? camera.name + ": " : "";
      panels.append(row);
      if (base !== one && base.cameras[place]) photo(row, name + base.title, base, base.cameras[place], base.cameras[place].images, "base");
      photo(row, name + one.title, one, camera, camera.images, "arm");
      if (!one.maps || !camera.grid) return;
      heat(row, "semantic score", one, camera, "semantic");
      if (one.maps.action.some(Boolean)) {
        heat(row, "action score", one, camera, "action");
        agreement(row, "the " + one.maps.k + " highest of both maps", one, camera, camera.images);
      }
    });
    const ended = (each) => each.title + (each.success ? " solved it" : " did not solve it") + (each.actions === null ? "" : " (" + each.actions + " actions)");
    told.textContent = "“" + of.instruction + "”: " + (base === one ? [base] : [base, one]).map(ended).join(", ") + ".";
    slider.max = Math.max(base.steps.length, one.steps.length); // the last place shows how it ended
    const pruned = one.pruned.indexOf(true);
    slider.value = Math.min(pruned < 0 ? 0 : pruned, slider.max);
    course();
    draw();
  }

  /** The overlap of this episode over time, with a line at the control step that is shown. */
  function course() {
    const SPACE = "http://www.w3.org/2000/svg", height = 150, left = 44, right = 10, top = 10, bottom = 34;
    const add = (tag, attributes, text) => {
      const one = document.createElementNS(SPACE, tag);
      for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
      if (text !== undefined) one.textContent = text;
      chart.append(one);
    };
    const maps = shown.maps, count = Number(slider.max), has = maps && [...maps.agree, ...maps.before].some((value) => value !== null);
    get("film-chart-box").hidden = !has;
    if (!has) return;
    const width = Math.max(300, chart.clientWidth || 900);
    chart.replaceChildren();
    chart.setAttribute("viewBox", "0 0 " + width + " " + height);
    get("film-drops").hidden = shown.fate !== "drop";
    const x = (step) => left + (width - left - right) * (step / Math.max(1, count)), y = (share) => top + (height - top - bottom) * (1 - share);
    for (const share of [0, 0.5, 1]) {
      add("line", { x1: left, x2: width - right, y1: y(share), y2: y(share), class: "grid" });
      add("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, String(100 * share));
    }
    add("line", { x1: left, x2: width - right, y1: y(maps.chance), y2: y(maps.chance), class: "reference blank" });
    for (const [name, values] of [["semantic", maps.agree], ["action", maps.before]]) {
      let path = "", drawing = false;
      values.forEach((value, step) => {
        if (value === null) { drawing = false; return; }
        path += (drawing ? "L" : "M") + x(step).toFixed(1) + " " + y(value).toFixed(1);
        drawing = true;
      });
      add("path", { d: path, class: "course " + name });
      values.forEach((value, step) => { if (value !== null) add("circle", { cx: x(step), cy: y(value), r: 2.4, class: "dot " + name }); });
    }
    add("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle", class: "title" }, "control step");
    const every = Math.ceil(count / (width < 500 ? 6 : 12));
    shown.steps.forEach((step, place) => { if (place % every === 0) add("text", { x: x(place), y: height - 19, "text-anchor": "middle" }, String(step)); });
    const turned = "translate(11 " + y(0.5) + ") rotate(-90)";
    add("text", { transform: turned, "text-anchor": "middle", class: "title" }, "overlap, %");
    add("line", { id: "film-cursor", y1: top - 4, y2: height - bottom, class: "cursor" });
    chart.dataset.left = x(0);
    chart.dataset.step = x(1) - x(0);
  }

  function draw() {
    now = Number(slider.value);
    const steps = shown.steps, over = now >= steps.length;
    where.textContent = over ? "after its last control step" : "control step " + steps[now] + " of " + steps[steps.length - 1];
    slider.setAttribute("aria-valuetext", where.textContent);
    views.forEach((one) => one(now));
    const cursor = get("film-cursor");
    if (cursor) {
      const x = Number(chart.dataset.left) + now * Number(chart.dataset.step);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
  }

  function move(to) {
    slider.value = Math.max(0, Math.min(Number(slider.max), to));
    draw();
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function toggle() {
    if (timer) return stop();
    if (now >= Number(slider.max)) move(0);
    play.textContent = "Pause";
    timer = setInterval(() => { move(now + 1); if (now >= Number(slider.max)) stop(); }, PACE);
  }

  films.forEach((one, place) => film.add(new Option(one.title, place)));
  film.onchange = load;
  arm.onchange = () => { stop(); build(); };
  slider.oninput = () => { stop(); draw(); };
  dim.onchange = draw;
  play.onclick = toggle;
  addEventListener("resize", () => { course(); draw(); });
  get("films-player").addEventListener("keydown", (event) => {
    if (event.target.matches("select, input[type=checkbox]") || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: Number(slider.max) };
    if (event.key in keys) { stop(); move(keys[event.key]); }
    else if (event.key === " " && event.target !== play) toggle();
    else return;
    event.preventDefault();
  });
  load();
})();
