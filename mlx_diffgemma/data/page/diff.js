// Compares two texts line by line, and changed lines word by word.

import { make } from "./dom.js";

// Cells of a table of common parts; beyond that, all is told as changed.
const MOST_CELLS = 4_000_000;

// Lines around a change that are shown.
const AROUND = 2;

// Gives [sign, a, b] for each part: " " for what both have, "-" and "+" for what one has.
export function compare(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start
    && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const same = (parts) => parts.map((part) => [" ", part]);
  return [
    ...same(a.slice(0, start)),
    ...middle(a.slice(start, a.length - end), b.slice(start, b.length - end)),
    ...same(a.slice(a.length - end)),
  ];
}

function middle(a, b) {
  if (a.length * b.length > MOST_CELLS) {
    return [...a.map((part) => ["-", part]), ...b.map((part) => ["+", part])];
  }
  const width = b.length + 1;
  const common = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const found = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      found.push([" ", a[i]]);
      i++, j++;
    } else if (j === b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) {
      found.push(["-", a[i++]]);
    } else {
      found.push(["+", b[j++]]);
    }
  }
  return found;
}

const words = (line) => line.match(/\w+|\s+|[^\w\s]/gu) ?? [];

// Elements for the lines around changes; none where nothing changed.
export function draw(before, after) {
  const lines = compare(before.split("\n"), after.split("\n"));
  if (lines.every(([sign]) => sign === " ")) return [];
  const shown = lines.map((_, i) => lines.slice(Math.max(0, i - AROUND), i + AROUND + 1).some(([sign]) => sign !== " "));
  const found = [];
  for (let i = 0; i < lines.length; i++) {
    if (!shown[i]) {
      if (!i || shown[i - 1]) found.push(make("div", { className: "skipped" }, "⋯"));
      continue;
    }
    const run = changed(lines, i);
    if (run) {
      found.push(...pairs(run));
      i += run.length - 1;
    } else {
      found.push(line(" ", [lines[i][1]]));
    }
  }
  return found;
}

function changed(lines, from) {
  let to = from;
  while (to < lines.length && lines[to][0] !== " ") to++;
  return to > from ? lines.slice(from, to) : null;
}

// Lines that went beside those that came: of a pair, the words that differ are marked.
function pairs(run) {
  const gone = run.filter(([sign]) => sign === "-").map(([, text]) => text);
  const come = run.filter(([sign]) => sign === "+").map(([, text]) => text);
  const marked = gone.map((text, i) => (i < come.length ? compare(words(text), words(come[i])) : null));
  const side = (sign, i) => marked[i].filter(([each]) => each === " " || each === sign)
    .map(([each, text]) => (each === " " ? text : make(sign === "-" ? "del" : "ins", {}, text)));
  return [
    ...gone.map((text, i) => line("-", marked[i] ? side("-", i) : [text])),
    ...come.map((text, i) => line("+", marked[i] ? side("+", i) : [text])),
  ];
}

const KINDS = { " ": "same", "-": "gone", "+": "come" };

const SAID = { " ": "", "-": "removed: ", "+": "added: " };

function line(sign, parts) {
  return make("div", { className: `line ${KINDS[sign]}` },
    make("span", { className: "sign", "aria-hidden": "true" }, sign),
    make("span", { className: "hidden" }, SAID[sign]),
    make("span", {}, ...parts));
}
