// Server-sent events out of bytes that may be cut anywhere: inside a character, a line ending or an event.

export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];

  /** Take bytes; return the data of the events that they complete. */
  push(bytes) {
    let text = this.#rest + this.#decoder.decode(bytes, { stream: true });
    const held = text.endsWith("\r") ? "\r" : ""; // perhaps the first half of \r\n
    if (held) text = text.slice(0, -1);
    const lines = text.split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + held;
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // comments (":"), and fields that nobody here asks for
    }
    return events;
  }
}

/** The data of each event of a response's body, as it comes. */
export async function* events(body) {
  const reader = body.getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening ends the request
  }
}
