// The server's API, at the place where the page came from and nowhere else.

import { events } from "./sse.js";

const KEY = "appliance.key"; // of the session's storage: gone with the tab

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

async function ask(path, { body = null, signal = null, key = apiKey.get() } = {}) {
  const headers = {};
  if (/[^\x21-\x7e]/.test(key)) throw new ApiError("The API key has characters that no key has.", { status: 401 });
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const url = new URL(path, document.baseURI); // relative: also behind a proxy that adds a prefix
  try {
    const more = { headers, signal, cache: "no-store", credentials: "omit" };
    return await fetch(url, body ? { ...more, method: "POST", body: JSON.stringify(body) } : more);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.");
  }
}

/** What the server's error says, in its own words. */
function failure(error, status, retryAfter = null) {
  const message = error?.message ?? (typeof error === "string" ? error : `The server answers ${status}.`);
  return new ApiError(message, { status, code: error?.code ?? null, retryAfter });
}

async function read(response) {
  try {
    return await response.json();
  } catch {
    return null;
  }
}

async function check(response) {
  if (response.ok) return response;
  throw failure((await read(response))?.error, response.status, response.headers.get("Retry-After"));
}

export async function get(path) {
  const answer = await read(await check(await ask(path)));
  if (answer === null) throw new ApiError("The server's answer is no JSON.");
  return answer;
}

/** The server's health: {status: ok | loading | draining | dead | away, ...}. Needs no key. */
export async function health() {
  try {
    const body = await read(await ask("health", { key: "" }));
    return { message: body?.error?.message ?? "", ...body, status: body?.status ?? "away" };
  } catch (error) {
    return { status: "away", message: error.message };
  }
}

/** Each chunk of a streamed chat completion. Throws ApiError, also where the stream ends before its time. */
export async function* stream(body, signal) {
  const response = await check(await ask("v1/chat/completions", { body, signal }));
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw failure(chunk.error, 500);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection to the server broke off in the middle of the answer.");
  }
  throw new ApiError("The server ended the answer before it was complete.");
}
