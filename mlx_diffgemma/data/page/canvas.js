// Draws a canvas while it is denoised: what may still change has a colour.

import { make } from "./dom.js";

// Probabilities from which a token is likely, and nearly sure.
const LIKELY = 0.4, NEARLY = 0.85;

// Drafts of one answer that are kept to be watched again, and steps a second then.
const MOST_DRAFTS = 300;

const PACE = 8;

const level = (probability) => (probability < LIKELY ? 0 : probability < NEARLY ? 1 : 2);

export class Canvas {
  constructor() {
    this.text = make("div", { className: "draft", dir: "auto" });
    this.map = make("div", { className: "map" });
    this.line = make("div", { className: "small" });
    // A reader of the screen would say each step; it hears the answer instead.
    this.element = make("div", { className: "canvas", "aria-hidden": "true", hidden: true }, this.text, this.map, this.line);
    this.drafts = [];
    this.kept = [];
    this.next = null;
    this.last = null;
  }

  // Shows a draft with the screen's next picture; of several the last.
  show(draft) {
    if (!Array.isArray(draft?.tokens)) return;
    if (this.drafts.length < MOST_DRAFTS) this.drafts.push(draft);
    this.last = draft;
    if (this.next === null) requestAnimationFrame(() => this.#draw());
    this.next = draft;
  }

  #draw() {
    const draft = this.next;
    this.next = null;
    if (draft) this.draw(draft);
  }

  draw(draft) {
    this.element.hidden = false;
    const runs = [];
    draft.tokens.forEach(({ text, accepted, probability }, i) => {
      const fresh = accepted && this.kept[i] === false ? " fresh" : "";
      const name = accepted ? `kept${fresh}` : `sure-${level(probability)}`;
      if (runs.at(-1)?.[0] === name) runs.at(-1)[1] += text;
      else runs.push([name, text]);
    });
    this.kept = draft.tokens.map((each) => each.accepted);
    this.text.replaceChildren(...runs.map(([name, text]) => make("span", { className: `t ${name}` }, text)));
    this.#drawMap(String(draft.positions ?? ""));
    const canvas = draft.canvas ? `canvas ${draft.canvas + 1}, ` : "";
    this.line.textContent = `${canvas}step ${draft.step} of ${draft.steps} · ${draft.accepted} of ${draft.length} settled`;
  }

  // A cell for each position of the canvas, those beyond the end of the text included.
  #drawMap(positions) {
    while (this.map.childElementCount < positions.length) this.map.append(make("i"));
    while (this.map.childElementCount > positions.length) this.map.lastChild.remove();
    [...positions].forEach((sign, i) => {
      const name = sign === "#" ? "kept" : `sure-${level(Number(sign) / 9)}`;
      if (this.map.children[i].className !== name) this.map.children[i].className = name;
    });
  }

  // What stands on the canvas becomes part of a text: the next draft is another canvas.
  clear() {
    this.next = this.last = null;
    this.kept = [];
    this.text.replaceChildren();
    this.element.hidden = true;
  }

  get shown() {
    return this.last ? String(this.last.text) : "";
  }
}

// Shows drafts again, slowly; gives a function that ends it.
export function replay(drafts, canvas, done) {
  let i = 0;
  const end = () => {
    clearInterval(timer);
    canvas.clear();
    done();
  };
  const step = () => {
    if (i === drafts.length) end();
    else canvas.draw(drafts[i++]);
  };
  const timer = setInterval(step, 1000 / PACE);
  step();
  return end;
}
