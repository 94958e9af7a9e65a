// What stands inside a line: code, emphasis, links. Every search that fails is remembered, so long texts stay cheap.

import { el } from "./dom.js";

const DEPTH = 10;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const TAGS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/** Nodes for a text; `linked`: it stands in a link, and links do not hold links. */
export function inline(text, depth = 0, linked = false) {
  return new Scanner(text, depth, linked).nodes();
}

class Scanner {
  constructor(text, depth, linked) {
    Object.assign(this, { text, depth, linked, at: 0, plain: "", found: [], missing: new Set() });
  }

  nodes() {
    while (this.at < this.text.length) {
      const node = this.special();
      if (node === null) this.plain += this.text[this.at++];
      else this.flush(node);
    }
    this.flush();
    return this.found;
  }

  flush(...nodes) {
    if (this.plain) this.found.push(this.plain);
    this.plain = "";
    this.found.push(...nodes);
  }

  /** The node that begins here, with `at` behind it; null where there is none. */
  special() {
    switch (this.text[this.at]) {
      case "\\":
        return this.escape();
      case "`":
        return this.code();
      case "\n":
        this.at++;
        this.plain = this.plain.replace(/ +$/, "");
        return el("br");
      case "*":
      case "_":
      case "~":
        return this.emphasis();
      case "!":
        return this.text[this.at + 1] === "[" ? this.link(1) : null;
      case "[":
        return this.link(0);
      case "<":
      case "h":
        return this.autolink();
    }
    return null;
  }

  escape() {
    const next = this.text[this.at + 1];
    if (!next || !PUNCTUATION.test(next)) return null;
    this.at += 2;
    return next;
  }

  code() {
    const [mark] = /^`+/.exec(this.text.slice(this.at, this.at + 64));
    const begin = this.at + mark.length;
    for (let end = this.search(mark, begin); end >= 0; end = this.search(mark, end)) {
      let after = end;
      while (this.text[after] === "`") after++;
      if (after - end === mark.length) {
        this.at = after;
        const inner = this.text.slice(begin, end).replaceAll("\n", " ");
        const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
        return el("code", {}, padded ? inner.slice(1, -1) : inner);
      }
      end = after;
    }
    this.plain += mark;
    this.at = begin;
    return "";
  }

  search(mark, from) {
    if (this.missing.has(mark)) return -1;
    const end = this.text.indexOf(mark, from);
    if (end < 0) this.missing.add(mark);
    return end;
  }

  emphasis() {
    const one = this.text[this.at];
    const mark = this.text[this.at + 1] === one ? one + one : one;
    const begin = this.at + mark.length;
    const before = this.text[this.at - 1] ?? " ";
    const inside = { _: /\w/, "*": /\d/ }[one]; // of a name, of a product
    const opens = /\S/.test(this.text[begin] ?? " ") && !inside?.test(before);
    const end = TAGS[mark] && opens && this.depth < DEPTH ? this.closing(mark, begin) : -1;
    if (end < 0) {
      this.plain += mark;
      this.at = begin;
      return "";
    }
    this.at = end + mark.length;
    return el(TAGS[mark], {}, inline(this.text.slice(begin, end), this.depth + 1, this.linked));
  }

  /** Where a mark closes: behind a character that is no space, outside of code, not as half of a longer mark. */
  closing(mark, begin) {
    if (this.missing.has(`close ${mark}`)) return -1;
    const one = mark[0];
    for (let i = begin + 1; i < this.text.length; i++) {
      const found = this.text[i];
      if (found === "\\") i++;
      else if (found === "`") i = this.pastCode(i);
      else if (found === one) {
        let after = i;
        while (this.text[after] === one) after++;
        const fits = mark.length === 2 ? after - i >= 2 : (after - i) % 2 === 1;
        const closes = /\S/.test(this.text[i - 1]) && !(one === "_" && /\w/.test(this.text[after] ?? " "));
        if (fits && closes) return mark.length === 2 || after - i === 1 ? after - mark.length : after - 1;
        i = after - 1;
      }
    }
    this.missing.add(`close ${mark}`);
    return -1;
  }

  pastCode(i) {
    const end = this.text.indexOf("`", i + 1);
    return end < 0 ? i : end;
  }

  /** [text](address); an image is a link to it, since nothing is loaded from elsewhere. */
  link(bang) {
    const begin = this.at + bang + 1;
    if (this.linked || this.depth >= DEPTH || this.search("](", begin) < 0) return null;
    const end = this.bracket(begin, "[", "]", 1000);
    if (end < 0 || this.text[end + 1] !== "(") return null;
    const close = this.bracket(end + 2, "(", ")", 4000);
    if (close < 0) return null;
    const address = safe(this.text.slice(end + 2, close).trim().split(/\s/)[0].replace(/^<|>$/g, ""));
    if (!address) return null;
    this.at = close + 1;
    const inner = this.text.slice(begin, end);
    return anchor(address, inner ? inline(inner, this.depth + 1, true) : [address]);
  }

  bracket(begin, open, shut, most) {
    let deep = 0;
    for (let i = begin; i < this.text.length && i < begin + most; i++) {
      if (this.text[i] === "\\") i++;
      else if (this.text[i] === open) deep++;
      else if (this.text[i] === shut && deep-- === 0) return i;
    }
    return -1;
  }

  autolink() {
    const angle = this.text[this.at] === "<" ? 1 : 0;
    const match = /^https?:\/\/[^\s<>"`]+/.exec(this.text.slice(this.at + angle, this.at + 2048));
    if (this.linked || !match || (!angle && /\w/.test(this.text[this.at - 1] ?? " "))) return null;
    let found = match[0];
    if (!angle) {
      for (let before = ""; before !== found; ) {
        before = found;
        found = found.replace(/[.,;:!?'*_~\]]+$/, "");
        if (found.endsWith(")") && found.split(")").length > found.split("(").length) found = found.slice(0, -1);
      }
    } else if (this.text[this.at + 1 + found.length] !== ">") return null;
    const address = safe(found);
    if (!address) return null;
    this.at += found.length + 2 * angle;
    return anchor(address, [found]);
  }
}

/** An address that a click may go to: http and https alone. */
function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function anchor(href, children) {
  return el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}
