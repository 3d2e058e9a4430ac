// Asks the server once a second, and shows what it says. Nothing is stored, and every name is text.

const EVERY = 1000; // milliseconds
const PATIENCE = 8000; // for an answer
const LATE = 15; // seconds after which the map of a busy engine is old

const by = (id) => document.getElementById(id);
const sparks = new Sparks(by("sparks"));
const engines = new Map();
let lostSince = null;
let paused = false;
let metrics = null;

async function ask(path) {
  const options = { cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(PATIENCE) };
  const response = await fetch(path, options);
  if (!response.ok) throw Error(`${path}: ${response.status}`);
  return response;
}

class Engine {
  constructor() {
    const part = by("engine").content.cloneNode(true);
    this.section = part.querySelector("section");
    this.title = part.querySelector("h2");
    this.note = part.querySelector(".note");
    this.map = new PoolMap(this.section);
    this.legend = new Legend(part.querySelector(".groups"));
    this.requests = new Requests(this.section);
    const parts = [".pool", ".page", ".groups", "h3", "table"];
    this.parts = parts.map((each) => part.querySelector(each));
    by("engines").append(part);
  }

  show({ engine, facts, age, map }, several) {
    const tokens = `${plural(facts.page_size, "token")} a page`;
    this.title.textContent = several ? `Pool of engine ${engine}` : "Pool";
    for (const part of this.parts) part.hidden = !map;
    const busy = metrics?.get(RUNNING) > 0;
    let note = "";
    if (!map) {
      note = busy ? "The engine’s first map comes with its next step."
        : "The engine is idle, and was when this page was opened: its map comes with a request.";
    } else if (busy && map.running && age > Math.max(LATE, 3 * map.interval)) {
      note = `This map is ${Math.round(age)} seconds old: the engine is in a long step, or hangs.`;
    }
    this.note.hidden = !note;
    if (this.note.textContent !== note) this.note.textContent = note;
    if (!map) return;
    const pages = Uint8Array.from(atob(map.pages), (letter) => letter.charCodeAt(0));
    this.title.textContent += `: ${plural(pages.length, "page")}, ${tokens}`;
    this.facts = facts;
    this.kinds = map.kinds;
    const decode = (byte) => [Math.floor(byte / map.group), map.kinds[byte % map.group]];
    this.counts = new Map();
    const totals = new Uint32Array(256);
    for (const byte of pages) totals[byte] += 1;
    totals.forEach((count, byte) => {
      const [group, kind] = decode(byte);
      if (count) this.counts.set(UNGROUPED.has(kind) ? kind : `${group} ${kind}`, count);
    });
    this.map.show(pages, decode, (group) => groupName(facts, group));
    this.requests.show(map, facts);
    this.tell(pages.length);
    this.paint();
  }

  tell(total) {
    const free = this.counts.get("free") ?? 0;
    const label = `Map of the pool: ${number(free)} of ${plural(total, "page")} free; see below`;
    this.map.canvas.setAttribute("aria-label", label);
  }

  paint() { // also when the colors have changed
    if (this.kinds) this.legend.show(this.facts, this.kinds, this.counts, String(color("--ink")));
  }
}

function state(text, name) {
  const line = by("state");
  line.className = name;
  if (line.textContent !== text) line.textContent = text; // else it would be read out each second
}

function show(data) {
  by("model").textContent = data.model;
  document.title = data.model ? `KV cache: ${data.model}` : "KV cache";
  for (const each of data.engines) {
    if (!engines.has(each.engine)) engines.set(each.engine, new Engine());
    engines.get(each.engine).show(each, data.engines.length > 1);
  }
  for (const [number, engine] of engines) {
    if (data.engines.some((each) => each.engine === number)) continue;
    engine.section.remove();
    engines.delete(number);
  }
  const inMaps = data.engines.map((each) => each.map?.running ?? 0);
  const running = metrics?.get(RUNNING) ?? Math.max(0, ...inMaps);
  if (!data.engines.length) {
    state("There is no map to show: the server runs without a KV policy (vllm serve --kv-policy), "
      + "with --disable-log-stats, or its engine is not ready yet.", "");
  } else if (running > 0) state("The server is at work.", "busy");
  else state("The server stands idle: no request is running.", "idle");
}

async function look() {
  const [data, text] = await Promise.allSettled([
    ask("kv/data").then((response) => response.json()),
    ask("metrics").then((response) => response.text()),
  ]);
  if (paused) return;
  metrics = text.status === "fulfilled" ? readMetrics(text.value) : null;
  sparks.add(metrics, performance.now() / 1000);
  by("no-metrics").hidden = metrics !== null;
  if (data.status === "fulfilled") {
    lostSince = null;
    show(data.value);
  } else {
    lostSince ??= new Date();
    const since = lostSince.toLocaleTimeString();
    state(`No answer from the server since ${since}; the page goes on asking. `
      + "What it shows is from before.", "lost");
  }
}

async function run() {
  for (;;) {
    const begin = performance.now();
    if (!paused && !document.hidden) {
      try {
        await look();
      } catch (error) {
        state(`The server’s answer cannot be shown: ${error.message}`, "lost");
        console.error(error);
      }
    }
    const rest = EVERY - (performance.now() - begin);
    await new Promise((done) => setTimeout(done, Math.max(200, rest)));
  }
}

by("pause").addEventListener("click", () => {
  paused = !paused;
  by("pause").setAttribute("aria-pressed", String(paused));
  if (paused) state("Paused: nothing is asked for.", "");
});

// Light or dark: the system's choice until the button is pressed.
const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
function paint() {
  const dark = chosen ?? system.matches;
  document.documentElement.style.colorScheme = chosen === null ? "" : dark ? "dark" : "light";
  by("theme").setAttribute("aria-pressed", String(dark));
  for (const engine of engines.values()) {
    engine.map.draw();
    engine.paint();
  }
}
by("theme").addEventListener("click", () => {
  chosen = !(chosen ?? system.matches);
  paint();
});
system.addEventListener("change", paint);
paint();
run();
