// The server's API: keys, errors with the field that they name, and server-sent events.
import { Store } from "./ui.js";

const REMEMBERED = "whipstaff.key"; // of the user's key, for this tab, and only if asked

/** The user's key and the administrator's. Neither is put into a URL, a link or the local storage. */
export const keys = new Store({ user: recall(), admin: "" });
/** Those who wait for a key: told once there is one. */
export const keyWanted = new Store(null);

function recall() {
  try {
    return sessionStorage.getItem(REMEMBERED) ?? "";
  } catch {
    return "";
  }
}

export function useKey(user, remember) {
  keys.set((now) => ({ ...now, user }));
  try {
    if (remember) sessionStorage.setItem(REMEMBERED, user);
    else sessionStorage.removeItem(REMEMBERED);
  } catch {
    // a browser that stores nothing: the key lives as long as the page
  }
  keyWanted.value?.granted();
  keyWanted.set(null);
}

/** An answer that is none: its status, message, and the JSON path of the field that is wrong. */
export class Refusal extends Error {
  constructor(status, { message, param } = {}) {
    super(message || `the server answered ${status}`);
    this.status = status;
    this.param = param ?? null;
  }
}

/** The server could not be reached, or went away. */
export class Gone extends Error {}

async function ask(path, options = {}) {
  for (;;) {
    const headers = new Headers(options.headers);
    const { user } = keys.value;
    if (user && !headers.has("Authorization")) headers.set("Authorization", `Bearer ${user}`);
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Gone("the server cannot be reached");
    }
    if (answer.ok) return answer;
    const refusal = await refusalOf(answer);
    if (answer.status !== 401 || options.admin) throw refusal;
    if (user === keys.value.user) await granted(refusal, options.signal); // else there is another key meanwhile
  }
}

/** Waits until somebody gave a key; all requests that were refused go on with it. */
function granted(refusal, signal) {
  let waiting = keyWanted.value;
  if (!waiting) {
    waiting = { wasWrong: Boolean(keys.value.user), message: refusal.message };
    waiting.promise = new Promise((resolve) => (waiting.granted = resolve));
    keyWanted.set(waiting);
  }
  const stopped = new Promise((_, reject) =>
    signal?.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError"))),
  );
  return Promise.race([waiting.promise, stopped]);
}

async function refusalOf(answer) {
  try {
    const body = await answer.json();
    const error = body.error ?? body;
    return new Refusal(answer.status, typeof error === "string" ? { message: error } : error);
  } catch {
    return new Refusal(answer.status);
  }
}

export const get = async (path, options) => (await ask(path, options)).json();

export async function post(path, body, options = {}) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body), ...options })).json();
}

/** Ask as an administrator: with that key beside the user's, or, where the server has a file of keys, in its place.
 * `attempt` gets the headers. */
export async function asAdministrator(attempt) {
  const { admin } = keys.value;
  const isRefused = (error) => error instanceof Refusal && [401, 403].includes(error.status);
  try {
    return await attempt(admin ? { "X-Whipstaff-Admin-Key": admin } : {});
  } catch (error) {
    if (!admin || !isRefused(error)) throw error;
    try {
      return await attempt({ Authorization: `Bearer ${admin}` });
    } catch (second) {
      throw isRefused(second) ? error : second;
    }
  }
}

const asked = (path, options) => asAdministrator((more) => ask(path, { ...options, headers: { ...options.headers, ...more }, admin: true }));

export const change = async (path, options) => (await asked(path, options)).json();
export const metrics = async () => (await asked("metrics", {})).text();

/** The data of a generation's events, as they come. Throws Gone if they end before [DONE]. */
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  let isDone = false;
  for await (const data of events(answer.body)) {
    isDone ||= data === "[DONE]";
    if (isDone) continue; // nothing follows but the end of the body
    const event = JSON.parse(data);
    if (event.error) throw new Refusal(event.error.code ?? 500, event.error);
    yield event;
  }
  if (!isDone) throw new Gone("the server went away");
}

/** Server-sent events: each one's data lines, joined. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true }).replaceAll("\r\n", "\n");
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone("the server went away");
  } finally {
    reader.cancel().catch(() => {});
  }
}
