// What is said of an engine beside its map: layer groups with their pages, and its requests.

const number = (value) => value.toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function groupName(facts, group) {
  const fact = facts.groups[group];
  if (!fact) return `layer group ${group}`;
  const keeps = fact.budget === null ? "keeps everything"
    : `${fact.policy}, keeps ${number(fact.budget)} entries`;
  return `layer group ${group}: ${plural(fact.layers, "layer")}, ${keeps}`;
}

function swatch(group, kind) {
  const canvas = element("canvas");
  const size = Math.round(14 * (devicePixelRatio || 1));
  canvas.width = canvas.height = size;
  canvas.style.width = canvas.style.height = "14px";
  canvas.setAttribute("aria-hidden", "true");
  drawCell(canvas.getContext("2d"), palette(), group, kind, 0, 0, size, true);
  return canvas;
}

// The legend, which also is the map in numbers.
class Legend {
  constructor(list) {
    this.list = list;
    this.numbers = new Map();
  }

  // counts: [group][kind] pages; made anew when other kinds are there, or the colors change.
  show(facts, kinds, counts, colors) {
    const every = facts.groups.map((_, group) => group);
    const shown = every.map((group) => kinds.filter((kind) => {
      if (UNGROUPED.has(kind)) return false;
      return kind !== "cached" || counts.get(`${group} cached`);
    }));
    const rest = kinds.filter((kind) => {
      return kind === "free" || (UNGROUPED.has(kind) && counts.get(kind));
    });
    const key = JSON.stringify([facts, shown, rest, colors]);
    if (key !== this.key) {
      this.key = key;
      this.numbers.clear();
      const items = every.map((group) => this.item(groupName(facts, group), group, shown[group]));
      this.list.replaceChildren(...items, this.item("no layer group’s", null, rest));
    }
    for (const [name, text] of this.numbers) text.textContent = number(counts.get(name) ?? 0);
  }

  item(title, group, kinds) {
    const item = element("li", title);
    const list = element("ul", "", "kinds");
    for (const kind of kinds) {
      const name = group === null ? kind : `${group} ${kind}`;
      const count = element("b");
      const entry = element("li");
      entry.append(swatch(group ?? 0, kind), `${NAMES[kind]} `, count);
      list.append(entry);
      this.numbers.set(name, count);
    }
    item.append(list);
    return item;
  }
}

// Rows that stay where they are while numbers change.
class Requests {
  constructor(section) {
    this.title = section.querySelector("h3");
    this.table = section.querySelector("table");
    this.body = this.table.tBodies[0];
    this.rows = new Map();
  }

  show(map, facts) {
    const waiting = map.waiting ? `, ${number(map.waiting)} waiting` : "";
    const left = map.left_out ? `; ${number(map.left_out)} of them not shown` : "";
    this.title.textContent = `${plural(map.running, "request")} running${waiting}${left}`;
    this.table.hidden = !map.requests.length;
    const totals = map.requests.map((request) => request.pages.reduce((a, b) => a + b, 0));
    const most = Math.max(1, ...totals);
    const rows = new Map();
    map.requests.forEach((request, index) => {
      const row = this.rows.get(request.number) ?? this.row(facts);
      this.fill(row, request, totals[index], most, facts);
      rows.set(request.number, row);
    });
    const wanted = [...rows.values()];
    const same = wanted.length === this.body.rows.length
      && wanted.every((row, index) => row === this.body.rows[index]);
    if (!same) this.body.replaceChildren(...wanted);
    this.rows = rows;
  }

  row(facts) {
    const row = element("tr");
    for (const label of ["", "prompt", "tokens", "pages", "bars", "dropped", "preempted"]) {
      const isNumber = !["", "bars", "dropped"].includes(label);
      const cell = element("td", "", isNumber ? "number" : label === "bars" ? label : "");
      if (label && label !== "bars") cell.dataset.label = label; // where there are no columns
      row.append(cell);
    }
    const bar = element("div", "", "bar");
    bar.setAttribute("role", "img");
    facts.groups.forEach((_, group) => {
      bar.append(element("span", "", `series-${group % SERIES}`));
    });
    row.cells[4].append(bar);
    return row;
  }

  fill(row, request, total, most, facts) {
    const dropped = request.has_dropped ? "yes" : "no";
    const { prompt, computed, preemptions } = request;
    const texts = [request.number, prompt, computed, total, null, dropped, preemptions];
    texts.forEach((value, index) => {
      if (value === null) return;
      const text = typeof value === "number" ? number(value) : value;
      row.cells[index].textContent = index === 0 ? `#${text}` : text;
    });
    const bar = row.cells[4].firstChild;
    const parts = request.pages.map((pages, group) => `group ${group}: ${plural(pages, "page")}`);
    bar.setAttribute("aria-label", parts.join(", "));
    bar.title = parts.join(", ");
    request.pages.forEach((pages, group) => {
      bar.children[group].style.width = `${(100 * pages) / most}%`;
    });
  }
}
