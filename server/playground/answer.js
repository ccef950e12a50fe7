// One answer in the conversation: its text in the colours of the adapters that wrote it, and the facts below it.

import { byId, element, percent } from "./dom.js";

const NUM_COLOURS = 12;
const colourOf = new Map(); // adapter name -> class name, in order of appearance

export class Answer {
  constructor() {
    this.node = element("article", "message assistant");
    this.textNode = this.node.appendChild(element("div", "text"));
    this.textNode.tabIndex = 0;
    this.textNode.setAttribute("aria-label", "Answer; arrow keys walk through its tokens");
    this.facts = this.node.appendChild(element("p", "facts", "…"));
    this.text = "";
    this.waiting = []; // traced tokens whose text is not out yet
    this.last = [];
    this.started = performance.now();
    this.firstToken = null;
    this.textNode.addEventListener("keydown", (event) => this.walk(event));
    byId("log").append(this.node);
  }

  add(choice) {
    const piece = choice.delta.content ?? "";
    this.waiting.push(...(choice.routing?.tokens ?? []));
    if (piece) {
      this.firstToken ??= performance.now();
      this.text += piece;
      this.textNode.append(this.span(piece));
      byId("log").scrollTop = byId("log").scrollHeight;
    }
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
    if (choice.routing?.policy) this.routing = choice.routing;
  }

  span(piece) {
    if (this.waiting.length) this.last = this.waiting;
    const tokens = this.last;
    this.waiting = [];
    if (!tokens.length) return document.createTextNode(piece);
    const shares = Object.entries(tokens[tokens.length - 1].adapters);
    const [name, weight] = shares.reduce((best, share) => (share[1] > best[1] ? share : best), ["base", 0]);
    const node = element("span", `token ${colour(name)}${weight < 0.5 ? " weak" : ""}`, piece);
    node.details = describe(piece, tokens);
    node.title = node.details;
    node.addEventListener("mouseenter", () => this.select(node));
    return node;
  }

  select(node) {
    document.querySelector(".token.current")?.classList.remove("current");
    node.classList.add("current");
    byId("token-details").textContent = node.details;
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const tokens = [...this.textNode.querySelectorAll(".token")];
    if (!step || !tokens.length) return;
    event.preventDefault();
    const at = tokens.findIndex((token) => token.classList.contains("current"));
    const next = at < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.min(tokens.length - 1, Math.max(0, at + step));
    this.select(tokens[next]);
    tokens[next].scrollIntoView({ block: "nearest" });
  }

  finish(usage) {
    const now = performance.now();
    const facts = [this.finishReason ?? (this.text ? "cut off" : "no answer")];
    if (this.routing) {
      const visible = Object.entries(this.routing.adapters).filter(([, share]) => share >= 0.005);
      const shares = visible.map(([name, share]) => `${name} ${percent(share)}`);
      facts.push(`${this.routing.policy}: ${shares.join(", ") || "no tokens"}`);
    }
    if (this.firstToken) facts.push(`first text after ${Math.round(this.firstToken - this.started)} ms`);
    if (usage) {
      const rate = usage.completion_tokens / ((now - this.started) / 1000);
      facts.push(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`, `${rate.toFixed(1)} tokens/s`);
    }
    this.facts.textContent = facts.join(" · ");
    this.node.classList.toggle("failed", !this.finishReason);
  }
}

function describe(piece, tokens) {
  const lines = tokens.map((token) => {
    const visible = Object.entries(token.adapters).filter(([, weight]) => weight >= 0.005);
    const shares = visible.map(([name, weight]) => `${name} ${weight.toFixed(2)}`);
    return `${JSON.stringify(token.token)}: ${shares.join(", ")}`;
  });
  return lines.length ? lines.join("\n") : JSON.stringify(piece);
}

function colour(name) {
  if (!colourOf.has(name)) {
    colourOf.set(name, name === "base" ? "base" : `a${[...colourOf.keys()].filter((n) => n !== "base").length % NUM_COLOURS}`);
    showLegend();
  }
  return colourOf.get(name);
}

function showLegend() {
  byId("legend").replaceChildren(...[...colourOf].map(([name, className]) => element("li", className, name)));
  byId("legend-box").hidden = colourOf.size === 0;
}
