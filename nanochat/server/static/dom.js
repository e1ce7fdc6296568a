// Making elements without HTML strings: h("p", {class: "note"}, "text", child), and the icons.

/** An element. Props: class, text, data (an object), on (event → listener); any other is an attribute, left out where null or false. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Strokes on a 24 × 24 field.
const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20l1-4L16.5 4.5l3 3L8 19zM14 7l3 3",
  again: "M19.5 12a7.5 7.5 0 1 1-2.3-5.4L19.5 9M19.5 4.5V9H15",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7M10.5 10.5v5.5M13.5 10.5v5.5",
  save: "M12 4v11M7.5 11l4.5 4.5 4.5-4.5M5 20h14",
  open: "M12 15.5V4M7.5 8.5L12 4l4.5 4.5M5 20h14",
  back: "M14.5 6l-6 6 6 6",
  next: "M9.5 6l6 6-6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  search: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13zM15.5 15.5L20 20",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 5.8a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4zM9 13.8a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  moon: "M19.5 14A8 8 0 0 1 10 4.5 8 8 0 1 0 19.5 14z",
  auto: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 4v16M12 8h5.6M12 12h8M12 16h5.6",
  help: "M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17zM9.7 9.5a2.4 2.4 0 1 1 3.5 2.2c-.8.4-1.2.9-1.2 1.8M12 16.3v.2",
  sum: "M6 4h12v16H6zM9 8h6M9 12h.1M12 12h.1M15 12h.1M9 16h.1M12 16h.1M15 16h.1",
  wave: "M3 12c2.2-5.5 4.4-5.5 6 0s3.8 5.5 6 0 3.8-5.5 6 0",
};

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button that is only an icon; its label is what a screen reader and the tooltip say. */
export function iconButton(name, label, click, props = {}) {
  return h(
    "button",
    {type: "button", "aria-label": label, title: label, ...props, class: `icon ${props.class ?? ""}`, on: {click}},
    icon(name),
  );
}

/** Another icon and label for a button made by iconButton. */
export function relabel(button, name, label) {
  button.replaceChildren(icon(name));
  button.title = label;
  button.setAttribute("aria-label", label);
}

/** Put text on the clipboard, and show a tick on the button for a moment. */
export async function copy(text, button, say) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // no clipboard on plain http from another machine: the old way
    const area = h("textarea", {class: "unseen", "aria-hidden": "true"});
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    button.focus();
    if (!done) return say("Could not copy: the browser does not allow it here.");
  }
  say("Copied.");
  const label = button.title;
  relabel(button, "check", "Copied");
  setTimeout(() => relabel(button, "copy", label), 1500);
}

/** How many, with the noun in the right number. */
export const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
