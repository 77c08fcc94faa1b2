// Keeps chats in this browser, within bounds. What is read back may be anything: other programs of
// the same address write there, too.

import { MOST_PICTURES } from "./pictures.js";

const PREFIX = "diffgemma.chat.";

// Chats that are kept, and characters of all of them; the oldest go first.
const MOST_CHATS = 100, MOST_CHARACTERS = 2_000_000;

const tab = crypto.getRandomValues(new Uint32Array(2)).join("-");

let count = 0;

export function newChat(like = {}) {
  count += 1;
  return {
    id: `${Date.now()}-${tab}-${count}`,
    revision: "",
    changed: Date.now(),
    system: like.system ?? "",
    steps: like.steps ?? null,
    thinking: like.thinking ?? false,
    messages: [],
  };
}

export function titleOf(chat) {
  const first = chat.messages.find((each) => each.role === "user")?.content ?? "";
  const line = first.trim().replace(/\s+/g, " ");
  if (!line && chat.messages.length) return "A picture";
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "New chat";
}

const text = (value) => (typeof value === "string" ? value : "");

const PICTURE = /^data:image\/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}$/;

// Addresses of pictures, which hold them; any other address would be asked for.
function pictures(value) {
  const found = Array.isArray(value) ? value : [];
  return found.filter((each) => typeof each === "string" && PICTURE.test(each)).slice(0, MOST_PICTURES);
}

function checkedMessage(value) {
  if (value?.role === "user") {
    const lost = Number.isInteger(value.lost) && value.lost > 0 ? value.lost : 0;
    return { role: "user", content: text(value.content), pictures: pictures(value.pictures), lost };
  }
  if (value?.role !== "assistant") return null;
  return {
    role: "assistant",
    content: text(value.content),
    thought: text(value.thought),
    note: text(value.note),
    facts: text(value.facts),
  };
}

function checked(id, raw) {
  let value;
  try {
    value = JSON.parse(raw);
  } catch {
    return null;
  }
  if (!Array.isArray(value?.messages)) return null;
  const messages = value.messages.map(checkedMessage);
  // A question, then perhaps its answer, and so on.
  if (messages.some((each, i) => !each || each.role !== (i % 2 ? "assistant" : "user"))) return null;
  const steps = Number.isInteger(value.steps) && value.steps > 0 && value.steps <= 1000;
  return {
    id,
    revision: text(value.revision),
    changed: Number(value.changed) || 0,
    system: text(value.system),
    steps: steps ? value.steps : null,
    thinking: value.thinking === true,
    messages,
  };
}

function storage() {
  try {
    return window.localStorage;
  } catch { // a browser that lets no page keep anything
    return null;
  }
}

export function read(id) {
  const raw = storage()?.getItem(PREFIX + id);
  return raw ? checked(id, raw) : null;
}

// All chats that can be read, the newest first.
export function list() {
  const found = [];
  const kept = storage();
  for (let i = 0; kept && i < kept.length; i++) {
    const name = kept.key(i);
    if (!name.startsWith(PREFIX)) continue;
    const raw = kept.getItem(name);
    const chat = checked(name.slice(PREFIX.length), raw);
    if (chat) found.push({ ...chat, size: raw.length });
  }
  return found.sort((a, b) => b.changed - a.changed);
}

function remove(id) {
  storage()?.removeItem(PREFIX + id);
}

// Chats that the user has deleted: an answer that ends later does not bring one back.
const deleted = new Set();

export function forget(id) {
  deleted.add(id);
  remove(id);
}

// A chat as it is kept, with its pictures or with their number alone.
function written(chat, whole = true) {
  const messages = chat.messages.map(checkedMessage).map((each) =>
    whole || !each.pictures?.length ? each
      : { ...each, pictures: [], lost: each.lost + each.pictures.length });
  return JSON.stringify({
    revision: chat.revision,
    changed: chat.changed,
    system: chat.system,
    steps: chat.steps,
    thinking: chat.thinking,
    messages,
  });
}

// Writes a chat. Where another tab has written it since, this one goes on under a name of its own,
// so that neither is lost. Gives what to tell the user, if anything.
export function save(chat) {
  const kept = storage();
  if (!kept) return "This browser keeps no chats.";
  if (deleted.has(chat.id)) return "";
  let told = "";
  const there = read(chat.id);
  if (there && there.revision !== chat.revision) {
    count += 1;
    chat.id = `${Date.now()}-${tab}-${count}`;
    told = "This chat went on in another tab, too; here it is a chat of its own now.";
  }
  chat.changed = Date.now();
  count += 1;
  chat.revision = `${tab}-${count}`;
  let raw = written(chat);
  if (raw.length > MOST_CHARACTERS) {
    raw = written(chat, false);
    told = "The pictures of this chat are too many to be kept in the browser.";
  }
  if (raw.length > MOST_CHARACTERS) return "This chat is too long to be kept in the browser.";
  const others = list().filter((each) => each.id !== chat.id);
  let room = MOST_CHARACTERS - raw.length;
  others.forEach((each, i) => {
    const bare = room < each.size ? written(each, false) : "";
    if (bare && bare.length < each.size) { // pictures go before chats
      kept.setItem(PREFIX + each.id, bare);
      room -= bare.length;
    } else {
      room -= each.size;
    }
    if (room < 0 || i >= MOST_CHATS - 1) remove(each.id);
  });
  for (;;) {
    try {
      kept.setItem(PREFIX + chat.id, raw);
      return told;
    } catch { // full, with what others keep there
      const oldest = list().filter((each) => each.id !== chat.id).pop();
      if (!oldest) return "The browser has no room to keep this chat.";
      remove(oldest.id);
    }
  }
}

// Calls back when another tab has changed a chat.
export function onOthers(changed) {
  window.addEventListener("storage", (event) => {
    if (event.key === null) changed(null);
    else if (event.key.startsWith(PREFIX)) changed(event.key.slice(PREFIX.length));
  });
}
