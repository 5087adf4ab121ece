// Depth as colour: the spans of tokens, the bars over them, the scale. The colours themselves are in style.css, which
// makes them of --heat, 0 (one loop step) to 1 (all of them).

/**
 * @typedef {{ text: string, depths: number[], tokens: string[], logprobs: number[], first: number }} Part
 *   a text and the tokens that made it, of which `first` is the number of the first, from 1
 */

const SVG = "http://www.w3.org/2000/svg";
// Narrower bars for longer answers, but no fat ones for short answers.
const FEWEST_BARS = 48;

/**
 * @param {number} depth
 * @param {number} most the depth of the hottest colour
 */
export function heatOf(depth, most) {
  return most > 1 ? Math.min(1, (depth - 1) / (most - 1)) : 1;
}

/**
 * @param {HTMLElement | SVGElement} element
 * @param {number} heat
 */
export function colour(element, heat) {
  element.classList.add("heat");
  element.style.setProperty("--heat", heat.toFixed(3));
}

/** @param {number[]} values */
export function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
}

/**
 * The parts of a piece: one for each token where their texts make up that of the piece, otherwise one for all.
 * @param {import("./api.js").Piece} piece
 * @param {number} first
 * @returns {Part[]}
 */
export function partsOf(piece, first) {
  const { text, depths, tokens, logprobs } = piece;
  if (depths.length > 1 && tokens.join("") === text) {
    return depths.map((depth, at) => {
      return { text: tokens[at], depths: [depth], tokens: [tokens[at]], logprobs: [logprobs[at]], first: first + at };
    });
  }
  return depths.length || text ? [{ ...piece, first }] : [];
}

/**
 * @param {Part} part
 * @param {number} most
 */
export function spanOf(part, most) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = part.text;
  span.dataset.depths = part.depths.join(" ");
  if (part.text === "") span.classList.add("silent");
  if (part.text.endsWith("\n")) span.classList.add("newline");
  if (part.depths.length) colour(span, heatOf(mean(part.depths), most));
  return span;
}

/**
 * What is told of a part: number, text, depth, probability.
 * @param {Part} part
 * @param {number} most
 */
export function told(part, most) {
  const { depths, first, tokens, logprobs } = part;
  const many = depths.length > 1;
  const numbers = many ? `tokens ${first}–${first + depths.length - 1}` : `token ${first}`;
  const depth = many
    ? `depths ${depths.join(", ")} (mean ${mean(depths).toFixed(1)}, most ${Math.max(...depths)}) of ${most}`
    : `depth ${depths[0]} of ${most}`;
  const chances = logprobs.map((one) => `${(100 * Math.exp(one)).toFixed(one < -4.6 ? 2 : 0)} %`);
  return { title: `${numbers} · ${depth}`, chance: chances.join(", "), text: tokens.map(shown).join(" ") };
}

/** @param {string} text */
function shown(text) {
  return text.replaceAll("\n", "↵").replaceAll(" ", "␣");
}

/** Bars of depth over the tokens of an answer. */
export class Bars {
  /** @param {number} most */
  constructor(most) {
    this.most = most;
    this.count = 0;
    this.element = document.createElementNS(SVG, "svg");
    this.element.classList.add("bars");
    this.element.setAttribute("preserveAspectRatio", "none");
    this.element.setAttribute("role", "img");
    this.#resize();
  }

  /** @param {number[]} depths */
  add(depths) {
    for (const depth of depths) {
      const bar = document.createElementNS(SVG, "rect");
      const height = depth / this.most;
      for (const [name, value] of Object.entries({ x: this.count + 0.06, y: 1 - height, width: 0.88, height })) {
        bar.setAttribute(name, String(value));
      }
      colour(bar, heatOf(depth, this.most));
      this.element.append(bar);
      this.count += 1;
    }
    this.#resize();
  }

  #resize() {
    this.element.setAttribute("viewBox", `0 0 ${Math.max(FEWEST_BARS, this.count)} 1`);
    this.element.setAttribute("aria-label", `depth of each of ${this.count} tokens`);
  }

  /**
   * The number of the token (from 0) at a place on the screen.
   * @param {number} x
   */
  tokenAt(x) {
    const { left, width } = this.element.getBoundingClientRect();
    return Math.floor(((x - left) / width) * Math.max(FEWEST_BARS, this.count));
  }
}

/**
 * Shows the scale of colours from 1 to the most.
 * @param {HTMLElement} element
 * @param {number} most
 */
export function drawScale(element, most) {
  const steps = Math.min(most, 16);
  element.replaceChildren(
    ...Array.from({ length: steps }, (_, at) => {
      const step = document.createElement("span");
      const depth = steps === 1 ? most : 1 + Math.round((at * (most - 1)) / (steps - 1));
      step.textContent = String(depth);
      step.className = "step";
      colour(step, heatOf(depth, most));
      return step;
    }),
  );
  element.setAttribute("aria-label", `depth scale, 1 to ${most} loop steps`);
}
