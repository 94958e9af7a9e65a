// The panel's fields, and the conversation's settings behind them.

import { moreFields } from "./answer.js";
import { apiKey } from "./api.js";
import { $ } from "./dom.js";
import * as store from "./store.js";

const NUMBERS = ["temperature", "top_p", "max_tokens"];
const TEXTS = ["system", "more"];

/** Show the settings of a conversation. */
export function show({ settings }) {
  for (const name of [...NUMBERS, ...TEXTS]) if (document.activeElement !== $(name)) $(name).value = settings[name] ?? "";
  $("key-again").value = apiKey.get();
  check();
}

/** Write what is typed into the settings of `conversation()`; `keyChanged` is called with another API key. */
export function listen(conversation, keyChanged) {
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings").addEventListener("input", ({ target }) => {
    const { settings } = conversation();
    const { id, value } = target;
    if (id === "key-again") return;
    if (value === "" || (NUMBERS.includes(id) && !target.validity.valid)) delete settings[id];
    else settings[id] = NUMBERS.includes(id) ? Number(value) : value;
    check();
    store.save(conversation());
  });
  $("key-again").addEventListener("change", ({ target }) => keyChanged(target.value.trim()));
}

function check() {
  let error = "";
  try {
    moreFields($("more").value);
  } catch ({ message }) {
    error = message;
  }
  $("more-error").textContent = error;
  $("more").setAttribute("aria-invalid", String(Boolean(error)));
}
