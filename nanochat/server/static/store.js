// What this browser keeps: conversations in IndexedDB, settings and the API key in localStorage. None of it is sent without the user's action.

const channel = "BroadcastChannel" in window ? new BroadcastChannel("nanochat") : null;
let database = null; // null: this browser keeps nothing, and conversations live as long as the page

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const objects = (mode) => database.transaction("conversations", mode).objectStore("conversations");

/** All conversations. Raises where the browser keeps none (some private windows); the others then do nothing. */
export async function open() {
  const request = indexedDB.open("nanochat", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", {keyPath: "id"});
  database = await promised(request);
  return promised(objects("readonly").getAll());
}

/** One change, committed at once: without an explicit commit it is undone where the page is closed in that moment. */
async function change(id, act) {
  if (!database) return;
  const store = objects("readwrite");
  const {transaction} = store;
  const kept = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error); // a disk that is full is told here alone
  });
  act(store);
  transaction.commit();
  await kept;
  channel?.postMessage(id);
}

export const save = (conversation) => change(conversation.id, (store) => store.put(conversation));
export const remove = (id) => change(id, (store) => store.delete(id));

/** Call `changed(id, conversation or undefined)` when another tab has saved or removed one. */
export function watch(changed) {
  if (channel) channel.onmessage = async ({data}) => database && changed(data, await promised(objects("readonly").get(data)));
}

/** A small value by name; `otherwise` where none is kept or it cannot be read. */
export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`nanochat.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(`nanochat.${name}`);
    else localStorage.setItem(`nanochat.${name}`, JSON.stringify(value));
  } catch {
    /* full or forbidden: it holds until the page is closed */
  }
}
