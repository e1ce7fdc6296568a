// The field at the foot of the page: writing, sending, stopping, slash commands.

import {command, COMMANDS} from "./commands.js";
import {h, relabel} from "./dom.js";

export class Composer {
  /** given: busy(), send(text), stop(), remark(text), settings, clear(), help(), raw(), editLast() */
  constructor({form, area, button, menu}, given) {
    Object.assign(this, {form, area, button, menu, given});
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#act();
    });
    area.addEventListener("input", () => this.update());
    area.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("resize", () => this.#grow());
    this.update();
  }

  #key(event) {
    if (event.isComposing) return; // Enter chooses a character there
    const touch = matchMedia("(pointer: coarse)").matches; // a phone's Enter makes a line
    if (event.key === "Enter" && !event.shiftKey && !touch) {
      event.preventDefault();
      if (!this.given.busy()) this.#act();
    } else if (event.key === "ArrowUp" && !this.area.value) {
      event.preventDefault();
      this.given.editLast();
    } else if (event.key === "Tab" && !event.shiftKey && !this.menu.hidden && this.menu.children.length) {
      const first = this.menu.firstChild.dataset.command;
      if (first !== this.area.value.trim()) {
        event.preventDefault();
        this.set(`${first} `);
      }
    }
  }

  #act() {
    if (this.given.busy()) return this.given.stop();
    const text = this.area.value;
    if (!text.trim()) return;
    const said = text.startsWith("/") ? command(text, this.given) : null;
    if (said === null) this.given.send(this.given.raw() ? text : text.trim());
    else if (said) this.given.remark(said);
    this.set("");
  }

  set(text) {
    this.area.value = text;
    this.update();
  }

  focus() {
    this.area.focus();
  }

  update() {
    const busy = this.given.busy();
    if (this.button.dataset.busy !== String(busy)) {
      this.button.dataset.busy = busy;
      relabel(this.button, busy ? "stop" : "send", busy ? "Stop (Esc)" : "Send (Enter)");
    }
    this.button.disabled = !busy && !this.area.value.trim();
    const typed = /^\/\w*$/.test(this.area.value) ? this.area.value.toLowerCase() : null;
    const fitting = typed === null ? [] : COMMANDS.filter(([name]) => name.startsWith(typed));
    this.menu.hidden = !fitting.length;
    this.menu.replaceChildren(
      ...fitting.map(([name, does]) =>
        h(
          "button",
          {
            type: "button",
            class: "command",
            data: {command: name},
            on: {
              click: () => {
                this.set(`${name} `);
                this.focus();
              },
            },
          },
          h("code", {text: name}),
          h("span", {text: does}),
        ),
      ),
    );
    this.#grow();
  }

  #grow() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, innerHeight * 0.4)}px`;
  }
}
