// Depth as colour: the spans of tokens, the bars over them, the scale. The colours themselves are in style.css, which
// makes them of --heat, 0 (one loop step) to 1 (all of them).

/**
 * @typedef {import("./api.js").Piece} Piece
 * @typedef {Piece & { first: number }} Part a text and the tokens that made it; `first` is the number of the first
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
 * @param {Piece} piece
 * @param {number} first
 * @returns {Part[]}
 */
export function partsOf({ text, tokens }, first) {
  if (tokens.length > 1 && tokens.map((token) => token.text).join("") === text) {
    return tokens.map((token, at) => ({ text: token.text, tokens: [token], first: first + at }));
  }
  return [{ text, tokens, first }];
}

/** @param {Part} part */
export function depthsOf({ tokens }) {
  return tokens.map(({ depth }) => depth);
}

/**
 * @param {Part} part
 * @param {number} most
 */
export function spanOf(part, most) {
  const span = document.createElement("span");
  const depths = depthsOf(part);
  span.className = "token";
  span.textContent = part.text;
  span.dataset.depths = depths.join(" ");
  if (part.text === "") span.classList.add("silent");
  if (part.text.endsWith("\n")) span.classList.add("newline");
  if (depths.length) colour(span, heatOf(mean(depths), most));
  return span;
}

/**
 * The depth of a part in words.
 * @param {Part} part
 * @param {number} most
 */
export function depthWords(part, most) {
  const { first, tokens } = part;
  const depths = depthsOf(part);
  if (depths.length === 1) return `token ${first} · depth ${depths[0]} of ${most}`;
  const last = first + tokens.length - 1;
  return `tokens ${first}–${last} · depths ${depths.join(", ")} of ${most}, mean ${mean(depths).toFixed(1)}`;
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
