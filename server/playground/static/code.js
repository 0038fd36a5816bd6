// A pane's request as a program would send it.
import { announce, html, Segments, useState } from "./ui.js";
import { keys } from "./api.js";
import { pathOf, requestOf, titleOf } from "./setup.js";

const BY_CLIENT = new Set(["model", "messages", "prompt", "temperature", "max_tokens", "seed", "stop"]); // OpenAI's own

const base = () => new URL(".", document.baseURI).href;

export const LANGUAGES = {
  curl: (path, request, hasKey) =>
    [
      `curl ${base()}${path}`,
      "-H 'Content-Type: application/json'",
      ...(hasKey ? ['-H "Authorization: Bearer $OPENAI_API_KEY"'] : []),
      `-d '${JSON.stringify(request, null, 2).replaceAll("'", String.raw`'\''`)}'`,
    ].join(" \\\n  "),
  Python: (path, request, hasKey) => {
    const own = Object.entries(request).filter(([name]) => BY_CLIENT.has(name));
    const more = Object.fromEntries(Object.entries(request).filter(([name]) => !BY_CLIENT.has(name)));
    const create = path.endsWith("chat/completions") ? "chat.completions.create" : "completions.create";
    return [
      ...(hasKey ? ["import os", ""] : []),
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url=${python(`${base()}v1`)}, api_key=${hasKey ? 'os.environ["OPENAI_API_KEY"]' : '"none"'})`,
      `answer = client.${create}(`,
      ...own.map(([name, value]) => `    ${name}=${python(value, 1)},`),
      ...(Object.keys(more).length ? [`    extra_body=${python(more, 1)},`] : []),
      ")",
      create.startsWith("chat") ? "print(answer.choices[0].message.content)" : "print(answer.choices[0].text)",
      "",
    ].join("\n");
  },
  JSON: (path, request) => JSON.stringify(request, null, 2),
};

/** A value of JSON as Python writes it. */
function python(value, depth = 0) {
  const inner = "    ".repeat(depth + 1);
  const outer = "    ".repeat(depth);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return value.some((one) => one && typeof one === "object") ? `[\n${value.map((one) => `${inner}${python(one, depth + 1)},\n`).join("")}${outer}]` : `[${value.map((one) => python(one)).join(", ")}]`;
  if (typeof value === "object") return `{\n${Object.entries(value).map(([key, one]) => `${inner}${JSON.stringify(key)}: ${python(one, depth + 1)},\n`).join("")}${outer}}`;
  return JSON.stringify(value); // a string of JSON without lone surrogates is one of Python's, too
}

export function Code({ now }) {
  const [language, setLanguage] = useState("curl");
  const [index, setIndex] = useState(Math.min(1, now.panes.length - 1));
  const pane = now.panes[Math.min(index, now.panes.length - 1)];
  const text = LANGUAGES[language](pathOf(now), requestOf(now, pane), Boolean(keys.value.user));
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    announce("copied");
  };
  return html`<div class="line">
      <${Segments} label="pane" value=${index} choices=${now.panes.map((one, number) => [number, titleOf(one)])} onChange=${setIndex} />
      <${Segments} label="language" value=${language} choices=${Object.keys(LANGUAGES).map((name) => [name, name])} onChange=${setLanguage} />
      <span class="grow"></span>
      <button onClick=${copy}>Copy</button>
    </div>
    <pre class="code" tabindex="0" aria-label="code"><code>${text}</code></pre>`;
}
