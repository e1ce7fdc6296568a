// A conversation: a tree of messages, of which one path is shown. Plain data, as it is stored and exported, and what can be asked of it.
//
//   {id, title, named, created, updated, system, dropOldest, nodes: {id: node}, chosen: {parent id or "": child id}}
//   node: {id, parent ("" for the first), role: "user" | "assistant", parts: [{type: "text" | "python" | "python_output", text}], created,
//          of answers: model, raw, state: "streaming" | "done" | "stopped" | "failed", finish, error, timings, dropped}

export const newId = () =>
  crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation(system = "") {
  const now = Date.now();
  return {id: newId(), title: "", named: false, created: now, updated: now, system, dropOldest: false, nodes: {}, chosen: {}};
}

/** Add a message below `parent` and show it. */
export function add(conversation, parent, role, parts, more = {}) {
  const node = {id: newId(), parent, role, parts, created: Date.now(), ...more};
  conversation.nodes[node.id] = node;
  conversation.chosen[parent] = node.id;
  conversation.updated = Date.now();
  if (role === "user" && !conversation.named && !parent) conversation.title = titleOf(node);
  return node;
}

/** Take out a message that has nothing below it; the one before it, if any, is shown instead. */
export function drop(conversation, node) {
  const others = siblings(conversation, node);
  const at = others.indexOf(node);
  delete conversation.nodes[node.id];
  const other = others[at - 1] ?? others[at + 1];
  if (other) conversation.chosen[node.parent] = other.id;
  else delete conversation.chosen[node.parent];
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  const nodes = [];
  for (let id = conversation.chosen[""]; id && conversation.nodes[id]; id = conversation.chosen[id]) nodes.push(conversation.nodes[id]);
  return nodes;
}

/** The messages from the first to `node`, which need not be shown. */
export function pathTo(conversation, node) {
  const nodes = [];
  for (; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

/** A message and its alternatives, oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes)
    .filter((other) => other.parent === node.parent)
    .sort((a, b) => a.created - b.created);
}

export function choose(conversation, node) {
  conversation.chosen[node.parent] = node.id;
}

export const textOf = (node) =>
  node.parts
    .filter((part) => part.type === "text")
    .map((part) => part.text)
    .join("");

/** What is written, tool use in brackets: for copying, searching and reading aloud. */
export function plain(node) {
  let text = "";
  node.parts.forEach((part, i) => {
    if (part.type === "text") text += part.text;
    else if (part.type === "python") text += `[${part.text}${node.parts[i + 1]?.type === "python_output" ? " = " : "]"}`;
    else text += `${part.text}]`;
  });
  return text;
}

export function titleOf(node) {
  const line = textOf(node).trim().split("\n")[0].replace(/\s+/g, " ");
  const cut = [...line].slice(0, 60).join("");
  return cut.length < line.length ? `${cut.trimEnd()}…` : cut || "Untitled";
}

/** The messages before the answer `node`, as the server wants them. */
export function messagesFor(conversation, node) {
  const messages = conversation.system.trim() ? [{role: "system", content: conversation.system}] : [];
  for (const {role, parts} of pathTo(conversation, node).slice(0, -1)) {
    messages.push({
      role,
      content: role === "assistant" && parts.some((part) => part.type !== "text") ? wholeParts(parts) : textOf({parts}),
    });
  }
  return messages;
}

/** The text before the answer `node`, for a model that only continues text. */
export function promptFor(conversation, node) {
  return pathTo(conversation, node).slice(0, -1).map(textOf).join("");
}

/** Without a call at the end that was cut short before its result. */
function wholeParts(parts) {
  const kept = parts.at(-1).type === "python" ? parts.slice(0, -1) : parts;
  return kept.length ? kept : [{type: "text", text: ""}];
}

/** Return whether every word of `query` is in the title or in a message. */
export function matches(conversation, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  const text = [conversation.title, ...Object.values(conversation.nodes).map(textOf)].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}
