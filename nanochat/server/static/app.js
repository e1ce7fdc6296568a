// The page: puts the parts together, and holds what they share. Served by nanochat/server; no build step, nothing from other hosts.

import {models} from "./api.js";
import {Chat, emptyState, mendBroken} from "./chat.js";
import {COMMANDS} from "./commands.js";
import {Composer} from "./composer.js";
import {h, icon, iconButton, relabel} from "./dom.js";
import {notice} from "./notices.js";
import {Settings, settingsSheet} from "./settings.js";
import {Sidebar} from "./sidebar.js";
import * as store from "./store.js";
import {newConversation, path} from "./tree.js";

const PROMPTS = [
  "Who are you?",
  "How many letters r are in “strawberry”?",
  "What is 17 times 23?",
  "Tell me a story about a lighthouse, in three sentences.",
];
const CONTINUED = ["Once upon a time, there was", "The capital of France is", "The most important thing about rivers is"];
const KEYS = [
  ["Enter", "send"],
  ["Shift Enter", "a new line"],
  ["Esc", "stop the answer; close what is open"],
  ["↑", "in the empty field: edit the last message"],
  ["/", "to the field"],
  ["Ctrl Shift O", "a new conversation"],
  ["Ctrl K", "search the conversations"],
  ["Ctrl B", "show or hide the list"],
  ["?", "this help"],
];
const THEMES = {auto: ["auto", "Theme: as the system"], light: ["sun", "Theme: light"], dark: ["moon", "Theme: dark"]};

const $ = (id) => document.getElementById(id);
const settings = new Settings();
const conversations = new Map();
let current = newConversation(store.recall("system", ""));
let available = [];

const model = () => available.find(({id}) => id === $("model").value) ?? null;
const saved = (conversation) => {
  if (conversations.has(conversation.id))
    store.save(conversation).catch((error) => notice(`This browser could not keep the conversation: ${error.message}`));
};

// ---- the parts

const chat = new Chat(
  {scroller: $("scroller"), list: $("messages"), empty: $("empty"), latest: $("latest")},
  {
    model,
    saved,
    sampling: () => settings.sampling(),
    key: () => store.recall("key", ""),
    keyGiven: (key) => store.keep("key", key),
    changed,
  },
);
const sidebar = new Sidebar(
  {list: $("conversations"), search: $("search"), nothing: $("nothing")},
  {
    conversations,
    saved,
    changed,
    current: () => current,
    busy: (conversation) => chat.busy(conversation),
    go(conversation) {
      show(conversation);
      drawer(false);
      if (!narrow.matches) composer.focus();
    },
    removed(conversation) {
      chat.stop(conversation);
      conversations.delete(conversation.id);
      store.remove(conversation.id);
      if (conversation === current) show(fresh());
      else changed();
    },
    restored(conversation, {quiet = false} = {}) {
      mendBroken(conversation);
      conversations.set(conversation.id, conversation);
      saved(conversation);
      if (quiet) changed();
      else show(conversation);
    },
  },
);
const composer = new Composer(
  {form: $("composer"), area: $("area"), button: $("send"), menu: $("commands")},
  {
    settings,
    busy: () => chat.conversation !== undefined && chat.busy(),
    send,
    stop: () => chat.stop(),
    remark: (text) => chat.remark(text),
    clear: begin,
    help: () => help.showModal(),
    raw: () => model()?.chat === false,
    editLast: () => chat.editLast(),
  },
);
const sheet = settingsSheet(settings, {conversation: () => current, saved, keyChanged: (key) => store.keep("key", key || null)});
const help = helpDialog();
document.body.append(sheet.element, help);

function send(text) {
  conversations.set(current.id, current);
  chat.send(text);
}

const fresh = () => newConversation(store.recall("system", ""));

/** A new conversation; the one that is left stays in the list. */
function begin() {
  show(fresh());
  drawer(false);
  composer.focus();
}

function show(conversation) {
  current = conversation;
  store.keep("current", conversations.has(conversation.id) ? conversation.id : null);
  showEmptyState();
  chat.show(conversation);
}

/** What depends on the conversation, brought up to date. */
function changed() {
  if (current !== chat.conversation) return; // in between
  if (conversations.has(current.id)) store.keep("current", current.id);
  document.title = current.title ? `${current.title} · nanochat` : "nanochat";
  $("title").textContent = current.title || "New conversation";
  sidebar.render();
  composer.update();
  meter();
}

function showEmptyState() {
  const raw = model()?.chat === false;
  $("empty").replaceChildren(
    icon("wave"),
    ...emptyState(raw ? CONTINUED : PROMPTS, (text) => {
      if (!chat.busy()) send(text);
    }),
  );
  if (raw)
    $("empty").querySelector(".lead").textContent =
      "This is a base model: it has not learnt to answer. It continues the text that you give it.";
  $("area").placeholder = raw ? "Begin a text; the model continues it" : "Ask something";
}

/** How full the context was after the last answer. */
function meter() {
  const times = path(current).findLast((node) => node.timings)?.timings;
  const length = times?.context_length;
  $("meter").hidden = !length;
  if (!length) return;
  const used = Math.min(times.context_used, length);
  const share = Math.round((100 * used) / length);
  $("meter-bar").style.width = `${share}%`;
  $("meter").classList.toggle("full", share >= 85);
  $("meter-text").textContent = `${share} % of ${length.toLocaleString("en")} tokens`;
  $("meter").title =
    `The model can read ${length.toLocaleString("en")} tokens at once; this conversation takes ${used.toLocaleString("en")} of them.`;
}

// ---- models

async function loadModels() {
  try {
    available = await models();
    $("offline").hidden = true;
  } catch (error) {
    $("offline-text").textContent = error.message;
    $("offline").hidden = false;
    return;
  }
  const wanted = store.recall("model", "");
  const chosen = available.find(({id}) => id === wanted) ?? available.find((one) => one.default) ?? available[0];
  $("model").replaceChildren(
    ...available.map((one) => h("option", {value: one.id, selected: one === chosen, title: one.description, text: named(one)})),
  );
  $("model").disabled = available.length < 2;
  modelChosen();
}

const named = ({id, chat: chats}) => id + (chats === false ? " · continues text" : "");

function modelChosen() {
  settings.offer(model());
  $("model").title = model()?.description ?? "";
  showEmptyState();
}
$("model").addEventListener("change", () => {
  store.keep("model", $("model").value);
  modelChosen();
});

// ---- the frame: list, theme, help, keys

const narrow = matchMedia("(max-width: 52rem)");

/** On a narrow page the list is a drawer above the rest; on a wide one it can be folded away. */
function drawer(open) {
  if (narrow.matches) {
    document.body.classList.toggle("drawer", open);
    $("main").inert = open;
    $("sidebar").inert = !open;
    if (open) $("new").focus();
    else if ($("sidebar").contains(document.activeElement)) $("menu").focus();
  }
  $("menu").setAttribute("aria-expanded", shownList());
}
const shownList = () => (narrow.matches ? document.body.classList.contains("drawer") : !document.body.classList.contains("folded"));

function toggleList() {
  if (narrow.matches) return drawer(!shownList());
  document.body.classList.toggle("folded");
  $("sidebar").inert = !shownList();
  store.keep("folded", !shownList());
  drawer(false);
}

function fit() {
  document.body.classList.remove("drawer");
  $("main").inert = false;
  $("sidebar").inert = narrow.matches || document.body.classList.contains("folded");
  $("menu").setAttribute("aria-expanded", shownList());
}
narrow.addEventListener("change", fit);

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  try {
    // plain text: theme.js reads it
    if (name === "auto") localStorage.removeItem("nanochat.theme");
    else localStorage.setItem("nanochat.theme", name);
  } catch {
    /* holds until the page is closed */
  }
  relabel($("theme"), ...THEMES[name]);
}

function helpDialog() {
  const dialog = h(
    "dialog",
    {class: "help", "aria-labelledby": "help-title"},
    h(
      "header",
      {},
      h("h2", {id: "help-title", text: "Commands and keys"}),
      iconButton("close", "Close help", () => dialog.close()),
    ),
    h(
      "table",
      {},
      h(
        "tbody",
        {},
        ...COMMANDS.map(([name, does]) => h("tr", {}, h("th", {scope: "row"}, h("code", {text: name})), h("td", {text: does}))),
        ...KEYS.map(([keys, does]) =>
          h("tr", {}, h("th", {scope: "row"}, ...keys.split(" ").map((key) => h("kbd", {text: key}))), h("td", {text: does})),
        ),
      ),
    ),
  );
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  return dialog;
}

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.matches?.("input, textarea, select");
  const held = event.ctrlKey || event.metaKey;
  const act = (doing) => {
    event.preventDefault();
    doing();
  };
  if (event.key === "Escape") {
    if (document.body.classList.contains("drawer")) act(() => drawer(false));
    else if (chat.stop()) act(() => composer.focus());
  } else if (held && event.shiftKey && event.key.toLowerCase() === "o") act(begin);
  else if (held && event.key.toLowerCase() === "k")
    act(() => {
      if (!shownList()) toggleList();
      $("search").focus();
      $("search").select();
    });
  else if (held && event.key.toLowerCase() === "b") act(toggleList);
  else if (!typing && !held && event.key === "/") act(() => composer.focus());
  else if (!typing && !held && event.key === "?") act(() => help.showModal());
});

for (const button of document.querySelectorAll("button[data-icon]")) button.prepend(icon(button.dataset.icon));
$("new").addEventListener("click", begin);
$("menu").addEventListener("click", toggleList);
$("scrim").addEventListener("click", () => drawer(false));
$("settings").addEventListener("click", () => sheet.open());
$("help").addEventListener("click", () => help.showModal());
$("theme").addEventListener("click", () =>
  theme({auto: "light", light: "dark", dark: "auto"}[document.documentElement.dataset.theme ?? "auto"]),
);
$("export").addEventListener("click", () => sidebar.exportAll());
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  for (const file of $("file").files) await sidebar.importFile(file);
  $("file").value = "";
});
$("retry-models").addEventListener("click", loadModels);

// ---- begin

if (store.recall("folded", false)) document.body.classList.add("folded");
fit();
theme(document.documentElement.dataset.theme ?? "auto");
try {
  for (const conversation of await store.open()) {
    mendBroken(conversation);
    conversations.set(conversation.id, conversation);
  }
} catch {
  notice("This browser keeps nothing for this page, so conversations last until it is closed. Export what you want to keep.", {
    seconds: 12,
  });
}
store.watch((id, conversation) => {
  // another tab
  if (conversations.has(id) && chat.busy(conversations.get(id))) return;
  if (conversation) conversations.set(id, conversation);
  else conversations.delete(id);
  if (id === current.id) show(conversation ?? fresh());
  else changed();
});
show(conversations.get(store.recall("current", "")) ?? current);
await loadModels();
if (!narrow.matches) composer.focus();
document.documentElement.dataset.ready = "true";
