// What the server is doing, from its /stats; asked for once a second while somebody looks.

import { get } from "./api.js";
import { $, el, svg } from "./dom.js";

const PERIOD_MS = 1000;
const SAMPLES = 90;
const PARTS = [
  ["weights", "Weights", (plan) => plan.weights_bytes?.total],
  ["cache", "KV cache", (plan) => plan.kv_cache?.bytes],
  ["workspace", "Workspace", (plan) => plan.workspace_bytes?.total],
  ["graphs", "Graphs", (plan) => plan.graphs_bytes?.total],
  ["runtime", "Runtime", (plan) => plan.runtime_bytes],
  ["grammars", "Grammars", (plan) => plan.device?.kind === "cpu" && plan.grammars_bytes?.total],
];

let timer = 0;
let asked = "";
let current = () => null;
let before = null;
const history = { generation: [], prompt: [] };

/** Begin to ask, or end; `model` says of which one, each time. Rests by itself while the tab is hidden. */
export function watch(on, model) {
  clearTimeout(timer);
  timer = 0;
  current = model;
  if (on) look();
}

async function look() {
  const begun = performance.now();
  if (document.visibilityState === "visible") {
    try {
      const model = current() ?? "";
      if (model !== asked) [asked, before, history.generation, history.prompt] = [model, null, [], []];
      const stats = await get(`stats${asked && `?model=${encodeURIComponent(asked)}`}`);
      note(stats);
      show(stats);
    } catch (error) {
      before = null;
      $("metrics").replaceChildren(el("p", { class: "bad" }, error.message));
    }
  }
  if (!$("metrics").hidden && !$("side").hidden) {
    clearTimeout(timer);
    timer = setTimeout(look, Math.max(100, PERIOD_MS - (performance.now() - begun)));
  }
}

/** Tokens a second since the look before. */
function note({ engine, uptime_s: now }) {
  if (before && now > before.now && engine.generation_tokens >= before.engine.generation_tokens) {
    const seconds = now - before.now;
    push("generation", (engine.generation_tokens - before.engine.generation_tokens) / seconds);
    push("prompt", (engine.prompt_tokens - before.engine.prompt_tokens) / seconds);
  }
  before = { engine, now };
}

function push(name, value) {
  history[name].push(value);
  if (history[name].length > SAMPLES) history[name].shift();
}

function show(stats) {
  const { engine, info, hardware, latency } = stats;
  const groups = [
    group("Throughput", chart("Generated", history.generation), chart("Prompts", history.prompt)),
    group("Requests", tiles(["running", "waiting", "swapped"].map((name) => [name, engine[name]])), finished(engine)),
    latency && group("Latency of the last minute", waits(latency)),
    engine.blocks_total > 0 && group("KV cache", ...cache(engine)),
    info?.plan && group("Memory", ...memory(info.plan, engine)),
    hardware && group("Machine", ...machine(hardware)),
    group("Server", about(stats)),
  ];
  $("metrics").replaceChildren(...groups.filter(Boolean));
}

function group(title, ...content) {
  return el("section", {}, el("h3", {}, title), content);
}

function chart(name, values) {
  const top = Math.max(...values, 1);
  const now = values.at(-1) ?? 0;
  const x = (i) => ((SAMPLES - values.length + i) * 300) / (SAMPLES - 1);
  const points = values.map((value, i) => `${x(i).toFixed(1)},${(40 - (38 * value) / top).toFixed(1)}`);
  const picture = svg("svg", { viewBox: "0 0 300 41", preserveAspectRatio: "none", class: "chart", "aria-hidden": "true" });
  if (points.length > 1) {
    picture.append(svg("polygon", { points: `${x(0).toFixed(1)},41 ${points.join(" ")} 300,41` }));
    picture.append(svg("polyline", { points: points.join(" ") }));
  }
  const figure = el("strong", {}, rate(now));
  return el("div", { class: "series" }, el("p", {}, el("span", {}, name), el("span", {}, figure, " tokens/s")), picture);
}

function tiles(parts) {
  const tile = ([name, value]) => el("div", {}, el("strong", {}, number(value)), el("span", {}, name));
  return el("div", { class: "tiles" }, parts.map(tile));
}

function waits({ ttft, itl }) {
  const rows = [["Time to first token", ttft], ["Between tokens", itl]];
  const cell = (seconds) => el("td", {}, seconds === null ? "–" : brief(seconds));
  const head = el("tr", {}, el("td"), ["p50", "p95", "p99"].map((name) => el("th", { scope: "col" }, name)));
  const row = ([name, found]) => {
    return el("tr", {}, el("th", { scope: "row" }, name), [found.p50_s, found.p95_s, found.p99_s].map(cell));
  };
  const body = rows.map(row);
  return el("table", { class: "waits" }, el("thead", {}, head), el("tbody", {}, body));
}

function finished({ finished: ends, preemptions }) {
  const parts = Object.entries(ends).filter(([, count]) => count).map(([reason, count]) => `${number(count)} ${reason}`);
  if (preemptions) parts.push(`${number(preemptions)} preempted`);
  return parts.length > 0 && el("p", { class: "hint" }, `Finished: ${parts.join(", ")}`);
}

function cache(engine) {
  const { blocks_total: total, blocks_used: used, blocks_kept: kept, block_size: size } = engine;
  const { prefix_queries: queries, prefix_hits: hits } = engine;
  const parts = [["cache", "used", used], ["kept", "cached", kept], ["free", "free", total - used - kept]];
  const found = queries ? `${percent(hits / queries)} of prompt tokens found in the cache.` : "";
  return [
    bar("Blocks of the cache", parts, total),
    legend(parts.map(([kind, name, count]) => [kind, name, number(count)])),
    el("p", { class: "hint" }, `${number(total)} blocks of ${size} tokens. ${found}`),
  ];
}

function memory(plan, engine) {
  const parts = PARTS.map(([kind, name, size]) => [kind, name, size(plan) ?? 0]).filter(([, , size]) => size > 0);
  const whole = Math.max(plan.budget_bytes ?? 0, plan.total_bytes ?? 0);
  const left = whole - parts.reduce((sum, [, , size]) => sum + size, 0);
  const words = `Planned ${bytes(plan.total_bytes)} of ${bytes(whole)}; the process holds ${bytes(engine.rss_bytes)}.`;
  return [
    bar("Memory planned", parts, whole),
    legend([...parts, ["free", "left", Math.max(0, left)]].map(([kind, name, size]) => [kind, name, bytes(size)])),
    el("p", { class: "hint" }, words),
  ];
}

function machine({ cpu, memory: ram, gpus = [] }) {
  const rows = gpus.flatMap((card) => {
    const { temperature_c: heat, power_w: power } = card;
    const more = [heat !== null && `${heat} °C`, power !== null && `${Math.round(power)} W`];
    const label = [card.name ?? `GPU ${card.index}`, ...more.filter(Boolean)].join(", ");
    const memory = card.memory_total_bytes ? [meter("its memory", card.memory_used_bytes / card.memory_total_bytes)] : [];
    return [card.utilization !== null && meter(label, card.utilization), ...memory];
  });
  if (cpu) rows.push(meter(`CPU, ${cpu.threads} threads`, cpu.utilization));
  if (ram) rows.push(meter(`Memory, ${bytes(ram.total_bytes)}`, 1 - ram.available_bytes / ram.total_bytes));
  return rows.filter(Boolean);
}

function about({ version, model, state, uptime_s: uptime, info }) {
  const rows = [["Model", model], ["State", state], ["Up", duration(uptime)], ["Version", version]];
  if (info) {
    rows.splice(1, 0, ["Quantization", info.quantization], ["Device", `${info.device}, ${info.kernels || "reference"} kernels`]);
    rows.splice(3, 0, ["Activations", info.dtype], ["Context", `${number(info.max_model_len)} tokens`]);
  }
  return el("dl", {}, rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
}

/** Parts of a whole, beside each other: [kind, name, size]. */
function bar(label, parts, whole) {
  const shown = parts.filter(([kind, , size]) => kind !== "free" && size > 0);
  const text = parts.map(([, name, size]) => `${name} ${percent(size / whole)}`).join(", ");
  const pieces = shown.map(([kind, name, size]) => {
    const piece = el("i", { class: kind, title: name });
    piece.style.width = `max(2px, ${(100 * size) / whole}%)`;
    return piece;
  });
  return el("div", { class: "stack", role: "img", "aria-label": `${label}: ${text}` }, pieces);
}

function legend(parts) {
  const item = ([kind, name, value]) => el("li", {}, el("i", { class: kind }), `${name} `, el("b", {}, value));
  return el("ul", { class: "legend" }, parts.map(item));
}

function meter(name, share) {
  const piece = el("i", { class: share > 0.9 ? "hot" : "cache" });
  piece.style.width = percent(share);
  const head = el("p", {}, el("span", {}, name), el("b", {}, percent(share)));
  const stack = el("div", { class: "stack", role: "img", "aria-label": `${name}: ${percent(share)}` }, piece);
  return el("div", { class: "meter" }, head, stack);
}

const brief = (seconds) => (seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`);
const number = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => `${Math.round(100 * share)}%`;
const rate = (value) => (value >= 100 || value === 0 ? number(value) : value.toFixed(1));

export function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = size > 0 ? Math.min(4, Math.floor(Math.log2(size) / 10)) : 0;
  const value = size / 1024 ** step;
  return `${step === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[step]}`;
}

function duration(seconds) {
  const [d, h, m, s] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

