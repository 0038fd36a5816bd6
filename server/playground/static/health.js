// How the server is doing: what /metrics says, every two seconds while somebody looks.
import { figure, html, useEffect, useRef, useState, useStore, Wrong } from "./ui.js";
import { metrics, Refusal } from "./api.js";
import { catalogue } from "./catalogue.js";
import { AdminKey } from "./library.js";
import uPlot from "./vendor/uplot.js";

const EVERY = 2000; // milliseconds
const KEPT = 150; // points
const SHOWN = 5; // methods in a chart
const COLOURS = ["#0b7a75", "#6a45b8", "#c9700a", "#a23668", "#3f7fbf"];

/** Prometheus' text as series: name -> [{labels, value}]. */
export function parsed(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([\w:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]));
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return found;
}

const sum = (series, keep = () => true) => (series ?? []).filter(({ labels }) => keep(labels)).reduce((total, { value }) => total + value, 0);

/** The cumulative buckets of a histogram, by method. */
function buckets(series) {
  const by = new Map();
  for (const { labels, value } of series ?? []) {
    if (!by.has(labels.method)) by.set(labels.method, new Map());
    by.get(labels.method).set(labels.le === "+Inf" ? Infinity : Number(labels.le), value);
  }
  return by;
}

/** A quantile of what came between two readings of one histogram's buckets; null if nothing did. */
export function quantile(before, after, share) {
  const edges = [...after.keys()].sort((a, b) => a - b);
  const counts = edges.map((edge) => after.get(edge) - (before?.get(edge) ?? 0));
  const total = counts.at(-1);
  if (!(total > 0)) return null;
  const wanted = share * total;
  const index = counts.findIndex((count) => count >= wanted);
  const low = index ? edges[index - 1] : 0;
  if (edges[index] === Infinity) return low;
  const below = index ? counts[index - 1] : 0;
  return low + ((edges[index] - low) * (wanted - below)) / (counts[index] - below);
}

const LATENCIES = {
  "first token, p50 (s)": ["whipstaff_time_to_first_token_seconds_bucket", 0.5],
  "between tokens, p50 (s)": ["whipstaff_inter_token_latency_seconds_bucket", 0.5],
  "whole answer, p99 (s)": ["whipstaff_e2e_request_latency_seconds_bucket", 0.99],
};

export function Health() {
  const [points, setPoints] = useState([]);
  const [wrong, setWrong] = useState(null);
  const { grafana } = useStore(catalogue).links;
  useEffect(() => {
    let isOn = true;
    let isBusy = false;
    let before = null;
    const look = async () => {
      if (document.hidden || isBusy) return;
      isBusy = true;
      try {
        const series = parsed(await metrics());
        if (!isOn) return;
        const at = Date.now() / 1000;
        const last = before;
        before = { at, series };
        setWrong(null);
        setPoints((now) => [...now, pointOf(last, before)].slice(-KEPT));
      } catch (error) {
        setWrong(error);
      } finally {
        isBusy = false;
      }
    };
    look();
    const timer = setInterval(look, EVERY);
    return () => {
      isOn = false;
      clearInterval(timer);
    };
  }, []);
  const last = points.at(-1);
  return html`<main class="health" id="main"><h1 class="unseen">Health</h1>
    ${wrong && html`<${Wrong}>${wrong instanceof Refusal ? `/metrics: ${wrong.message}` : "The server cannot be reached."}<//>`}
    ${wrong instanceof Refusal && html`<${AdminKey} />`}
    ${last && html`<div class="tiles">${Object.entries(last.now).map(([name, value]) => html`<div class="tile" key=${name}><small>${name}</small><b>${value === null ? "–" : figure(value)}</b></div>`)}</div>`}
    <div class="charts">
      <${Chart} title="tokens per second" points=${points} of=${(point) => point.tokens} />
      <${Chart} title="running and waiting" points=${points} of=${(point) => point.queue} />
      ${Object.keys(LATENCIES).map((name) => html`<${Chart} key=${name} title=${name} points=${points} of=${(point) => point.latency[name]} />`)}
    </div>
    <p class="about">From <a href="metrics">/metrics</a>, every two seconds while this is visible. ${/^https?:/.test(grafana) ? html`<a href=${grafana} target="_blank" rel="noopener noreferrer">Grafana</a> has more.` : "Dashboards for Grafana are in the repository, below docker/grafana; --grafana-url puts a link here."}</p>
  </main>`;
}

/** One moment: what is now, and what happened since the moment before. */
function pointOf(before, { at, series }) {
  const value = (name) => sum(series.get(name));
  const seconds = before ? at - before.at : 0;
  const rate = (name) => (before ? Math.max(0, (value(name) - sum(before.series.get(name))) / seconds) : null);
  const latency = {};
  for (const [title, [name, share]] of Object.entries(LATENCIES)) {
    const was = buckets(before?.series.get(name));
    latency[title] = {};
    for (const [method, counts] of buckets(series.get(name))) {
      const found = before ? quantile(was.get(method), counts, share) : null;
      if (found !== null) latency[title][method] = found;
    }
  }
  const generated = rate("vllm:generation_tokens_total");
  const running = value("vllm:num_requests_running");
  const waiting = value("vllm:num_requests_waiting");
  return {
    at,
    now: {
      running,
      waiting,
      "tokens per second": generated,
      "slots in use": value("whipstaff_slots_in_use"),
      slots: value("whipstaff_slots"),
      "KV cache in use, %": 100 * value("vllm:kv_cache_usage_perc"),
      requests: value("whipstaff_requests_total"),
    },
    tokens: { generated },
    queue: { running, waiting },
    latency,
  };
}

/** A small chart of several series, and the same as a table for who does not see it. */
function Chart({ title, points, of }) {
  const box = useRef(null);
  const plot = useRef(null);
  const names = [...new Set(points.flatMap((point) => Object.keys(of(point) ?? {})))].slice(0, SHOWN);
  const key = names.join();
  const data = [points.map((point) => point.at), ...names.map((name) => points.map((point) => of(point)?.[name] ?? null))];
  useEffect(() => {
    if (!names.length) return undefined;
    const element = box.current;
    const style = getComputedStyle(element);
    const axis = { stroke: style.color, grid: { stroke: "rgb(128 128 128 / 0.2)" }, ticks: { show: false } };
    const size = () => ({ width: Math.max(element.clientWidth, 120), height: 170 });
    plot.current = new uPlot(
      {
        ...size(),
        cursor: { show: false },
        legend: { show: false },
        scales: { y: { range: (_, low, high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.1 : 1] } },
        axes: [axis, { ...axis, size: 54 }],
        series: [{}, ...names.map((name, index) => ({ label: name, stroke: COLOURS[index], width: 2, spanGaps: true, points: { show: true, size: 4 } }))],
      },
      data,
      element,
    );
    const follow = new ResizeObserver(() => plot.current?.setSize(size()));
    follow.observe(element);
    return () => {
      follow.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, [key]);
  useEffect(() => plot.current?.setData(data));
  const last = (name) => points.map((point) => of(point)?.[name]).findLast((value) => value !== null && value !== undefined);
  return html`<figure class="card chart" aria-label=${title}><figcaption>${title}</figcaption>
    <div ref=${box} aria-hidden="true"></div>
    ${names.length ? html`<table class="list"><thead><tr><th scope="col">series</th><th scope="col">last</th></tr></thead><tbody>${names.map((name, index) => html`<tr key=${name}><th scope="row"><svg width="10" height="10" aria-hidden="true"><rect width="10" height="10" rx="2" fill=${COLOURS[index]} /></svg> <bdi>${name}</bdi></th><td>${figure(last(name))}</td></tr>`)}</tbody></table>` : html`<p class="about">nothing yet</p>`}
  </figure>`;
}
