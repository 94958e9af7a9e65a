// The page put together: what each button and key does.

import { Chat } from "./chat.js";
import { $, el, iconButton, toast } from "./dom.js";
import * as metrics from "./metrics.js";
import { Server } from "./server.js";
import * as settings from "./settings.js";
import * as store from "./store.js";

const DEMO = ["What is 7 plus 5?", "What is the capital of France?", "What is the opposite of hot?", "Spell the word garden."];

const server = new Server(refresh);
const chat = new Chat({ changed, grown, ended: () => server.look(), failed: (error) => server.failed(error) });

/** Another conversation, or other messages in it. */
function changed() {
  const { conversation } = chat;
  const hash = conversation.messages.length ? `#${conversation.id}` : "";
  if (location.hash !== hash) history.replaceState(null, "", hash || location.pathname + location.search);
  settings.show(conversation);
  list();
  refresh();
}

/** The list of conversations. */
function list() {
  const rows = store.list().map((one) => {
    const current = one.id === chat.conversation.id;
    const title = one.title || "Untitled";
    const click = () => (chat.open(one.id), drawer(false));
    const open = el("button", { type: "button", class: "title", "aria-current": current && "true", click }, title);
    return el("li", { class: current && "current" }, open, iconButton("remove", `Delete ${title}`, () => forget(one)));
  });
  $("list").replaceChildren(...rows);
}

function forget(conversation) {
  chat.stop(conversation.id);
  store.remove(conversation.id);
  if (conversation.id === chat.conversation.id) chat.open(null);
  else list();
  toast("Conversation deleted", () => (store.save(conversation), chat.open(conversation.id)));
}

/** All that depends on the server's state and on whether an answer is under way. */
function refresh() {
  const { conversation, busy } = chat;
  const names = server.models.map(({ id }) => id);
  if (names.length && !names.includes(conversation.model)) conversation.model = names[0];
  const picker = $("model");
  const short = (name) => name.split("/").filter(Boolean).at(-1) ?? name; // of a directory, its last part
  const labels = names.map((name) => short(name) + (server.loaded(name) ? "" : " (not loaded)"));
  if ([...picker.options].map(({ label }) => label).join("\n") !== labels.join("\n")) {
    picker.replaceChildren(...names.map((name, i) => el("option", { value: name, title: name }, labels[i])));
  }
  $("waking").hidden = !busy || server.loaded(conversation.model);
  picker.value = conversation.model ?? "";
  picker.disabled = names.length < 2 || busy;
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("send").disabled = !server.ready || !$("prompt").value.trim();
  $("export").disabled = !conversation.messages.length;
  const [call] = chat.pending();
  $("prompt").placeholder = call ? `Result of ${call.function.name}` : "Message the model";
  const ideas = conversation.model === "demo" ? DEMO : [];
  const idea = (text) => el("button", { type: "button", disabled: !server.ready, click: () => send(text) }, text);
  $("ideas").replaceChildren(...ideas.map(idea));
  context();
}

function grown() {
  $("waking").hidden = true;
  context();
}

/** How much of the model's context the conversation takes. */
function context() {
  const { messages, model } = chat.conversation;
  const total = messages.findLast(({ stats }) => stats)?.stats.total;
  const most = server.context(model);
  const words = total && most ? `${total.toLocaleString("en")} of ${most.toLocaleString("en")} tokens of context` : "";
  if ($("context").textContent !== words) $("context").textContent = words;
  $("context").classList.toggle("bad", Boolean(most) && total > 0.9 * most);
}

function send(text) {
  if (!server.ready || chat.busy || !text.trim()) return;
  try {
    chat.send(text);
  } catch (error) {
    toast(error.message);
    return;
  }
  $("prompt").value = "";
  grow();
  $("prompt").focus();
}

/** The field is as high as its text, up to what its style allows. */
function grow() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function drawer(open) {
  document.body.classList.toggle("chats-open", open);
  $("menu").setAttribute("aria-expanded", String(open));
  $("shade").hidden = !open;
  if (open) $("new").focus();
}

/** Show the panel at the side with one of its tabs; null closes it. */
function side(tab) {
  const opener = $("side").contains(document.activeElement) ? $(`open-${shownTab()}`) : null;
  $("side").hidden = tab === null;
  document.body.classList.toggle("side-open", tab !== null);
  for (const name of ["settings", "metrics"]) {
    const on = name === tab;
    if (tab !== null) {
      $(name).hidden = !on;
      $(`tab-${name}`).setAttribute("aria-selected", String(on));
      $(`tab-${name}`).tabIndex = on ? 0 : -1;
    }
    $(`open-${name}`).setAttribute("aria-expanded", String(on));
  }
  watch();
  if (tab === null) opener?.focus();
}

/** Look at what the server does while that is shown. */
function watch() {
  metrics.watch(!$("side").hidden && !$("metrics").hidden, () => chat.conversation.model);
}

const shownTab = () => ($("settings").hidden ? "metrics" : "settings");

function exportFile() {
  const { conversation } = chat;
  const url = URL.createObjectURL(new Blob([store.toFile(conversation)], { type: "application/json" }));
  const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50);
  el("a", { href: url, download: `${name || "conversation"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importFile({ target }) {
  const [file] = target.files;
  target.value = "";
  if (!file) return;
  try {
    const conversation = store.fromFile(await file.text());
    if (!conversation.messages.length) throw new Error("The file has no messages.");
    if (!store.save(conversation)) throw new Error("The browser's storage has no room for it.");
    chat.open(conversation.id);
    drawer(false);
  } catch (error) {
    toast(error.message);
  }
}

function onKey(event) {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (chat.busy) chat.stop();
    else if (document.body.classList.contains("chats-open")) drawer(false);
    else if (!$("side").hidden) side(null);
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("prompt").focus();
  }
}

function onPromptKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("prompt").value);
}

$("composer").addEventListener("submit", (event) => (event.preventDefault(), send($("prompt").value)));
$("prompt").addEventListener("keydown", onPromptKey);
$("prompt").addEventListener("input", () => (grow(), ($("send").disabled = !server.ready || !$("prompt").value.trim())));
$("stop").addEventListener("click", () => (chat.stop(), $("prompt").focus()));
$("down").addEventListener("click", () => chat.toEnd());
$("model").addEventListener("change", ({ target }) => {
  chat.conversation.model = target.value;
  store.save(chat.conversation);
  refresh();
});
$("new").addEventListener("click", () => (chat.open(null), drawer(false), $("prompt").focus()));
$("export").addEventListener("click", exportFile);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", importFile);
$("menu").addEventListener("click", () => drawer(true));
$("shade").addEventListener("click", () => drawer(false));
$("close-side").addEventListener("click", () => side(null));
for (const name of ["settings", "metrics"]) {
  $(`open-${name}`).addEventListener("click", () => side($("side").hidden || shownTab() !== name ? name : null));
  $(`tab-${name}`).addEventListener("click", () => side(name));
  $(`tab-${name}`).addEventListener("keydown", ({ key }) => {
    if (!["ArrowLeft", "ArrowRight"].includes(key)) return;
    const other = name === "settings" ? "metrics" : "settings";
    side(other);
    $(`tab-${other}`).focus();
  });
}
settings.listen(() => chat.conversation, (key) => server.useKey(key));
store.onChange((id) => (id === null || id === chat.conversation.id ? chat.reload() : list()));
addEventListener("hashchange", () => chat.open(location.hash.slice(1)));
addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", watch);

chat.open(location.hash.slice(1) || (store.list()[0]?.id ?? null));
server.connect();
$("prompt").focus();
