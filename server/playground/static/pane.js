// One pane: its own steering and decoding, its own answer, stop and error.
import { figure, html, useEffect, useReducer, useState, useStore, Wrong } from "./ui.js";
import { Answer } from "./answer.js";
import { catalogue, isSteering, methodOf, offers, vectorOf } from "./catalogue.js";
import { Field, Fields, Json, range } from "./form.js";
import { Slider } from "./ui.js";
import { Strip } from "./reading.js";
import { edit, editPane, emptySetup, isPlain, newId, setup, titleOf } from "./setup.js";
import { run, runs } from "./run.js";

export const kindOf = (pane) => (isPlain(pane) ? "plain" : pane.steering.length ? (pane.decoding.length ? "both" : "steered") : "decoded");

export function Pane({ pane, isFirst, error, errorAt, opened, onOpen }) {
  const own = useStore(runs).get(pane.id);
  const title = titleOf(pane);
  const change = (side, entries) => editPane(pane.id, { [side]: entries, label: "" });
  const at = { error, errorAt };
  return html`<section class="pane ${kindOf(pane)}" data-pane=${pane.id} aria-label=${title}>
    <header>
      <h2>${title}</h2>
      <span class="tools">
        ${own && html`<${Stop} key=${own.started} run=${own} title=${title} />`}
        ${!isFirst && html`<button class="quiet" aria-label=${`remove ${title}`} title="remove this pane" onClick=${() => remove(pane)}>✕</button>`}
      </span>
    </header>
    <div class="entries">
      ${["steering", "decoding"].map((side) =>
        pane[side].map(
          (entry, index) => html`<${Entry} key=${`${side}${index}`} side=${side} entry=${entry} onExample=${(example) => showExample(pane, side, index, example)} at=${{ ...at, path: `${side}[${index}]` }}
            onChange=${(next) => change(side, next ? pane[side].map((one, number) => (number === index ? next : one)) : pane[side].filter((_, number) => number !== index))} />`,
        ),
      )}
      ${pane.more && html`<${More} more=${pane.more} onChange=${(more) => editPane(pane.id, { more })} />`}
      ${isPlain(pane) && html`<p class="nothing">the model as it is</p>`}
      <div class="adders">
        <${Adder} side="steering" label="+ steer" onAdd=${(entry) => change("steering", [...pane.steering, entry])} />
        <${Adder} side="decoding" label="+ decode" onAdd=${(entry) => change("decoding", [...pane.decoding, entry])} />
        ${!pane.more && html`<button class="quiet" onClick=${() => editPane(pane.id, { more: {} })}>+ fields</button>`}
      </div>
      ${error && errorAt === "" && html`<${Wrong}>${error.param ? html`<code>${error.param}</code>: ` : ""}${error.message}<//>`}
    </div>
    ${own ? html`<${Result} key=${own.started} run=${own} pane=${pane} title=${title} opened=${opened} onOpen=${onOpen} />` : html`<div class="text empty"><p>Run, and this pane's answer appears here.</p></div>`}
  </section>`;
}

function remove(pane) {
  runs.value.get(pane.id)?.stop();
  edit({ panes: setup.value.panes.filter((one) => one.id !== pane.id) });
}

export function addPane(from = {}) {
  const pane = { id: newId(), label: "", steering: [], decoding: [], ...structuredClone(from) };
  pane.id = newId();
  edit({ panes: [...setup.value.panes, pane] });
  return pane;
}

/** One entry of `steering` or `decoding`: its main number at hand, the rest one click away. */
function Entry({ side, entry, at, onChange, onExample }) {
  useStore(catalogue);
  const [isJson, setJson] = useState(false);
  const method = methodOf(entry);
  const name = entry.vector ?? entry.method ?? side;
  const problem = !method ? null : method.available ? null : method.reason;
  const main = method && mainNumber(method.schema);
  const inside = { ...at, defs: method?.schema.$defs ?? {}, layers: layersOf(entry) };
  const isInside = at.errorAt && at.errorAt !== at.path && at.errorAt !== `${at.path}.${main}` && at.errorAt.startsWith(at.path);
  return html`<article class="entry ${side}" data-path=${at.path} aria-label=${`${side}: ${name}`}>
    <div class="title">
      <strong><bdi>${name}</bdi></strong>
      <small>${method ? (entry.vector ? method.name : method.kind) : ""}</small>
      ${method?.example && html`<button class="quiet" title="a request that shows ${method.name}: its prompt is for all panes" aria-label=${`example of ${name}`} onClick=${() => onExample(method.example)}>example</button>`}
      <button class="quiet" aria-pressed=${isJson ? "true" : "false"} onClick=${() => setJson(!isJson)}>JSON</button>
      <button class="quiet" aria-label=${`remove ${name}`} onClick=${() => onChange(null)}>✕</button>
    </div>
    ${problem && html`<p class="about">${problem}</p>`}
    ${isJson || !method
      ? html`<${Json} rows="6" value=${entry} hints=${{ "aria-label": `${name} as JSON` }} onChange=${(next) => next && onChange(next)} />`
      : html`${main && html`<${Main} entry=${entry} name=${main} method=${method} at=${inside} onChange=${onChange} />`}
          <details open=${isInside || undefined}>
            <summary>${summaryOf(entry, main) || "where, when, how"}</summary>
            <${Fields} schema=${method.schema} value=${entry} onChange=${onChange} at=${inside} leaveOut=${[main]} />
          </details>`}
    ${at.error && at.errorAt === at.path && html`<${Wrong}>${at.error.message}<//>`}
  </article>`;
}

/** Further fields of the request, whatever the server takes. */
function More({ more, onChange }) {
  return html`<article class="entry" aria-label="further fields">
    <div class="title"><strong>further fields</strong><small></small><button class="quiet" aria-label="remove further fields" onClick=${() => onChange(undefined)}>✕</button></div>
    <${Json} rows="3" value=${more} hints=${{ "aria-label": "further fields as JSON" }} onChange=${(next) => typeof next === "object" && !Array.isArray(next) && onChange(next ?? {})} />
  </article>`;
}

/** Put the request that shows a method into the place of an entry: its prompt and sampling are for all panes. */
function showExample(pane, side, index, example) {
  const { model, prompt, messages, steering, decoding, temperature, max_tokens, seed, stop, ...more } = example;
  const own = { steering: pane.steering, decoding: pane.decoding };
  own[side] = own[side].toSpliced(index, 1, ...[{ steering, decoding }[side]].flat());
  const other = side === "steering" ? "decoding" : "steering";
  own[other] = [{ steering, decoding }[other] ?? own[other]].flat();
  const base = emptySetup();
  const said = Object.entries({ temperature, max_tokens, seed, stop: stop && [stop].flat() }).filter(([, value]) => value !== undefined);
  edit({
    ...(messages ? { kind: "chat", messages } : { kind: "completion", prompt: prompt ?? setup.value.prompt }),
    sampling: { ...base.sampling, ...Object.fromEntries(said) },
    panes: setup.value.panes.map((one) => (one.id === pane.id ? { ...one, ...own, label: "", more: Object.keys(more).length ? more : one.more } : one)),
  });
  run(setup.value.panes);
}

const MAIN = ["scale", "alpha"]; // of the numbers of a method, the one that people move

function mainNumber(schema) {
  const isNumber = (name) => ["number", "integer"].includes(schema.properties[name]?.type) && !["from"].includes(name);
  return MAIN.find(isNumber) ?? Object.keys(schema.properties).find(isNumber);
}

function Main({ entry, name, method, at, onChange }) {
  const schema = method.schema.properties[name];
  const fallback = (name === "scale" && vectorOf(entry.vector)?.scale) || schema.default;
  const wrong = at.errorAt === `${at.path}.${name}` ? at.error : null;
  const set = (value) => {
    const { [name]: _, ...rest } = entry;
    onChange(value === undefined ? rest : { ...rest, [name]: value });
  };
  return html`<div class="main" data-path=${`${at.path}.${name}`}>
    <span class="label">${name.replaceAll("_", " ")}</span>
    <${Slider} value=${entry[name]} fallback=${fallback} ...${range(schema, fallback)} label=${`${entry.vector ?? method.name}: ${name}`} onChange=${set} aria-invalid=${wrong ? "true" : undefined} />
    ${wrong && html`<${Wrong}>${wrong.message}<//>`}
  </div>`;
}

/** The layers that an entry may name, and how large its vector is there. */
function layersOf(entry) {
  const vector = vectorOf(entry.vector);
  if (!vector) return null;
  const norms = {};
  for (const [place, norm] of Object.entries(vector.norms)) {
    const layer = Number(place.split(".")[1]);
    if (Number.isInteger(layer)) norms[layer] = Math.hypot(norms[layer] ?? 0, norm);
  }
  return { own: vector.layers, norms };
}

const ASIDE = new Set(["vector", "method"]);

/** What an entry says beside its name and its main number. */
function summaryOf(entry, main) {
  const said = Object.entries(entry).filter(([name]) => !ASIDE.has(name) && name !== main);
  return said.map(([name, value]) => `${name} ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
}

/** A list of what can be added; what this server cannot do is listed with the reason. */
function Adder({ side, label, onAdd }) {
  const all = useStore(catalogue) && offers(side);
  const able = all.filter((one) => one.isAvailable);
  const unable = all.filter((one) => !one.isAvailable);
  const pick = (event) => {
    const chosen = able[Number(event.target.value)];
    event.target.value = "";
    if (chosen) onAdd(structuredClone(chosen.entry));
  };
  return html`<select class="small ${side}" aria-label=${side === "steering" ? "add steering" : "add decoding"} onChange=${pick}>
    <option value="" selected>${label}</option>
    ${able.map((one, index) => html`<option key=${one.name} value=${index}>${one.name} (${one.about})</option>`)}
    ${unable.length > 0 &&
    html`<optgroup label="not on this server">
      ${unable.map((one) => html`<option key=${one.name} disabled title=${one.reason}>${one.name}: ${one.reason}</option>`)}
    </optgroup>`}
  </select>`;
}

/** Draw again whenever there is more of an answer. */
function useRun(own) {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    again(); // what came before anybody followed
    return own.follow(again);
  }, [own]);
}

/** Ends an answer; above it, where a growing text does not move it. */
function Stop({ run: own, title }) {
  useRun(own);
  return own.isLive && html`<button class="small" aria-label=${`stop ${title}`} onClick=${() => own.stop()}>Stop</button>`;
}

/** An answer with its figures. */
function Result({ run: own, pane, title, opened, onOpen }) {
  useRun(own);
  const rate = own.first !== null && own.numTokens > 1 ? (own.numTokens - 1) / (((own.ended ?? performance.now() - own.started) - own.first) / 1000) : null;
  const dose = own.receipt?.steering?.map((one) => one.dose?.relative).find((one) => one !== undefined);
  const edited = own.receipt?.steering?.map((one) => one.edited_tokens).find((one) => one !== undefined);
  const search = own.receipt?.search?.[0];
  return html`<${Strip} run=${own} opened=${opened} onOpen=${onOpen} />
    <${Answer} run=${own} label=${title} opened=${opened} onOpen=${onOpen} />
    <footer class="figures">
      <span class="state ${own.state}">${own.summary()}</span>
      ${own.first !== null && html`<span title="time to the first token">${Math.round(own.first)} ms</span>`}
      ${rate !== null && html`<span title="tokens per second after the first">${Math.round(rate)}/s</span>`}
      ${own.finish && html`<span title="why it ended">${own.finish}</span>`}
      ${dose !== undefined && html`<span title="length of the edit beside the activations that it edits">dose ${figure(dose, 2)}</span>`}
      ${edited !== undefined && html`<span title="tokens whose activations were edited">${edited} edited</span>`}
      ${own.receipt?.steering?.filter((one) => one.fired).map((one) => html`<span title="tokens at which the condition let the edit through">open at ${one.fired.tokens} of ${one.fired.of}</span>`)}
      ${own.cells.numStruck > 0 && html`<span title="times that the search took back what it had said; struck above">taken back ${own.cells.numStruck} times</span>`}
      ${search && html`<${Search} search=${search} />`}
      ${["cut", "stopped", "refused"].includes(own.state) && html`<button class="small" onClick=${() => run([pane])}>Retry</button>`}
    </footer>
    ${own.receipt?.warnings?.map((warning) => html`<p class="warning" key=${warning}>${warning}</p>`)}`;
}

/** What a search came to, in numbers. */
function Search({ search }) {
  const said = Object.entries(search).filter(([, value]) => typeof value === "number");
  return said.map(([name, value]) => html`<span key=${name}>${name.replaceAll("_", " ")} ${figure(value)}</span>`);
}
