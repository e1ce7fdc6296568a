// Conversations as JSON files: out, and in again, with everything that comes in checked.

import {h} from "./dom.js";
import {add, newConversation, newId} from "./tree.js";

const FORMAT = "nanochat-conversations";
const TYPES = new Set(["text", "python", "python_output"]);

/** Save conversations as a file. */
export function download(conversations, name) {
  const text = JSON.stringify({format: FORMAT, version: 1, exported: new Date().toISOString(), conversations}, null, 1);
  const link = h("a", {href: URL.createObjectURL(new Blob([text], {type: "application/json"})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

export const fileName = (title) =>
  `${
    title
      .toLowerCase()
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 40) || "conversation"
  }.json`;

/** The conversations in a file's text: our own export, or plain {"messages": [...]}, one, a list of them, or one a line.
 *  Raises Error that says what is wrong. */
export function parse(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch {
    try {
      given = text
        .split("\n")
        .filter((line) => line.trim())
        .map((line) => JSON.parse(line));
    } catch {
      throw new Error("it is not JSON");
    }
  }
  if (given?.format === FORMAT && given.version > 1) throw new Error(`it is of version ${given.version}, and this page reads version 1`);
  const list = Array.isArray(given?.conversations) ? given.conversations : Array.isArray(given) && !given[0]?.role ? given : [given];
  if (!list.length) throw new Error("it holds no conversations");
  return list.map((one, i) => {
    try {
      return one?.nodes ? checked(one) : fromMessages(Array.isArray(one) ? one : one?.messages);
    } catch (error) {
      throw new Error(`conversation ${i + 1}: ${error.message}`);
    }
  });
}

/** Only the known fields, of the known types; a tree without circles. */
function checked(given) {
  const conversation = newConversation(string(given.system ?? "", "system"));
  conversation.id = /^[\w-]{1,64}$/.test(given.id) ? given.id : newId();
  for (const name of ["created", "updated"]) if (Number.isFinite(given[name])) conversation[name] = given[name];
  conversation.title = string(given.title ?? "", "title").slice(0, 200);
  conversation.named = Boolean(given.named);
  conversation.dropOldest = Boolean(given.dropOldest);
  const ids = new Map(Object.keys(given.nodes).map((id) => [id, /^[\w-]{1,64}$/.test(id) && id !== "__proto__" ? id : newId()]));
  for (const [id, node] of Object.entries(given.nodes)) {
    if (node?.role !== "user" && node?.role !== "assistant") throw new Error("a message has no role");
    if (!Array.isArray(node.parts)) throw new Error("a message has no parts");
    const copy = {
      id: ids.get(id),
      parent: node.parent ? ids.get(node.parent) : "",
      role: node.role,
      parts: node.parts.map((part) => ({
        type: TYPES.has(part?.type) ? part.type : "text",
        text: string(part?.text, "the text of a message"),
      })),
      created: Number.isFinite(node.created) ? node.created : 0,
    };
    if (copy.parent === undefined) throw new Error("a message follows one that is not there");
    if (node.role === "assistant") {
      Object.assign(copy, {
        model: typeof node.model === "string" ? node.model : "",
        raw: Boolean(node.raw),
        dropped: Number.isInteger(node.dropped) ? node.dropped : 0,
        state: ["done", "stopped", "failed"].includes(node.state) ? node.state : "stopped",
        finish: typeof node.finish === "string" ? node.finish : "",
      });
      if (copy.state === "failed")
        copy.error = {message: String(node.error?.message ?? "It failed."), kind: "status", status: 0, code: null, retryAt: null};
      const times = [
        "completion_tokens",
        "tokens_per_second",
        "first_token_seconds",
        "context_used",
        "context_length",
        "prompt_tokens",
        "cached_tokens",
      ];
      if (node.timings)
        copy.timings = Object.fromEntries(
          times.filter((name) => Number.isFinite(node.timings[name])).map((name) => [name, node.timings[name]]),
        );
    }
    conversation.nodes[copy.id] = copy;
  }
  for (const [parent, child] of Object.entries(given.chosen ?? {})) {
    const node = conversation.nodes[ids.get(child)];
    if (node && node.parent === (ids.get(parent) ?? "")) conversation.chosen[node.parent] = node.id;
  }
  for (const node of Object.values(conversation.nodes)) {
    const seen = new Set();
    for (let at = node; at; at = conversation.nodes[at.parent]) {
      if (seen.has(at.id)) throw new Error("its messages go round in a circle");
      seen.add(at.id);
    }
  }
  return conversation;
}

function fromMessages(messages) {
  if (!Array.isArray(messages) || !messages.length) throw new Error("it has no messages");
  const conversation = newConversation();
  let parent = "";
  messages.forEach(({role, content} = {}, i) => {
    if (i === 0 && role === "system") return void (conversation.system = string(content, "the system message"));
    if (role !== "user" && role !== "assistant") throw new Error(`message ${i + 1} has no role`);
    const parts = Array.isArray(content)
      ? content.map((part) => ({type: TYPES.has(part?.type) ? part.type : "text", text: string(part?.text, `message ${i + 1}`)}))
      : [{type: "text", text: string(content, `message ${i + 1}`)}];
    const node = add(conversation, parent, role, parts, role === "assistant" ? {model: "", raw: false, state: "done", finish: "stop"} : {});
    node.created += i; // their order
    parent = node.id;
  });
  return conversation;
}

function string(value, what) {
  if (typeof value !== "string") throw new Error(`${what} is not text`);
  return value;
}
