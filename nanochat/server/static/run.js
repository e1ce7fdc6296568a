// One answer: what is asked of the server, and what its chunks add to the message.

import {ApiError, stream} from "./api.js";
import {messagesFor, promptFor} from "./tree.js";

/** Stream into the answer `node`, calling `changed` after each piece. Never raises: how it ended is node.state, and node.error. */
export async function run(conversation, node, {sampling, key, signal, changed}) {
  const body = {model: node.model || undefined, ...sampling};
  if (node.raw) body.prompt = promptFor(conversation, node);
  else Object.assign(body, {messages: messagesFor(conversation, node), tools_shown: true, drop_oldest: conversation.dropOldest});
  try {
    for await (const chunk of stream(node.raw ? "v1/completions" : "v1/chat/completions", body, {key, signal})) {
      take(node, chunk);
      changed();
    }
    if (!node.finish) throw new ApiError("The connection ended before the answer was complete.", {kind: "early"});
    node.state = "done";
  } catch (error) {
    node.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) {
      if (!(error instanceof ApiError)) console.error(error);
      const {message, kind = "page", status = 0, code = null, retryAfter = null} = error;
      node.error = {
        message,
        kind,
        status,
        code,
        retryAt: retryAfter === null ? null : Date.now() + 1000 * retryAfter,
        dropped: Boolean(body.drop_oldest),
      };
    }
  }
  changed();
}

/** What one chunk adds. */
export function take(node, chunk) {
  const extra = chunk.nanochat ?? {};
  if (extra.dropped_turns) node.dropped = extra.dropped_turns;
  if (extra.timings) node.timings = extra.timings;
  if (extra.tool) takeTool(node, extra.tool);
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content ?? choice?.text;
  if (typeof text === "string" && text) append(node, "text", text);
  if (choice?.finish_reason) node.finish = choice.finish_reason;
}

function append(node, type, text) {
  const last = node.parts.at(-1);
  if (last?.type === type) last.text += text;
  else node.parts.push({type, text});
}

/** A tool call, or its result, comes from its start on, as far as it is. */
function takeTool(node, {type, text}) {
  const last = node.parts.at(-1);
  if (last?.type === type && text.startsWith(last.text)) last.text = text;
  else node.parts.push({type, text});
}
