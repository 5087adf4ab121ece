// One answer on the screen: its tokens with their depth, the bars, the figures.
import { at, made } from "./dom.js";
import { Bars, depthsOf, mean, partsOf, spanOf } from "./heat.js";

/** @typedef {import("./heat.js").Part} Part */

// What ended an answer, by OpenAI's words for it and ours beside them.
const ENDS = new Map([
  ["stop", "model"],
  ["length", "limit"],
  ["stopped", "you"],
  ["failed", "error"],
]);

export class Answer {
  /**
   * @param {{ title: string, words: string[], most: number, given?: string }} about `given` is text that it continues
   */
  constructor({ title, words, most, given = "" }) {
    this.most = most;
    this.text = "";
    /** @type {Part[]} */
    this.parts = [];
    /** @type {number[]} */
    this.ids = [];
    /** @type {number[]} */
    this.depths = [];
    /** The part that each token is in. @type {number[]} */
    this.partOf = [];
    /** @type {string | undefined} */
    this.end = undefined;
    this.asked = performance.now();
    this.firstAt = this.lastAt = 0;
    /** @type {import("./api.js").Usage | undefined} */
    this.usage = undefined;

    this.element = made("article", { className: "answer working", ariaBusy: "true" });
    this.element.setAttribute("aria-label", `${title}: ${words.join(", ")}`);
    const head = made("header", {});
    head.append(made("strong", { textContent: title }));
    for (const word of words) head.append(made("span", { className: "chip", textContent: word }));
    this.keep = made("button", { type: "button", className: "quiet keep", hidden: true });
    this.copy = made("button", { type: "button", className: "quiet copy", textContent: "Copy" });
    head.append(this.keep, this.copy);
    this.body = made("div", { className: "tokens", tabIndex: 0 });
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", "Tokens: arrow keys walk through them and tell their depth");
    if (given) this.body.append(made("span", { className: "given", textContent: given }));
    this.error = made("p", { className: "error", hidden: true });
    this.error.setAttribute("role", "alert");
    this.bars = new Bars(most);
    this.figures = made("dl", { className: "figures" });
    this.element.append(head, this.body, this.error, this.bars.element, this.figures);
    this.#tellFigures();
  }

  /** @param {import("./api.js").News} news */
  hear({ piece, finish, usage }) {
    if (piece) this.#add(piece);
    if (finish) this.end = finish;
    if (usage) this.usage = usage;
    this.#tellFigures();
  }

  /** @param {import("./api.js").Piece} piece */
  #add(piece) {
    if (!piece.tokens.length) return;
    this.lastAt = performance.now();
    this.firstAt ||= this.lastAt;
    this.text += piece.text;
    for (const part of partsOf(piece, this.depths.length + 1)) {
      const span = spanOf(part, this.most);
      span.dataset.part = String(this.parts.length);
      for (const { id } of part.tokens) {
        this.partOf.push(this.parts.length);
        this.ids.push(id);
      }
      this.parts.push(part);
      this.depths.push(...depthsOf(part));
      this.bars.add(depthsOf(part));
      this.body.append(span);
    }
  }

  /**
   * The answer is over.
   * @param {string} [end] why, where the server did not say
   * @param {string} [message] what went wrong
   */
  close(end, message) {
    this.end = end ?? this.end;
    this.element.classList.remove("working");
    this.element.ariaBusy = "false";
    this.error.hidden = !message;
    this.error.textContent = message ?? "";
    this.#tellFigures();
  }

  /** @param {number} token its number, from 0 */
  spanOfToken(token) {
    return /** @type {HTMLElement | null} */ (this.body.querySelector(`[data-part="${this.partOf[token]}"]`));
  }

  /** @param {HTMLElement} span */
  partOfSpan(span) {
    return this.parts[Number(span.dataset.part)];
  }

  #tellFigures() {
    const count = this.depths.length;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const { usage } = this;
    /** @type {[string, string][]} */
    const figures = [
      ["tokens", String(usage?.completion_tokens ?? count)],
      ["mean depth", count ? (usage?.mean_depth ?? mean(this.depths)).toFixed(2) : "–"],
      ["block calls", String(usage?.block_calls ?? "–")],
      ["first token", count ? `${(this.firstAt - this.asked).toFixed(0)} ms` : "–"],
      ["tokens/s", seconds > 0 ? ((count - 1) / seconds).toFixed(count > seconds * 100 ? 0 : 1) : "–"],
      ["cached", usage ? `${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens}` : "–"],
    ];
    if (this.end) figures.push(["ended by", ENDS.get(this.end) ?? this.end]);
    const pairs = figures.map(([name, value]) => {
      const pair = made("div", {});
      pair.append(made("dt", { textContent: name }), made("dd", { textContent: value }));
      return pair;
    });
    this.figures.replaceChildren(...pairs);
  }
}

/**
 * Marks the first token at which two answers part, and says so.
 * @param {Answer} first
 * @param {Answer} second
 * @returns {string}
 */
export function comparison(first, second) {
  const both = [first, second];
  const shorter = Math.min(first.ids.length, second.ids.length);
  let same = 0;
  while (same < shorter && first.ids[same] === second.ids[same]) same += 1;
  if (same < shorter || (both.every(({ end }) => end) && first.ids.length !== second.ids.length)) {
    for (const one of both) one.spanOfToken(same)?.classList.add("parts");
    return same ? `The same for ${same} ${same === 1 ? "token" : "tokens"}, then they part.` : "They part at the first token.";
  }
  if (!both.every(({ end }) => end)) return same ? `The same so far: ${same} tokens.` : "";
  return `The same text, ${same} tokens.`;
}

/** Says an answer to a screen reader, a sentence at a time. */
export class Reader {
  constructor() {
    this.held = "";
    at("live").replaceChildren();
  }

  /** @param {string} text */
  hear(text) {
    this.held += text;
    if (/[.!?:\n]\s*$/.test(this.held) && this.held.trim()) this.end();
  }

  end() {
    if (this.held) at("live").append(made("p", { textContent: this.held }));
    this.held = "";
  }
}
