// What is read of the model while it answers: a probe at every token, and how long the activations of some layers are.
import { figure, html, NumberBox, useStore } from "./ui.js";
import { catalogue, isProbe } from "./catalogue.js";
import { LayerText } from "./form.js";
import { BY_CONDITION, edit, readBy, SITE } from "./setup.js";

const HEIGHT = 40; // of a strip, in its own units; a token is one wide
const BYTES = { F32: Float32Array, I64: BigInt64Array };

// ---- what is asked

const choices = (vectors) =>
  vectors
    .filter((one) => one.fits && isProbe(one))
    .flatMap((one) => (one.layers.length > 1 ? one.layers.map((layer) => ({ name: one.id, layer })) : [{ name: one.id }]));

/** Which probe is read along, whether it ends answers, and whose activations are told. */
export function Reading({ now, wrong }) {
  const probes = choices(useStore(catalogue).vectors);
  const { name, layer, above, below } = now.probe;
  const isChosen = (one) => one.name === name && one.layer === layer;
  const isSide = below === undefined ? "above" : "below";
  const pick = (value) => edit({ probe: probes[value] ?? { name: value } });
  const end = (side, limit) => edit({ probe: { name, ...(layer === undefined ? {} : { layer }), ...(limit === undefined ? {} : { [side]: limit }) } });
  return html`<span class="field" data-path="stop_when">
      <label>read along <select onChange=${(event) => pick(event.target.value)}>
        <option value=${BY_CONDITION} selected=${name === BY_CONDITION}>what conditions read</option>
        <option value="" selected=${name === ""}>nothing</option>
        ${probes.map((one, index) => html`<option key=${index} value=${index} selected=${isChosen(one)}>${one.name}${one.layer === undefined ? "" : `, layer ${one.layer}`}</option>`)}
        ${name && name !== BY_CONDITION && !probes.some(isChosen) && html`<option value=${name} selected>${name}</option>`}
      </select></label>
      ${name && name !== BY_CONDITION && html`<label>and end
        <select onChange=${(event) => end(event.target.value, above ?? below)}>${["above", "below"].map((side) => html`<option key=${side} selected=${side === isSide}>${side}</option>`)}</select></label>
        <${NumberBox} value=${above ?? below} step="any" placeholder="never" aria-label="reading that ends the answer" onChange=${(limit) => end(isSide, limit)} />`}
      ${wrong("stop_when")}
    </span>
    <label class="field" data-path="capture">activations of layers <${LayerText} value=${now.capture} onChange=${(layers) => edit({ capture: layers ?? [] })} hints=${{ class: "short", placeholder: "none" }} />${wrong("capture")}</label>`;
}

// ---- what is told

/** How long the activations of each generated token are, of a receipt's `captured` and the number of what asked for them:
 * {layers, rows}, a row of lengths for each token that the model was given; or {problem}. */
export function lengthsOf(captured, number, layers) {
  if (!captured) return null;
  if (captured.problem) return { problem: captured.problem };
  const tensors = tensorsOf(captured.safetensors);
  const positions = Array.from(tensors[`${number}.positions`].values, Number);
  const rows = positions.map((_, row) => layers.map((layer) => lengthOf(tensors[`${number}.${SITE}.${layer}`], row)));
  return { layers, rows };
}

function lengthOf({ values, shape: [, width] }, row) {
  let sum = 0;
  for (let at = row * width; at < (row + 1) * width; at++) sum += values[at] ** 2;
  return Math.sqrt(sum);
}

/** The tensors of a safetensors file in base64: eight bytes say how long a header of JSON is, numbers follow. */
function tensorsOf(text) {
  const { buffer } = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(buffer.slice(8, start)));
  const values = ({ dtype, data_offsets: [from, to] }) => new BYTES[dtype](buffer.slice(start + from, start + to));
  return Object.fromEntries(Object.entries(header).map(([name, one]) => [name, { shape: one.shape, values: values(one) }]));
}

/** Where conditions of a pane change their mind about what a probe reads. */
const limitsOf = (pane, { probe, above, below }) => [
  ...pane.steering.flatMap(({ when }) => (when?.probe === probe ? [when.above, when.below, when.release] : [])),
  above ?? below,
].filter(Number.isFinite);

/** What a probe read after every token, as bars above the text; thresholds are lines. A click opens the token. */
export function Strip({ run: own, opened, onOpen }) {
  const asked = own.request.capture?.[readBy(own.request).probe];
  if (!asked) return null;
  const { readings } = own;
  if (!readings.length) return html`<p class="strip about">${own.isLive ? "" : `nothing was told of ${asked.probe}`}</p>`;
  const limits = limitsOf(own.pane, { ...own.request.stop_when, probe: asked.probe });
  const low = Math.min(0, ...readings, ...limits);
  const high = Math.max(0, ...readings, ...limits);
  const y = (value) => (HEIGHT * (high - value)) / (high - low || 1);
  const bars = readings.map((value, at) => `M${at + 0.1} ${y(0)}V${y(value)}H${at + 0.9}V${y(0)}Z`).join("");
  const most = readings.indexOf(Math.max(...readings));
  const token = own.cells.records[most]?.token;
  const said = `${asked.probe} reads ${figure(Math.min(...readings))} to ${figure(readings[most])}, most after token ${most + 1}${token ? ` “${token.trim()}”` : ""}`;
  const current = opened === null ? [] : (own.cells.cells[opened]?.records ?? []);
  const click = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const at = Math.floor((readings.length * (event.clientX - box.left)) / box.width);
    const cell = own.cells.cells.findIndex((one) => one.records.includes(at));
    if (cell >= 0) onOpen(cell);
  };
  return html`<div class="strip">
    <svg viewBox="0 0 ${readings.length} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${said} onClick=${click}>
      ${current.map((at) => html`<rect key=${at} class="current" x=${at} width="1" height=${HEIGHT} />`)}
      <path d=${bars} />
      ${[0, ...limits].map((value, index) => html`<line key=${index} class=${index ? "limit" : ""} x1="0" x2=${readings.length} y1=${y(value)} y2=${y(value)} />`)}
    </svg>
    <small>${said}</small>
  </div>`;
}

/** How long a token's activations are at each layer that was read. */
export function Lengths({ lengths, at }) {
  if (!lengths) return null;
  if (lengths.problem) return html`<p class="about">activations: ${lengths.problem}</p>`;
  const row = lengths.rows[at];
  if (!row) return html`<p class="about">The last token is not given to the model, so it has no activations.</p>`;
  const most = Math.max(...lengths.rows.flat(), 1e-9);
  return html`<dl class="facts lengths"><div><dt>length of the activations (${SITE}) after this token, beside the longest of the answer</dt>
    <dd>${row.map((value, index) => html`<span class="bar" key=${index}>layer ${lengths.layers[index]}
      <svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect height="10" width=${(100 * value) / most} /></svg>
      <span>${figure(value)}</span></span>`)}</dd></div></dl>`;
}
