// The tabs that fill and edit: a form, a canvas, a result.

import { ask } from "./api.js";
import { Canvas, replay } from "./canvas.js";
import { draw } from "./diff.js";
import { button, copyButton, find, grow, make } from "./dom.js";

// One of the two tabs. `bodyOf` gives what the form asks for, `show` the elements of a result.
class Work {
  constructor(name, page, bodyOf, show) {
    Object.assign(this, { name, page, bodyOf, show, stopper: null });
    this.status = find(`${name}-status`);
    this.result = find(`${name}-result`);
    this.canvas = null;
    find(`${name}-form`).addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.stopper) this.run();
    });
    find(`${name}-stop`).addEventListener("click", () => this.stopper?.abort());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stopper?.abort();
      const go = event.key === "Enter" && (event.ctrlKey || event.metaKey);
      if (go && find(`${name}-form`).contains(event.target)) find(`${name}-form`).requestSubmit();
    });
  }

  async run() {
    const body = { ...this.bodyOf(), stream_drafts: true };
    if (this.page.model) body.model = this.page.model.id;
    if (this.page.seed() !== null) body.seed = this.page.seed();
    if (this.page.steps()) body.steps = this.page.steps();
    this.stopper = new AbortController();
    const canvas = new Canvas();
    find(`${this.name}-draft`).replaceChildren(canvas.element);
    this.result.replaceChildren();
    this.#busy(true);
    this.status.textContent = "The model is writing.";
    this.status.parentElement.scrollIntoView({ block: "nearest" });
    const asking = {
      signal: this.stopper.signal,
      wantKey: this.page.wantKey,
      tell: (line) => (this.status.textContent = line),
    };
    try {
      for await (const [type, value] of ask(`/v1/${this.name}`, body, asking)) {
        if (type === "draft") canvas.show(value);
        else this.#done(body, value, canvas);
      }
    } catch (error) {
      this.#cut(error, canvas);
    }
    canvas.clear();
    this.stopper = null;
    this.#busy(false);
  }

  #busy(busy) {
    find(`${this.name}-go`).hidden = busy;
    find(`${this.name}-stop`).hidden = !busy;
  }

  #done(body, value, canvas) {
    const notes = value.notes.map((note) => make("p", { className: "note" }, note));
    const actions = make("div", { className: "message-actions" },
      copyButton(() => value.text, "the text"), this.#watch(canvas.drafts));
    this.result.replaceChildren(...this.show(body, value, actions), ...notes, actions);
    this.status.textContent = `Done in ${value.denoising_steps} steps.`;
    this.status.parentElement.scrollIntoView({ block: "nearest" });
  }

  #watch(drafts) {
    let end = null;
    const made = button("Watch again", () => {
      if (end) return end();
      const canvas = new Canvas();
      find(`${this.name}-draft`).replaceChildren(canvas.element);
      made.textContent = "Stop watching";
      end = replay(drafts, canvas, () => {
        made.textContent = "Watch again";
        end = null;
      });
    }, { disabled: !drafts.length });
    return made;
  }

  #cut(error, canvas) {
    const stopped = error.name === "AbortError";
    if (canvas.shown) {
      this.result.replaceChildren(make("pre", { className: "text", tabIndex: 0 }, canvas.shown),
        make("p", { className: "note" }, "This is a draft that had not settled."));
    }
    this.status.textContent = stopped ? "Stopped." : error.message;
    if (!stopped && !(error.status >= 0)) console.error(error);
  }
}

// The pieces of a template between its holes; `\{{` is no hole.
export function literals(template) {
  return template.split(/(?<!\\)\{\{.*?\}\}/s).map((part) => part.replaceAll("\\{{", "{{"));
}

// A filled text with what was written into holes marked.
export function marked(template, text) {
  const parts = [];
  let at = 0;
  const given = literals(template);
  given.forEach((piece, i) => {
    const found = i === given.length - 1 && i ? text.lastIndexOf(piece) : text.indexOf(piece, at);
    if (found < at) return;
    if (i && found > at) parts.push(make("mark", {}, text.slice(at, found)));
    parts.push(piece);
    at = found + piece.length;
  });
  if (at < text.length) parts.push(make("mark", {}, text.slice(at)));
  return parts;
}

function filled(body, value) {
  const rows = Object.entries(value.values).map(([name, held]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, String(held))));
  const text = make("pre", { className: "text", tabIndex: 0 }, ...marked(body.template, value.text));
  return rows.length ? [text, make("dl", { className: "values" }, ...rows)] : [text];
}

function edited(body, value, actions) {
  const lines = draw(body.text, value.text);
  if (!lines.length) return [make("p", {}, "The model changes nothing.")];
  actions.append(button("Use this text", () => {
    find("edit-text").value = value.text;
    find("edit-text").focus();
  }));
  return [make("div", { className: "diff", tabIndex: 0, role: "group", "aria-label": "Changes" }, ...lines)];
}

function wholeLines() {
  const [first, last] = ["edit-first", "edit-last"].map((id) => find(id).valueAsNumber);
  if (Number.isNaN(first) && Number.isNaN(last)) return {};
  const from = Number.isNaN(first) ? 1 : first;
  return { lines: [from, Number.isNaN(last) ? from : last] };
}

export function addWork(page) {
  ["fill-template", "edit-text"].forEach((id) => grow(find(id)));
  new Work("fill", page, () => {
    const prompt = find("fill-prompt").value.trim();
    return { template: find("fill-template").value, ...(prompt ? { prompt } : {}) };
  }, filled);
  new Work("edit", page, () => ({
    text: find("edit-text").value,
    instruction: find("edit-instruction").value,
    strength: find("edit-strength").valueAsNumber,
    ...wholeLines(),
  }), edited);
  const shown = find("edit-strength-value");
  find("edit-strength").addEventListener("input", () => (shown.value = find("edit-strength").value));
}
