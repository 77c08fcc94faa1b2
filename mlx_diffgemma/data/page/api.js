// Asks the server: with its key, again where it is busy, and as a stream of events.

const KEY = "diffgemma.key";

// How often a busy server is asked again.
const TRIES = 6;

export class ApiError extends Error {
  constructor(status, message, wait = 0) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

// The key lives as long as the tab. A link may bring it behind #key=, which is then taken away.
export const key = {
  get: () => stored() ?? "",
  set(value) {
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch { /* a browser without storage asks again */ }
    memory = value;
  },
};

let memory = "";

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? memory;
  } catch {
    return memory;
  }
}

export function takeKeyOfAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given === null) return;
  key.set(given.trim());
  history.replaceState(null, "", location.pathname + location.search);
}

// A header holds bytes; the server reads a key as UTF-8.
const bytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

async function call(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${bytes(key.get())}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let said = `The server answers with status ${response.status}.`;
  try {
    said = (await response.json()).error.message;
  } catch { /* something between us and the server answered */ }
  throw new ApiError(response.status, said, Number(response.headers.get("Retry-After")) || 2);
}

export async function get(path) {
  return (await call(path)).json();
}

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    reject(new DOMException("stopped", "AbortError"));
  });
});

// Posts a body and gives [type, value] of each event, until the server says that it is done.
// `wantKey` asks the user for a key, and `tell` says what is waited for.
export async function* ask(path, body, { signal, wantKey, tell }) {
  yield* events(await patiently(path, body, { signal, wantKey, tell }));
}

async function patiently(path, body, { signal, wantKey, tell }) {
  for (let tried = 1; ; tried++) {
    try {
      return await call(path, { body, signal });
    } catch (error) {
      if (error.status === 401 && await wantKey()) continue;
      if (error.status !== 429 || tried === TRIES) throw error;
      tell(`The server is busy; asking again in ${error.wait} s.`);
      await pause(error.wait, signal);
    }
  }
}

const BROKEN = "The connection broke before the answer was complete.";

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) throw new ApiError(0, BROKEN);
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const event = parse(part);
      if (event === null) return;
      if (event) yield event;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, BROKEN);
  }
}

// [type, value]; null at the end of all, undefined for what is no event of ours.
function parse(part) {
  let type = "message", data = "";
  for (const line of part.split("\n")) {
    if (line.startsWith("event: ")) type = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  if (data === "[DONE]") return null;
  if (!data) return undefined;
  let value;
  try {
    value = JSON.parse(data);
  } catch {
    throw new ApiError(0, BROKEN);
  }
  if (value === null || typeof value !== "object") return undefined;
  if (value.error) throw new ApiError(0, String(value.error.message ?? value.error));
  return [type, value];
}
