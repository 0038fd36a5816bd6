// A vector made of pairs that are typed or pasted: the server fits it on its own model; this page shows how far that is, and what it is worth.
import { announce, figure, html, Store, useId, useState, useStore, Wrong, Segments } from "./ui.js";
import { change } from "./api.js";
import { load } from "./catalogue.js";
import { addPane } from "./pane.js";
import { MOST_PANES, setup } from "./setup.js";

const PAUSE = 1000; // milliseconds between two looks at a job
const METHODS = ["caa", "shift_vector", "repe", "control_vector", "actadd", "probe"]; // that take pairs
const FITS = "v1/steering/fits";
const jobs = new Store([]); // that this page has started, the newest first: {id, state, ...} as the server tells them
const draft = new Store({ method: "caa", name: "", pairs: "", template: "none", layers: "" });

/** Rows of the lines that say something, and which line each is of. */
export function rowsOf(text) {
  const rows = [];
  const lines = [];
  for (const [index, line] of text.split("\n").entries()) {
    if (!line.trim()) continue;
    lines.push(index + 1);
    rows.push(rowOf(line));
  }
  return { rows, lines };
}

function rowOf(line) {
  if (line.trimStart().startsWith("{")) {
    try {
      return JSON.parse(line);
    } catch {
      return line; // no row, which the server says
    }
  }
  const [positive, ...rest] = line.split(line.includes("\t") ? "\t" : "|");
  return rest.length === 1 ? { positive: positive.trim(), negative: rest[0].trim() } : line;
}

/** What a refusal is about, in the words of this form. */
function placed(error, lines) {
  const [, row] = /^data\[(\d+)\]/.exec(error.param ?? "") ?? [];
  if (row === undefined) return { field: error.param ?? "", message: error.message };
  const key = /\]\.(\w+)/.exec(error.param)?.[1];
  return { field: "data", message: `line ${lines[row]}${key ? `, ${key}` : ""}: ${error.message}` };
}

const asJson = (body) => ({ method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
const tell = (job) => jobs.set((now) => now.map((one) => (one.id === job.id ? { ...one, ...job } : one)));

async function follow(id) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
    if (!jobs.value.some((one) => one.id === id)) return; // it was put away
    try {
      const job = await change(`${FITS}/${id}`, {});
      tell({ ...job, trouble: null });
      if (job.ended === null) continue;
      announce(`${job.name}: ${job.state}`);
      if (job.state === "done") await load();
      return;
    } catch (wrong) {
      tell({ id, trouble: wrong.message });
      if (wrong.status) return; // it was refused; one that cannot be reached may come back
    }
  }
}

export function Fit() {
  const said = useStore(draft);
  const started = useStore(jobs);
  const [error, setError] = useState(null);
  const id = useId("fit");
  const say = (field) => (event) => draft.set((now) => ({ ...now, [field]: event.target.value }));
  const { rows, lines } = rowsOf(said.pairs);
  const start = async (event) => {
    event.preventDefault();
    setError(null);
    const options = { template: said.template, ...(said.layers ? { layers: said.layers } : {}) };
    try {
      const job = await change(FITS, asJson({ method: said.method, name: said.name, data: rows, options }));
      jobs.set((now) => [job, ...now]);
      announce(`${job.name} is being made`);
      follow(job.id);
    } catch (wrong) {
      setError(placed(wrong, lines));
    }
  };
  const wrong = (field) => (error?.field === field ? { "aria-invalid": "true", "aria-describedby": `${id}-wrong` } : {});
  return html`<section class="card" aria-label="Fit"><h2>Fit a vector from pairs</h2>
    <form class="fields" onSubmit=${start}>
      <label class="field">pairs <textarea rows="5" spellcheck="false" value=${said.pairs} onInput=${say("pairs")} ...${wrong("data")}></textarea></label>
      <small>A line each: a text that shows what is meant, a bar or a tab, one like it that does not. Rows of JSON are taken, too. ${rows.length} so far.</small>
      <div class="line">
        <label>method <select value=${said.method} onChange=${say("method")} ...${wrong("method")}>${METHODS.map((one) => html`<option key=${one}>${one}</option>`)}</select></label>
        <label>name <input type="text" required value=${said.name} onInput=${say("name")} ...${wrong("name")} /></label>
        <label>layers <input type="text" placeholder="the best" value=${said.layers} onInput=${say("layers")} ...${wrong("options.layers")} /></label>
        <${Segments} label="texts are" value=${said.template} choices=${[["none", "as they are"], ["chat", "chats"]]} onChange=${(template) => draft.set((now) => ({ ...now, template }))} />
      </div>
      ${error && html`<${Wrong} id=${`${id}-wrong`}>${error.message}<//>`}
      <button class="run" disabled=${!said.name || !rows.length}>Fit</button>
    </form>
    ${started.map((job) => html`<${Job} key=${job.id} job=${job} />`)}
  </section>`;
}

function Job({ job }) {
  const end = async () => {
    try {
      const { deleted, ...now } = await change(`${FITS}/${job.id}`, { method: "DELETE" });
      if (deleted) jobs.set((all) => all.filter((one) => one.id !== job.id));
      else tell(now);
    } catch (wrong) {
      tell({ id: job.id, trouble: wrong.message });
    }
  };
  const use = () => {
    addPane({ steering: [{ vector: job.name }] });
    location.hash = "#/compare";
  };
  const isOver = job.ended !== null;
  const { what, done, of } = job.progress ?? { what: job.state, done: 0, of: 1 };
  return html`<article class="entry" aria-label=${`fit of ${job.name}`}>
    <div class="title"><strong><bdi>${job.name}</bdi></strong><small>${job.method}, ${job.state}</small>
      ${job.state === "done" && job.method !== "probe" && html`<button class="small" disabled=${setup.value.panes.length >= MOST_PANES} onClick=${use}>try it</button>`}
      <button class="quiet" aria-label=${`${isOver ? "put away" : "cancel"} the fit of ${job.name}`} onClick=${end}>${isOver ? "put away" : "cancel"}</button>
    </div>
    ${!isOver && html`<div class="line"><progress max=${of} value=${done} aria-label=${`${what}: ${job.name}`}></progress><small>${what} ${done} of ${of}</small></div>`}
    ${job.evaluation && html`<p>${worth(job.evaluation)}</p>`}
    ${job.warnings.map((text) => html`<p class="about" key=${text}>${text}</p>`)}
    ${job.error && html`<p class="problem">${job.error.message}</p>`}
    ${job.trouble && html`<p class="problem">${job.trouble}</p>`}
  </article>`;
}

/** What an evaluation says, in a sentence. */
function worth({ rows, problem, ahead, accuracy, auc }) {
  if (problem) return `Not measured on held-out rows: ${problem}`;
  const percent = (value) => `${figure(100 * value, 3)} %`;
  const range = ({ value, interval: [low, high] }) => `${percent(value)} (between ${percent(low)} and ${percent(high)})`;
  const parts = [
    ahead && `tells the two texts of a pair apart in ${range(ahead)}`,
    accuracy && `names the side of a text in ${range(accuracy)}`,
    auc && `AUC ${figure(auc.value, 3)} (${figure(auc.interval[0], 3)} to ${figure(auc.interval[1], 3)})`,
  ].filter(Boolean);
  return `On ${rows} held-out rows it ${parts.join("; ")}. That says nothing yet of what answers become.`;
}
