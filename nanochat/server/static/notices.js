// Short notices at the foot of the page, some with a button, and what is said to screen readers.

import {h, iconButton} from "./dom.js";

/** Say something to screen readers once, politely. */
export function announce(text) {
  const region = document.getElementById("announcer");
  region.textContent = "";
  setTimeout(() => {
    region.textContent = text;
  }, 50); // a change is what is read, also where the text is the same
}

/** Show a notice for a while, and as long as the pointer is over it; `act` is what its button does. */
export function notice(text, {label = "", act = null, seconds = 6} = {}) {
  const list = document.getElementById("notices");
  let timer;
  const gone = () => {
    clearTimeout(timer);
    element.remove();
  };
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(gone, 1000 * seconds);
  };
  const hold = () => clearTimeout(timer);
  const element = h(
    "div",
    {class: "notice", on: {pointerenter: hold, pointerleave: wait, focusin: hold, focusout: wait}},
    h("span", {text}),
    act &&
      h("button", {
        type: "button",
        class: "plain",
        text: label,
        on: {
          click: () => {
            gone();
            act();
          },
        },
      }),
    iconButton("close", "Dismiss", gone),
  );
  list.append(element);
  while (list.children.length > 3) list.firstChild.remove();
  announce(text);
  wait();
}
