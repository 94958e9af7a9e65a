// Markdown as models write it, to elements. No HTML, no images: what is not known here stays the text it is.

import { copyButton, el } from "./dom.js";
import { inline } from "./inline.js";

const DEPTH = 8; // lists in quotes in lists: deeper ones are text
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|[ \t]+|$)(.*)$/;

/** Show `text` in `container`. Blocks that are as they were stay the elements they are: a growing answer costs its end alone. */
export function render(container, text) {
  const blocks = split(text.split("\n"), 0);
  const old = [...container.children];
  blocks.forEach((block, i) => {
    if (old[i]?.source === block.raw) return;
    const element = block.build();
    element.source = block.raw;
    if (old[i]) old[i].replaceWith(element);
    else container.append(element);
  });
  old.slice(blocks.length).forEach((element) => element.remove());
}

/** Blocks: what each is made of, and how to build it. */
function split(lines, depth) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const [kind, end] = extent(lines, i, depth);
    const part = lines.slice(i, end);
    blocks.push({ raw: part.join("\n"), build: () => BUILD[kind](part, depth + 1) });
    i = end;
  }
  return blocks;
}

function build(lines, depth) {
  return split(lines, depth).map((block) => block.build());
}

/** The kind of the block that begins at line i, and the line behind it. */
function extent(lines, i, depth) {
  const fence = FENCE.exec(lines[i]);
  if (fence) return ["code", fenceEnd(lines, i, fence[2])];
  if (HEADING.test(lines[i])) return ["heading", i + 1];
  if (RULE.test(lines[i])) return ["rule", i + 1];
  if (depth < DEPTH && QUOTE.test(lines[i])) return ["quote", run(lines, i, (line) => QUOTE.test(line))];
  if (depth < DEPTH && isItem(lines[i])) return ["list", listEnd(lines, i)];
  if (isTable(lines, i)) return ["table", run(lines, i + 2, (line) => line.includes("|"))];
  return ["paragraph", run(lines, i + 1, (line, at) => line.trim() && !interrupts(lines, at))];
}

function run(lines, i, goesOn) {
  while (i < lines.length && goesOn(lines[i], i)) i++;
  return i;
}

/** Whether a paragraph ends before line i. A number other than 1 may be a year that came to stand at the start of a line. */
function interrupts(lines, i) {
  const item = isItem(lines[i]) && (!ordered(lines[i]) || /^ *1[.)]/.test(lines[i]));
  return item || [FENCE, HEADING, RULE, QUOTE].some((kind) => kind.test(lines[i])) || isTable(lines, i);
}

function isItem(line) {
  return ITEM.test(line) && !RULE.test(line);
}

function fenceEnd(lines, i, mark) {
  const close = (line) => {
    const trimmed = line.trim();
    return trimmed.length >= mark.length && trimmed === mark[0].repeat(trimmed.length);
  };
  const end = run(lines, i + 1, (line) => !close(line));
  return Math.min(end + 1, lines.length);
}

function ordered(line) {
  return /^ *\d/.test(line);
}

function indent(line) {
  return line.length - line.trimStart().length;
}

/** A list goes on through items of its kind and what is indented below them; a blank line alone does not end it. */
function listEnd(lines, i) {
  const kind = ordered(lines[i]);
  let end = i + 1;
  for (let at = i + 1; at < lines.length; at++) {
    const line = lines[at];
    if (!line.trim()) continue;
    const lazy = at === end && !interrupts(lines, at); // goes on with the paragraph above
    if (!(isItem(line) && ordered(line) === kind) && indent(line) < 2 && !lazy) break;
    end = at + 1;
  }
  return end;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function isTable(lines, i) {
  if (!lines[i].includes("|") || !lines[i + 1]?.includes("-")) return false;
  const rule = cells(lines[i + 1]);
  return rule.length === cells(lines[i]).length && rule.every((cell) => /^:?-+:?$/.test(cell));
}

const BUILD = {
  paragraph: (lines) => el("p", {}, inline(lines.map((line) => line.trimStart()).join("\n"))),

  heading([line]) {
    const [, marks, text = ""] = HEADING.exec(line);
    const level = Math.min(marks.length + 2, 6); // the page has an h1 and an h2 of its own
    return el(`h${level}`, {}, inline(text.replace(/[ \t]+#+[ \t]*$/, "")));
  },

  rule: () => el("hr"),

  quote: (lines, depth) => el("blockquote", {}, build(lines.map((line) => line.replace(QUOTE, "")), depth)),

  code(lines) {
    const [, margin, mark, name] = FENCE.exec(lines[0]);
    const last = lines.at(-1).trim();
    const closed = lines.length > 1 && last.length >= mark.length && last === mark[0].repeat(last.length);
    const strip = (line) => line.slice(Math.min(indent(line), margin.length));
    const text = lines.slice(1, closed ? -1 : undefined).map(strip).join("\n");
    const language = name.trim().split(/\s/)[0];
    const head = el("div", { class: "code-head" }, el("span", {}, language || "text"), copyButton(() => text, "Copy code"));
    return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", {}, text)));
  },

  list(lines, depth) {
    const items = [];
    const number = ordered(lines[0]);
    for (const line of lines) {
      const beside = !items.length || (ordered(line) === number && indent(line) < items.at(-1).content);
      const item = beside && isItem(line) ? ITEM.exec(line) : null;
      if (item) {
        const content = item[1].length + item[2].length + (item[3]?.length ?? 1);
        items.push({ content, lines: [item[4]] });
      } else {
        const open = items.at(-1);
        open.lines.push(line.slice(Math.min(indent(line), open.content)));
      }
    }
    const start = number ? parseInt(lines[0].trim(), 10) : 1;
    return el(number ? "ol" : "ul", { start: start !== 1 && String(start) }, items.map((item) => listItem(item, depth)));
  },

  table(lines) {
    const aligned = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
    const row = (line, tag) =>
      el("tr", {}, aligned.map((align, i) => el(tag, { class: align }, inline(cells(line)[i] ?? ""))));
    const body = lines.slice(2).map((line) => row(line, "td"));
    const table = el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, body));
    return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
  },
};

/** A box that stands for [ ] and [x]; a tight item's text has no paragraph around it. */
function listItem({ lines }, depth) {
  const task = /^\[([ xX])\][ \t]+/.exec(lines[0]);
  const own = task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines;
  const parts = build(own, depth);
  if (parts.length && parts[0].tagName === "P" && !lines.some((line, i) => i && !line.trim() && i < lines.length - 1)) {
    parts.splice(0, 1, ...parts[0].childNodes);
  }
  const box = task && el("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "Done" });
  return el("li", { class: task && "task" }, box, parts);
}
