// Markdown of an answer → elements, safely, while it is still being written.
//
// Three walls stand between what a model writes and the page. HTML in the text is shown, not obeyed (the renderer escapes it). What marked
// makes of the rest goes through DOMPurify with short lists of tags and attributes; it comes back as nodes, so that no string is ever
// put into the page, and DOMPurify's own parsing goes through its Trusted Types policy. And the server's content-security policy forbids
// inline scripts, styles, and everything from other hosts.

import {Marked} from "./vendor/marked.esm.js";
import "./vendor/purify.min.js"; // sets DOMPurify
import {copy, h, icon, iconButton} from "./dom.js";
import {highlighted} from "./highlight.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a",
    "b",
    "blockquote",
    "br",
    "code",
    "del",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "li",
    "ol",
    "p",
    "pre",
    "s",
    "span",
    "strong",
    "sub",
    "sup",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.codePointAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({text, block}) => (block ? `<p>${escape(text.trimEnd())}</p>` : escape(text)),
    image({href, text}) {
      // never loaded: a link to it
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
    checkbox: ({checked}) => (checked ? "☑ " : "☐ "),
    code: ({text, lang}) => `<pre><code class="language-${/^[\w+#.-]*/.exec(lang ?? "")[0]}">${escape(text)}</code></pre>`,
  },
});

const clean = (html) => DOMPurify.sanitize(html, ALLOWED);

/** The prose of one answer. `show(parts)` may be called with ever longer text; only what changed is made anew. */
export class Prose {
  #blocks = []; // {raw, nodes} of each top-level block of the text
  #chips = []; // one for each tool call
  #say;

  constructor(element, say) {
    this.element = element;
    this.#say = say;
  }

  /** whole: the text is complete; a link definition at its end may serve a link at its beginning. */
  show(parts, whole = false) {
    const text = this.#withChips(parts);
    let tokens;
    try {
      tokens = marked.lexer(text);
    } catch {
      tokens = null; // nested beyond reason
    }
    if (!tokens) return this.#replace(0, [{raw: text, nodes: [h("p", {class: "verbatim", text})]}]);
    const blocks = tokens.filter(({type}) => type !== "space" && type !== "def");
    let same = 0;
    if (!whole || !tokens.some(({type}) => type === "def"))
      while (same < blocks.length && blocks[same].raw === this.#blocks[same]?.raw) same += 1;
    this.#replace(
      same,
      blocks.slice(same).map((token) => ({raw: token.raw, nodes: this.#made(token, tokens.links)})),
    );
  }

  #replace(from, blocks) {
    for (const {nodes} of this.#blocks.splice(from)) for (const node of nodes) node.remove();
    for (const {nodes} of blocks) this.element.append(...nodes);
    this.#blocks.push(...blocks);
  }

  #made(token, links) {
    let fragment;
    try {
      fragment = clean(marked.parser(Object.assign([token], {links})));
    } catch {
      return [h("p", {class: "verbatim", text: token.raw})];
    }
    for (const link of fragment.querySelectorAll("a")) {
      if (!link.hasAttribute("href")) link.replaceWith(...link.childNodes);
      else
        for (const [name, value] of [
          ["target", "_blank"],
          ["rel", "noopener noreferrer"],
        ])
          link.setAttribute(name, value);
    }
    for (const table of fragment.querySelectorAll("table")) {
      const frame = h("div", {class: "wide", tabindex: "0", role: "region", "aria-label": "Table"});
      table.replaceWith(frame);
      frame.append(table);
    }
    for (const code of fragment.querySelectorAll("pre > code")) this.#code(code);
    this.#putChips(fragment);
    return [...fragment.childNodes].filter((node) => node.nodeType !== Node.TEXT_NODE || node.data.trim());
  }

  /** A block of code in its frame: the language, a copy button, colours. */
  #code(code) {
    const text = code.textContent;
    const language = code.className.replace("language-", "");
    const colours = highlighted(text, language.toLowerCase());
    if (colours !== null) code.replaceChildren(clean(colours));
    const pre = code.parentElement;
    const button = iconButton("copy", "Copy code", () => copy(text.replace(MARK, ""), button, this.#say));
    const frame = h("div", {class: "code"}, h("div", {class: "code-head"}, h("span", {text: language || "text"}), button));
    pre.replaceWith(frame);
    pre.tabIndex = 0; // so that arrow keys can scroll it
    frame.append(pre);
  }

  /** One text of all parts, a mark in it for each tool call; the chips are made or brought up to date. */
  #withChips(parts) {
    let text = "",
      calls = 0;
    parts.forEach((part, i) => {
      if (part.type === "text") text += part.text.replace(/[\uE000\uE001]/g, "\uFFFD");
      else if (part.type === "python" || parts[i - 1]?.type !== "python") {
        const result = part.type === "python_output" ? part : parts[i + 1]?.type === "python_output" ? parts[i + 1] : null;
        this.#chip(calls, part.type === "python" ? part.text : "", result?.text ?? null);
        text += `\uE000${calls}\uE001`;
        calls += 1;
      }
    });
    return text;
  }

  #chip(at, asked, result) {
    const chip = (this.#chips[at] ??= h("span", {class: "chip", title: "Worked out with the calculator"}));
    const shown = result === null ? asked : `${asked} = ${result}`;
    if (chip.dataset.shown === shown) return;
    chip.dataset.shown = shown;
    chip.replaceChildren(
      icon("sum"),
      h("span", {class: "unseen", text: "calculator: "}),
      h("span", {text: asked}),
      ...(result === null
        ? [h("span", {class: "pending", text: " = …"})]
        : [h("span", {class: "equals", text: " = "}), h("strong", {text: result})]),
    );
  }

  #putChips(fragment) {
    const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode()) if (walker.currentNode.data.includes("\uE000")) texts.push(walker.currentNode);
    for (const node of texts) {
      const pieces = node.data.split(MARK); // text, number, text, number, …
      node.replaceWith(...pieces.map((piece, i) => (i % 2 ? (this.#chips[piece] ?? "") : piece)));
    }
  }
}

const MARK = /\uE000(\d+)\uE001/g;
