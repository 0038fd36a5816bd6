// What every part of the page is made of: templates, hooks, a few controls, and words for screen readers.
import { h, render, Fragment } from "./vendor/preact.js";
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";

export { render, Fragment, useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState };
export const html = htm.bind(h);

/** A value that many parts follow. `set` takes a value, or a function of the one before. */
export class Store {
  #followers = new Set();

  constructor(value) {
    this.value = value;
  }

  set(next) {
    this.value = typeof next === "function" ? next(this.value) : next;
    for (const follower of [...this.#followers]) follower(this.value);
  }

  follow(follower) {
    this.#followers.add(follower);
    return () => this.#followers.delete(follower);
  }
}

/** The value of a store, rendered anew whenever it changes. */
export function useStore(store) {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    again();
    return store.follow(again);
  }, [store]);
  return store.value;
}

/** The last of many calls, once none came for a while. */
export function useDebounced(milliseconds, action) {
  const timer = useRef(0);
  const latest = useRef(action);
  latest.current = action;
  useEffect(() => () => clearTimeout(timer.current), []);
  return (...args) => {
    clearTimeout(timer.current);
    timer.current = setTimeout(() => latest.current(...args), milliseconds);
  };
}

// ---- words for screen readers: one polite line for the whole page

const said = new Store("");
export const announce = (text) => said.set(text);

export function Announcer() {
  return html`<p class="unseen" role="status" aria-live="polite">${useStore(said)}</p>`;
}

// ---- controls

let ids = 0;
export function useId(prefix = "f") {
  const id = useRef(null);
  id.current ??= `${prefix}${++ids}`;
  return id.current;
}

/** A number as one types it: nothing is sent while it is none. */
export function NumberBox({ value, onChange, ...more }) {
  const read = (event) => {
    const text = event.target.value;
    if (text === "") onChange(undefined);
    else if (!Number.isNaN(Number(text))) onChange(Number(text));
  };
  return html`<input type="number" class="number" value=${value ?? ""} onInput=${read} ...${more} />`;
}

/** A text that counts once it is left or Enter is pressed; what is typed stays until then, whatever is drawn anew. */
export function LateText({ value, onChange, ...more }) {
  const [draft, setDraft] = useState(null);
  const take = (event) => {
    setDraft(null);
    onChange(event.target.value);
  };
  return html`<input type="text" value=${draft ?? value} ...${more} onInput=${(event) => setDraft(event.target.value)} onChange=${take} />`;
}

/** A slider beside the exact number, which may lie beyond the slider's ends. */
export function Slider({ value, fallback, min, max, step, onChange, label, ...more }) {
  const shown = value ?? fallback ?? min;
  return html`<span class="slider">
    <input type="range" min=${min} max=${max} step=${step} value=${shown} aria-label=${label}
      onInput=${(event) => onChange(Number(event.target.value))} />
    <${NumberBox} value=${value} placeholder=${fallback} step=${step} onChange=${onChange} aria-label=${`${label}, exactly`} ...${more} />
  </span>`;
}

/** A few choices of which one holds. */
export function Segments({ value, choices, onChange, label }) {
  const name = useId("s");
  return html`<span class="segments" role="radiogroup" aria-label=${label}>
    ${choices.map(
      ([choice, text]) => html`<label key=${choice}>
        <input type="radio" name=${name} checked=${choice === value} onChange=${() => onChange(choice)} />
        <span>${text}</span>
      </label>`,
    )}
  </span>`;
}

/** A dialog of the browser's own, shown while it is rendered. */
export function Dialog({ title, onClose, children }) {
  const dialog = useRef(null);
  const id = useId("d");
  useEffect(() => {
    const before = document.activeElement;
    dialog.current.showModal();
    return () => before?.focus?.();
  }, []);
  const outside = (event) => event.target === dialog.current && onClose();
  return html`<dialog ref=${dialog} aria-labelledby=${id} onClose=${onClose} onClick=${outside}>
    <header><h2 id=${id}>${title}</h2><button class="quiet" onClick=${onClose} aria-label="close">✕</button></header>
    ${children}
  </dialog>`;
}

/** What the server, or the page, says is wrong. */
export function Wrong({ id, children }) {
  return html`<p class="wrong" id=${id} role="alert">${children}</p>`;
}

export const figure = (value, digits = 3) =>
  value === null || value === undefined || Number.isNaN(value) ? "–" : Number(value.toPrecision(digits)).toString();
