"use strict";

// The map of a pool: a cell for each page, its hue the layer group, its shade (and pattern, where
// cells are large enough for one) what it holds.

const SERIES = 7;
const LARGEST = 18; // CSS pixels of a cell, with the gap
const PATTERN = 6; // CSS pixels from which on a cell has a pattern
const NAMES = {
  free: "free",
  cached: "free, in the prefix cache",
  prompt: "prompt",
  survivors: "survivors",
  newest: "newest",
  shared: "shared",
  moving: "in transit",
};
const UNGROUPED = new Set(["free", "moving"]);

// [red, green, blue] of a CSS variable, as it is now.
function color(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return parts;
}

function mix(one, other, share) {
  return one.map((part, index) => Math.round(part * share + other[index] * (1 - share)));
}

// Colors of (layer group, kind), from light to strong: each kind differs in lightness, too.
function palette() {
  const [surface, ink, free] = ["--surface", "--ink", "--free"].map(color);
  const hues = Array.from({ length: SERIES }, (_, index) => color(`--series-${index}`));
  return {
    surface,
    of(group, kind) {
      const hue = hues[group % SERIES];
      switch (kind) {
        case "free": return free;
        case "cached": return mix(hue, free, 0.22);
        case "prompt": return mix(hue, surface, 0.45);
        case "shared": return mix(hue, surface, 0.7);
        case "survivors": return hue;
        case "newest": return mix(hue, ink, 0.45);
        default: return mix(ink, surface, 0.4);
      }
    },
  };
}

const css = (rgb) => `rgb(${rgb.join(",")})`;

// A cell of `size` device pixels at x, y.
function drawCell(context, colors, group, kind, x, y, size, patterns) {
  const gap = size >= 4 ? Math.max(1, Math.round(size / 10)) : 0;
  const side = size - gap;
  context.fillStyle = css(colors.of(group, kind));
  context.fillRect(x, y, side, side);
  if (!patterns) return;
  const line = Math.max(1, Math.round(side / 8));
  if (kind === "cached") { // an outline
    context.strokeStyle = css(colors.of(group, "prompt"));
    context.lineWidth = line;
    context.strokeRect(x + line / 2, y + line / 2, side - line, side - line);
  } else if (kind === "newest") { // a dot
    const dot = Math.max(2, Math.round(side / 3));
    context.fillStyle = css(colors.surface);
    context.fillRect(x + Math.floor((side - dot) / 2), y + Math.floor((side - dot) / 2), dot, dot);
  } else if (kind === "shared" || kind === "moving") { // a corner, or two
    context.fillStyle = css(kind === "shared" ? colors.of(group, "newest") : colors.surface);
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x + side * 0.7, y);
    context.lineTo(x, y + side * 0.7);
    context.fill();
  }
}

// The largest cells with which all pages fit; device pixels.
function layout(count, width, height, ratio) {
  let size = Math.floor(LARGEST * ratio);
  while (size > 1 && Math.ceil(count / Math.floor(width / size)) * size > height) size -= 1;
  const columns = Math.max(1, Math.min(count, Math.floor(width / size)));
  return { size, columns, rows: Math.ceil(count / columns) };
}

class PoolMap {
  constructor(section) {
    this.box = section.querySelector(".pool");
    this.canvas = section.querySelector("canvas");
    this.mark = section.querySelector(".mark");
    this.text = section.querySelector(".page");
    this.hint = this.text.textContent;
    this.chosen = null;
    this.text.setAttribute("aria-live", "polite");
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.choose(null));
    this.canvas.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  // pages: Uint8Array; decode: byte -> [group, kind]; name: group -> text
  show(pages, decode, name) {
    Object.assign(this, { pages, decode, name });
    this.draw();
    this.tell();
  }

  draw() {
    if (!this.pages || !this.box.clientWidth) return;
    const ratio = devicePixelRatio || 1;
    const height = Math.min(440, Math.max(240, innerHeight * 0.55)) * ratio;
    const found = layout(this.pages.length, this.box.clientWidth * ratio, height, ratio);
    const { size, columns, rows } = Object.assign(this, found, { ratio });
    this.canvas.width = columns * size;
    this.canvas.height = rows * size;
    this.canvas.style.width = `${(columns * size) / ratio}px`;
    this.canvas.style.height = `${(rows * size) / ratio}px`;
    const context = this.canvas.getContext("2d");
    if (size >= 4) this.drawCells(context);
    else this.drawPixels(context);
    this.place();
  }

  drawCells(context) {
    const { size, columns, ratio, pages } = this;
    const colors = palette();
    const atlas = document.createElement("canvas"); // each byte's cell, drawn once
    atlas.width = 256 * size;
    atlas.height = size;
    const drawing = atlas.getContext("2d");
    const patterns = size >= PATTERN * ratio;
    for (const byte of new Set(pages)) {
      drawCell(drawing, colors, ...this.decode(byte), byte * size, 0, size, patterns);
    }
    for (let page = 0; page < pages.length; page += 1) {
      const x = (page % columns) * size;
      const y = Math.floor(page / columns) * size;
      context.drawImage(atlas, pages[page] * size, 0, size, size, x, y, size, size);
    }
  }

  drawPixels(context) {
    const { size, columns, rows, pages } = this;
    const colors = palette();
    const words = new Uint32Array(256); // little-endian: alpha, blue, green, red
    for (const byte of new Set(pages)) {
      const [red, green, blue] = colors.of(...this.decode(byte));
      words[byte] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    }
    const image = new ImageData(columns, rows);
    const target = new Uint32Array(image.data.buffer);
    for (let page = 0; page < pages.length; page += 1) target[page] = words[pages[page]];
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = rows;
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, columns * size, rows * size);
  }

  point(event) {
    const scale = this.ratio / this.size;
    const column = Math.floor(event.offsetX * scale);
    const page = Math.floor(event.offsetY * scale) * this.columns + column;
    this.choose(column >= 0 && column < this.columns && page >= 0 ? page : null);
  }

  press(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    const last = this.pages ? this.pages.length - 1 : -1;
    const ends = { Home: 0, End: last };
    if (last < 0 || !(event.key in steps || event.key in ends)) return;
    event.preventDefault();
    const next = ends[event.key] ?? (this.chosen === null ? 0 : this.chosen + steps[event.key]);
    if (next >= 0 && next <= last) this.choose(next);
  }

  choose(page) {
    this.chosen = this.pages && page < this.pages.length ? page : null;
    this.place();
    this.tell();
  }

  place() {
    this.mark.hidden = this.chosen === null;
    if (this.mark.hidden) return;
    const side = this.size / this.ratio;
    const style = this.mark.style;
    style.left = `${(this.chosen % this.columns) * side}px`;
    style.top = `${Math.floor(this.chosen / this.columns) * side}px`;
    style.width = style.height = `${side}px`;
  }

  tell() {
    let text = this.hint;
    if (this.chosen !== null) {
      const [group, kind] = this.decode(this.pages[this.chosen]);
      const where = UNGROUPED.has(kind) ? "" : `; ${this.name(group)}`;
      text = `Page ${(this.chosen + 1).toLocaleString("en")}: ${NAMES[kind]}${where}`;
    }
    if (this.text.textContent !== text) this.text.textContent = text;
  }
}
