// What is asked: one prompt, its sampling, and panes that each add their own steering and decoding.
import { Store } from "./ui.js";
import { methodOf } from "./catalogue.js";

const PLACE = "whipstaff.playground";
const VERSION = 1;
export const SITE = "resid_post"; // whose activations are read
export const MOST_PANES = 4; // browsers open six connections to a server, for all tabs together

export const BY_CONDITION = "*"; // in a probe's place: whatever a pane's own condition reads

let numbers = 0;
export const newId = () => `p${Date.now().toString(36)}${(numbers += 1)}`;

export function emptySetup() {
  return {
    kind: "completion",
    prompt: "",
    messages: [{ role: "user", content: "" }],
    model: "",
    sampling: { temperature: 0, max_tokens: 48, seed: 7, stop: [] },
    top: 5,
    probe: { name: BY_CONDITION },
    capture: [],
    panes: [{ id: newId(), label: "Plain", steering: [], decoding: [] }],
  };
}

export const setup = new Store(emptySetup());
/** How it is looked at; kept like the setup, never shared. */
export const view = new Store({ colour: "rank", theme: "auto", unsteered: true });

export const edit = (change) => setup.set((now) => ({ ...now, ...change }));
export const editPane = (id, change) =>
  edit({ panes: setup.value.panes.map((pane) => (pane.id === id ? { ...pane, ...change } : pane)) });
export const isPlain = (pane) => !pane.steering.length && !pane.decoding.length;

/** What a pane is called: as its owner said, or by what it does; with a number if one before it is called so. */
export function titleOf(pane) {
  const same = setup.value.panes.filter((one) => saidOf(one) === saidOf(pane));
  const number = same.findIndex((one) => one.id === pane.id) + 1;
  return number > 1 ? `${saidOf(pane)} ${number}` : saidOf(pane);
}

function saidOf(pane) {
  if (pane.label) return pane.label;
  if (isPlain(pane)) return "Plain";
  return [pane.steering.length && "Steered", pane.decoding.length && "Decoded"].filter(Boolean).join(", ");
}

// ---- requests

export const pathOf = (setup) => (setup.kind === "chat" ? "v1/chat/completions" : "v1/completions");

/** A pane's request, as a client would write it. */
export function requestOf(setup, pane) {
  const { temperature, max_tokens, seed, stop } = setup.sampling;
  return {
    model: pane.model || setup.model,
    ...(setup.kind === "chat" ? { messages: setup.messages } : { prompt: setup.prompt }),
    ...(temperature === undefined ? {} : { temperature }),
    ...(max_tokens === undefined ? {} : { max_tokens }),
    ...(temperature > 0 && seed !== undefined ? { seed } : {}),
    ...(stop.length ? { stop } : {}),
    ...pane.more,
    ...(pane.steering.length ? { steering: pane.steering } : {}),
    ...(pane.decoding.length ? { decoding: pane.decoding } : {}),
    ...(limitOf(setup.probe) ? { stop_when: { ...probeOf(setup, pane), ...limitOf(setup.probe) } } : {}),
  };
}

/** The same as the page sends it: streamed, with a record of every token and what is to be read of the model. A search
 * draws no token, of which there could be records; it says what it takes back. */
export function streamedRequest(setup, pane) {
  const streamed = { ...requestOf(setup, pane), stream: true, stream_options: { include_usage: true } };
  if (pane.decoding.some((entry) => methodOf(entry)?.kind === "search")) return { ...streamed, stream_retractions: true };
  const probe = probeOf(setup, pane);
  const capture = [
    ...(probe ? [{ ...probe, where: "generation" }] : []),
    ...(setup.capture.length ? [{ site: SITE, layers: setup.capture, where: "generation" }] : []),
  ];
  return {
    ...streamed,
    ...(capture.length ? { capture } : {}),
    ...(setup.top > 0 ? { explain: explained(setup, pane) } : {}),
  };
}

/** What a request reads along: {probe: its number in `capture`, or -1, and the same of `site`}. */
export function readBy({ capture = [] }) {
  return { probe: capture.findIndex((one) => one.probe), site: capture.findIndex((one) => one.site) };
}

/** The probe that is read at every token of a pane's answer: the one that was chosen, or what its condition reads. */
function probeOf({ probe: { name, layer } }, pane) {
  if (name !== BY_CONDITION) return name ? withLayer(name, layer) : null;
  const when = pane.steering.map((entry) => entry.when).find((one) => typeof one?.probe === "string");
  return when ? withLayer(when.probe, when.layer) : null;
}

const withLayer = (probe, layer) => (Number.isInteger(layer) ? { probe, layer } : { probe });

/** Where a chosen probe ends an answer, if anywhere. */
function limitOf({ name, above, below }) {
  if (name === BY_CONDITION || !name) return null;
  return above !== undefined ? { above } : below !== undefined ? { below } : null;
}

/** What to say of every token. */
function explained({ top, sampling }, pane) {
  const unsteered = pane.steering.length > 0 && view.value.unsteered;
  return { top, ...(unsteered ? { unsteered } : {}), ...(sampling.temperature === 0 ? {} : { drawn: true }) };
}

// ---- what is kept, and what a link says

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** The parts that a stored or shared setup may have, and nothing else; throws what is wrong with it. */
export function checkedSetup(said) {
  const base = emptySetup();
  if (!isObject(said) || !Array.isArray(said.panes)) throw new Error("it holds no panes");
  const text = (value, otherwise) => (typeof value === "string" ? value : otherwise);
  const list = (value) => (Array.isArray(value) ? value.filter((one) => one && typeof one === "object") : []);
  const panes = said.panes.slice(0, MOST_PANES).map((pane) => ({
    id: newId(),
    label: text(pane?.label, "").slice(0, 80),
    steering: list(pane?.steering),
    decoding: list(pane?.decoding),
    ...(typeof pane?.model === "string" && pane.model ? { model: pane.model } : {}),
    ...(isObject(pane?.more) ? { more: pane.more } : {}),
  }));
  const messages = list(said.messages).map(({ role, content }) => ({ role: text(role, "user"), content: text(content, "") }));
  const sampling = { ...base.sampling };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    const value = said.sampling?.[name];
    if (typeof value === "number" && Number.isFinite(value)) sampling[name] = value;
  }
  if (Array.isArray(said.sampling?.stop)) sampling.stop = said.sampling.stop.filter((one) => typeof one === "string");
  return {
    kind: said.kind === "chat" ? "chat" : "completion",
    prompt: text(said.prompt, ""),
    messages: messages.length ? messages : base.messages,
    model: text(said.model, ""),
    sampling,
    top: Number.isInteger(said.top) ? Math.min(Math.max(said.top, 0), 20) : base.top,
    probe: checkedProbe(said.probe) ?? base.probe,
    capture: Array.isArray(said.capture) ? said.capture.filter(Number.isInteger) : base.capture,
    panes: panes.length ? panes : base.panes,
  };
}

function checkedProbe(said) {
  if (typeof said?.name !== "string") return null;
  const numbers = ["layer", "above", "below"].filter((name) => Number.isFinite(said[name]));
  return { name: said.name, ...Object.fromEntries(numbers.map((name) => [name, said[name]])) };
}

/** Told once, where the browser keeps nothing. */
export const unkept = new Store(false);

/** Bring back what was kept; false if there was nothing. Whatever cannot be read is left where it is. */
export function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE));
    if (kept?.version !== VERSION) return false;
    view.set((now) => ({ ...now, ...kept.view }));
    setup.set(checkedSetup(kept.setup));
    return true;
  } catch {
    return false;
  }
}

/** Keep every change from now on: soon after it, and at the latest when the page goes. */
export function keep() {
  let timer = 0;
  const write = () => {
    if (!timer) return;
    clearTimeout(timer);
    timer = 0;
    try {
      localStorage.setItem(PLACE, JSON.stringify({ version: VERSION, setup: setup.value, view: view.value }));
    } catch {
      unkept.set(true);
    }
  };
  const writeSoon = () => {
    clearTimeout(timer);
    timer = setTimeout(write, 200);
  };
  const stops = [setup.follow(writeSoon), view.follow(writeSoon)];
  addEventListener("pagehide", write);
  forget = () => {
    for (const stop of stops) stop();
    clearTimeout(timer);
    timer = 0;
    localStorage.removeItem(PLACE);
  };
}

/** Remove all that is kept, and keep nothing more until the page is loaded again. */
export let forget = () => localStorage.removeItem(PLACE);

const LINK = "s=1."; // what a fragment begins with
const MOST_BYTES = 1 << 20;

/** The setup as a URL's fragment. */
export async function toFragment(setup) {
  const { panes, ...rest } = setup;
  const bytes = new TextEncoder().encode(JSON.stringify({ ...rest, panes: panes.map(({ id, ...pane }) => pane) }));
  const packed = await through(bytes, new CompressionStream("deflate-raw"));
  const letters = Array.from(packed, (byte) => String.fromCharCode(byte)).join("");
  return `#${LINK}${btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

/** The setup that a fragment holds, or null if it holds none. Throws what is wrong with it. */
export async function fromFragment(fragment) {
  const text = fragment.replace(/^#/, "");
  if (!text.startsWith("s=")) return null;
  if (!text.startsWith(LINK)) throw new Error("it is of another version");
  if (text.length > MOST_BYTES) throw new Error("it is too long");
  try {
    const letters = atob(text.slice(LINK.length).replaceAll("-", "+").replaceAll("_", "/"));
    const packed = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
    const bytes = await through(packed, new DecompressionStream("deflate-raw"));
    return checkedSetup(JSON.parse(new TextDecoder().decode(bytes)));
  } catch (error) {
    throw new Error(`it cannot be read (${error.message})`);
  }
}

/** Bytes through a (de)compressing stream, at most MOST_BYTES of them. */
async function through(bytes, transform) {
  const reader = new Blob([bytes]).stream().pipeThrough(transform).getReader();
  const parts = [];
  for (let length = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if ((length += value.length) > MOST_BYTES) throw new Error("it is too large");
    parts.push(value);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
