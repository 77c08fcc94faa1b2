// Turns what a model wrote into elements. It may be anything: HTML in it is shown as text, and
// what Markdown makes of the rest goes through DOMPurify, down to a few harmless tags.

import { copyButton, make } from "./dom.js";
import DOMPurify from "./vendor/purify.js";
import { Marked } from "./vendor/marked.js";

// Characters beyond which a text is shown as it is: parsing would hold up the page.
const MOST = 100_000;

const TAGS = (
  "p br strong em del code pre blockquote ul ol li hr table thead tbody tr th td a h3 h4 h5 h6"
).split(" ");

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    // An image would be fetched from wherever the model says, with whatever it puts there.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    heading({ tokens, depth }) {
      const tag = `h${Math.min(depth + 2, 6)}`;
      return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>`;
    },
  },
});

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName !== "class") return;
  data.keepAttr = node.nodeName === "CODE" && /^language-[\w+#.-]{1,30}$/.test(data.attrValue);
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

const RULES = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

// A fragment that shows the text.
export function render(text) {
  if (text.length > MOST) return plain(text);
  try {
    const found = DOMPurify.sanitize(marked.parse(text), RULES);
    found.querySelectorAll("pre").forEach(withCopy);
    found.querySelectorAll("table").forEach(scrollable);
    return found;
  } catch { // nested beyond what a stack holds
    return plain(text);
  }
}

function plain(text) {
  const found = document.createDocumentFragment();
  found.append(make("div", { className: "as-it-is" }, text));
  return found;
}

function withCopy(pre) {
  const code = pre.querySelector("code");
  const language = /^language-(.+)$/.exec(code?.className ?? "")?.[1] ?? "";
  const copy = copyButton(() => pre.textContent.replace(/\n$/, ""), "the code");
  const head = make("div", { className: "code-head" }, make("span", {}, language), copy);
  pre.tabIndex = 0;
  pre.before(make("div", { className: "code" }, head));
  pre.previousSibling.append(pre);
}

function scrollable(table) {
  const box = make("div", { className: "table", tabIndex: 0 });
  table.before(box);
  box.append(table);
}
