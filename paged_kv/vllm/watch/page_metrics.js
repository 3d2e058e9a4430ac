// Sparklines of numbers in vLLM's /metrics, of all engines together.

const KEPT = 120; // samples, of which there is one a second
const WIDTH = 120;
const HEIGHT = 44;
const GENERATED = "vllm:generation_tokens_total";
const RUNNING = "vllm:num_requests_running";
const WAITING = "vllm:num_requests_waiting";
const PREEMPTIONS = "vllm:num_preemptions_total";
const FREE = "vllm:paged_kv_free_pages";
const POOL = "vllm:paged_kv_pool_pages";
const FREED = "vllm:paged_kv_freed_pages_total";
const WANTED = [GENERATED, RUNNING, WAITING, PREEMPTIONS, FREE, POOL, FREED];

// The sums of what is wanted, by name, over all labels; without what is not there.
function readMetrics(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const name = line.match(/^[\w:]+/)?.[0];
    if (!WANTED.includes(name)) continue;
    const value = Number(line.slice(line.lastIndexOf("}") + 1).trim().split(/\s+/)[0]);
    if (Number.isFinite(value)) sums.set(name, (sums.get(name) ?? 0) + value);
  }
  return sums;
}

class Spark {
  // value: (now, rate) -> what is drawn, or undefined; more: now -> what is written beside it
  constructor(label, value, more = () => "") {
    Object.assign(this, { label, value, more, values: [] });
    this.figure = element("figure", "", "spark");
    this.number = element("output", "–");
    this.beside = element("small");
    this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    const [base, path] = ["line", "path"].map((name) => {
      return this.svg.appendChild(document.createElementNS(this.svg.namespaceURI, name));
    });
    const ends = { x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 };
    for (const [name, at] of Object.entries(ends)) base.setAttribute(name, at);
    this.path = path;
    this.figure.append(element("figcaption", label), this.number, " ", this.beside, this.svg);
  }

  add(now, rate) {
    this.values.push(this.value(now, rate));
    if (this.values.length > KEPT) this.values.shift();
    const last = this.values.at(-1);
    this.number.textContent = last === undefined ? "–" : number(Math.round(last));
    this.beside.textContent = last === undefined ? "" : this.more(now);
    this.draw();
  }

  gap() {
    this.values.push(undefined);
    if (this.values.length > KEPT) this.values.shift();
    this.number.textContent = "–";
    this.beside.textContent = "";
    this.draw();
  }

  draw() {
    const known = this.values.filter((value) => value !== undefined);
    const most = Math.max(...known, 1e-9);
    const step = WIDTH / (KEPT - 1);
    const first = KEPT - this.values.length;
    let path = "";
    this.values.forEach((value, index) => {
      if (value === undefined) return;
      const joins = index && this.values[index - 1] !== undefined;
      const y = HEIGHT - 1 - (value / most) * (HEIGHT - 4);
      path += `${joins ? "L" : "M"}${((first + index) * step).toFixed(1)} ${y.toFixed(1)}`;
      if (!joins) path += "h0.01"; // a point of its own is seen, too
    });
    this.path.setAttribute("d", path);
    const range = known.length ? `, at most ${number(Math.round(most))} in two minutes` : "";
    this.svg.setAttribute("aria-label", `${this.label}: ${this.number.textContent}${range}`);
  }
}

class Sparks {
  constructor(box) {
    const of = (name) => (now) => now.get(name);
    const text = (now, name) => number(now.get(name) ?? 0);
    this.all = [
      new Spark("output tokens/s", (_, rate) => rate(GENERATED)),
      new Spark("running requests", of(RUNNING), (now) => `and ${text(now, WAITING)} waiting`),
      new Spark("free pages", of(FREE), (now) => `of ${text(now, POOL)}`),
      new Spark("pages given back/s", (_, rate) => rate(FREED)),
      new Spark("preemptions/s", (_, rate) => rate(PREEMPTIONS), (now) => {
        return `${text(now, PREEMPTIONS)} in all`;
      }),
    ];
    box.append(...this.all.map((spark) => spark.figure));
  }

  // metrics: of readMetrics; null if they could not be read
  add(metrics, seconds) {
    const before = this.before;
    this.before = metrics && { metrics, seconds };
    if (!metrics) {
      for (const spark of this.all) spark.gap();
      return;
    }
    const rate = (name) => {
      const [old, now] = [before?.metrics.get(name), metrics.get(name)];
      if (old === undefined || now === undefined || now < old) return undefined;
      return (now - old) / Math.max(0.1, seconds - before.seconds);
    };
    for (const spark of this.all) spark.add(metrics, rate);
  }
}
