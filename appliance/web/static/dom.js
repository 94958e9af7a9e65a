// Elements from code. Text goes in as text nodes alone: nothing that a model or a server says can become markup.

/** An element. Functions among `attributes` listen to the event of that name; null and false leave an attribute out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
}

export const $ = (id) => document.getElementById(id);

// Paths of 24 x 24 icons, drawn with strokes.
const ICONS = {
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  done: "M5 12.5l4.5 4.5L19 7",
  retry: "M19 12a7 7 0 1 1-2.1-5M19 3v4.5h-4.5",
  edit: "M4 20l1-4L16 5l3 3L8 19zM13.5 7.5l3 3",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  go: "M6 5l12 7-12 7z",
};

export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A button that is an icon alone; `label` is its name. */
export function iconButton(name, label, click) {
  return el("button", { type: "button", class: "quiet", "aria-label": label, title: label, click }, icon(name));
}

/** Copy text, also where the page came by plain HTTP from another machine and has no clipboard of its own. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

export function copyButton(text, label) {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? "done" : "copy"));
    announce(done ? "Copied" : "Could not copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Have a screen reader say it. */
export function announce(text) {
  $("announcer").textContent = text;
}

let hiding = 0;

/** Say something at the foot of the page, with a way to take it back if there is one. */
export function toast(text, undo = null) {
  const box = $("toast");
  clearTimeout(hiding);
  const hide = () => (box.hidden = true);
  const button = undo && el("button", { type: "button", click: () => (undo(), hide()) }, "Undo");
  box.replaceChildren(el("span", {}, text), ...(button ? [button] : []));
  box.hidden = false;
  hiding = setTimeout(hide, 8000);
}
