// How a token's record becomes a colour: what is measured, in which unit, and how strong it shows.

const IMPOSSIBLE = -9999; // how the server says the log-probability of what cannot be drawn
export const BUCKETS = 8;

/** What the model would have said without what this pane adds: unsteered where that was asked, else before decoding. */
export const reference = (record) => record.unsteered ?? record.base;

export const MEASURES = {
  none: { name: "none", of: () => 0, share: () => 0 },
  rank: {
    name: "rank change",
    about: "how far down the token stood in the plain model's list",
    of: (record) => (reference(record) && record.final ? reference(record).rank - record.final.rank : NaN),
    share: (value) => Math.log2(1 + Math.max(value, 0)) / 3,
  },
  gain: {
    name: "log-probability gained",
    about: "nats by which the token became likelier than in the plain model",
    of: (record) => (reference(record) && record.final ? bounded(record.final.logprob) - bounded(reference(record).logprob) : NaN),
    share: (value) => Math.max(value, 0) / 5,
  },
  kl: {
    name: "KL",
    about: "nats between what was decoded and the plain model",
    of: (record) => record.unsteered?.kl ?? record.kl ?? NaN,
    share: (value) => Math.sqrt(Math.max(value, 0) / 4),
  },
  layer: {
    name: "DoLa's layer",
    about: "which early layer the token was contrasted with",
    of: (record) => record.facts?.layer ?? NaN,
    share: (value, records) => (value + 1) / (1 + Math.max(...records.map((one) => one.facts?.layer ?? 0))),
  },
  reading: {
    name: "probe",
    about: "what the probe that is read along read after the token, between its least and its most",
    of: (record) => record.reading ?? NaN,
    share: (value, records) => {
      const all = records.map((one) => one.reading).filter(Number.isFinite);
      const least = Math.min(...all);
      return (value - least) / (Math.max(...all) - least || 1);
    },
  },
};

const bounded = (logprob) => Math.max(logprob, -20);

/** 0 for nothing to BUCKETS for much, of the strongest of a cell's records. */
export function bucket(measure, records, all) {
  let most = 0;
  for (const record of records) {
    const value = measure.of(record);
    if (!Number.isNaN(value)) most = Math.max(most, measure.share(value, all));
  }
  return most <= 0 ? 0 : Math.max(1, Math.min(BUCKETS, Math.round(most * BUCKETS)));
}

export const isPossible = (logprob) => logprob > IMPOSSIBLE;
