// The playground: a chat against /v1/chat/completions, its routing trace, and the adapters behind it.

import { Answer } from "./answer.js";
import { byId, element, percent } from "./dom.js";
import { events, getJson, setKey } from "./requests.js";

const REFRESH_MS = 5000;

const conversation = [];
let running = null; // AbortController of the answer being written
let numCleared = 0;

function showError(error) {
  byId("error").textContent = error ? error.message : "";
  byId("error").hidden = !error;
}

// What is asked for

function pool() {
  const rows = [...byId("pool-list").children];
  const isWeighted = byId("settings").elements.mode.value === "weighted";
  if (isWeighted) {
    const weights = rows.map((row) => [row.dataset.name, Number(row.querySelector("[type=number]").value)]);
    return Object.fromEntries(weights.filter(([, weight]) => weight > 0));
  }
  const isChosen = (row) => row.querySelector("[type=checkbox]").checked;
  // A list leaves the base model out, as everybody else: what the router chooses from of itself is asked for by none.
  if (rows.every((row) => isChosen(row) === (row.dataset.routed === "true"))) return null;
  return rows.filter(isChosen).map((row) => row.dataset.name);
}

function requestBody() {
  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  const system = byId("system").value.trim();
  const body = {
    model: byId("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    max_completion_tokens: number("max-tokens"),
    seed: number("seed"),
    routing: { trace: byId("trace").checked ? "tokens" : "summary" },
  };
  if (body.model === "auto") {
    body.adapters = pool();
    if (!Array.isArray(body.adapters ?? [])) return body;
    body.top_k_adapters = number("top-k");
  }
  return body;
}

// Messages

async function send() {
  const text = byId("prompt").value.trim();
  if (!text || running) return;
  showError(null);
  conversation.push({ role: "user", content: text });
  const question = element("article", "message user");
  question.append(element("div", "text", text));
  byId("log").append(question);
  byId("prompt").value = "";
  running = new AbortController();
  setBusy(true);
  const answer = new Answer();
  const conversationNumber = numCleared;
  let usage = null;
  try {
    for await (const event of events("v1/chat/completions", requestBody(), running.signal)) {
      for (const choice of event.choices) answer.add(choice);
      usage = event.usage ?? usage;
    }
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  } finally {
    answer.finish(usage);
    if (conversationNumber === numCleared) {
      if (answer.text) conversation.push({ role: "assistant", content: answer.text });
      else {
        conversation.pop(); // The question got no answer: do not ask it again behind the user's back,
        if (!answer.finishReason) byId("prompt").value ||= text; // nor have it typed again.
      }
    }
    running = null;
    setBusy(false);
    refresh();
  }
}

function setBusy(isBusy) {
  byId("send").disabled = isBusy;
  byId("stop").hidden = !isBusy;
  byId("log").setAttribute("aria-busy", String(isBusy));
}

// Models and adapters

async function refresh() {
  try {
    const ready = await getJson("ready");
    showStatus(ready.ready ? "ready" : "down", ready.ready ? "ready" : ready.reason);
    const [models, listed, router] = await Promise.all([getJson("v1/models"), getJson("v1/adapters"), getJson("v1/router")]);
    const adapters = listed.data;
    showModels(models.data.map((model) => model.id));
    showPool(adapters.filter((adapter) => adapter.state === "READY"));
    byId("adapter-rows").replaceChildren(...adapters.map(adapterRow));
    byId("router").textContent = routerFacts(router);
  } catch (error) {
    showStatus("down", error.message);
  }
}

function showStatus(className, text) {
  byId("status").className = className;
  if (byId("status-text").textContent !== text) byId("status-text").textContent = text;
}

function routerFacts(router) {
  const facts = Object.entries(router).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value));
  return facts.length ? `Router: ${facts.map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", ")}` : "No learned router.";
}

function showModels(ids) {
  const select = byId("model");
  const current = [...select.options].map((option) => option.value);
  if (current.join("\n") === ids.join("\n")) return;
  const chosen = select.value || "auto";
  select.replaceChildren(...ids.map((id) => new Option(id, id, false, id === chosen)));
  byId("pool").hidden = select.value !== "auto";
}

function showPool(ready) {
  const list = byId("pool-list");
  if ([...list.children].map((row) => row.dataset.name).join("\n") === ready.map((adapter) => adapter.name).join("\n")) {
    ready.forEach((adapter, index) => showRouted(list.children[index], adapter.routed));
    return;
  }
  // Adapters come and go; what was chosen for those that stay is kept.
  const before = new Map([...list.children].map((row) => [row.dataset.name, row]));
  list.replaceChildren(...ready.map((adapter) => {
    const row = before.get(adapter.name);
    if (!row) return poolRow(adapter);
    showRouted(row, adapter.routed);
    return row;
  }));
  showMode();
}

function poolRow(adapter) {
  const row = element("label", "inline");
  row.dataset.name = adapter.name;
  row.dataset.routed = adapter.routed;
  row.title = adapter.description ?? "";
  const check = Object.assign(element("input"), { type: "checkbox", checked: adapter.routed });
  const weight = Object.assign(element("input"), { type: "number", min: "0", max: "2", step: "0.1", value: "0" });
  weight.setAttribute("aria-label", `Weight of ${adapter.name}`);
  row.append(element("span", "", adapter.name), check, weight);
  return row;
}

// A box that shows what the router does of itself goes on to do so.
function showRouted(row, isRouted) {
  const check = row.querySelector("[type=checkbox]");
  if (check.checked === (row.dataset.routed === "true")) check.checked = isRouted;
  row.dataset.routed = isRouted;
}

function showMode() {
  const isWeighted = byId("settings").elements.mode.value === "weighted";
  for (const row of byId("pool-list").children) {
    row.querySelector("[type=checkbox]").hidden = isWeighted;
    row.querySelector("[type=number]").hidden = !isWeighted;
  }
  byId("top-k").disabled = isWeighted;
}

function adapterRow(adapter) {
  const row = element("tr");
  const name = row.appendChild(element("th", "", adapter.name));
  name.scope = "row";
  if (adapter.description) name.title = adapter.description;
  const state = row.appendChild(element("td", `state-${adapter.state}`, adapter.state.toLowerCase()));
  if (adapter.state === "DOWNLOADING") state.append(` ${percent(adapter.progress ?? 0)}`);
  if (adapter.reason) state.append(element("div", "why", adapter.reason));
  const routed = adapter.state === "READY" ? (adapter.routed ? "yes" : "by name only") : "–";
  row.append(element("td", "", routed), trafficCell(adapter.traffic_share ?? 0));
  row.append(element("td", "", String(adapter.rank ?? "–")), element("td", "", (adapter.targets ?? []).join(", ") || "–"));
  row.append(element("td", "", [adapter.source, adapter.revision?.slice(0, 10)].filter(Boolean).join(" @ ")));
  const digest = row.appendChild(element("td"));
  digest.append(element("code", "", adapter.digest?.slice(0, 12) ?? "–"));
  return row;
}

function trafficCell(share) {
  const cell = element("td", "traffic");
  const meter = Object.assign(element("meter"), { min: 0, max: 1, value: share });
  meter.setAttribute("aria-hidden", "true");
  cell.append(meter, ` ${percent(share)}`);
  return cell;
}

// Wiring

byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  numCleared += 1;
  byId("log").replaceChildren();
  byId("token-details").textContent = "";
  showError(null);
  byId("prompt").focus();
});
byId("model").addEventListener("change", () => (byId("pool").hidden = byId("model").value !== "auto"));
byId("pool").addEventListener("change", showMode);
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", () => {
  setKey(byId("key").value);
  refresh();
});
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
setInterval(() => {
  if (!document.hidden && !running) refresh();
}, REFRESH_MS);
refresh();
