// Conversations in the browser's storage: one entry each, so that two tabs do not write over each other's.

const PREFIX = "appliance.chat.";
const LATEST = "appliance.settings"; // what a new conversation begins with
const FORMAT = "appliance.chat";
const ROLES = ["system", "user", "assistant", "tool"];
const NUMBERS = ["temperature", "top_p", "max_tokens"];

export function create() {
  const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
  return { id, title: "", model: null, updated: Date.now(), messages: [], settings: latest() };
}

function latest() {
  return parse(localStorage.getItem(LATEST)) ?? {};
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** All conversations that hold something, the latest first. */
export function list() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const found = keys.map((key) => parse(localStorage.getItem(key))).filter((one) => one?.id && Array.isArray(one.messages));
  return found.sort((a, b) => b.updated - a.updated);
}

export function load(id) {
  return parse(localStorage.getItem(PREFIX + id));
}

/** Returns whether there was room. A conversation without messages is not kept. */
export function save(conversation) {
  conversation.title = conversation.title || title(conversation);
  try {
    if (conversation.messages.length) localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    localStorage.setItem(LATEST, JSON.stringify(conversation.settings));
    return true;
  } catch {
    return false;
  }
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** Call back with the id of a conversation that another tab has changed; null where it was all of them. */
export function onChange(callback) {
  addEventListener("storage", ({ key }) => {
    if (key === null || key.startsWith(PREFIX)) callback(key && key.slice(PREFIX.length));
  });
}

function title({ messages }) {
  const first = messages.find((message) => message.role === "user");
  return (first?.content ?? "").trim().replace(/\s+/g, " ").slice(0, 60);
}

/** The file of a conversation: its `messages` are those of OpenAI's API; `appliance chat` reads and writes the same. */
export function toFile({ title, model, messages, settings }) {
  const { system, ...more } = settings;
  const first = system ? [{ role: "system", content: system }] : [];
  return JSON.stringify({ format: FORMAT, version: 1, title, model, settings: more, messages: [...first, ...messages] }, null, 1);
}

/** A conversation out of such a file, or of a plain list of messages. Throws Error with a line for the user. */
export function fromFile(text) {
  const found = parse(text);
  const messages = Array.isArray(found) ? found : found?.messages;
  if (!Array.isArray(messages)) throw new Error('The file is no conversation: it needs a list of "messages" in JSON.');
  const conversation = create();
  conversation.settings = settings(found.settings);
  for (const [i, message] of messages.entries()) {
    const { role, content } = message ?? {};
    const which = `message ${i + 1} of the file`;
    if (!ROLES.includes(role)) throw new Error(`The role of ${which} is ${JSON.stringify(role)}: roles are ${ROLES.join(", ")}.`);
    if (typeof (content ?? "") !== "string") throw new Error(`The content of ${which} is not text.`);
    if (role === "system" && i === 0) conversation.settings.system = content ?? "";
    else conversation.messages.push(clean(message));
  }
  conversation.title = typeof found.title === "string" ? found.title.slice(0, 200) : "";
  conversation.model = typeof found.model === "string" ? found.model : null;
  return conversation;
}

function settings(found) {
  const kept = {};
  for (const name of NUMBERS) if (typeof found?.[name] === "number") kept[name] = found[name];
  if (typeof found?.more === "string") kept.more = found.more;
  return kept;
}

/** The fields of a message that this page knows, as far as they are what they should be. */
function clean({ role, content, reasoning_content, tool_calls, tool_call_id, stats }) {
  const message = { role, content: content ?? "" };
  if (typeof reasoning_content === "string") message.reasoning_content = reasoning_content;
  if (typeof tool_call_id === "string") message.tool_call_id = tool_call_id;
  const isCall = (call) => typeof call?.function?.name === "string" && typeof call.function.arguments === "string";
  if (Array.isArray(tool_calls)) message.tool_calls = tool_calls.filter(isCall);
  const numbers = Object.entries(stats ?? {}).filter(([, value]) => typeof value === "number");
  if (role === "assistant" && numbers.length) message.stats = Object.fromEntries(numbers);
  return message;
}
