// An answer's text in cells: the smallest stretches of which the records are known. Mostly a cell is a token; tokens that
// are parts of one character, or whose text came late, share one.

const segmenter = new Intl.Segmenter(undefined, { granularity: "grapheme" });

export class Cells {
  cells = []; // {text, records: [number]}
  records = [];
  text = "";
  numStruck = 0; // times that something was taken back
  #pending = ""; // text that no record accounts for yet
  #open = []; // records that no text accounts for yet

  /** What one event brought. */
  add(text, records) {
    this.text += text;
    this.#pending += text;
    for (const record of records) this.#open.push(this.records.push(record) - 1);
    this.#match(false);
  }

  /** What came to be known of a token later, if there is a record of it. */
  note(index, name, value) {
    if (!this.records[index]) return;
    this.records[index][name] = value;
    const cell = this.cells.findLast((one) => one.records.includes(index));
    if (cell) cell.isChanged = true;
  }

  /** What a cell looks like may depend on all of them. */
  repaint() {
    for (const cell of this.cells) cell.isChanged = true;
  }

  /** The last characters (code points) hold no longer: they stay as struck cells. Only where there are no records. */
  retract(characters) {
    for (let left = characters, index = this.cells.length - 1; left > 0 && index >= 0; index--) {
      const cell = this.cells[index];
      if (cell.isStruck) continue;
      const points = [...cell.text];
      const kept = points.slice(0, Math.max(points.length - left, 0)).join("");
      left -= points.length;
      cell.isChanged = true;
      if (kept) this.cells.splice(index + 1, 0, { text: cell.text.slice(kept.length), records: [], isStruck: true });
      else cell.isStruck = true;
      if (kept) cell.text = kept;
    }
    this.numStruck += 1;
    this.text = this.cells.map((cell) => (cell.isStruck ? "" : cell.text)).join("");
  }

  /** Nothing more comes. */
  close() {
    this.#match(true);
    if (this.#pending || this.#open.length) this.#put(this.#pending, this.#open);
    this.#pending = "";
    this.#open = [];
  }

  /** Give records their text, first to first. Where they do not fit, wait until they do, together. */
  #match(isLast) {
    if (!this.#open.length) {
      if (this.#pending && !this.records.length) this.#flush(); // no records were asked for
      return;
    }
    while (this.#open.length) {
      const token = this.records[this.#open[0]].token ?? "";
      if (!token || token.includes("\ufffd") || !this.#pending.startsWith(token)) break;
      this.#put(token, [this.#open.shift()]);
      this.#pending = this.#pending.slice(token.length);
    }
    if (!this.#open.length || !this.#pending) return;
    const joined = this.#open.map((index) => this.records[index].token ?? "").join("");
    const isWhole = joined.includes("\ufffd") || !joined.startsWith(this.#pending);
    if (isWhole || isLast) {
      this.#put(this.#pending, this.#open);
      this.#pending = "";
      this.#open = [];
    }
  }

  #flush() {
    this.#put(this.#pending, []);
    this.#pending = "";
  }

  /** A cell of its own, unless it would cut a character in two. */
  #put(text, records) {
    const last = this.cells.at(-1);
    if (last && !last.isStruck && text && isInside(last.text, text)) {
      last.text += text;
      last.records = [...last.records, ...records];
      last.isChanged = true;
    } else if (text || records.length) {
      this.cells.push({ text, records });
    }
  }
}

/** Whether the border between two texts lies within one character as people see it: a flag, a conjunct. */
function isInside(before, after) {
  if (/^[\x20-\x7e\n]/.test(after)) return false;
  const start = before.slice(-16);
  for (const { index } of segmenter.segment(start + after.slice(0, 16))) if (index === start.length) return false;
  return true;
}
