(() => {
  "use strict";
  const get = (id) => document.getElementById(id), all = (selector, of = document) => [...of.querySelectorAll(selector)];

  // One forest plot at a time.
  const forests = all(".forest.tasks"), choice = get("forest-arm");
  if (choice) {
    const show = () => forests.forEach((one) => one.classList.toggle("shown", one.dataset.arm === choice.value));
    choice.onchange = show;
    all("[data-step]").forEach((button) => {
      button.onclick = () => {
        const count = choice.options.length;
        choice.selectedIndex = (choice.selectedIndex + Number(button.dataset.step) + count) % count;
        show();
      };
    });
    show();
  }

  // The table: sorting, folding, filtering.
  const table = get("arms-table"), filter = get("filter"), grouped = get("grouped");
  if (table) {
    const bodies = all("tbody", table);
    const home = bodies.map((body) => all("tr:not(.section)", body));
    let column = null, down = true;
    const value = (row) => {
      const cell = row.cells[column], text = cell.dataset.v;
      return text === undefined ? (column === 0 ? cell.textContent : null) : Number(text);
    };
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null); // what has no number goes last
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    };
    const arrange = () => {
      const flat = grouped && !grouped.checked, sorted = (rows) => (column === null ? rows : [...rows].sort(compare));
      table.classList.toggle("flat", Boolean(flat));
      if (flat) bodies[0].append(...sorted(home.flat()));
      else bodies.forEach((body, place) => body.append(...sorted(home[place])));
      all("thead th", table).forEach((head, place) =>
        head.setAttribute("aria-sort", place !== column ? "none" : down ? "descending" : "ascending"));
    };
    all("thead th", table).forEach((head, place) => {
      head.firstElementChild.onclick = () => {
        down = column === place ? !down : place > 0;
        column = place;
        arrange();
      };
    });
    all(".section button", table).forEach((button) => {
      button.onclick = () => {
        const folded = button.closest("tbody").classList.toggle("folded");
        button.setAttribute("aria-expanded", String(!folded));
      };
    });
    if (grouped) grouped.onchange = arrange;
    if (filter) filter.oninput = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      home.flat().forEach((row) => {
        const text = row.cells[0].textContent.toLowerCase() + " " + row.textContent.toLowerCase();
        row.classList.toggle("filtered", !words.every((word) => text.includes(word)));
      });
    };
  }

  const unfold = get("unfold");
  if (unfold) unfold.onclick = () => {
    const groups = all("details.group"), open = groups.some((one) => !one.open);
    groups.forEach((one) => { one.open = open; });
    unfold.textContent = open ? "Fold all" : "Unfold all";
  };
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("section details:not([open])");
    folded.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));
})();
