// The conversation on the screen: sending, stopping, changing, keeping.

import { answer, moreFields, requestBody } from "./answer.js";
import { $, announce, toast } from "./dom.js";
import { MessageView } from "./message.js";
import * as store from "./store.js";

const SAVE_MS = 2000;

export class Chat {
  /** Called: `changed` when a conversation is another one, `grown` when an answer is, `ended` after it, `failed` with errors. */
  constructor({ changed, grown, ended, failed }) {
    Object.assign(this, { changed, grown, ended, failed, views: new Map(), running: new Map(), sticky: true });
    this.conversation = store.create();
    this.scroll = $("scroll");
    this.scroll.addEventListener("scroll", () => this.#scrolled());
    addEventListener("pagehide", () => this.#leave());
  }

  get busy() {
    return this.running.has(this.conversation.id);
  }

  /** Show the conversation of that id, or a new one. One that is being answered goes on meanwhile. */
  open(id) {
    this.conversation = this.running.get(id)?.conversation ?? (id && store.load(id)) ?? store.create();
    this.views.clear();
    $("log").replaceChildren();
    this.sticky = true;
    this.#show();
    this.changed();
  }

  /** Take over what another tab has done to it. */
  reload() {
    if (!this.busy) this.open(this.conversation.id);
  }

  /** What the model waits for before it can answer: the calls of the last answer that have no result yet. */
  pending() {
    const { messages } = this.conversation;
    const last = messages.findLastIndex((message) => message.role === "assistant");
    const given = new Set(messages.slice(last + 1).map((message) => message.tool_call_id));
    const after = messages.slice(last + 1).every((message) => message.role === "tool");
    return last >= 0 && after ? (messages[last].tool_calls ?? []).filter((call) => !given.has(call.id)) : [];
  }

  /** Send what the user wrote; where the model called tools, it is the result of the first one that has none. */
  send(text) {
    const { messages, settings } = this.conversation;
    moreFields(settings.more); // before anything is changed
    const [call, ...others] = this.pending();
    messages.push(call ? { role: "tool", tool_call_id: call.id, content: text } : { role: "user", content: text });
    this.sticky = true;
    if (others.length) this.#keep();
    else this.#answer();
  }

  stop(id = this.conversation.id) {
    this.running.get(id)?.controller.abort();
  }

  async #answer(resumed = null) {
    const { conversation } = this;
    const message = resumed ?? { role: "assistant", content: "" };
    const body = requestBody(conversation, resumed !== null);
    const controller = new AbortController();
    this.running.set(conversation.id, { conversation, controller, message });
    Object.assign(message, { model: conversation.model, error: null });
    if (!resumed) conversation.messages.push(message);
    this.#keep();
    announce("Answering");
    let saved = performance.now();
    const grown = () => {
      this.#draw(message);
      if (performance.now() - saved < SAVE_MS) return;
      saved = performance.now();
      store.save(conversation);
    };
    try {
      await answer(body, message, controller.signal, grown);
      announce("The answer is complete");
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else message.error = error.message;
      announce(message.error ?? "Stopped");
      this.failed(error);
    } finally {
      this.running.delete(conversation.id);
      this.#end(conversation, message);
      this.ended();
    }
  }

  /** An answer of which nothing came is not kept, unless there is an error to show. */
  #end(conversation, message) {
    const empty = !message.content && !message.reasoning_content && !message.tool_calls?.length;
    if (empty && !message.error && message.finish === "stopped") {
      conversation.messages.splice(conversation.messages.indexOf(message), 1);
    }
    this.#keep(conversation);
  }

  /** Answer again: the question of this message, or the one before this answer. */
  retry(message) {
    const { messages } = this.conversation;
    const at = messages.indexOf(message);
    if (this.busy || at < 0) return;
    messages.length = message.role === "user" ? at + 1 : at;
    this.sticky = true;
    this.#guarded(() => this.#answer());
  }

  resume(message) {
    const { messages } = this.conversation;
    if (!this.busy && messages.at(-1) === message) this.#guarded(() => this.#answer(message));
  }

  edit(message, text) {
    if (this.busy) return;
    message.content = text;
    if (message.role === "user") this.retry(message);
    else this.#keep();
  }

  /** Delete a message; with a question goes what was said to it. */
  remove(message) {
    const { conversation } = this;
    const { messages } = conversation;
    if (this.busy) return;
    const before = [...messages];
    const at = messages.indexOf(message);
    const next = messages.findIndex((other, i) => i > at && other.role === "user");
    const count = message.role === "user" ? (next < 0 ? messages.length : next) - at : 1;
    messages.splice(at, count);
    this.#keep();
    toast(count > 1 ? "Question and answer deleted" : "Message deleted", () => {
      conversation.messages = before;
      this.#keep(conversation);
    });
  }

  #guarded(action) {
    try {
      moreFields(this.conversation.settings.more);
    } catch (error) {
      toast(error.message);
      return;
    }
    action();
  }

  #keep(conversation = this.conversation) {
    conversation.updated = Date.now();
    if (conversation.messages.length === 0) store.remove(conversation.id);
    const kept = store.save(conversation);
    if (!kept) toast("The browser's storage is full: this conversation will be lost. Export it, or delete others.");
    if (conversation === this.conversation) this.#show();
    this.changed();
  }

  /** Views for all messages, in order; those that are there stay. */
  #show() {
    const log = $("log");
    const { messages } = this.conversation;
    const act = {
      retry: (message) => this.retry(message),
      edit: (message, text) => this.edit(message, text),
      remove: (message) => this.remove(message),
      resume: (message) => this.resume(message),
    };
    const shown = new Set(messages);
    for (const [message, view] of this.views) {
      if (shown.has(message)) continue;
      view.element.remove();
      this.views.delete(message);
    }
    messages.forEach((message, i) => {
      if (!this.views.has(message)) this.views.set(message, new MessageView(message, act));
      const view = this.views.get(message);
      if (log.children[i] !== view.element) log.insertBefore(view.element, log.children[i] ?? null);
      view.streaming = this.running.get(this.conversation.id)?.message === message;
      view.element.classList.toggle("last", i === messages.length - 1);
      view.update();
    });
    log.setAttribute("aria-busy", String(this.busy)); // read out when it is complete
    $("empty").hidden = messages.length > 0;
    this.#stick();
  }

  /** Show what came, once a frame at most. */
  #draw(message) {
    const view = this.views.get(message);
    if (!view || view.due) return;
    view.due = requestAnimationFrame(() => {
      view.due = 0;
      view.update();
      this.#stick();
      this.grown();
    });
  }

  /** The page goes, and with it what is on its way: keep what there is. */
  #leave() {
    for (const { conversation, message } of this.running.values()) {
      message.finish = "stopped";
      store.save(conversation);
    }
  }

  #stick() {
    if (this.sticky) this.scroll.scrollTop = this.scroll.scrollHeight;
    else this.#scrolled();
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    this.sticky = scrollHeight - scrollTop - clientHeight < 48;
    $("down").hidden = this.sticky;
  }

  toEnd() {
    this.sticky = true;
    this.#stick();
    this.#scrolled();
  }
}
