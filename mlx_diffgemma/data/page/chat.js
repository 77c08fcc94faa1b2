// The conversation: what was said, what is being written, and what may be done with either.

import { ask } from "./api.js";
import { Canvas, replay } from "./canvas.js";
import { button, copyButton, find, grow, make, sends } from "./dom.js";
import { render } from "./markdown.js";
import { thumbnail, Tray } from "./pictures.js";
import { newChat, read, save, titleOf } from "./store.js";

// Answers whose drafts can be watched again, the last ones.
const MOST_REPLAYS = 5;

const CURRENT = "diffgemma.current";

const ENDS = {
  length: "The answer ends here because it is as long as it may be.",
  not_converged: "The canvas had not settled in its last step.",
  repetition: "The answer went round in circles and was stopped.",
};

export class Chat {
  // `page` has `model`, `wantKey`, `seed`, `listed`, `tell`.
  constructor(page) {
    this.page = page;
    this.stopper = null;
    this.replays = new Map();
    this.parsed = new WeakMap();
    this.thumbnails = new WeakMap();
    this.tray = new Tray({ say: (line) => this.#say(line), sees: () => Boolean(page.model?.images) });
    this.messages = find("messages");
    this.scroll = find("scroll");
    this.input = find("message");
    this.fit = grow(this.input);
    this.chat = newChat();
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.input.value;
      if (this.busy || this.tray.reading || !(text.trim() || this.tray.addresses.length)) return;
      this.input.value = "";
      this.fit();
      this.send(text, this.tray.take());
    });
    this.input.addEventListener("keydown", (event) => {
      if (!sends(event)) return;
      event.preventDefault();
      find("composer").requestSubmit();
    });
    find("stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
  }

  get busy() {
    return this.stopper !== null;
  }

  // Opens the chat that this tab had open, or an empty one.
  restore() {
    let id = null;
    try {
      id = sessionStorage.getItem(CURRENT);
    } catch { /* nothing is kept */ }
    this.open((id && read(id)) || newChat());
  }

  open(chat) {
    this.stop();
    this.chat = chat;
    this.replays.clear();
    this.#remember();
    this.draw();
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  stop() {
    this.stopper?.abort();
  }

  send(text, pictures = []) {
    if (this.busy) return;
    this.chat.messages.push({ role: "user", content: text, pictures, lost: 0 });
    this.answer();
  }

  // Asks once more for the answer at a place; what came after goes.
  retry(at) {
    if (this.busy) return;
    this.chat.messages.length = at;
    this.answer();
  }

  #remember() {
    try {
      sessionStorage.setItem(CURRENT, this.chat.id);
    } catch { /* nothing is kept */ }
  }

  #save() {
    this.page.tell(save(this.chat));
    this.#remember();
    this.page.listed();
  }

  // What the model is asked: questions that got no answer are left out with it.
  #conversation() {
    const { system, messages } = this.chat;
    const asked = system.trim() ? [{ role: "system", content: system }] : [];
    messages.forEach((each, i) => {
      const answer = messages[i + 1];
      if (each.role === "user" && answer && !answer.content) return;
      const content = this.#content(each);
      if (content.length) asked.push({ role: each.role, content });
    });
    return asked;
  }

  // A message as text, or as pictures and what stands behind them, for a model that sees.
  #content({ content, pictures }) {
    if (!pictures?.length || !this.page.model?.images) return content;
    const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    return content.trim() ? [...parts, { type: "text", text: content }] : parts;
  }

  #body() {
    const { steps, thinking } = this.chat;
    const body = { messages: this.#conversation(), stream: true, stream_drafts: true };
    body.stream_options = { include_usage: true };
    if (this.page.model) body.model = this.page.model.id;
    if (steps) body.steps = steps;
    if (thinking && this.page.model?.thinking) body.enable_thinking = true;
    if (this.page.seed() !== null) body.seed = this.page.seed();
    return body;
  }

  async answer() {
    const chat = this.chat;
    const body = this.#body();
    const reply = { role: "assistant", content: "", thought: "", note: "", facts: "" };
    chat.messages.push(reply);
    this.#save();
    this.stopper = new AbortController();
    this.draw();
    const view = this.#writing(reply);
    this.#say("The model is writing.");
    const started = performance.now();
    const facts = { steps: 0, tokens: 0, read: 0 };
    try {
      const asking = {
        signal: this.stopper.signal,
        wantKey: this.page.wantKey,
        tell: (line) => this.#say(line),
      };
      for await (const [type, value] of ask("/v1/chat/completions", body, asking)) {
        if (type === "draft") view.draft(value);
        else this.#take(value, reply, view, facts);
      }
      if (!reply.content && !reply.note) reply.note = "The model wrote nothing.";
      reply.facts = told(facts, (performance.now() - started) / 1000);
    } catch (error) {
      this.#cut(error, reply, view);
    }
    this.stopper = null;
    this.replays.set(reply, view.canvas.drafts);
    if (this.replays.size > MOST_REPLAYS) this.replays.delete(this.replays.keys().next().value);
    if (chat !== this.chat) { // another one was opened meanwhile
      save(chat);
      this.page.listed();
      this.#say("");
    } else {
      this.#save();
      this.#say(reply.note ? "" : "The answer is complete."); // a note stands there already
    }
    this.draw();
    if (document.activeElement === document.body) this.input.focus();
  }

  #take(value, reply, view, facts) {
    if (value.usage) {
      facts.tokens = value.usage.completion_tokens;
      facts.read = value.usage.prompt_tokens;
    }
    const choice = value.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: thought } = choice.delta ?? {};
    if (thought) view.thought((reply.thought += thought));
    if (content) view.text((reply.content += content));
    if (choice.diffusion) {
      facts.steps = choice.diffusion.denoising_steps;
      reply.note = ENDS[choice.diffusion.finish] ?? "";
    }
  }

  // An answer that was stopped, or broke off, keeps what stood on the canvas.
  #cut(error, reply, view) {
    const stopped = error.name === "AbortError";
    const draft = view.canvas.shown;
    reply.content += draft;
    const kept = draft ? " The end is a draft that had not settled." : "";
    reply.note = `${stopped ? "Stopped." : error.message}${kept}`;
    if (!stopped && !(error.status >= 0)) console.error(error);
  }

  #say(line) {
    find("status").textContent = line;
  }

  // Draws all messages; one that is being written is lost by it.
  draw() {
    this.messages.replaceChildren(...this.chat.messages.map((each, i) =>
      each.role === "user" ? this.#question(each, i) : this.#reply(each, i)));
    this.frame();
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  // Draws what stands around the messages.
  frame() {
    const { messages } = this.chat;
    for (const each of ["picture-add", "picture-take"]) find(each).hidden = !this.page.model?.images;
    find("welcome").hidden = messages.length > 0;
    find("send").hidden = this.busy;
    find("stop").hidden = !this.busy;
    find("system-note").hidden = !this.chat.system.trim();
    find("system-note").textContent = `System prompt: ${this.chat.system.trim().slice(0, 90)}`;
    const name = this.page.model?.id;
    document.title = [messages.length ? titleOf(this.chat) : "", name, "mlx-diffgemma"].filter(Boolean).join(" · ");
  }

  #question(message, at) {
    const actions = make("div", { className: "message-actions" },
      copyButton(() => message.content, "your message"),
      button("Edit", () => this.#edit(element, message, at), { disabled: this.busy }));
    const element = make("article", { className: "user", "aria-label": "You" },
      ...this.#pictures(message),
      make("div", { className: "said", dir: "auto", hidden: !message.content }, message.content), actions);
    return element;
  }

  // What was sent with a message, drawn once: long chats are drawn often.
  #pictures(message) {
    const { pictures = [], lost = 0 } = message;
    const found = [];
    if (pictures.length) {
      if (!this.thumbnails.has(message)) {
        this.thumbnails.set(message, make("div", { className: "pictures" },
          ...pictures.map((each, i) => thumbnail(each, `Picture ${i + 1}`))));
      }
      found.push(this.thumbnails.get(message));
    }
    if (lost) found.push(make("p", { className: "note" }, lost > 1 ? `${lost} pictures were not kept.` : "A picture was not kept."));
    return found;
  }

  #edit(element, message, at) {
    const area = make("textarea", { value: message.content, rows: 2, "aria-label": "Your message, changed" });
    const fit = grow(area);
    const back = () => this.draw();
    const go = () => {
      if (this.busy || !(area.value.trim() || message.pictures?.length)) return;
      this.chat.messages.length = at;
      this.send(area.value, message.pictures);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") back();
      if (sends(event)) {
        event.preventDefault();
        go();
      }
    });
    element.replaceChildren(area, make("div", { className: "message-actions" },
      button("Cancel", back), button("Send again", go, { className: "primary" })));
    fit();
    area.focus();
  }

  #reply(message, at) {
    const element = make("article", { className: "model", "aria-label": "The model" });
    if (message.thought) element.append(thoughts(message.thought, "Thoughts"));
    const said = this.#rendered(message);
    element.append(said);
    if (message.note) element.append(make("p", { className: "note" }, message.note));
    const last = at === this.chat.messages.length - 1;
    if (this.busy && last) return element;
    const actions = make("div", { className: "message-actions" });
    if (message.content) actions.append(copyButton(() => message.content, "the answer"));
    actions.append(button("Retry", () => this.retry(at), { disabled: this.busy }));
    const drafts = this.replays.get(message);
    if (drafts?.length) actions.append(this.#watch(element, said, drafts));
    if (message.facts) actions.append(make("span", { className: "facts" }, message.facts));
    element.append(actions);
    return element;
  }

  // What a message says, parsed once: long chats are drawn often.
  #rendered(message) {
    const known = this.parsed.get(message);
    if (known?.content === message.content) {
      known.said.hidden = false;
      return known.said;
    }
    const said = make("div", { className: "said", dir: "auto" }, render(message.content));
    this.parsed.set(message, { content: message.content, said });
    return said;
  }

  // A button that shows how the answer settled, step by step.
  #watch(element, said, drafts) {
    let end = null;
    const made = button("Watch again", () => {
      if (end) return end();
      const canvas = new Canvas();
      said.hidden = true;
      said.after(canvas.element);
      made.textContent = "Stop watching";
      end = replay(drafts, canvas, () => {
        canvas.element.remove();
        said.hidden = false;
        made.textContent = "Watch again";
        end = null;
      });
    });
    return made;
  }

  // The answer that is being written: thoughts, text that is final, and the canvas below it.
  #writing(reply) {
    const element = this.messages.lastElementChild;
    const said = element.querySelector(".said");
    const canvas = new Canvas();
    let thought = null;
    element.append(canvas.element);
    const follow = this.#follower();
    return {
      canvas,
      draft: (draft) => {
        canvas.show(draft);
        follow();
      },
      thought: (text) => {
        if (!thought) element.prepend(thought = thoughts("", "Thinking"));
        thought.lastElementChild.textContent = text;
        canvas.clear();
        follow();
      },
      text: (text) => {
        if (thought) thought.firstElementChild.textContent = "Thoughts";
        said.replaceChildren(render(text));
        canvas.clear();
        follow();
      },
    };
  }

  // Keeps the end in view, unless the user has scrolled up to read.
  #follower() {
    const area = this.scroll;
    return () => {
      const below = area.scrollHeight - area.scrollTop - area.clientHeight;
      if (below < 160) requestAnimationFrame(() => (area.scrollTop = area.scrollHeight));
    };
  }
}

function thoughts(text, title) {
  return make("details", { className: "thought" },
    make("summary", {}, title), make("div", { className: "as-it-is" }, text));
}

function told({ steps, tokens, read }, seconds) {
  const parts = [`${steps} steps`, `${tokens} tokens`, `${seconds.toFixed(1)} s`];
  if (steps) parts.push(`${(tokens / steps).toFixed(1)} tokens a step`);
  if (read) parts.push(`${read} tokens read`);
  return parts.join(" · ");
}
