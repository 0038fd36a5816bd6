// What this server can be asked for by name: vectors, learned heads and presets; and, with the administrator's key, changing them.
import { announce, figure, html, Segments, useRef, useState, useStore, Wrong } from "./ui.js";
import { asAdministrator, change, keys, Refusal } from "./api.js";
import { catalogue, isProbe, load } from "./catalogue.js";
import { Fit } from "./fit.js";
import { addPane } from "./pane.js";
import { edit, MOST_PANES, setup } from "./setup.js";

const NEAREST = 6; // cosines that are shown of a vector

export function Library() {
  const { vectors, presets, methods } = useStore(catalogue);
  const [asked, ask] = useState(null); // what is about to be removed
  const [error, setError] = useState(null);
  const remove = async ({ kind, id }) => {
    try {
      await change(`v1/steering/${kind}s/${encodeURIComponent(id)}`, { method: "DELETE" });
      announce(`${id} removed`);
      ask(null);
      setError(null);
      await load();
    } catch (wrong) {
      setError(wrong);
    }
  };
  const edits = new Set(methods.filter((one) => one.kind === "edit").map((one) => one.name));
  const sorts = [
    ["Vectors", vectors.filter((one) => edits.has(one.method))],
    ["Learned heads", vectors.filter((one) => !edits.has(one.method))],
  ];
  return html`<main class="library" id="main">
    <h1 class="unseen">Library</h1>
    <${AdminKey} />
    ${error && html`<${Wrong}>${error.message}<//>`}
    <div class="columns">
      ${sorts.map(([name, some]) => (some.length || name === "Vectors") && html`<section class="card" key=${name} aria-label=${name}><h2>${name}</h2>
        ${some.length ? some.map((one) => html`<${Vector} key=${one.id} vector=${one} asked=${asked} ask=${ask} remove=${remove} />`) : html`<p class="about">None is loaded. Start the server with --vectors PATH, or upload one here.</p>`}
      </section>`)}
      <section class="card" aria-label="Presets"><h2>Presets</h2>
        ${presets.length ? presets.map((one) => html`<${Preset} key=${one.id} preset=${one} asked=${asked} ask=${ask} remove=${remove} />`) : html`<p class="about">None. A preset is requests' fields under a model's name.</p>`}
      </section>
      <${Upload} />
      <${Fit} />
    </div>
  </main>`;
}

export function AdminKey() {
  const { admin } = useStore(keys);
  return html`<section class="card" aria-label="administrator's key"><div class="line">
    <label>administrator's key <input type="password" autocomplete="off" value=${admin} onInput=${(event) => keys.set((now) => ({ ...now, admin: event.target.value }))} /></label>
    <small>needed to upload, fit, replace, rename and remove, and on servers with a file of keys to see their health; kept in this page's memory only, gone when it is loaded again</small>
  </div></section>`;
}

function Removal({ what, asked, ask, remove }) {
  if (asked?.id === what.id && asked.kind === what.kind) {
    return html`<span role="group" aria-label="sure?">Remove <bdi>${what.id}</bdi> for everybody? <button class="small" onClick=${() => remove(what)}>Remove</button> <button class="small" onClick=${() => ask(null)}>Keep</button></span>`;
  }
  return html`<button class="quiet" aria-label=${`remove ${what.id}`} onClick=${() => ask(what)}>remove</button>`;
}

/** Ask for a name, and say what is wrong with it. */
function Rename({ id }) {
  const [name, setName] = useState(id);
  const [error, setError] = useState(null);
  const rename = async (event) => {
    event.preventDefault();
    try {
      const body = JSON.stringify({ name });
      await change(`v1/steering/vectors/${encodeURIComponent(id)}`, { method: "PATCH", body, headers: { "Content-Type": "application/json" } });
      announce(`${id} is ${name} now`);
      await load();
    } catch (wrong) {
      setError(wrong);
    }
  };
  return html`<form class="typed" onSubmit=${rename}>
    <label>new name <input type="text" value=${name} aria-invalid=${error ? "true" : undefined} onInput=${(event) => setName(event.target.value)} /></label>
    <button class="small" disabled=${!name || name === id}>Rename</button>
    ${error && html`<${Wrong}>${error.message}<//>`}
  </form>`;
}

function Vector({ vector, ...removal }) {
  const [isNaming, setNaming] = useState(false);
  const near = Object.entries(vector.cosines ?? {}).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a)).slice(0, NEAREST);
  const dose = vector.doses?.[0];
  const use = () => {
    if (isProbe(vector)) edit({ probe: { name: vector.id, ...(vector.layers.length > 1 ? { layer: vector.layers.at(-1) } : {}) } });
    else if (setup.value.panes.length < MOST_PANES) addPane({ steering: [{ vector: vector.id }] });
    location.hash = "#/compare";
  };
  return html`<article class="entry steering" aria-label=${vector.id}>
    <div class="title"><strong><bdi>${vector.id}</bdi></strong><small>${vector.method}</small>
      ${vector.fits && html`<button class="small" disabled=${!isProbe(vector) && setup.value.panes.length >= MOST_PANES} onClick=${use}>${isProbe(vector) ? "read it along" : "try it"}</button>`}
      ${!vector.read_only && html`<button class="quiet" aria-label=${`rename ${vector.id}`} aria-expanded=${isNaming ? "true" : "false"} onClick=${() => setNaming(!isNaming)}>rename</button>
      <${Removal} what=${{ kind: "vector", id: vector.id }} ...${removal} />`}
    </div>
    ${isNaming && html`<${Rename} id=${vector.id} />`}
    ${vector.description && html`<p dir="auto">${vector.description}</p>`}
    ${vector.problem && html`<p class="problem">${vector.problem}</p>`}
    <div class="line">
      <${Norms} norms=${vector.norms} />
      <small>layers ${vector.layers.join(", ")} of ${vector.sites.join(", ")}; default scale ${figure(vector.scale)}${typeof vector.where === "string" ? `, ${vector.where}` : ""}${dose ? `; dose ${figure(dose.relative, 2)} at ${dose.at}` : ""}</small>
    </div>
    ${near.length > 0 && html`<p class="about">cosine with ${near.map(([other, value], index) => html`${index ? ", " : ""}<bdi>${other}</bdi> ${figure(value, 2)}`)}</p>`}
    <p class="digest">${[vector.licence, ...Object.entries(vector.provenance ?? {}).map(([key, value]) => `${key.replaceAll("_", " ")}: ${value}`)].filter(Boolean).join(" · ")} · <code>${vector.digest.slice(0, 16)}</code></p>
  </article>`;
}

function Norms({ norms }) {
  const found = Object.entries(norms ?? {}).slice(0, 96);
  const largest = Math.max(...found.map(([, norm]) => norm), 1e-9);
  return html`<span class="norms" role="img" aria-label=${found.map(([place, norm]) => `${place}: ${figure(norm)}`).join(", ")}>
    ${found.map(([place, norm]) => html`<svg key=${place} viewBox="0 0 9 34"><title>${place}: ${figure(norm)}</title><rect width="8" y=${34 - 34 * (norm / largest)} height=${34 * (norm / largest)} /></svg>`)}
  </span>`;
}

function Preset({ preset, ...removal }) {
  const { id, object, digest, read_only, description, ...rest } = preset;
  const use = () => {
    if (setup.value.panes.length < MOST_PANES) addPane({ model: `${catalogue.value.models[0]}@${id}`, label: `@${id}` });
    location.hash = "#/compare";
  };
  return html`<article class="entry" aria-label=${id}>
    <div class="title"><strong><bdi>@${id}</bdi></strong><small></small>
      <button class="small" disabled=${setup.value.panes.length >= MOST_PANES} onClick=${use}>try it</button>
      ${!read_only && html`<${Removal} what=${{ kind: "preset", id }} ...${removal} />`}</div>
    ${description && html`<p dir="auto">${description}</p>`}
    <pre class="code" tabindex="0" aria-label=${`what ${id} says`}><code>${JSON.stringify(rest, null, 1)}</code></pre>
  </article>`;
}

const NO_HINTS = new Set(["name", "body", "filename"]); // of what an upload's refusal may name

/** A file is sent as it is; what the server finds missing becomes the next question. */
function Upload() {
  const [file, setFile] = useState(null);
  const [name, setName] = useState("");
  const [hints, setHints] = useState({});
  const [error, setError] = useState(null);
  const [progress, setProgress] = useState(null);
  const [isOver, setOver] = useState(false);
  const choose = (chosen) => {
    setFile(chosen);
    setName(chosen.name.replace(/\.\w+$/, "").replace(/[^A-Za-z0-9._-]+/g, "-"));
    setHints({});
    setError(null);
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    if (event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
  };
  const send = async (event) => {
    event.preventDefault();
    setError(null);
    setProgress(0);
    try {
      const said = Object.entries(hints).filter(([, value]) => value !== "");
      const parameters = new URLSearchParams({ name, filename: file.name, ...Object.fromEntries(said) });
      const made = await asAdministrator((headers) => upload(file, parameters, headers, setProgress));
      announce(`${made.id} uploaded`);
      setFile(null);
      await load();
    } catch (wrong) {
      setError(wrong);
      if (wrong.param && !NO_HINTS.has(wrong.param)) setHints((now) => ({ [wrong.param]: "", ...now }));
    } finally {
      setProgress(null);
    }
  };
  const input = useRef(null);
  return html`<section class="card" aria-label="Upload"><h2>Upload</h2>
    <div class="drop ${isOver ? "over" : ""}" onDragOver=${(event) => (event.preventDefault(), setOver(true))} onDragLeave=${() => setOver(false)} onDrop=${drop}>
      <label>a vector file, or one of another library's <input type="file" ref=${input} onChange=${(event) => event.target.files[0] && choose(event.target.files[0])} /></label>
      <small>or drop it here. What it is, is found out; what it leaves unsaid, is asked.</small>
    </div>
    ${file &&
    html`<form class="fields" onSubmit=${send}>
      <label class="field">name <input type="text" required value=${name} onInput=${(event) => setName(event.target.value)} aria-invalid=${error?.param === "name" ? "true" : undefined} /></label>
      ${Object.entries(hints).map(([hint, value]) => html`<label class="field" key=${hint}>${hint} <input type="text" value=${value} onInput=${(event) => setHints({ ...hints, [hint]: event.target.value })} aria-invalid=${error?.param === hint ? "true" : undefined} /></label>`)}
      ${error && html`<${Wrong}>${error.param ? html`<code>${error.param}</code>: ` : ""}${error.message}<//>`}
      ${progress !== null && html`<progress max="1" value=${progress} aria-label="upload"></progress>`}
      <button class="run" disabled=${progress !== null || !name}>Upload ${file.name}</button>
    </form>`}
  </section>`;
}

/** fetch tells nothing of a body's progress; XMLHttpRequest does. */
function upload(file, parameters, headers, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `v1/steering/vectors?${parameters}`);
    const user = keys.value.user && { Authorization: `Bearer ${keys.value.user}` };
    for (const [name, value] of Object.entries({ ...user, ...headers })) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Refusal(0, { message: "the server cannot be reached" }));
    request.onload = () => {
      let body = {};
      try {
        body = JSON.parse(request.responseText);
      } catch {
        // an answer without JSON says what its status says
      }
      if (request.status < 300) resolve(body);
      else reject(new Refusal(request.status, body.error));
    };
    request.send(file);
  });
}
