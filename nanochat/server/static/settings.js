// How answers are sampled: the values, kept in this browser, and the sheet with the sliders.

import {h, iconButton} from "./dom.js";
import {keep, recall} from "./store.js";

//   name, label, lowest, highest, step, at first, what it does
const FIELDS = [
  ["temperature", "Temperature", 0, 2, 0.05, 0.8, "0 takes the most likely token each time; higher is more varied."],
  ["top_p", "Top-p", 0.05, 1, 0.01, 1, "Sample from the most likely tokens that together have this much of the probability."],
  ["top_k", "Top-k", 0, 200, 1, 50, "Sample from this many of the most likely tokens; 0 = all."],
  ["repetition_penalty", "Repetition penalty", 1, 2, 0.05, 1, "Above 1, tokens seen before become less likely."],
  ["max_tokens", "Longest answer", 1, 2048, 1, 512, "In tokens; three are about two words."],
];
const OTHERS = {seed: null};

export class Settings extends EventTarget {
  #given = recall("settings", {}); // only what was changed by hand
  #offered = {}; // the server's own, where it says so

  get(name) {
    const field = FIELDS.find(([known]) => known === name);
    const given = this.#given[name];
    if (!field) return Number.isSafeInteger(given) ? given : OTHERS[name];
    return typeof given === "number" && given >= field[2] && given <= this.highest(field)
      ? given
      : Math.min(this.#offered[name] ?? field[5], this.highest(field));
  }

  set(name, value) {
    this.#given = {...this.#given, [name]: value};
    keep("settings", this.#given);
    this.dispatchEvent(new Event("change"));
  }

  reset() {
    this.#given = {};
    keep("settings", null);
    this.dispatchEvent(new Event("change"));
  }

  /** The model that will answer: its context bounds the longest answer, and it may name the values it is best used with. */
  offer(model) {
    this.context = model?.context_length ?? 2048;
    this.#offered = model?.defaults ?? {};
    this.dispatchEvent(new Event("change"));
  }

  highest = ([name, , , high]) => (name === "max_tokens" ? (this.context ?? high) : high);

  /** As fields of a request. */
  sampling() {
    const fields = Object.fromEntries(FIELDS.map(([name]) => [name, this.get(name)]));
    return this.get("seed") === null ? fields : {...fields, seed: this.get("seed")};
  }
}

/** The sheet. conversation() gives the one that is shown, saved(conversation) is called when its system prompt has changed. */
export function settingsSheet(settings, {conversation, saved, keyChanged}) {
  const system = h("textarea", {
    id: "system",
    rows: "4",
    placeholder: "You answer in one short sentence.",
    on: {
      input() {
        conversation().system = system.value;
        keep("system", system.value || null);
        saved(conversation());
      },
    },
  });
  const rows = FIELDS.map((field) => slider(settings, field));
  const seed = h("input", {
    id: "seed",
    type: "number",
    step: "1",
    min: "0",
    placeholder: "random",
    on: {
      input() {
        const value = seed.valueAsNumber;
        settings.set("seed", Number.isSafeInteger(value) && value >= 0 ? value : null);
      },
    },
  });
  const forget = h(
    "div",
    {class: "field"},
    h("p", {class: "hint", text: "An API key is kept in this browser."}),
    h("button", {
      type: "button",
      class: "plain",
      text: "Forget the API key",
      on: {
        click() {
          keyChanged("");
          show();
        },
      },
    }),
  );
  const dialog = h(
    "dialog",
    {class: "sheet", "aria-labelledby": "settings-title"},
    h(
      "header",
      {},
      h("h2", {id: "settings-title", text: "Settings"}),
      iconButton("close", "Close settings", () => dialog.close()),
    ),
    h(
      "div",
      {class: "field"},
      h("label", {for: "system", text: "System prompt"}),
      system,
      h("p", {class: "hint", text: "Put before the first message of this conversation, and of new ones."}),
    ),
    ...rows.map(({element}) => element),
    h(
      "div",
      {class: "field"},
      h("label", {for: "seed", text: "Seed"}),
      seed,
      h("p", {class: "hint", text: "Blank: another answer each time. A number: the same answer each time."}),
    ),
    h(
      "div",
      {class: "field"},
      h("button", {type: "button", class: "plain", text: "Back to the defaults", on: {click: () => settings.reset()}}),
    ),
    forget,
  );
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  }); // outside of it
  const show = () => {
    for (const row of rows) row.show();
    if (document.activeElement !== seed) seed.value = settings.get("seed") ?? "";
    system.value = conversation().system;
    forget.hidden = !recall("key", "");
  };
  settings.addEventListener("change", () => dialog.open && show());
  return {
    element: dialog,
    open() {
      show();
      dialog.showModal();
    },
  };
}

function slider(settings, field) {
  const [name, label, low, , step, , hint] = field;
  const range = h("input", {
    id: name,
    type: "range",
    min: low,
    step,
    "aria-describedby": `${name}-hint`,
    on: {input: () => settings.set(name, range.valueAsNumber)},
  });
  const number = h("input", {
    type: "number",
    min: low,
    step,
    "aria-label": `${label}, as a number`,
    on: {
      change() {
        const value = Math.min(settings.highest(field), Math.max(low, number.valueAsNumber));
        if (Number.isFinite(value)) settings.set(name, step === 1 ? Math.round(value) : value);
        else show();
      },
    },
  });
  const show = () => {
    for (const input of [range, number]) {
      input.max = settings.highest(field);
      input.value = settings.get(name);
    }
  };
  const element = h(
    "div",
    {class: "field"},
    h("div", {class: "row"}, h("label", {for: name, text: label}), number),
    range,
    h("p", {class: "hint", id: `${name}-hint`, text: hint}),
  );
  return {element, show};
}
