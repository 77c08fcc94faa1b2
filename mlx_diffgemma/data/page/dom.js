// Makes elements. Text is always text: nothing here reads HTML.

export const find = (id) => document.getElementById(id);

// An element with properties, and children that are elements or text.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function button(text, act, properties = {}) {
  const made = make("button", { type: "button", className: "plain", ...properties }, text);
  made.addEventListener("click", act);
  return made;
}

// A button that copies what `text` gives, and says so for a moment.
export function copyButton(text, what) {
  const made = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      made.textContent = "Copied";
    } catch {
      made.textContent = copied(text()) ? "Copied" : "Not allowed";
    }
    setTimeout(() => (made.textContent = "Copy"), 1500);
  }, { "aria-label": `Copy ${what}` });
  return made;
}

// Over plain HTTP from another machine there is no clipboard, but there is a selection.
function copied(text) {
  const area = make("textarea", { value: text, className: "hidden" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

// Whether a key press sends: Enter alone, and not the one that ends a word of an input method, which
// Safari tells by its code only.
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

// Lets a text area be as high as its text, and never lower than it was made.
export function grow(area) {
  const fit = () => {
    area.style.height = "auto";
    if (area.scrollHeight > area.clientHeight) area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  return fit;
}
