// What a person can set: the controls, what they send, and what is remembered of them.
import { made } from "./dom.js";

/**
 * @typedef {{ name: string, label: string, hint?: string, kind: "range" | "select" | "number", min?: number,
 *   max?: number, step?: number, options?: [string, string][], own: any, shown?: (value: any) => string,
 *   sent?: (value: any) => any }} Control
 *   `own` is the value where none is set: the model's, or the server's
 */

const SPACE = "mythos-edge:settings:";
// Beyond the slider's end, and beyond any halting mass.
const NEVER = 1e9;
const NEVER_SAID = "never halts";
const POLICIES = /** @type {[string, string][]} */ ([
  ["exact", "exact: when a token needs them"],
  ["full", "full: at once"],
  ["last", "last: never, approximate"],
]);

/**
 * The controls of one answer.
 * @param {import("./api.js").Model} model
 * @returns {Control[]}
 */
export function depthControls(model) {
  const { defaults } = model;
  const threshold = defaults.threshold ?? model.threshold;
  const top = Math.max(1, Math.ceil(Math.max(model.threshold, threshold) * 100) / 100);
  return [
    {
      name: "max_depth",
      label: "Depth limit",
      kind: "range",
      min: 1,
      max: deepest(model),
      step: 1,
      own: defaults.max_depth ?? model.max_depth,
      shown: (value) => (value === 1 ? "1 loop step" : `${value} loop steps`),
    },
    {
      name: "threshold",
      label: "Halting threshold",
      hint: "lower: tokens halt sooner",
      kind: "range",
      min: 0.01,
      max: top + 0.01,
      step: 0.01,
      own: threshold,
      shown: (value) => (value > top ? NEVER_SAID : String(Number(value.toFixed(3)))),
      sent: (value) => (value > top ? NEVER : value),
    },
    {
      name: "policy",
      label: "Skipped loop steps run",
      kind: "select",
      options: POLICIES,
      own: defaults.policy ?? "exact",
    },
  ];
}

/**
 * The depth that has the hottest colour.
 * @param {import("./api.js").Model} model
 */
export function deepest(model) {
  return Math.max(model.max_depth, model.defaults.max_depth ?? 1);
}

/** @type {Control[]} */
export const SAMPLING = [
  {
    name: "temperature",
    label: "Temperature",
    kind: "range",
    min: 0,
    max: 2,
    step: 0.05,
    own: 0.7,
    shown: (value) => (value === 0 ? "0, greedy" : value.toFixed(2)),
  },
  { name: "max_tokens", label: "Token limit", kind: "number", min: 1, step: 1, own: 200 },
  { name: "seed", label: "Seed", hint: "empty: a new one each time", kind: "number", min: 0, step: 1, own: "" },
];

/** A group of controls and the values they have; null is the own value. */
export class Group {
  /**
   * @param {string} title
   * @param {string} prefix of the ids of its elements
   * @param {Control[]} controls
   * @param {Record<string, any>} values
   * @param {() => void} changed
   * @param {string} resetLabel
   */
  constructor(title, prefix, controls, values, changed, resetLabel) {
    this.controls = controls;
    this.values = Object.fromEntries(controls.map((one) => [one.name, allowed(one, values[one.name])]));
    this.element = document.createElement("fieldset");
    this.element.className = "group";
    this.element.append(made("legend", { textContent: title }));
    /** @type {(() => void)[]} */
    this.shows = [];
    for (const control of controls) this.element.append(this.#element(control, `${prefix}-${control.name}`, changed));
    const reset = made("button", { type: "button", className: "quiet reset", textContent: resetLabel });
    reset.addEventListener("click", () => {
      for (const { name } of controls) this.values[name] = null;
      this.show();
      changed();
    });
    this.shows.push(() => {
      reset.disabled = Object.values(this.values).every((value) => value === null);
    });
    this.element.append(reset);
    this.show();
  }

  show() {
    for (const show of this.shows) show();
  }

  /** @param {string} name */
  value(name) {
    const control = this.controls.find((one) => one.name === name);
    return this.values[name] ?? control?.own;
  }

  /** The fields of a request; own values are left to the server. */
  fields() {
    const set = this.controls.filter(({ name }) => this.values[name] !== null);
    return Object.fromEntries(set.map(({ name, sent }) => [name, sent ? sent(this.values[name]) : this.values[name]]));
  }

  /** What the controls say, in a few words. */
  words() {
    const threshold = this.controls.find(({ name }) => name === "threshold")?.shown?.(this.value("threshold"));
    const words = [`depth ≤ ${this.value("max_depth")}`, threshold === NEVER_SAID ? threshold : `threshold ${threshold}`];
    return this.value("policy") === "exact" ? words : [...words, this.value("policy")];
  }

  /**
   * @param {Control} control
   * @param {string} id
   * @param {() => void} changed
   */
  #element(control, id, changed) {
    const box = made("div", { className: `control ${control.kind}` });
    const input = control.kind === "select" ? selectOf(control) : inputOf(control);
    input.id = id;
    const label = made("label", { textContent: control.label, htmlFor: id });
    const output = made("output", { htmlFor: id });
    box.append(label, output, input);
    if (control.kind === "range") box.append(markOf(control));
    if (control.hint) {
      const hint = made("p", { className: "hint", textContent: control.hint, id: `${id}-hint` });
      input.setAttribute("aria-describedby", hint.id);
      box.append(hint);
    }
    this.shows.push(() => {
      const value = this.values[control.name];
      input.value = String(value ?? control.own);
      output.textContent = control.shown ? control.shown(value ?? control.own) : "";
      input.setAttribute("aria-valuetext", output.textContent);
      box.classList.toggle("changed", value !== null);
    });
    input.addEventListener(control.kind === "number" ? "change" : "input", () => {
      const value = allowed(control, control.kind === "select" ? input.value : numberOf(input.value));
      this.values[control.name] = value === control.own ? null : value;
      this.show();
      changed();
    });
    return box;
  }
}

/**
 * The value, or null where the control has no such.
 * @param {Control} control
 * @param {any} value
 */
function allowed({ kind, options, min = -Infinity, max = Infinity, step }, value) {
  if (kind === "select") return options?.some(([name]) => name === value) ? value : null;
  if (typeof value !== "number" || !Number.isFinite(value)) return null;
  const bounded = Math.min(Math.max(value, min), max);
  return step === 1 ? Math.round(bounded) : Number(bounded.toFixed(4));
}

/** @param {string} text */
function numberOf(text) {
  return text.trim() === "" ? NaN : Number(text);
}

/** @param {Control} control */
function inputOf({ kind, min, max, step, own }) {
  const input = made("input", { type: kind });
  if (min !== undefined) input.min = String(min);
  if (max !== undefined) input.max = String(max);
  input.step = String(step);
  if (kind === "number" && own === "") input.placeholder = "any";
  return input;
}

/** @param {Control} control */
function selectOf({ options = [], own }) {
  const select = made("select", {});
  for (const [value, text] of options) {
    select.append(made("option", { value, textContent: text }));
  }
  return select;
}

/**
 * A mark under a slider at the model's own value.
 * @param {Control} control
 */
function markOf({ min = 0, max = 1, own, shown = String }) {
  const mark = made("span", { className: "mark", title: `the model's: ${shown(own)}` });
  mark.style.setProperty("--at", String((Math.min(own, max) - min) / (max - min || 1)));
  return mark;
}

/**
 * What was remembered under a name; nothing where there is no store, or rubbish in it.
 * @param {string} name
 * @returns {Record<string, any>}
 */
export function remembered(name) {
  try {
    const values = JSON.parse(localStorage.getItem(SPACE + name) ?? "{}");
    return values !== null && typeof values === "object" ? values : {};
  } catch {
    return {};
  }
}

/**
 * @param {string} name
 * @param {Record<string, any>} values
 */
export function remember(name, values) {
  try {
    localStorage.setItem(SPACE + name, JSON.stringify(values));
  } catch {
    // a private window may have no store; then nothing is remembered
  }
}
