// What this server has: models, methods with their schemas, vectors and presets.
import { Store } from "./ui.js";
import { get } from "./api.js";

export const catalogue = new Store({ isLoaded: false, models: [], methods: [], vectors: [], presets: [], links: {}, error: null });

/** Ask for all of it. */
export async function load() {
  try {
    const [models, methods, vectors, presets, links] = await Promise.all(
      ["v1/models", "v1/steering/methods", "v1/steering/vectors", "v1/steering/presets", "v1/steering/links"].map((path) => get(path)),
    );
    const details = await Promise.all(vectors.data.map((one) => get(`v1/steering/vectors/${encodeURIComponent(one.id)}`)));
    catalogue.set({
      isLoaded: true,
      error: null,
      models: models.data.map((one) => one.id),
      methods: methods.data,
      vectors: details,
      presets: presets.data,
      links,
    });
  } catch (error) {
    catalogue.set((now) => ({ ...now, error }));
  }
}

export const vectorOf = (name) => catalogue.value.vectors.find((one) => one.id === name);

/** The method of an entry of `steering` or `decoding`, as the server describes it. */
export function methodOf(entry) {
  const name = entry.method ?? vectorOf(entry.vector)?.method;
  return catalogue.value.methods.find((one) => one.name === name);
}

export const isSteering = (method) => method.kind === "edit";

/** Probes change nothing: conditions read them, and the page does. */
export const isProbe = (vector) => vector.method === "probe";

/** What there is for one side: vectors that fit, then methods that need none. */
export function offers(side) {
  const { methods, vectors } = catalogue.value;
  if (side === "decoding") return methods.filter((one) => !isSteering(one)).map((one) => offer(one, beginningOf(one)));
  const loaded = vectors
    .filter((one) => one.fits && !isProbe(one) && methods.some((method) => method.name === one.method))
    .map((one) => ({ name: one.id, about: one.method, entry: { vector: one.id }, isAvailable: true }));
  const bare = methods.filter((one) => isSteering(one) && "method" in one.schema.properties);
  return [...loaded, ...bare.map((one) => offer(one, beginningOf(one)))];
}

const offer = (method, entry) => ({ name: method.name, about: method.kind, entry, isAvailable: method.available, reason: method.reason });

/** The least that an entry of a method can say: its name, and what it needs where there is something to choose from. */
function beginningOf(method) {
  const entry = { method: method.name };
  const taken = new Set();
  for (const name of method.schema.required ?? []) {
    const choices = method.schema.properties[name]?.enum ?? [];
    const choice = choices.find((one) => !taken.has(one)) ?? choices[0];
    if (choice !== undefined) taken.add((entry[name] = choice));
  }
  return entry;
}
