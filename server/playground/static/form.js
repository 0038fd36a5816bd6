// A JSON schema becomes controls. Editors hang on what a schema says, never on which method it is of, so that a method
// that the server gains tomorrow has a form. What this does not know becomes a box of JSON: nothing is out of reach.
// Absent, null and a default are three things: only what somebody touched is in the value.
import { html, LateText, NumberBox, Segments, Slider, useId, useState, Wrong } from "./ui.js";

const LONG = 1000; // characters, from which on a text gets an area
const FEW = 4; // choices that are shown side by side

/** A schema without its reference, and without `null` among its forms. */
function resolved(schema, defs) {
  const found = schema.$ref ? { ...defs[schema.$ref.split("/").at(-1)], ...schema, $ref: undefined } : schema;
  if (!found.anyOf) return found;
  const forms = found.anyOf.filter((form) => form.type !== "null");
  if (forms.length > 1) return { ...found, anyOf: forms };
  const { anyOf, ...rest } = found;
  return resolved({ ...forms[0], ...rest }, defs);
}

const words = (name) => name.replaceAll("_", " ");

/** Where a path of the server's is, among the fields that are shown: at itself, or at the nearest that holds it. */
export function nearest(param, paths) {
  if (!param) return null;
  const holds = (path) => param === path || param.startsWith(`${path}.`) || param.startsWith(`${path}[`);
  return paths.filter(holds).sort((a, b) => b.length - a.length)[0] ?? null;
}

/** One field: its name, its control, what it is for, and what is wrong with it.
 *
 * `at` has the JSON path, the definitions, the error of the whole and the field that it belongs to. */
export function Field({ name, schema, value, onChange, at, isRequired }) {
  const own = resolved(schema, at.defs);
  const id = useId();
  const wrong = at.errorAt === at.path ? at.error : null;
  const hints = { id, "aria-invalid": wrong ? "true" : undefined, "aria-describedby": `${id}-about ${id}-wrong` };
  const isSet = value !== undefined;
  return html`<div class="field ${isSet ? "set" : ""}" data-path=${at.path}>
    <div class="name">
      <label for=${id}>${words(name)}${isRequired ? html`<b title="needed"> *</b>` : null}</label>
      ${isSet && !isRequired && html`<button class="quiet" title="as if it had never been said" aria-label=${`${words(name)}: unset`} onClick=${() => onChange(undefined)}>unset</button>`}
    </div>
    <${Control} schema=${own} value=${value} onChange=${onChange} at=${at} label=${words(name)} hints=${hints} />
    <p class="about" id="${id}-about">${own.description ?? ""}</p>
    ${wrong && html`<${Wrong} id="${id}-wrong">${wrong.message}<//>`}
  </div>`;
}

/** The control for a schema that needs no further resolving. */
function Control({ schema, value, onChange, at, label, hints }) {
  const props = { schema, value, onChange, at, label, hints };
  if (schema.enum) return html`<${Choice} ...${props} choices=${schema.enum} />`;
  if (schema.anyOf) return html`<${Forms} ...${props} />`;
  if (schema.type === "boolean") return html`<${Choice} ...${props} choices=${[true, false]} />`;
  if (schema.type === "integer" || schema.type === "number") return html`<${NumberControl} ...${props} />`;
  if (schema.type === "string") return html`<${Text} ...${props} />`;
  if (at.isLayers && schema.type === "array") return html`<${Layers} ...${props} />`;
  if (schema.type === "array" && schema.prefixItems) return html`<${Tuple} ...${props} />`;
  if (schema.type === "array" && schema.items) return html`<${Rows} ...${props} />`;
  if (schema.type === "object" && schema.properties) return html`<${Optional} ...${props} />`;
  if (schema.type === "object" && schema.additionalProperties) return html`<${Pairs} ...${props} />`;
  return html`<${Json} ...${props} />`;
}

/** The fields of an object, in the schema's order. */
export function Fields({ schema, value, onChange, at, leaveOut = [] }) {
  const set = (name, next) => {
    const { [name]: _, ...rest } = value ?? {};
    onChange(next === undefined ? rest : { ...rest, [name]: next });
  };
  const shown = Object.entries(schema.properties).filter(([name, own]) => !leaveOut.includes(name) && own.const === undefined);
  return html`<div class="fields">
    ${shown.map(
      ([name, own]) => html`<${Field} key=${name} name=${name} schema=${own} value=${value?.[name]}
        onChange=${(next) => set(name, next)} isRequired=${schema.required?.includes(name)}
        at=${{ ...at, path: `${at.path}.${name}`, isLayers: name === "layers" }} />`,
    )}
  </div>`;
}

/** An object that nobody has touched is one button. */
function Optional(props) {
  const [isOpen, open] = useState(false);
  if (props.value !== undefined || isOpen) return html`<${Fields} ...${props} />`;
  return html`<button class="small" aria-label=${`set ${props.label}`} onClick=${() => open(true)}>set</button>`;
}

const shown = (choice) => (choice === true ? "yes" : choice === false ? "no" : String(choice));

function Choice({ schema, choices, value, onChange, label, hints }) {
  const current = value ?? schema.default;
  if (choices.length && choices.length <= FEW) {
    return html`<${Segments} label=${label} value=${current} choices=${choices.map((one) => [one, shown(one)])} onChange=${onChange} />`;
  }
  return html`<select ...${hints} onChange=${(event) => onChange(choices[event.target.value])}>
    <option hidden selected=${current == null}>${choices.length ? "choose" : "this server has none"}</option>
    ${choices.map((one, index) => html`<option key=${index} value=${index} selected=${one === current}>${shown(one)}</option>`)}
  </select>`;
}

/** How far a slider should go: what the schema allows, where that is no wider than anybody would want. */
export function range(schema, fallback) {
  const low = schema.minimum ?? schema.exclusiveMinimum ?? -Infinity;
  const high = schema.maximum ?? schema.exclusiveMaximum ?? Infinity;
  const reach = Math.max(Math.abs(fallback || 1) * 2, 2);
  const min = Math.max(low, low >= 0 ? low : -reach);
  const max = Math.min(high, min + (high - low <= 4 * reach ? high - low : low >= 0 ? 2 * reach : reach - min));
  const step = schema.type === "integer" ? 1 : max - min > 8 ? 0.25 : 0.05;
  return { min, max, step };
}

function NumberControl({ schema, value, onChange, label, hints }) {
  const isBounded = [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum].every((bound) => bound !== undefined);
  const step = schema.type === "integer" ? 1 : "any";
  if (!isBounded) return html`<${NumberBox} value=${value} placeholder=${schema.default} step=${step} onChange=${onChange} ...${hints} />`;
  const fallback = schema.default ?? undefined;
  return html`<${Slider} value=${value} fallback=${fallback} ...${range(schema, fallback)} onChange=${onChange} label=${label} ...${hints} />`;
}

function Text({ schema, value, onChange, hints }) {
  const props = { value: value ?? "", placeholder: schema.default ?? "", onInput: (event) => onChange(event.target.value || undefined), dir: "auto", ...hints };
  return (schema.maxLength ?? 0) > LONG ? html`<textarea rows="2" ...${props}></textarea>` : html`<input type="text" ...${props} />`;
}

/** Several forms that a value may have: choose one. */
function Forms({ schema, value, onChange, at, label, hints }) {
  const forms = schema.anyOf.map((form) => resolved(form, at.defs)).sort((a, b) => Boolean(b.enum) - Boolean(a.enum));
  const fitting = value === undefined ? -1 : forms.findIndex((form) => fits(value, form));
  const [chosen, choose] = useState(Math.max(fitting, 0));
  const index = fitting >= 0 ? fitting : chosen;
  const pick = (next) => {
    choose(next);
    onChange(forms[next].type === "object" ? {} : undefined); // a name, a number or a row is what somebody chooses next
  };
  return html`<div class="forms">
    <${Segments} label=${`${label}: kind`} value=${index} choices=${forms.map((form, number) => [number, called(form)])} onChange=${pick} />
    <${Control} schema=${{ default: schema.default, ...forms[index] }} value=${fitting === index ? value : undefined}
      onChange=${onChange} at=${at} label=${label} hints=${hints} />
  </div>`;
}

function fits(value, form) {
  if (form.enum) return form.enum.includes(value);
  if (form.type === "array") return Array.isArray(value) && (!value.length || !form.items?.type || value.some((one) => typeof one === kindOf(form.items)));
  if (form.type === "object") return typeof value === "object" && !Array.isArray(value);
  return typeof value === kindOf(form);
}

const kindOf = (form) => (form.type === "integer" ? "number" : form.type === "array" || form.$ref ? "object" : form.type);

/** What people call a form of a value. */
function called(form) {
  if (form.enum) return form.enum.length > 2 ? "by name" : form.enum.join(" or ");
  if (form.const !== undefined) return String(form.const);
  if (form.type === "array") return form.items?.prefixItems ? "windows" : form.items?.$ref ? `${words(form.items.$ref.split("/").at(-1)).toLowerCase()}s` : form.items?.type === "integer" ? "numbers" : "list";
  return { string: "text", object: "custom", boolean: "yes or no" }[form.type] ?? form.type ?? "JSON";
}

/** The least that a form of a value can be. */
function beginning(schema) {
  if (schema.default !== undefined && schema.default !== null) return schema.default;
  if (schema.const !== undefined) return schema.const;
  if (schema.enum) return schema.enum[0];
  if (schema.prefixItems) return [schema.prefixItems[0].type === "integer" ? 0 : null, null];
  return { array: [], object: {}, string: "", integer: 0, number: 0, boolean: false }[schema.type] ?? null;
}

/** A half-open window: two numbers, of which the second may be the end. */
function Tuple({ value, onChange, label }) {
  const [start, end] = value ?? [0, null];
  return html`<span class="window" role="group" aria-label=${label}>
    <${NumberBox} value=${start} step="1" aria-label=${`${label}: from`} onChange=${(next) => onChange([next ?? 0, end])} /> to
    <${NumberBox} value=${end ?? undefined} step="1" placeholder="end" aria-label=${`${label}: before`} onChange=${(next) => onChange([start, next ?? null])} />
  </span>`;
}

/** A list of whatever its items are. */
function Rows({ schema, value, onChange, at, label }) {
  const item = resolved(schema.items, at.defs);
  const rows = value ?? [];
  const put = (index, next) => onChange(rows.map((row, number) => (number === index ? next : row)));
  const drop = (index) => onChange(rows.length > 1 ? rows.filter((_, number) => number !== index) : undefined);
  return html`<div class="rows">
    ${rows.map((row, index) => {
      const name = `${label} ${index + 1}`;
      const inside = { ...at, path: `${at.path}[${index}]`, isLayers: false };
      return html`<div class="row" key=${index} data-path=${inside.path}>
        <${Control} schema=${item} value=${row} onChange=${(next) => put(index, next ?? beginning(item))} at=${inside} label=${name} hints=${{ "aria-label": name }} />
        <button class="quiet" aria-label=${`remove ${name}`} onClick=${() => drop(index)}>✕</button>
        ${at.errorAt === inside.path && html`<${Wrong}>${at.error.message}<//>`}
      </div>`;
    })}
    <button class="small" onClick=${() => onChange([...rows, beginning(item)])}>+ ${label}</button>
  </div>`;
}

/** A map, as rows of key and value. */
function Pairs({ schema, value, onChange, at, label }) {
  const item = resolved(schema.additionalProperties === true ? {} : schema.additionalProperties, at.defs);
  const rows = Object.entries(value ?? {});
  const put = (index, row) => onChange(Object.fromEntries(rows.map((one, number) => (number === index ? row : one))));
  const drop = (index) => onChange(rows.length > 1 ? Object.fromEntries(rows.filter((_, number) => number !== index)) : undefined);
  return html`<div class="rows">
    ${rows.map(
      ([key, one], index) => html`<div class="row" key=${index}>
        <input type="text" class="key" value=${key} aria-label=${`${label} ${index + 1}: name`} onChange=${(event) => put(index, [event.target.value, one])} />
        <${Control} schema=${item} value=${one} onChange=${(next) => put(index, [key, next ?? beginning(item)])}
          at=${{ ...at, path: `${at.path}.${key}`, isLayers: false }} label=${`${label} ${key}`} hints=${{ "aria-label": `${label} ${key}` }} />
        <button class="quiet" aria-label=${`remove ${label} ${key}`} onClick=${() => drop(index)}>✕</button>
      </div>`,
    )}
    <button class="small" onClick=${() => onChange({ ...value, [""]: beginning(item) })}>+ ${label}</button>
  </div>`;
}

/** The layers of a model, those that can be chosen, and how large a vector is at each. */
function Layers({ value, onChange, at, label, hints }) {
  const { own, norms = {} } = at.layers ?? {};
  if (!own?.length) return html`<${LayerText} value=${value} onChange=${onChange} hints=${hints} />`;
  const chosen = new Set(value ?? own);
  const largest = Math.max(...own.map((layer) => norms[layer] ?? 0), 1e-9);
  const flip = (layer) => {
    const next = own.filter((one) => (one === layer ? !chosen.has(one) : chosen.has(one)));
    onChange(next.length === own.length || !next.length ? undefined : next);
  };
  return html`<span class="layers" role="group" aria-label=${label}>
    ${own.map(
      (layer) => html`<button key=${layer} aria-pressed=${chosen.has(layer) ? "true" : "false"} onClick=${() => flip(layer)}
          title=${`layer ${layer}${norms[layer] ? `, norm ${norms[layer].toPrecision(3)}` : ""}`}>
        <svg viewBox="0 0 10 24" aria-hidden="true"><rect x="1" width="8" y=${24 - 4 - (20 * (norms[layer] ?? largest)) / largest} height=${4 + (20 * (norms[layer] ?? largest)) / largest} /></svg>
        ${layer}
      </button>`,
    )}
  </span>`;
}

/** `8-12, 20` as numbers. */
export function LayerText({ value, onChange, hints }) {
  const read = (text) => {
    const found = text.split(",").flatMap((part) => {
      const [first, last = first] = part.split("-").map((word) => Number.parseInt(word, 10));
      return Number.isNaN(first) || Number.isNaN(last) ? [] : Array.from({ length: Math.min(last - first + 1, 1024) }, (_, index) => first + index);
    });
    onChange(found.length ? found : undefined);
  };
  return html`<${LateText} placeholder="such as 8-12, 20" value=${(value ?? []).join(", ")} ...${hints} onChange=${read} />`;
}

/** Anything, as JSON. What is no JSON yet is said, and not sent. */
export function Json({ value, onChange, hints, rows = 2 }) {
  const [draft, setDraft] = useState(null);
  const [wrong, setWrong] = useState("");
  const id = useId();
  const read = (text) => {
    setDraft(text);
    try {
      const next = text.trim() ? JSON.parse(text) : undefined;
      setWrong("");
      onChange(next);
    } catch (error) {
      setWrong(error.message);
    }
  };
  return html`<textarea class="json" spellcheck="false" rows=${rows} ...${hints} aria-invalid=${wrong ? "true" : undefined} aria-errormessage=${id}
      value=${draft ?? (value === undefined ? "" : JSON.stringify(value, null, 1))} onInput=${(event) => read(event.target.value)}
      onBlur=${() => wrong || setDraft(null)}></textarea>
    ${wrong && html`<${Wrong} id=${id}>${wrong}<//>`}`;
}
