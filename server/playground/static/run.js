// One answer on its way: text, records and what became of it. Views are told once per frame.
import { announce, Store } from "./ui.js";
import { Gone, Refusal, stream } from "./api.js";
import { Cells } from "./cells.js";
import { lengthsOf } from "./reading.js";
import { pathOf, readBy, setup, streamedRequest, titleOf } from "./setup.js";

/** pane's id -> its latest run */
export const runs = new Store(new Map());

export class Run {
  #followers = new Set();
  #frame = 0;
  #abort = new AbortController();

  constructor(pane, now) {
    this.pane = pane;
    this.title = titleOf(pane);
    this.setup = now;
    this.request = streamedRequest(now, pane);
    this.state = "waiting"; // streaming, done, stopped, refused or cut
    this.cells = new Cells();
    this.numTokens = 0;
    this.finish = null;
    this.receipt = null;
    this.readings = []; // what a probe read after each token
    this.lengths = null; // of activations
    this.error = null;
    this.started = performance.now();
    this.first = this.ended = null; // milliseconds from the start
  }

  get isLive() {
    return this.state === "waiting" || this.state === "streaming";
  }

  follow(follower) {
    this.#followers.add(follower);
    return () => this.#followers.delete(follower);
  }

  /** Tell the views, in the next frame, however often this is called before. */
  #changed() {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      for (const follower of [...this.#followers]) follower(this);
    });
  }

  async start() {
    announce(`${this.title}: started`);
    try {
      for await (const event of stream(pathOf(this.setup), this.request, this.#abort.signal)) this.#take(event);
      this.state = "done";
    } catch (error) {
      this.error = error.name === "AbortError" ? null : error;
      this.state = error.name === "AbortError" ? "stopped" : error instanceof Gone && this.first !== null ? "cut" : "refused";
      if (!(error instanceof Gone || error instanceof Refusal || error.name === "AbortError")) throw error;
    } finally {
      this.ended = performance.now() - this.started;
      this.cells.close();
      this.#changed();
      announce(`${this.title}: ${this.summary()}`);
    }
  }

  #take(event) {
    const choice = event.choices?.find((one) => one.index === 0);
    if (choice) {
      const text = choice.delta ? (choice.delta.content ?? "") : choice.text;
      const records = choice.explain ?? [];
      if ((text || records.length) && this.first === null) this.first = performance.now() - this.started;
      if (this.first !== null) this.state = "streaming";
      this.cells.add(text, records);
      for (const { values } of choice.readings ?? []) this.#read(values[readBy(this.request).probe]);
      this.finish = choice.finish_reason ?? this.finish;
    }
    this.numTokens = event.usage?.completion_tokens ?? this.cells.records.length;
    const { retracted, ...receipt } = event.whipstaff ?? {};
    for (const { index, characters } of retracted ?? []) if (index === 0) this.cells.retract(characters);
    if (Object.keys(receipt).length) this.#conclude(receipt);
    this.#changed();
  }

  /** What the probe read after the next token. */
  #read(value) {
    if (value === undefined) return;
    this.cells.note(this.readings.length, "reading", value);
    this.readings.push(value);
  }

  /** What the receipt says. Activations are large: their lengths are all that stays. */
  #conclude({ captured, ...receipt }) {
    this.receipt = receipt;
    const { site } = readBy(this.request);
    this.lengths = captured && site >= 0 ? lengthsOf(captured[0], site, this.request.capture[site].layers) : null;
    if (this.readings.length) this.cells.repaint(); // colours are between the least and the most
  }

  stop() {
    this.#abort.abort();
  }

  /** What became of it, in words. */
  summary() {
    const tokens = `${this.numTokens} token${this.numTokens === 1 ? "" : "s"}`;
    if (this.state === "waiting") return "waiting";
    if (this.state === "streaming") return tokens;
    if (this.state === "stopped") return `stopped after ${tokens}`;
    if (this.state === "cut") return `${this.error.message} after ${tokens}`;
    if (this.state === "refused") return this.error.message;
    return `done, ${tokens}`;
  }
}

/** Run these panes together; the scheduler puts their requests into one batch. */
export function run(panes) {
  const started = panes.map((pane) => {
    runs.value.get(pane.id)?.stop();
    return [pane.id, new Run(pane, setup.value)];
  });
  runs.set(new Map([...runs.value, ...started]));
  for (const [, one] of started) one.start();
}

export const stopAll = () => [...runs.value.values()].filter((one) => one.isLive).forEach((one) => one.stop());

/** Run again those whose request is another one now, if they ran before. */
export function rerunChanged() {
  const changed = setup.value.panes.filter((pane) => {
    const before = runs.value.get(pane.id);
    return before && JSON.stringify(before.request) !== JSON.stringify(streamedRequest(setup.value, pane));
  });
  if (changed.length) run(changed);
}
