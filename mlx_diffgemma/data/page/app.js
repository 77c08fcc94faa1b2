// Puts the page together: tabs, dialogs, the list of chats, the model's name.

import { get, key, takeKeyOfAddress } from "./api.js";
import { Chat } from "./chat.js";
import { button, find, grow, make } from "./dom.js";
import { examplesFor } from "./examples.js";
import { forget, list, newChat, onOthers, read, save, titleOf } from "./store.js";
import { addWork } from "./work.js";

const THEME = "diffgemma.theme", MODEL = "diffgemma.model";

let models = [], model = null, seed = null;

const page = {
  get model() {
    return model;
  },
  seed: () => seed,
  steps: () => talk.chat.steps,
  wantKey,
  listed: drawList,
  tell,
};

function tell(line) {
  find("alert").textContent = line ?? "";
  find("alert").hidden = !line;
}

// Dialogs ------------------------------------------------------------------------------------

// Opens a dialog; gives whether it was left with "save".
function opened(dialog) {
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "save"), { once: true });
  });
}

let asking = null;

// Asks for a key, once for all who want one; gives whether there is one now.
function wantKey() {
  asking ??= (async () => {
    find("key").value = "";
    const given = await opened(find("key-dialog")) && find("key").value.trim();
    if (given) key.set(given);
    asking = null;
    if (given && !model) meet();
    return Boolean(given);
  })();
  return asking;
}

async function settings() {
  const { chat } = talk;
  find("set-system").value = chat.system;
  find("set-steps").value = chat.steps ?? "";
  find("set-steps").placeholder = model?.denoising_steps ?? "";
  find("set-seed").value = seed ?? "";
  find("set-thinking").checked = chat.thinking;
  find("set-theme").value = theme();
  find("set-key").value = key.get();
  if (!await opened(find("settings"))) return;
  const number = (id) => (Number.isInteger(find(id).valueAsNumber) ? find(id).valueAsNumber : null);
  chat.system = find("set-system").value;
  chat.steps = number("set-steps");
  chat.thinking = find("set-thinking").checked;
  seed = number("set-seed");
  dress(find("set-theme").value);
  if (key.get() !== find("set-key").value.trim()) {
    key.set(find("set-key").value.trim());
    meet();
  }
  if (chat.messages.length) tell(save(chat));
  talk.frame();
}

// Colours ------------------------------------------------------------------------------------

function theme() {
  try {
    return localStorage.getItem(THEME) ?? "auto";
  } catch {
    return "auto";
  }
}

function dress(name) {
  const known = ["light", "dark"].includes(name);
  if (known) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem(THEME, known ? name : "auto");
  } catch { /* it lasts as long as the page */ }
}

// Tabs ---------------------------------------------------------------------------------------

const TABS = ["chat", "fill", "edit"];

function show(name, focus = false) {
  for (const each of TABS) {
    const tab = find(`tab-${each}`), on = each === name;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    find(`panel-${each}`).hidden = !on;
    if (on && focus) tab.focus();
  }
  document.body.dataset.tab = name;
}

function addTabs() {
  TABS.forEach((name, i) => {
    const tab = find(`tab-${name}`);
    tab.addEventListener("click", () => show(name));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? TABS.length - 1 : i + (step ?? 0);
      if (to !== i) show(TABS.at(to % TABS.length), true);
    });
  });
  show("chat");
}

// Chats --------------------------------------------------------------------------------------

function drawList() {
  const chats = list();
  find("chat-list").replaceChildren(...chats.map((chat) => {
    const open = button(titleOf(chat), () => {
      side(false);
      if (chat.id === talk.chat.id) return;
      const found = read(chat.id);
      if (found) talk.open(found);
      drawList();
    }, { className: "open" });
    if (chat.id === talk.chat.id) open.setAttribute("aria-current", "true");
    const gone = button("×", () => {
      forget(chat.id);
      if (chat.id === talk.chat.id) talk.open(newChat(talk.chat));
      drawList();
    }, { className: "plain gone", "aria-label": `Delete ${titleOf(chat)}` });
    return make("li", {}, open, gone);
  }));
  find("chat-clear").hidden = chats.length === 0;
}

// On a narrow screen the list lies over the conversation.
function side(open) {
  find("side").classList.toggle("open", open);
  find("chats-open").setAttribute("aria-expanded", String(open));
  if (open) find("chat-new").focus();
}

function addChats() {
  find("chats-open").addEventListener("click", () => side(!find("side").classList.contains("open")));
  find("side").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    side(false);
    find("chats-open").focus();
  });
  find("chat-new").addEventListener("click", () => {
    side(false);
    talk.open(newChat(talk.chat));
    drawList();
    find("message").focus();
  });
  find("chat-clear").addEventListener("click", () => {
    if (!confirm("Delete all chats that this browser keeps?")) return;
    list().forEach((chat) => forget(chat.id));
    talk.open(newChat());
    drawList();
  });
  onOthers((id) => {
    drawList();
    if (talk.busy || (id !== null && id !== talk.chat.id)) return;
    const found = read(talk.chat.id);
    if (found && found.revision !== talk.chat.revision) talk.open(found);
  });
}

// The model ----------------------------------------------------------------------------------

async function meet() {
  try {
    const { data } = await get("/v1/models");
    models = data;
    model = models.find((each) => each.id === chosen()) ?? models[0];
    tell("");
  } catch (error) {
    if (error.status === 401) {
      wantKey();
      return;
    }
    tell(error.message);
    return;
  }
  find("model").replaceChildren(named(), make("span", { id: "model-lengths", className: "only-wide" }));
  drawModel();
}

// The one that was last chosen, where the server has several.
function chosen() {
  try {
    return localStorage.getItem(MODEL);
  } catch {
    return null;
  }
}

function choose(name) {
  try {
    localStorage.setItem(MODEL, name);
  } catch { /* it lasts as long as the page */ }
  model = models.find((each) => each.id === name);
  drawModel();
}

// The model's name, or what chooses one of several.
function named() {
  if (models.length === 1) return make("strong", {}, model.id);
  const options = models.map(({ id }) => make("option", { value: id, selected: id === model.id }, id));
  const select = make("select", { "aria-label": "Model" }, ...options);
  select.addEventListener("change", () => choose(select.value));
  return select;
}

function drawModel() {
  const number = (value) => value.toLocaleString("en");
  find("model-lengths").textContent =
    ` ${number(model.context_length)} tokens of context, canvases of ${model.canvas_length}`;
  find("set-thinking-row").hidden = !model.thinking;
  talk.frame();
  addExamples();
}

function addExamples() {
  const { chat, fill, edit } = examplesFor(model.id);
  find("examples").replaceChildren(...chat.map(([title, text]) =>
    button("", () => talk.send(text), { className: "example" })).map((each, i) => {
    each.append(make("strong", {}, chat[i][0]), make("span", {}, chat[i][1]));
    return each;
  }));
  const offer = (name, all, set) => find(`${name}-examples`).replaceChildren(
    ...all.map((each) => button(each[0], () => set(each))));
  offer("fill", fill, ([, template, prompt]) => {
    find("fill-template").value = template;
    find("fill-prompt").value = prompt;
  });
  offer("edit", edit, ([, text, instruction, line]) => {
    find("edit-text").value = text;
    find("edit-instruction").value = instruction;
    find("edit-first").value = find("edit-last").value = line ?? "";
  });
}

dress(theme());
takeKeyOfAddress();
const talk = new Chat(page);
addTabs();
addChats();
addWork(page);
grow(find("set-system"));
for (const close of document.querySelectorAll("[data-close]")) {
  close.addEventListener("click", () => close.closest("dialog").close("cancel"));
}
find("settings-open").addEventListener("click", settings);
talk.restore();
drawList();
meet();
find("message").focus();
