// One answer as it comes: the request's body, the message that grows, and how fast it did.

import { stream } from "./api.js";

const MEASURABLE_MS = 40; // what comes within less may have come in one piece, and says nothing about speed

const OWN = new Set(["model", "messages", "stream", "stream_options", "continue_final_message", "add_generation_prompt", "n"]);

/** The fields beside temperature and the like, which a user wrote as JSON. Throws Error with a line for the user. */
export function moreFields(text) {
  if (!text?.trim()) return {};
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`More request fields: this is no JSON (${error.message}).`);
  }
  const isObject = found !== null && typeof found === "object" && !Array.isArray(found);
  if (!isObject) throw new Error('More request fields: write an object, as {"seed": 1}.');
  const own = Object.keys(found).find((name) => OWN.has(name));
  if (own) throw new Error(`More request fields: the page itself says ${own}.`);
  return found;
}

/** What is asked. With `resume` the last message is the beginning of the answer. */
export function requestBody({ messages, settings, model }, resume) {
  const { system, more, ...numbers } = settings;
  const kept = messages.filter(({ role, content, tool_calls }) => role !== "assistant" || content || tool_calls?.length);
  const sent = kept.map(({ role, content, reasoning_content, tool_calls, tool_call_id }) => ({
    role,
    content,
    ...(reasoning_content && { reasoning_content }),
    ...(tool_calls?.length && { tool_calls }),
    ...(tool_call_id && { tool_call_id }),
  }));
  return {
    model,
    ...numbers,
    ...moreFields(more),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...sent],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(resume && { continue_final_message: true, add_generation_prompt: false }),
  };
}

/** Ask, and let `message` grow; `grown` is called after each chunk. Throws ApiError, and AbortError where `signal` stops it. */
export async function answer(body, message, signal, grown) {
  const begun = performance.now();
  const before = message.stats?.tokens ?? 0; // of an answer that goes on
  let first = 0;
  let firstTokens = 0;
  let last = 0;
  message.finish = null;
  for await (const chunk of stream(body, signal)) {
    const choice = chunk.choices[0];
    const tokens = chunk.usage?.completion_tokens ?? 0;
    if (choice && grow(message, choice.delta)) {
      last = performance.now();
      if (!first) [first, firstTokens] = [last, tokens];
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (chunk.usage) {
      const measurable = last - first >= MEASURABLE_MS && tokens > firstTokens;
      const rate = measurable ? ((tokens - firstTokens) * 1000) / (last - first) : null;
      const cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      const ttft = first ? (first - begun) / 1000 : null;
      const { prompt_tokens: prompt, total_tokens: total } = chunk.usage;
      message.stats = { prompt, cached, tokens: before + tokens, total, ttft, rate };
    }
    grown();
  }
}

/** Whether there was anything to see in it. */
function grow(message, delta) {
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  if (reasoning) message.reasoning_content = (message.reasoning_content ?? "") + reasoning;
  message.content += delta.content ?? "";
  for (const part of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id += part.id ?? "";
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
  return Boolean(reasoning || delta.content || delta.tool_calls?.length);
}
