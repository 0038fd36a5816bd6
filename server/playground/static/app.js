// The page: which screen is shown, keys, theme, and what it begins with.
import { announce, Announcer, Dialog, html, render, Segments, useEffect, useState, useStore, Wrong } from "./ui.js";
import { get, keys, keyWanted, useKey } from "./api.js";
import { catalogue, load } from "./catalogue.js";
import { Compare } from "./compare.js";
import { examples, setupOf } from "./examples.js";
import { Health } from "./health.js";
import { Library } from "./library.js";
import { run } from "./run.js";
import { edit, forget, fromFragment, keep, restore, setup, toFragment, unkept, view } from "./setup.js";

const SCREENS = { compare: ["Compare", Compare], library: ["Library", Library], health: ["Health", Health] };
const LONG_LINK = 8000; // characters, which some programs cut off

const screenOf = () => location.hash.replace(/^#\//, "");

function App({ note }) {
  const [screen, setScreen] = useState(screenOf() in SCREENS ? screenOf() : "compare");
  const [dialog, setDialog] = useState(null);
  const [said, setSaid] = useState(note);
  const { error, isLoaded } = useStore(catalogue);
  const { theme } = useStore(view);
  useEffect(() => {
    const follow = async () => {
      if (screenOf() in SCREENS) setScreen(screenOf());
      else if (location.hash.startsWith("#s=")) setSaid(await openLink());
    };
    const help = (event) => event.key === "?" && !event.target.closest("input, textarea, select") && setDialog("help");
    addEventListener("hashchange", follow);
    addEventListener("keydown", help);
    return () => {
      removeEventListener("hashchange", follow);
      removeEventListener("keydown", help);
    };
  }, []);
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
  }, [theme]);
  const [, Screen] = SCREENS[screen];
  const share = async () => {
    const link = new URL(await toFragment(setup.value), location.href).href;
    history.replaceState(null, "", link);
    await navigator.clipboard?.writeText(link).catch(() => {});
    setSaid(link.length > LONG_LINK ? "The link is in the address bar. It is long: some programs will cut it off." : "The link is copied, and in the address bar. It holds the prompt and the settings, no answer and no key.");
  };
  return html`<a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), document.querySelector("main").querySelector("button, select, textarea, input").focus())}>to the content</a>
    <header class="top">
      <a class="brand" href="#/compare"><${Mark} /> Whipstaff</a>
      <nav aria-label="screens">${Object.entries(SCREENS).map(([key, [name]]) => html`<a key=${key} href="#/${key}" aria-current=${key === screen ? "page" : undefined}>${name}</a>`)}</nav>
      <span class="grow"></span>
      <button class="quiet" onClick=${share}>Share</button>
      <a href="docs" class="quiet button">API</a>
      <button class="quiet" onClick=${() => setDialog("help")}>Help</button>
      <button class="quiet" onClick=${() => setDialog("settings")}>Settings</button>
    </header>
    <${KeyWanted} />
    ${said && html`<p class="note" role="status">${said} <button class="quiet" aria-label="close this note" onClick=${() => setSaid("")}>✕</button></p>`}
    ${useStore(unkept) && html`<p class="note">This browser keeps nothing: what you write here is gone when the page is.</p>`}
    ${error && html`<${Gone} error=${error} />`}
    ${isLoaded || screen === "health" ? html`<${Screen} />` : html`<main id="main"><h1 class="unseen">Whipstaff</h1><p class="waiting">Asking the server what it has ...</p></main>`}
    ${dialog === "help" && html`<${Dialog} title="Keys" onClose=${() => setDialog(null)}><${Help} /><//>`}
    ${dialog === "settings" && html`<${Dialog} title="Settings" onClose=${() => setDialog(null)}><${Settings} /><//>`}
    <${Announcer} />`;
}

function Mark() {
  return html`<svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true"><path d="M12 3v13M6.5 16h11M12 16c0 3-3 5-6.5 4.6M12 16c0 3 3 5 6.5 4.6" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round"/><circle cx="12" cy="4" r="2.2" fill="currentColor"/></svg>`;
}

/** The server wants a key: it is asked for in place, and whatever waited goes on. */
function KeyWanted() {
  const wanted = useStore(keyWanted);
  const [key, setKey] = useState("");
  const [remember, setRemember] = useState(false);
  if (!wanted) return null;
  const give = (event) => {
    event.preventDefault();
    useKey(key, remember);
    setKey("");
  };
  return html`<form class="key" onSubmit=${give} aria-label="API key">
    <label>${wanted.wasWrong ? "That was not this server's API key. Try again" : "This server asks for its API key"}
      <input type="password" autocomplete="off" value=${key} onInput=${(event) => setKey(event.target.value)} /></label>
    <label class="check"><input type="checkbox" checked=${remember} onChange=${(event) => setRemember(event.target.checked)} /> until this tab is closed</label>
    <button class="run" disabled=${!key}>Use it</button>
  </form>`;
}

/** The server cannot be reached: asked again and again, at growing distances. */
function Gone({ error }) {
  useEffect(() => {
    let pause = 1000;
    let timer = 0;
    const again = async () => {
      try {
        await fetch("health");
        return load();
      } catch {
        pause = Math.min(pause * 1.6, 15000);
        timer = setTimeout(again, pause);
      }
    };
    timer = setTimeout(again, pause);
    return () => clearTimeout(timer);
  }, [error]);
  return html`<p class="note gone" role="alert">${error.message}. Everything here can be edited meanwhile; the page tries again by itself.</p>`;
}

function Help() {
  const rows = [
    ["Ctrl or Cmd + Enter", "run all panes"],
    ["Esc", "stop them; else close what is open"],
    ["Tab to an answer, then ← → Home End", "walk through its tokens"],
    ["Enter", "open a token; then ← → go on from token to token"],
    ["?", "this list"],
  ];
  return html`<table class="help"><tbody>${rows.map(([key, what]) => html`<tr key=${key}><th scope="row"><kbd>${key}</kbd></th><td>${what}</td></tr>`)}</tbody></table>
    <p>A prompt goes to every pane at once; each pane adds its own steering (what the model thinks) and decoding (how it chooses). The colour of a token says how much that changed it. Click one to see every distribution behind it.</p>`;
}

function Settings() {
  const now = useStore(view);
  const { user } = useStore(keys);
  const [key, setKey] = useState(user);
  const clear = () => {
    forget();
    announce("cleared");
    location.hash = "";
    location.reload();
  };
  return html`<div class="settings">
    <div><span class="label">theme</span> <${Segments} label="theme" value=${now.theme} choices=${[["auto", "as the system"], ["light", "light"], ["dark", "dark"]]} onChange=${(theme) => view.set((was) => ({ ...was, theme }))} /></div>
    <form onSubmit=${(event) => (event.preventDefault(), useKey(key, false))}>
      <label>API key <input type="password" autocomplete="off" value=${key} onInput=${(event) => setKey(event.target.value)} /></label>
      <button>Use it</button>
      <p class="about">Kept while this page is open. It is sent to this server alone, and is in no link and no copied code.</p>
    </form>
    <div><button onClick=${clear}>Clear what this browser keeps</button><p class="about">The prompt, the panes and how they are looked at stay in this browser's local storage. Nothing is sent anywhere but to this server.</p></div>
  </div>`;
}

/** Fill the page with what the address says. What it came to, in words. */
async function openLink() {
  try {
    const shared = await fromFragment(location.hash);
    if (!shared) return "";
    setup.set(shared);
    return "This came with the link. Nothing runs before you say so.";
  } catch (error) {
    return `The link is no good: ${error.message}.`;
  }
}

/** What the page shows first: what a link says, what was there before, or an example. */
async function begin() {
  const wasKept = restore();
  const before = setup.value;
  const note = await openLink();
  const wasShared = setup.value !== before;
  keep();
  render(html`<${App} note=${note} />`, document.getElementById("app"));
  await load();
  const { models, isLoaded } = catalogue.value;
  if (!isLoaded) return;
  if (!wasShared && !wasKept) {
    setup.set(setupOf(examples()[0], models[0]));
    if (models[0] === "demo") run(setup.value.panes);
  } else if (!setup.value.model) {
    edit({ model: models[0] });
  }
}

begin();
