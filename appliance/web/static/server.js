// Whether the server can be asked: waits while it loads or is away, asks for a key where it wants one, knows its models.

import { ApiError, apiKey, get, health } from "./api.js";
import { $, el } from "./dom.js";
import { bytes } from "./metrics.js";

const WORDS = {
  ok: "ready",
  loading: "loading",
  draining: "shutting down",
  dead: "engine down",
  away: "no answer",
  key: "needs a key",
  refused: "refused",
};
const AWAY = ["engine_dead", "model_loading", "shutting_down"]; // codes of errors that say so
const ASK_MS = 700;

export class Server {
  /** `changed` is called with each new state. */
  constructor(changed) {
    Object.assign(this, { changed, state: "away", models: [], waiting: false });
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.useKey($("key").value.trim());
    });
  }

  get ready() {
    return this.state === "ok";
  }

  /** The longest context of a model, in tokens; null where the server does not say. */
  context(model) {
    return this.models.find(({ id }) => id === model)?.max_model_len ?? null;
  }

  /** Whether a model is in memory; one that is not is loaded for the first question. */
  loaded(model) {
    return ["ok", undefined].includes(this.models.find(({ id }) => id === model)?.status);
  }

  /** Ask anew for the models, where what is loaded may have changed. */
  async look() {
    if (this.ready && this.models.some(({ status }) => status && status !== "ok")) await this.#list();
  }

  /** Ask until the server is ready, however long that takes. */
  async connect() {
    if (this.waiting) return;
    this.waiting = true;
    for (;;) {
      const found = await health();
      if (found.status === "ok") break;
      this.#set(found.status in WORDS ? found.status : "away", found);
      await new Promise((resolve) => setTimeout(resolve, ASK_MS));
    }
    this.waiting = false;
    await this.#list();
  }

  async #list() {
    try {
      this.models = (await get("v1/models")).data ?? [];
      this.#set("ok");
    } catch (error) {
      if (!this.failed(error)) this.#set("refused", error);
    }
  }

  /** Whether an error says something of the server itself, which then shows. */
  failed(error) {
    if (!(error instanceof ApiError)) return false;
    if (error.status === 401) {
      this.#set("key");
      $("key-error").textContent = apiKey.get() ? error.message : "";
    } else if (error.status === 0 || AWAY.includes(error.code)) {
      setTimeout(() => this.connect(), ASK_MS / 7);
    } else return false;
    return true;
  }

  useKey(key) {
    apiKey.set(key);
    $("key").value = "";
    this.connect();
  }

  #set(state, found = {}) {
    this.state = state;
    $("state").dataset.state = state;
    $("state").replaceChildren(el("span", {}, WORDS[state]));
    const hadKeyForm = !$("key-form").hidden;
    $("key-form").hidden = state !== "key";
    if (state === "key" && !hadKeyForm) $("key").focus();
    this.#progress(state, found);
    this.changed();
  }

  #progress(state, { message = "", loaded_bytes: done = 0, total_bytes: all = 0 }) {
    $("loading").hidden = ["ok", "key"].includes(state);
    $("loading-what").textContent = state === "loading" ? "The model is being loaded." : message || "The server does not answer.";
    $("loading-bar").hidden = state !== "loading";
    if (all) $("loading-bar").value = done / all;
    else $("loading-bar").removeAttribute("value");
    const how = state === "refused" ? "" : "This page goes on by itself.";
    $("loading-how").textContent = state === "loading" && all ? `${bytes(done)} of ${bytes(all)}` : how;
  }
}
