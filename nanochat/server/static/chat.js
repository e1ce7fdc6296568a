// The conversation that is shown, and the answers that are being written, in it and in others.

import {h} from "./dom.js";
import {MessageView, remark} from "./message.js";
import {announce} from "./notices.js";
import {run} from "./run.js";
import {add, drop, path, plain} from "./tree.js";

export class Chat {
  #views = new Map(); // node id → MessageView, of what is shown
  #runs = new Map(); // conversation id → {controller, node}
  #remarks = [];
  #following = true; // the end of the conversation is kept in sight
  #frame = 0;

  /** parts: the elements of the page; given: model(), sampling(), key(), saved(conversation), keyGiven(key), changed() */
  constructor({scroller, list, empty, latest}, given) {
    Object.assign(this, {scroller, list, empty, latest, given});
    scroller.addEventListener(
      "scroll",
      () => {
        this.#following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
        latest.hidden = this.#following;
      },
      {passive: true},
    );
    latest.addEventListener("click", () => this.#toEnd());
    new ResizeObserver(() => this.#following && this.#toEnd()).observe(list);
  }

  show(conversation) {
    if (this.conversation !== conversation) {
      for (const view of this.#views.values()) view.remove();
      this.#views.clear();
      this.#remarks = [];
    }
    this.conversation = conversation;
    this.render();
    this.#following = true;
    this.#toEnd();
  }

  busy(conversation = this.conversation) {
    return this.#runs.has(conversation.id);
  }

  /** What a command said, below the conversation until the next message. */
  remark(text) {
    this.#remarks.push(remark(text));
    this.render();
    this.#toEnd();
    announce(text);
  }

  render() {
    const nodes = path(this.conversation);
    const busy = this.busy();
    const shown = new Set(nodes.map(({id}) => id));
    for (const [id, view] of this.#views)
      if (!shown.has(id)) {
        view.remove();
        this.#views.delete(id);
      }
    nodes.forEach((node, i) => {
      let view = this.#views.get(node.id);
      if (!view) this.#views.set(node.id, (view = new MessageView(this.conversation, node, this.#acts())));
      if (this.list.children[i] !== view.element) this.list.insertBefore(view.element, this.list.children[i] ?? null);
      view.update({busy, last: i === nodes.length - 1});
    });
    this.list.querySelectorAll(":scope > .remark").forEach((element) => element.remove());
    this.list.append(...this.#remarks);
    this.empty.hidden = nodes.length > 0 || this.#remarks.length > 0;
    this.given.changed();
  }

  #toEnd() {
    this.scroller.scrollTop = this.empty.hidden ? this.scroller.scrollHeight : 0;
  }

  // ---- what a person does

  send(text) {
    const last = path(this.conversation).at(-1);
    const node = add(this.conversation, last?.id ?? "", "user", [{type: "text", text}]);
    this.answer(this.conversation, node);
  }

  /** Stop the answer of the conversation that is shown; returns whether there was one. */
  stop(conversation = this.conversation) {
    const running = this.#runs.get(conversation.id);
    running?.controller.abort();
    return Boolean(running);
  }

  editLast() {
    const node = path(this.conversation).findLast(({role}) => role === "user");
    if (node && !this.busy()) this.#views.get(node.id).startEditing();
  }

  #acts() {
    const conversation = this.conversation;
    const asked = (node) => conversation.nodes[node.parent];
    return {
      chosen: (node, step) => {
        this.given.saved(conversation);
        this.render();
        const view = this.#views.get(node.id);
        const side = (name) => view.actions.querySelector(`[aria-label="${name} alternative"]:enabled`);
        (side(step < 0 ? "Previous" : "Next") ?? side(step < 0 ? "Next" : "Previous"))?.focus();
        view.element.scrollIntoView({block: "nearest"});
      },
      edit: (node, text) => this.answer(conversation, add(conversation, node.parent, "user", [{type: "text", text}])),
      again: (node) => this.answer(conversation, asked(node)),
      retry: (node) => this.#anew(conversation, node),
      withoutOldest: (node) => {
        conversation.dropOldest = true;
        this.#anew(conversation, node);
      },
      withKey: (node, key) => {
        this.given.keyGiven(key);
        this.#anew(conversation, node);
      },
    };
  }

  /** Answer again; what had come of the failed answer stays as an alternative, if anything had. */
  #anew(conversation, node) {
    const question = conversation.nodes[node.parent];
    if (!node.parts.length) drop(conversation, node);
    this.answer(conversation, question);
  }

  // ---- answers

  /** Write an answer below the user's message `question`. */
  async answer(conversation, question) {
    if (this.busy(conversation)) return;
    const model = this.given.model();
    const node = add(conversation, question.id, "assistant", [], {
      model: model?.id ?? "",
      raw: model?.chat === false,
      state: "streaming",
      finish: "",
      dropped: 0,
    });
    const controller = new AbortController();
    this.#runs.set(conversation.id, {controller, node});
    this.#remarks = [];
    if (conversation === this.conversation) this.#following = true;
    announce("The model is answering.");
    this.render();
    this.#toEnd();
    let savedAt = 0;
    const changed = () => {
      if (conversation === this.conversation)
        this.#frame ||= requestAnimationFrame(() => {
          this.#frame = 0;
          this.#views.get(node.id)?.update({busy: this.busy(), last: true}); // only what grows: the rest may be under the pointer
        });
      if (Date.now() - savedAt > 700) {
        savedAt = Date.now();
        this.given.saved(conversation); // a page that is closed keeps what had come
      }
    };
    this.given.saved(conversation);
    await run(conversation, node, {sampling: this.given.sampling(), key: this.given.key(), signal: controller.signal, changed});
    this.#runs.delete(conversation.id);
    this.given.saved(conversation);
    if (conversation === this.conversation) this.render();
    else this.given.changed();
    announce(node.error ? `Something went wrong: ${node.error.message}` : `${node.state === "stopped" ? "Stopped. " : ""}${plain(node)}`);
  }
}

/** An answer that was being written when the page was closed: the text so far, and a button to continue. */
export function mendBroken(conversation) {
  let broken = false;
  for (const node of Object.values(conversation.nodes)) {
    if (node.state !== "streaming") continue;
    broken = true;
    Object.assign(node, {
      state: "failed",
      error: {message: "The page was closed while it was being written.", kind: "early", status: 0, code: null, retryAt: null},
    });
  }
  return broken;
}

/** The first thing seen: what this model is and is not, and something to click. */
export function emptyState(prompts, ask) {
  return [
    h("h2", {text: "A small model of your own"}),
    h("p", {
      class: "lead",
      text: "It was trained in an evening, from raw text to this page. It can talk about everyday things, do sums with a calculator, and spell.",
    }),
    h(
      "ul",
      {class: "isnot"},
      h("li", {text: "It makes things up, and sounds sure of them."}),
      h("li", {text: "It has no internet and remembers nothing between conversations."}),
      h("li", {text: "What you write goes to this server only; conversations are kept in this browser."}),
    ),
    h(
      "div",
      {class: "prompts", role: "group", "aria-label": "Things to ask"},
      ...prompts.map((text) => h("button", {type: "button", class: "prompt", text, on: {click: () => ask(text)}})),
    ),
  ];
}
