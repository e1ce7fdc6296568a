// The list of conversations: search, rename, delete with undo, files out and in.

import {count, h, iconButton} from "./dom.js";
import {announce, notice} from "./notices.js";
import {download, fileName, parse} from "./transfer.js";
import {matches, newId} from "./tree.js";

export class Sidebar {
  #renaming = null;

  /** given: conversations (a Map), current(), changed(), and of a conversation: busy, go, saved, removed, restored */
  constructor({list, search, nothing}, given) {
    Object.assign(this, {list, search, nothing, given});
    search.addEventListener("input", () => {
      this.render();
      announce(search.value.trim() ? `${count(this.list.querySelectorAll(".conversation").length, "conversation")} found` : "");
    });
    search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && search.value) {
        event.stopPropagation();
        search.value = "";
        this.render();
      }
      if (event.key === "ArrowDown") {
        event.preventDefault();
        this.list.querySelector(".open")?.focus();
      }
    });
    list.addEventListener("keydown", (event) => this.#arrows(event));
  }

  render() {
    if (this.#renaming) return; // the name is being typed
    const found = [...this.given.conversations.values()]
      .filter((one) => Object.keys(one.nodes).length && matches(one, this.search.value))
      .sort((a, b) => b.updated - a.updated);
    const focused = document.activeElement?.closest?.(".conversation");
    const focus = focused && this.list.contains(focused) ? [focused.dataset.id, document.activeElement.dataset.act] : null;
    const rows = [];
    let heading = "";
    for (const conversation of found) {
      const day = dayOf(conversation.updated);
      if (day !== heading) rows.push(h("li", {class: "day", text: (heading = day)}));
      rows.push(this.#row(conversation));
    }
    this.list.replaceChildren(...rows);
    this.nothing.hidden = found.length > 0;
    this.nothing.textContent = this.search.value.trim() ? "Nothing found." : "No conversations yet.";
    if (focus) this.list.querySelector(`[data-id="${focus[0]}"] [data-act="${focus[1]}"]`)?.focus();
  }

  #row(conversation) {
    const current = conversation === this.given.current();
    const title = conversation.title || "Untitled";
    return h(
      "li",
      {class: "conversation", data: {id: conversation.id}},
      h(
        "button",
        {
          type: "button",
          class: "open",
          "aria-current": current ? "true" : null,
          title,
          data: {act: "open"},
          on: {click: () => this.given.go(conversation)},
        },
        h("span", {class: "title", text: title}),
        this.given.busy(conversation) && h("span", {class: "running", role: "img", "aria-label": "is being answered"}),
      ),
      h(
        "span",
        {class: "tools"},
        iconButton("edit", `Rename “${title}”`, () => this.#rename(conversation), {"data-act": "rename"}),
        iconButton("save", `Export “${title}”`, () => download([conversation], fileName(title)), {"data-act": "export"}),
        iconButton("trash", `Delete “${title}”`, () => this.remove(conversation), {"data-act": "delete"}),
      ),
    );
  }

  #arrows(event) {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (!step || !event.target.matches(".open")) return;
    event.preventDefault();
    const all = [...this.list.querySelectorAll(".open")];
    (all[all.indexOf(event.target) + step] ?? (step < 0 ? this.search : event.target)).focus();
  }

  #rename(conversation) {
    const row = this.list.querySelector(`[data-id="${conversation.id}"]`);
    const leave = (kept) => {
      if (this.#renaming !== input) return;
      this.#renaming = null;
      if (kept && input.value.trim()) {
        Object.assign(conversation, {title: input.value.trim().slice(0, 200), named: true});
        this.given.saved(conversation);
      }
      this.given.changed();
      this.list.querySelector(`[data-id="${conversation.id}"] [data-act="rename"]`)?.focus();
    };
    const input = h("input", {
      type: "text",
      "aria-label": "Name of the conversation",
      maxlength: "200",
      on: {
        keydown: (event) => {
          if (event.key === "Enter" && !event.isComposing) leave(true);
          if (event.key === "Escape") {
            event.stopPropagation();
            leave(false);
          }
        },
        blur: () => leave(true),
      },
    });
    input.value = conversation.title;
    row.replaceChildren(input);
    this.#renaming = input;
    input.focus();
    input.select();
  }

  remove(conversation) {
    const next = this.list.querySelector(
      `[data-id="${conversation.id}"] + .conversation .open, .conversation:has(+ [data-id="${conversation.id}"]) .open`,
    )?.parentElement.dataset.id;
    this.given.removed(conversation);
    (this.list.querySelector(`[data-id="${next}"] .open`) ?? this.search).focus();
    const undo = {label: "Undo", seconds: 10, act: () => this.given.restored(conversation)};
    notice(`“${conversation.title || "Untitled"}” is deleted.`, undo);
  }

  exportAll() {
    const all = [...this.given.conversations.values()].filter((one) => Object.keys(one.nodes).length);
    if (!all.length) return notice("There are no conversations to export.");
    download(all, `conversations-${new Date().toISOString().slice(0, 10)}.json`);
  }

  /** Take in a file of conversations; one that is already here in the same words is left out, a changed one comes in beside it. */
  async importFile(file) {
    let read;
    try {
      read = parse(await file.text());
    } catch (error) {
      return notice(`“${file.name}” cannot be imported: ${error.message}.`, {seconds: 12});
    }
    let taken = 0;
    for (const conversation of read) {
      const here = this.given.conversations.get(conversation.id);
      if (here && words(here) === words(conversation)) continue;
      if (here) conversation.id = newId();
      this.given.restored(conversation, {quiet: true});
      taken += 1;
    }
    const known = read.length - taken;
    notice(`${count(taken, "conversation")} imported${known ? `, ${known} already here` : ""}.`);
  }
}

const words = ({title, system, nodes}) =>
  JSON.stringify([title, system, Object.values(nodes).map(({id, parent, role, parts}) => [id, parent, role, parts])]);

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - 86400000) return "Yesterday";
  if (time >= midnight - 6 * 86400000) return "Last 7 days";
  return new Date(time).toLocaleDateString("en", {month: "long", year: "numeric"});
}
