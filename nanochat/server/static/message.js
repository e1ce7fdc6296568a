// One message as it is seen: text, alternatives, buttons, what went wrong.

import {copy, count, h, icon, iconButton} from "./dom.js";
import {Prose} from "./markdown.js";
import {announce} from "./notices.js";
import {choose, plain, siblings, textOf} from "./tree.js";

/** acts: edit(node, text), again(node), retry(node), withoutOldest(node), withKey(node, key), chosen() */
export class MessageView {
  #acts;
  #node;
  #seen = {}; // what each piece shows, so that nothing is made anew without need
  #timer = null;

  constructor(conversation, node, acts) {
    this.#acts = acts;
    this.#node = node;
    this.conversation = conversation;
    this.answer = node.role === "assistant";
    this.body = h("div", {class: this.answer ? "prose" : "bubble"});
    this.notes = h("div", {class: "notes"});
    this.problem = h("div", {class: "problem-place"});
    this.actions = h("div", {class: "actions"});
    this.heading = h("h2", {class: "unseen", text: this.answer ? `Answer${node.model ? ` of ${node.model}` : ""}` : "You"});
    this.element = h(
      "li",
      {class: `message ${node.role}`, data: {id: node.id}},
      this.heading,
      this.notes,
      this.body,
      this.problem,
      this.actions,
    );
    if (this.answer && !node.raw) this.prose = new Prose(this.body, announce);
  }

  /** Bring it up to date. busy: an answer of this conversation is being written, so nothing may be changed. */
  update({busy, last}) {
    const node = this.#node;
    this.element.classList.toggle("last", last);
    this.#show("body", `${node.state}/${node.parts.map((part) => part.text.length)}`, () => this.#showBody(node));
    this.#show("notes", `${node.dropped}/${node.state}/${node.finish}`, () => this.#showNotes(node));
    this.#show("problem", JSON.stringify(node.error ?? null) + busy, () => this.#showProblem(node, busy));
    const family = siblings(this.conversation, node);
    this.#show("actions", `${busy}/${family.map(({id}) => id)}/${node.state}/${node.parts.length > 0}/${Boolean(node.timings)}`, () =>
      this.#showActions(node, family, busy),
    );
  }

  remove() {
    clearInterval(this.#timer);
    this.element.remove();
  }

  #show(what, seen, make) {
    if (this.#seen[what] === seen) return;
    this.#seen[what] = seen;
    make();
  }

  #showBody(node) {
    const writing = node.state === "streaming";
    this.element.setAttribute("aria-busy", writing);
    this.element.classList.toggle("writing", writing);
    if (this.prose) this.prose.show(node.parts, !writing);
    else if (node.raw) this.body.replaceChildren(h("div", {class: "verbatim", text: textOf(node)}));
    else this.body.textContent = textOf(node);
    this.body.classList.toggle("empty", !node.parts.length);
    this.body.classList.toggle("waiting", writing && !node.parts.length);
  }

  #showNotes(node) {
    const notes = [];
    if (node.dropped)
      notes.push(
        `To make room, the oldest ${node.dropped === 1 ? "turn was" : `${node.dropped} turns were`} left out of what the model read.`,
      );
    this.notes.replaceChildren(...notes.map((text) => h("p", {class: "note", text})));
  }

  #showProblem(node, busy) {
    clearInterval(this.#timer);
    this.problem.replaceChildren();
    if (node.state === "failed" && node.error) this.problem.append(this.#problemCard(node, node.error, busy));
  }

  #problemCard(node, error, busy) {
    const card = h("div", {class: "problem", role: "group", "aria-label": "What went wrong"});
    const button = (text, act, kind = "plain") => h("button", {type: "button", class: kind, text, disabled: busy, on: {click: act}});
    if (error.code === "context_length_exceeded") {
      card.append(h("p", {}, h("strong", {text: "This conversation no longer fits. "}), error.message));
      if (!error.dropped)
        card.append(
          h(
            "div",
            {class: "row start"},
            button("Continue without the oldest turns", () => this.#acts.withoutOldest(node), "main"),
          ),
        );
      return card;
    }
    if (error.status === 401) return this.#keyCard(node, card);
    const retry = button("Retry", () => this.#acts.retry(node));
    const line = h(
      "p",
      {},
      h("strong", {text: error.status === 429 ? "The server is busy. " : node.parts.length ? "The answer broke off. " : "No answer. "}),
      error.message,
    );
    card.append(line, h("div", {class: "row start"}, retry));
    if (error.retryAt) {
      const tick = () => {
        const seconds = Math.ceil((error.retryAt - Date.now()) / 1000);
        retry.disabled = busy || seconds > 0;
        retry.textContent = seconds > 0 ? `Retry in ${seconds} s` : "Retry";
        if (seconds <= 0) clearInterval(this.#timer);
      };
      this.#timer = setInterval(tick, 250);
      tick();
    }
    return card;
  }

  #keyCard(node, card) {
    const id = `key-${node.id}`;
    const input = h("input", {type: "password", id, autocomplete: "off", required: true, spellcheck: "false"});
    card.append(
      h(
        "form",
        {
          on: {
            submit: (event) => {
              event.preventDefault();
              if (input.value.trim()) this.#acts.withKey(node, input.value.trim());
            },
          },
        },
        h("label", {for: id}, h("strong", {text: "This server asks for an API key."})),
        h("div", {class: "row start"}, input, h("button", {class: "main", text: "Use it"})),
        h("p", {class: "hint", text: "It is kept in this browser only, and sent to this server only."}),
      ),
    );
    return card;
  }

  #showActions(node, family, busy) {
    const focused = this.actions.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    const buttons = [];
    if (family.length > 1) {
      const at = family.indexOf(node);
      const go = (step) => () => {
        choose(this.conversation, family[at + step]);
        this.#acts.chosen(family[at + step], step);
      };
      buttons.push(
        h(
          "span",
          {class: "alternatives", role: "group", "aria-label": "Alternatives"},
          iconButton("back", "Previous alternative", go(-1), {disabled: at === 0}),
          h("span", {class: "count", text: `${at + 1}/${family.length}`}),
          iconButton("next", "Next alternative", go(1), {disabled: at === family.length - 1}),
        ),
      );
    }
    if (node.state !== "streaming" && (node.parts.length || !this.answer)) {
      const button = iconButton("copy", "Copy", () => copy(plain(node), button, announce));
      buttons.push(button);
    }
    const retried = node.state === "failed" && node.error?.code !== "context_length_exceeded"; // there is a button for it above
    if (this.answer && node.state !== "streaming" && !retried)
      buttons.push(iconButton("again", "Another answer", () => this.#acts.again(node), {disabled: busy}));
    if (!this.answer) buttons.push(iconButton("edit", "Edit", () => this.#edit(), {disabled: busy}));
    const stats = this.answer && node.state !== "streaming" ? statistics(node) : "";
    if (stats) buttons.push(h("span", {class: "stats", text: stats}));
    this.actions.replaceChildren(...buttons);
    if (focused) this.actions.querySelector(`[aria-label="${focused}"]:enabled`)?.focus();
  }

  /** Turn the message into a field; sending makes a new branch beside it. */
  #edit() {
    const node = this.#node;
    const area = h("textarea", {
      "aria-label": "Edit your message",
      on: {
        input: grow,
        keydown: (event) => {
          if (event.key === "Escape") {
            event.preventDefault();
            event.stopPropagation();
            leave();
          } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            send();
          }
        },
      },
    });
    function grow() {
      area.style.height = "auto";
      area.style.height = `${area.scrollHeight + 2}px`;
    }
    const leave = () => {
      form.remove();
      this.element.classList.remove("editing");
      this.actions.querySelector('[aria-label="Edit"]')?.focus();
    };
    const send = () => {
      if (area.value.trim()) {
        leave();
        this.#acts.edit(node, area.value);
      }
    };
    const form = h(
      "div",
      {class: "edit"},
      area,
      h(
        "div",
        {class: "row"},
        h("span", {class: "hint", text: "The earlier version stays."}),
        h("button", {type: "button", class: "plain", text: "Cancel", on: {click: leave}}),
        h("button", {type: "button", class: "main", text: "Send", on: {click: send}}),
      ),
    );
    area.value = textOf(node);
    this.element.classList.add("editing");
    this.body.after(form);
    grow();
    area.focus();
  }

  startEditing() {
    this.#edit();
  }
}

/** The line under an answer: how it ended if it was cut off, how long it is, how fast it came. */
function statistics(node) {
  const told = [];
  const times = node.timings ?? {};
  if (node.state === "stopped") told.push("stopped");
  if (node.finish === "length") told.push(times.context_used >= times.context_length ? "the context is full" : "cut at the longest answer");
  if (times.completion_tokens) told.push(count(times.completion_tokens, "token"));
  if (times.tokens_per_second) told.push(`${times.tokens_per_second.toFixed(times.tokens_per_second < 10 ? 1 : 0)} tokens/s`);
  return told.join(" · ");
}

/** A note in the list that is not part of the conversation: what a slash command said. */
export const remark = (text) => h("li", {class: "remark"}, icon("sliders"), h("span", {text}));
