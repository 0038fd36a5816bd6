// A token opened: what each distribution thought, what methods did, and a way to go on with another choice.
import { figure, html, useEffect, useReducer, useRef, useState, Wrong } from "./ui.js";
import { post } from "./api.js";
import { isPossible, reference } from "./colour.js";
import { MOST_PANES, readBy, setup, titleOf } from "./setup.js";
import { addPane } from "./pane.js";
import { Lengths } from "./reading.js";
import { run } from "./run.js";

const visible = (token) => (token ?? "").replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > -4.6 ? 1 : 3)} %`;

/** The drawer below the panes. */
export function Inside({ run: own, pane, cell: index, onMove, onClose }) {
  const [, again] = useReducer((count) => count + 1, 0);
  const title = useRef(null);
  const [part, setPart] = useState(0);
  useEffect(() => own.follow(again), [own]);
  useEffect(() => setPart(0), [index]);
  useEffect(() => title.current?.focus({ preventScroll: true }), [own]); // who opened it by the keyboard goes on in it
  const { cells, records } = own.cells;
  const cell = cells[Math.min(index, cells.length - 1)];
  const at = cell?.records[Math.min(part, cell.records.length - 1)];
  const record = records[at];
  if (!record) return null;
  const press = (event) => {
    if (event.target.closest("input, textarea, select")) return;
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      event.preventDefault();
      onMove(index + (event.key === "ArrowRight" ? 1 : -1));
    }
  };
  return html`<aside class="inside" aria-label="inside this token" onKeyDown=${press}>
    <header>
      <h2 ref=${title} tabindex="-1"><code dir="auto">${visible(record.token)}</code></h2>
      <span>token ${at + 1} of ${records.length}, id ${record.id}, ${titleOf(pane)}</span>
      <span class="tools">
        <button class="quiet" aria-label="the token before" disabled=${index === 0} onClick=${() => onMove(index - 1)}>‹</button>
        <button class="quiet" aria-label="the next token" disabled=${index >= cells.length - 1} onClick=${() => onMove(index + 1)}>›</button>
        <button class="quiet" aria-label="close" onClick=${onClose}>✕</button>
      </span>
    </header>
    ${cell.records.length > 1 &&
    html`<p class="about">Several tokens are parts of this text:
      ${cell.records.map((one, number) => html`<button class="small" key=${one} aria-pressed=${one === at ? "true" : "false"} onClick=${() => setPart(number)}><code>${visible(records[one].token)}</code></button>`)}
    </p>`}
    <${Figures} record=${record} pane=${pane} />
    <${Distributions} record=${record} onFork=${(choice) => fork(own, pane, at, choice)} />
    <${Facts} record=${record} run=${own} />
    <${Lengths} lengths=${own.lengths} at=${at} />
    <${Typed} onFork=${(choice) => fork(own, pane, at, choice)} />
  </aside>`;
}

function Figures({ record, pane }) {
  if (!record.final) return html`<p class="about">A search chose this token among whole sequences; there is no distribution that it was drawn from.</p>`;
  const isOnlySteered = pane.steering.length > 0 && !pane.decoding.length;
  const plain = record.unsteered;
  return html`<dl class="four">
      <div><dt>rank</dt><dd>${record.final.rank}</dd></div>
      <div><dt>probability</dt><dd>${percent(record.final.logprob)}</dd></div>
      <div><dt>${plain ? "rank unsteered" : "rank before decoding"}</dt><dd>${reference(record).rank}</dd></div>
      <div><dt>${plain ? "KL to unsteered" : "KL to before decoding"}</dt><dd>${figure(plain?.kl ?? record.kl)} nats</dd></div>
    </dl>
    ${isOnlySteered && !plain && html`<p class="about">Base is the model after steering, so nothing is seen of that here: tick “with the unsteered model” and run again.</p>`}`;
}

/** All distributions side by side: the tokens that any of them finds likely, and the one that was drawn. */
function Distributions({ record, onFork }) {
  const isBaseFinal = record.unsteered && record.kl === 0; // nothing was decoded: base says the same as final
  const named = { final: record.final, drawn: record.drawn, unsteered: record.unsteered, base: isBaseFinal ? null : record.base, ...record.streams };
  const columns = Object.entries(named).filter(([, one]) => one);
  const tokens = new Map([[record.id, record.token]]);
  for (const [, one] of columns) for (const { id, token } of one.top) tokens.set(id, token);
  const known = (one, id) => one.top.find((each) => each.id === id)?.logprob ?? (id === record.id ? one.logprob : null);
  const best = (id) => Math.max(...columns.map(([, one]) => known(one, id) ?? -Infinity));
  const rows = [...tokens].sort(([a], [b]) => (known(record.final ?? record.base ?? { top: [] }, b) ?? best(b) - 100) - (known(record.final ?? record.base ?? { top: [] }, a) ?? best(a) - 100));
  const isFull = setup.value.panes.length >= MOST_PANES;
  if (!columns.length) return null;
  return html`<div class="scroll" tabindex="0" role="region" aria-label="distributions"><table class="distributions">
    <thead><tr><th scope="col">token</th>${columns.map(([name]) => html`<th scope="col" key=${name}><bdi>${name}</bdi></th>`)}<th scope="col"><span class="unseen">go on</span></th></tr></thead>
    <tbody>
      ${rows.map(
        ([id, token]) => html`<tr key=${id} class=${id === record.id ? "drawn" : ""}>
          <th scope="row"><code dir="auto">${visible(token)}</code>${id === record.id ? html`<span class="unseen"> (drawn)</span>` : ""}</th>
          ${columns.map(([name, one]) => html`<td key=${name}><${Bar} logprob=${known(one, id)} /></td>`)}
          <td>${id !== record.id && html`<button class="small" disabled=${isFull} title=${isFull ? "close a pane first" : "the answer up to here, then this token, in a new pane"} onClick=${() => onFork(id)}>go on with it</button>`}</td>
        </tr>`,
      )}
    </tbody>
    <tfoot><tr><th scope="row">shown cover</th>${columns.map(([name, one]) => html`<td key=${name}>${percent(Math.log(Math.min(1, rows.reduce((sum, [id]) => sum + Math.exp(known(one, id) ?? -Infinity), 0))))}</td>`)}<td></td></tr></tfoot>
  </table></div>`;
}

function Bar({ logprob }) {
  if (logprob === null) return html`<span class="unknown">–</span>`;
  if (!isPossible(logprob)) return html`<span class="unknown" title="left out">out</span>`;
  return html`<span class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect height="10" width=${100 * Math.exp(logprob)} /></svg><span>${percent(logprob)}</span></span>`;
}

/** What methods, gates and probes did. */
function Facts({ record, run: own }) {
  const facts = Object.entries(record.facts ?? {});
  const gates = own.receipt?.steering?.filter((one) => one.fired || one.schedule || one.when) ?? [];
  const isRead = record.reading !== undefined;
  if (!facts.length && !gates.length && !isRead) return null;
  return html`<dl class="facts">
    ${isRead && html`<div><dt><bdi>${own.request.capture[readBy(own.request).probe].probe}</bdi> reads</dt><dd>${figure(record.reading)}</dd></div>`}
    ${facts.map(([name, value]) => html`<div key=${name}><dt>${name.replaceAll("_", " ")}</dt><dd>${Array.isArray(value) ? value.map((one) => figure(Number(one))).join(", ") : figure(Number(value))}</dd></div>`)}
    ${gates.map((one) => html`<div key=${one.vector}><dt>gate of <bdi>${one.vector ?? one.method}</bdi></dt><dd>${gateOf(one)}</dd></div>`)}
  </dl>`;
}

function gateOf({ fired, schedule, when }) {
  const said = [];
  if (when) said.push(`reads ${when.probe}`);
  if (fired) said.push(`open at ${fired.tokens} of ${fired.of} tokens`);
  if (fired?.readings) said.push(`read ${JSON.stringify(fired.readings)}`);
  if (schedule) said.push(`${schedule.shape} schedule`);
  return said.join(", ");
}

/** Go on with any text. */
function Typed({ onFork }) {
  const [text, setText] = useState("");
  const [wrong, setWrong] = useState("");
  const go = async (event) => {
    event.preventDefault();
    try {
      const { tokens } = await post("tokenize", { model: setup.value.model, prompt: text, add_special_tokens: false });
      if (tokens.length) onFork(tokens);
    } catch (error) {
      setWrong(error.message);
    }
  };
  return html`<form class="typed" onSubmit=${go}>
    <label>or with these words <input type="text" dir="auto" value=${text} onInput=${(event) => setText(event.target.value)} /></label>
    <button class="small" disabled=${!text || setup.value.panes.length >= MOST_PANES}>go on from here</button>
    ${wrong && html`<${Wrong}>${wrong}<//>`}
  </form>`;
}

/** The same request with the tokens before this one, and another in its place, given: positions, windows, schedules and
 * the template stay as they were. */
function fork(own, pane, at, choice) {
  const ids = [...own.cells.records.slice(0, at).map((record) => record.id), ...[choice].flat()];
  const decoding = [...pane.decoding.filter((entry) => entry.method !== "forced"), { method: "forced", ids }];
  run([addPane({ ...pane, label: `${titleOf(pane)}, from token ${at + 1}`, decoding })]);
}
