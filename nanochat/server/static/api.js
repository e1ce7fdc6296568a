// Talking to the server: its models, and answers as they come.

/** What went wrong. kind: "offline", "early" (the answer broke off), "status" (the server said no), "stream" (it said so in mid-answer). */
export class ApiError extends Error {
  constructor(message, {kind = "status", status = 0, code = null, retryAfter = null} = {}) {
    super(message);
    Object.assign(this, {kind, status, code, retryAfter});
  }
}

/** Server-sent events, fed in pieces that may be cut anywhere; gives the data of each event that is whole. */
export class EventParser {
  #rest = "";
  #data = [];

  feed(text) {
    const events = [];
    this.#rest += text;
    // a \r at the very end may be half of \r\n
    for (let end; (end = /\r\n|\n|\r(?=[^])/.exec(this.#rest)); this.#rest = this.#rest.slice(end.index + end[0].length)) {
      const line = this.#rest.slice(0, end.index);
      if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (!line && this.#data.length) events.push(this.#data.splice(0).join("\n"));
    }
    return events;
  }
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", {kind: "offline"});
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  throw new ApiError(said(body) ?? `The server answered ${response.status} ${response.statusText}`.trim() + ".", {
    status: response.status,
    code: body?.error?.code ?? null,
    retryAfter: Number.isFinite(after) ? Math.max(0, after) : null,
  });
}

const said = (body) => (typeof body?.error?.message === "string" ? body.error.message : null);

/** The models that the server has. */
export async function models() {
  const {data} = await (await reach("v1/models", {cache: "no-store"})).json();
  return data;
}

/** Post `body` and yield the chunks of the streamed answer. Aborting `signal` ends it, on the server too. Raises ApiError. */
export async function* stream(path, body, {key, signal}) {
  const response = await reach(path, {
    method: "POST",
    signal,
    body: JSON.stringify({...body, stream: true, stream_options: {include_usage: true}}),
    headers: {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})},
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder(); // keeps the bytes of a character that a read cuts in two
  const parser = new EventParser();
  try {
    for (;;) {
      const {done, value} = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke before the answer was complete.", {kind: "early"});
      });
      for (const data of parser.feed(done ? decoder.decode() : decoder.decode(value, {stream: true}))) {
        if (data === "[DONE]") return;
        yield parsed(data);
      }
      if (done) throw new ApiError("The connection ended before the answer was complete.", {kind: "early"});
    }
  } finally {
    reader.cancel().catch(() => {}); // ending the request stops the server's work too
  }
}

function parsed(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is not JSON.", {kind: "stream"});
  }
  if (typeof chunk !== "object" || chunk === null) throw new ApiError("The server sent something that is no chunk.", {kind: "stream"});
  if (chunk.error) throw new ApiError(said(chunk) ?? "The server reported an error.", {kind: "stream", code: chunk.error.code ?? null});
  return chunk;
}
