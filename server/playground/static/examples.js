// Examples load with one click. Those of the demo's world, and for any other server what it has to show.
import { catalogue } from "./catalogue.js";
import { emptySetup, newId } from "./setup.js";

const MORNING = "In the morning Mara opened the door, and";
const GLOOMY = { vector: "cheerful", scale: -8 };
const HELPFUL = { method: "proxy_tuning", expert: "tuned", antiexpert: "untuned" };
const pane = (label, steering = [], decoding = []) => ({ id: newId(), label, steering, decoding });

const OF_THE_DEMO = [
  {
    name: "Mara, gloomy",
    about: "a mood vector changes what the model thinks, DoLa how it chooses",
    setup: { prompt: MORNING, sampling: { max_tokens: 22 }, panes: [pane("Plain"), pane("Steered", [GLOOMY]), pane("Decoded", [], [{ method: "dola" }])] },
  },
  {
    name: "A question, answered",
    about: "a storyteller that answers because two small models lend it that, while it decodes",
    setup: {
      kind: "chat",
      messages: [{ role: "user", content: "Where does Mara live?" }],
      panes: [pane("Plain"), pane("Steered", [GLOOMY]), pane("Decoded", [], [HELPFUL])],
    },
  },
  {
    name: "Dose: one vector, three scales",
    about: "how far a vector carries the model as its scale grows",
    setup: {
      prompt: MORNING,
      sampling: { stop: ["."] },
      panes: [pane("Scale -8", [GLOOMY]), pane("Scale 2", [{ vector: "cheerful", scale: 2 }]), pane("Scale 8", [{ vector: "cheerful", scale: 8 }])],
    },
  },
  {
    name: "A schedule that fades",
    about: "gloomy for the first words, then less and less",
    setup: {
      prompt: MORNING,
      panes: [pane("Plain"), pane("Steered", [GLOOMY]), pane("Faded", [{ ...GLOOMY, schedule: { shape: "linear", from: 1, to: 0, tokens: 12 } }])],
    },
  },
  {
    name: "Only where it is merry",
    about: "a probe reads every token; gloom is added where it reads more than the threshold",
    setup: {
      prompt: "The sun shone and Mara sang a merry song.",
      panes: [pane("Plain"), pane("Steered", [GLOOMY]), pane("Held back", [{ ...GLOOMY, when: { probe: "is_cheerful", above: 0, decide: "step" } }])],
    },
  },
  {
    name: "Beams",
    about: "a search looks further than the next token",
    setup: { prompt: MORNING, sampling: { stop: ["."] }, panes: [pane("Plain"), pane("Searched", [], [{ method: "beam_search", num_beams: 4 }])] },
  },
];

/** Those that this server can run. */
export function examples() {
  const { models, methods, vectors } = catalogue.value;
  const names = new Set(vectors.filter((one) => one.fits).map((one) => one.id));
  const available = new Set(methods.filter((one) => one.available).map((one) => one.name));
  const auxiliaries = new Set(methods.find((one) => one.name === "proxy_tuning")?.schema.properties.expert.enum);
  const runs = (one) =>
    one.setup.panes.every(
      (each) =>
        each.steering.every((entry) => names.has(entry.vector) && (!entry.when || names.has(entry.when.probe))) &&
        each.decoding.every((entry) => available.has(entry.method) && (!entry.expert || auxiliaries.has(entry.expert))),
    );
  const found = models[0] === "demo" ? OF_THE_DEMO.filter(runs) : [];
  return found.length ? found : [ofThisServer(vectors, methods)];
}

function ofThisServer(vectors, methods) {
  const vector = vectors.find((one) => one.fits && methods.find((method) => method.name === one.method)?.available);
  const dola = methods.find((one) => one.name === "dola" && one.available);
  const panes = [pane("Plain")];
  if (vector) panes.push(pane("Steered", [{ vector: vector.id }]));
  if (dola) panes.push(pane("Decoded", [], [{ method: "dola" }]));
  return { name: "What this server has", about: "plain beside what is loaded", setup: { prompt: "The weather today is", panes } };
}

/** A whole setup from an example; a model that was chosen stays. */
export function setupOf(example, model) {
  const base = emptySetup();
  return { ...base, ...example.setup, model, sampling: { ...base.sampling, ...example.setup.sampling }, panes: example.setup.panes.map((one) => ({ ...one, id: newId() })) };
}
