// What one message looks like: its text, reasoning, tool calls, figures and buttons.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { render } from "./markdown.js";

const NAMES = { user: "You", tool: "Tool", system: "System" };
const ENDS = {
  length: "Cut off: the limit of tokens is reached.",
  abort: "Aborted by the server.",
  stopped: "Stopped.",
};

export class MessageView {
  /** `act`: retry, edit, remove, resume; each is called with this view's message. */
  constructor(message, act) {
    Object.assign(this, { message, act, streaming: false });
    this.name = el("span", { class: "who" });
    this.reasoning = el("div", { class: "prose" });
    this.summary = el("summary");
    this.details = el("details", { class: "reasoning", hidden: true }, this.summary, this.reasoning);
    this.content = el("div", { class: message.role === "assistant" ? "prose" : "plain" });
    this.calls = el("div", { class: "calls" });
    this.foot = el("div", { class: "figures" });
    this.error = el("div", { class: "error", role: "alert", hidden: true });
    this.buttons = el("div", { class: "actions" });
    const foot = el("div", { class: "under" }, this.foot, this.buttons);
    const answered = [this.name, this.details, this.content, this.calls, this.error, foot];
    const parts = message.role === "assistant" ? answered : [this.name, this.content, foot];
    this.element = el("article", { class: `message ${message.role}` }, parts);
    this.update();
  }

  update() {
    const { message, streaming } = this;
    const { role } = message;
    this.name.textContent = NAMES[role] ?? message.model ?? "Model";
    if (role === "assistant") render(this.content, message.content);
    else this.content.textContent = message.content;
    this.content.hidden = !message.content && !streaming;
    this.element.classList.toggle("streaming", streaming);
    this.element.classList.toggle("waiting", streaming && !message.content && !message.reasoning_content);
    this.#reasoning();
    this.calls.replaceChildren(...(message.tool_calls ?? []).map(call));
    this.error.hidden = !message.error;
    if (message.error) this.#error();
    this.#figures();
    if (!this.buttons.childElementCount !== streaming) this.#buttons();
  }

  #reasoning() {
    const { message } = this;
    this.details.hidden = !message.reasoning_content;
    if (!message.reasoning_content) return;
    this.summary.textContent = this.streaming && !message.content ? "Thinking…" : "Reasoning";
    if (this.details.open) render(this.reasoning, message.reasoning_content);
    this.details.ontoggle = () => render(this.reasoning, this.message.reasoning_content);
  }

  #error() {
    const again = el("button", { type: "button", click: () => this.act.retry(this.message) }, "Try again");
    this.error.replaceChildren(el("span", {}, this.message.error), again);
  }

  #figures() {
    const { stats, finish, error } = this.message;
    const parts = stats ? figures(stats) : [];
    const end = !this.streaming && !error && ENDS[finish];
    const resume = end && this.message.content && !this.message.tool_calls?.length;
    const button = el("button", { type: "button", class: "link", click: () => this.act.resume(this.message) }, "Go on");
    this.foot.replaceChildren(
      ...parts.map(([text, title]) => el("span", { title }, text)),
      ...(end ? [el("span", { class: "end" }, end)] : []),
      ...(resume ? [button] : []),
    );
  }

  #buttons() {
    const { act, message } = this;
    this.buttons.replaceChildren();
    if (this.streaming) return;
    if (message.error && !message.content) return; // its own button asks again
    this.buttons.append(copyButton(() => this.message.content, "Copy"));
    const again = message.role === "user" ? "Answer again" : "Try again";
    if (message.role !== "tool") this.buttons.append(iconButton("retry", again, () => act.retry(message)));
    this.buttons.append(iconButton("edit", "Edit", () => this.#edit()));
    this.buttons.append(iconButton("remove", "Delete", () => act.remove(message)));
  }

  /** A field in place of the text. A question is sent anew; an answer is changed, and no more. */
  #edit() {
    const rows = Math.min(12, this.message.content.split("\n").length + 1);
    const field = el("textarea", { "aria-label": "Edit the message", rows });
    field.value = this.message.content;
    const close = () => (form.replaceWith(this.content), (this.buttons.hidden = false));
    const submit = (event) => {
      event.preventDefault();
      close();
      if (field.value !== this.message.content || this.message.role === "user") this.act.edit(this.message, field.value);
    };
    const save = el("button", { class: "primary" }, this.message.role === "user" ? "Send" : "Save");
    const cancel = el("button", { type: "button", click: close }, "Cancel");
    const keys = (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
      else return;
      event.stopPropagation();
    };
    const form = el("form", { class: "edit", submit, keydown: keys }, field, el("div", { class: "row" }, save, cancel));
    this.content.replaceWith(form);
    this.buttons.hidden = true;
    field.focus();
  }
}

function call({ function: { name, arguments: given } }) {
  let shown = given;
  try {
    shown = JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    // still on its way, or no JSON: as the model wrote it
  }
  const head = el("div", { class: "code-head" }, el("span", {}, icon("go"), ` ${name}`));
  return el("div", { class: "call" }, head, el("pre", { tabindex: "0" }, shown));
}

/** [text, explanation] of each figure. */
function figures({ tokens, rate, ttft, prompt, cached }) {
  const found = [[`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`, "Tokens of the answer"]];
  if (rate) found.push([`${rate >= 100 ? Math.round(rate) : rate.toFixed(1)} tokens/s`, "After the first one"]);
  const wait = ttft < 1 ? `${Math.round(ttft * 1000)} ms` : `${ttft?.toFixed(1)} s`;
  if (ttft !== null) found.push([`first after ${wait}`, "Time to the first token"]);
  const known = cached ? `, ${cached.toLocaleString("en")} cached` : "";
  const why = "Tokens of the prompt, and how many of them were computed before";
  found.push([`prompt ${prompt.toLocaleString("en")}${known}`, why]);
  return found;
}
