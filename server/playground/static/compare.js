// One prompt, plain beside steered beside decoded.
import { Dialog, html, LateText, NumberBox, Segments, Slider, useDebounced, useEffect, useRef, useState, useStore, Wrong } from "./ui.js";
import { Gone, post, Refusal } from "./api.js";
import { catalogue } from "./catalogue.js";
import { Code } from "./code.js";
import { BUCKETS, MEASURES } from "./colour.js";
import { examples, setupOf } from "./examples.js";
import { nearest } from "./form.js";
import { Inside } from "./inside.js";
import { addPane, Pane } from "./pane.js";
import { Reading } from "./reading.js";
import { rerunChanged, run, runs, stopAll } from "./run.js";
import { edit, MOST_PANES, pathOf, requestOf, setup, view } from "./setup.js";

const PAUSE = 250; // milliseconds after the last change

export function Compare() {
  const now = useStore(setup);
  const [errors, setErrors] = useState({});
  const [opened, setOpened] = useState(null); // {pane, cell}
  const [isCode, setCode] = useState(false);
  const before = useRef(null);
  const settle = useDebounced(PAUSE, async (mayRun) => {
    const found = await refusals(setup.value);
    if (found === null) return; // nobody to ask; the banner says so
    setErrors(found);
    if (mayRun && !Object.keys(found).length) rerunChanged();
  });
  useEffect(() => {
    const { prompt, messages, kind } = before.current ?? now;
    const isPromptSame = prompt === now.prompt && messages === now.messages && kind === now.kind;
    if (now.model) settle(isPromptSame && before.current !== null);
    before.current = now;
  }, [now]);
  useEffect(() => {
    const press = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        run(setup.value.panes);
      } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
        if (live().length) stopAll();
        else setOpened(null);
      }
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
  const paneErrors = usePlaces(now.panes, errors, useStore(runs));
  const open = now.panes.find((pane) => pane.id === opened?.pane);
  const openRun = open && runs.value.get(open.id);
  const close = () => {
    const text = document.querySelector(`[data-pane="${CSS.escape(opened.pane)}"] .text`);
    setOpened(null);
    text?.focus();
  };
  const move = (cell) => openRun.cells.cells[cell] && setOpened({ ...opened, cell });
  return html`<main class="compare" id="main">
    <div class="intro">
      <h1>One prompt, plain beside steered beside decoded. The colour of a word says how much that changed it; open one to see why.</h1>
      <${Examples} model=${now.model} />
    </div>
    <${Ask} now=${now} shared=${paneErrors.shared} onCode=${() => setCode(true)} />
    <${Legend} />
    <div class="panes n${now.panes.length}">
      ${now.panes.map(
        (pane, index) => html`<${Pane} key=${pane.id} pane=${pane} isFirst=${index === 0} ...${paneErrors.of(pane.id)}
          opened=${opened?.pane === pane.id ? opened.cell : null} onOpen=${(cell) => setOpened({ pane: pane.id, cell })} />`,
      )}
      ${now.panes.length < MOST_PANES && html`<button class="add" onClick=${() => addPane(now.panes.at(-1))}>+ pane</button>`}
    </div>
    ${openRun && html`<${Inside} run=${openRun} pane=${open} cell=${opened.cell} onMove=${move} onClose=${close} />`}
    ${isCode && html`<${Dialog} title="The same from a program" onClose=${() => setCode(false)}><${Code} now=${now} /><//>`}
  </main>`;
}

const live = () => [...runs.value.values()].filter((one) => one.isLive);

/** What the server says is wrong with each pane's request; null if it cannot be asked. */
async function refusals(now) {
  const found = {};
  for (const pane of now.panes) {
    try {
      await post("v1/steering/validate", requestOf(now, pane));
    } catch (error) {
      if (!(error instanceof Refusal)) {
        if (error instanceof Gone) return null;
        throw error;
      }
      found[pane.id] = error;
    }
  }
  return found;
}

/** Which field each error stands at: found among those that are shown. "" is the pane itself. */
function usePlaces(panes, errors, all) {
  const [places, setPlaces] = useState({});
  const of = (id) => errors[id] ?? (all.get(id)?.state === "refused" && all.get(id).error instanceof Refusal ? all.get(id).error : null);
  useEffect(() => {
    const next = {};
    const shared = pathsIn(document.querySelector(".ask"));
    for (const pane of panes) {
      const param = of(pane.id)?.param;
      const own = nearest(param, pathsIn(document.querySelector(`[data-pane="${CSS.escape(pane.id)}"]`)));
      const common = nearest(param, shared);
      next[pane.id] = own !== null ? own : common !== null ? `shared:${common}` : "";
    }
    if (JSON.stringify(next) !== JSON.stringify(places)) setPlaces(next);
  });
  const shared = {};
  for (const pane of panes) {
    const place = places[pane.id];
    if (place?.startsWith("shared:") && of(pane.id)) shared[place.slice(7)] = of(pane.id);
  }
  return { shared, of: (id) => ({ error: of(id), errorAt: places[id] ?? "" }) };
}

const pathsIn = (part) => [...(part?.querySelectorAll("[data-path]") ?? [])].map((one) => one.dataset.path);

/** The prompt and what all panes share. */
function Ask({ now, shared, onCode }) {
  const { models } = useStore(catalogue);
  const sampling = (name) => (value) => edit({ sampling: { ...now.sampling, [name]: value } });
  const isLive = useLive();
  const wrong = (path) => shared[path] && html`<${Wrong}>${shared[path].message}<//>`;
  return html`<section class="ask" aria-label="prompt and sampling">
    <div class="line">
      <${Segments} label="kind of request" value=${now.kind} choices=${[["completion", "Completion"], ["chat", "Chat"]]} onChange=${(kind) => edit(turned(now, kind))} />
      <label data-path="model">model
        <select value=${now.model} onChange=${(event) => edit({ model: event.target.value })}>
          ${(models.includes(now.model) ? models : [now.model, ...models]).map((name) => html`<option key=${name} value=${name} selected=${name === now.model}>${name}</option>`)}
        </select>
        ${wrong("model")}
      </label>
      <span class="grow"></span>
      <button class="run" onClick=${() => run(now.panes)} disabled=${!now.model}>Run <kbd>Ctrl ⏎</kbd></button>
      <button onClick=${stopAll} disabled=${!isLive}>Stop <kbd>Esc</kbd></button>
      <button onClick=${onCode}>Code</button>
    </div>
    ${now.kind === "chat" ? html`<${Messages} messages=${now.messages} />` : html`<${Prompt} prompt=${now.prompt} />`}
    ${["messages", "prompt"].map((path) => wrong(path))}
    <div class="line sampling">
      <div class="field" data-path="temperature"><span class="label">temperature</span>
        <${Slider} value=${now.sampling.temperature} fallback=${1} min="0" max="2" step="0.05" label="temperature" onChange=${sampling("temperature")} />${wrong("temperature")}</div>
      <label class="field" data-path="max_tokens">at most <${NumberBox} value=${now.sampling.max_tokens} min="1" step="1" onChange=${sampling("max_tokens")} /> tokens ${wrong("max_tokens")}</label>
      <label class="field" data-path="seed">seed <${NumberBox} value=${now.sampling.seed} step="1" disabled=${!now.sampling.temperature} onChange=${sampling("seed")} />${wrong("seed")}</label>
      <label class="field" data-path="stop">stop at <${LateText} class="short" value=${now.sampling.stop.join(" | ")} placeholder="nothing"
        onChange=${(text) => sampling("stop")(text.split(" | ").filter(Boolean))} />${wrong("stop")}</label>
      <label class="field" data-path="explain">explain <${NumberBox} value=${now.top} min="0" max="20" step="1" onChange=${(top) => edit({ top: top ?? 0 })} /> likeliest ${wrong("explain")}</label>
    </div>
    <div class="line sampling reading"><${Reading} now=${now} wrong=${wrong} /></div>
  </section>`;
}

/** Whether anything is being generated. */
function useLive() {
  const all = useStore(runs);
  const [, again] = useState(0);
  useEffect(() => {
    const stops = [...all.values()].map((one) => one.follow(() => again((count) => count + 1)));
    return () => stops.forEach((stop) => stop());
  }, [all]);
  return live().length > 0;
}

/** The same words as a chat, or as a prompt. */
function turned(now, kind) {
  if (kind === now.kind) return {};
  const last = now.messages.findLast((one) => one.role === "user")?.content ?? "";
  return kind === "chat" ? { kind, messages: [{ role: "user", content: now.prompt || last }] } : { kind, prompt: last || now.prompt };
}

function Examples({ model }) {
  useStore(catalogue);
  const load = (example) => {
    stopAll();
    setup.set(setupOf(example, model || catalogue.value.models[0]));
    run(setup.value.panes);
  };
  return html`<span class="chips" role="group" aria-label="examples">
    ${examples().map((one) => html`<button key=${one.name} title=${one.about} onClick=${() => load(one)}>${one.name}</button>`)}
  </span>`;
}

function Prompt({ prompt }) {
  return html`<div data-path="prompt"><textarea class="prompt" rows="2" dir="auto" aria-label="prompt" placeholder="a text to go on from" value=${prompt} onInput=${(event) => edit({ prompt: event.target.value })}></textarea></div>`;
}

function Messages({ messages }) {
  const put = (index, change) => edit({ messages: messages.map((one, number) => (number === index ? { ...one, ...change } : one)) });
  return html`<div class="messages" data-path="messages">
    ${messages.map(
      ({ role, content }, index) => html`<div class="message ${role}" key=${index}>
        <select aria-label=${`message ${index + 1}: role`} onChange=${(event) => put(index, { role: event.target.value })}>
          ${["system", "user", "assistant"].map((one) => html`<option key=${one} selected=${one === role}>${one}</option>`)}</select>
        <textarea rows="1" dir="auto" aria-label=${`message ${index + 1}: ${role}`} value=${content} onInput=${(event) => put(index, { content: event.target.value })}></textarea>
        ${messages.length > 1 && html`<button class="quiet" aria-label=${`remove message ${index + 1}`} onClick=${() => edit({ messages: messages.filter((_, number) => number !== index) })}>✕</button>`}
      </div>`,
    )}
    <button class="small" onClick=${() => edit({ messages: [...messages, { role: messages.at(-1).role === "user" ? "assistant" : "user", content: "" }] })}>+ message</button>
  </div>`;
}

/** What the colour of a token means, and which there are. */
function Legend() {
  const now = useStore(view);
  const measure = MEASURES[now.colour] ?? MEASURES.none;
  const { top } = useStore(setup);
  return html`<div class="legend">
    <span>colour</span>
    <${Segments} label="what the colour of a token shows" value=${now.colour} choices=${Object.entries(MEASURES).map(([key, one]) => [key, one.name])} onChange=${(colour) => view.set((was) => ({ ...was, colour }))} />
    <span class="scale" aria-hidden="true">${Array.from({ length: BUCKETS }, (_, index) => html`<i key=${index} class="b${index + 1}"></i>`)}</span>
    <small>${top ? measure.about : "no records: explain is 0"}</small>
    <span class="grow"></span>
    <label class="check" title="ask for what the model would have thought without steering; it costs a further sequence"><input type="checkbox" checked=${now.unsteered} onChange=${(event) => view.set((was) => ({ ...was, unsteered: event.target.checked }))} /> with the unsteered model</label>
  </div>`;
}
