// An answer's text: cells that were appended and never drawn again, so that thousands of tokens stream smoothly.
import { html, useEffect, useRef, useStore } from "./ui.js";
import { bucket, MEASURES } from "./colour.js";
import { view } from "./setup.js";

const NEAR_END = 40; // pixels: whoever reads at the end is kept there
const PARAGRAPH = 250; // cells, after which the next word begins a new line: what is above it needs no new layout

/** The cells of a run, kept in step with it by hand. */
class Drawn {
  constructor(box) {
    this.box = box;
    this.measure = null;
    this.selected = -1;
    this.restart(0);
  }

  update(run, measure) {
    const { cells, records } = run.cells;
    if (run.cells.numStruck !== this.numStruck) this.restart(run.cells.numStruck);
    const isAtEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < NEAR_END;
    if (this.measure !== measure) this.spans.forEach((span, index) => this.colour(span, cells[index], records, measure));
    this.measure = measure;
    for (let index = 0; index < cells.length; index++) {
      const cell = cells[index];
      if (index >= this.spans.length) this.append(cell, records, measure, index);
      else if (cell.isChanged) this.fill(this.spans[index], cell, records, measure);
      cell.isChanged = false;
    }
    if (isAtEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  /** Something before the end changed: all is drawn anew. */
  restart(numStruck) {
    this.numStruck = numStruck;
    this.spans = [];
    this.paragraph = null;
    this.box.replaceChildren();
  }

  append(cell, records, measure, index) {
    if (!this.paragraph || (this.count >= PARAGRAPH && /^\s/.test(cell.text))) {
      this.paragraph = document.createElement("p");
      this.paragraph.dir = "auto";
      this.count = 0;
      this.box.append(this.paragraph);
    }
    const span = document.createElement("span");
    span.dataset.cell = index;
    this.fill(span, cell, records, measure);
    this.spans.push(span);
    this.count += 1;
    this.paragraph.append(span);
  }

  fill(span, cell, records, measure) {
    const isWithheld = !cell.text && cell.records.length > 0; // a stop string, or the end of the text
    span.textContent = isWithheld ? cell.records.map((index) => records[index].token ?? "").join("") : cell.text;
    span.classList.toggle("withheld", isWithheld);
    span.classList.toggle("struck", Boolean(cell.isStruck));
    if (isWithheld) span.title = "ended the answer, and is not part of it";
    this.colour(span, cell, records, measure);
  }

  colour(span, cell, records, measure) {
    const own = cell.records.map((index) => records[index]);
    const kind = ["withheld", "struck"].find((name) => span.classList.contains(name)) ?? "";
    span.className = `${kind} b${bucket(measure, own, records)}`.trim();
  }

  select(index, isFocused) {
    this.spans[this.selected]?.removeAttribute("aria-current");
    this.spans[this.selected]?.removeAttribute("tabindex");
    this.selected = Math.max(0, Math.min(index, this.spans.length - 1));
    const span = this.spans[this.selected];
    if (!span) return;
    span.setAttribute("aria-current", "true");
    span.tabIndex = -1;
    if (isFocused) span.scrollIntoView({ block: "nearest" });
  }

  deselect() {
    this.spans[this.selected]?.removeAttribute("aria-current");
    this.selected = -1;
  }
}

/** The text of a run. Arrow keys walk through its tokens, Enter opens one. */
export function Answer({ run, label, opened, onOpen }) {
  const box = useRef(null);
  const drawn = useRef(null);
  const measure = MEASURES[useStore(view).colour] ?? MEASURES.none;
  const latest = useRef(measure);
  latest.current = measure;
  useEffect(() => {
    drawn.current = new Drawn(box.current);
    drawn.current.update(run, latest.current);
    return run.follow(() => drawn.current.update(run, latest.current));
  }, [run]);
  useEffect(() => drawn.current?.update(run, measure), [measure]);
  useEffect(() => {
    if (opened === null) drawn.current?.deselect();
    else drawn.current?.select(opened, true);
  }, [opened, run]);
  const click = (event) => {
    const cell = event.target.closest("[data-cell]");
    if (cell && run.cells.records.length) onOpen(Number(cell.dataset.cell));
  };
  const press = (event) => {
    const at = drawn.current.selected;
    const last = run.cells.cells.length - 1;
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, Enter: Math.max(at, 0) }[event.key];
    if (next === undefined || !run.cells.records.length) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(next, last));
    drawn.current.select(index, true);
    if (event.key === "Enter" || opened !== null) onOpen(index);
  };
  return html`<div class="text ${run.state}" ref=${box} role="log" aria-live="off" tabindex="0" aria-label=${`${label}: answer`}
    onClick=${click} onKeyDown=${press}></div>`;
}
