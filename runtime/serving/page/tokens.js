// What tokens tell under the pointer, and as arrow keys walk through them: number, depth, and what else was likely.
import { made } from "./dom.js";
import { depthWords } from "./heat.js";

/**
 * @typedef {import("./answer.js").Answer} Answer
 * @typedef {import("./api.js").Token} Token
 */

const MOST_TOKENS = 6;

/**
 * @param {HTMLElement} talk
 * @param {HTMLElement} tip
 * @param {HTMLElement} announcer says it to a screen reader
 * @param {(element: Element | null) => Answer | undefined} answerOf the answer that an element is of
 */
export function watchTokens(talk, tip, announcer, answerOf) {
  /** @type {HTMLElement | null} */
  let current = null;

  /** @param {HTMLElement | null} span */
  function show(span) {
    current?.classList.remove("current");
    current = span;
    const answer = span && answerOf(span.closest(".answer"));
    tip.hidden = !answer;
    if (!span || !answer) return;
    span.classList.add("current");
    const part = answer.partOfSpan(span);
    const tables = part.tokens.slice(0, MOST_TOKENS).map(likely);
    tip.replaceChildren(made("strong", { textContent: depthWords(part, answer.most) }), ...tables);
    place(tip, span);
  }

  talk.addEventListener("pointermove", ({ target, clientX }) => {
    if (!(target instanceof Element)) return;
    const bars = target.closest(".bars");
    const token = bars ? answerOf(bars.closest(".answer"))?.bars.tokenAt(clientX) : undefined;
    const span = token === undefined ? target.closest(".token") : answerOf(target.closest(".answer"))?.spanOfToken(token);
    if (span !== current) show(/** @type {HTMLElement | null} */ (span ?? null));
  });
  talk.addEventListener("pointerleave", () => show(null));
  talk.addEventListener("focusout", () => show(null));
  talk.addEventListener("scroll", () => show(null));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
  });
  talk.addEventListener("keydown", (event) => {
    const body = event.target instanceof HTMLElement && event.target.matches(".tokens") ? event.target : null;
    const spans = /** @type {HTMLElement[]} */ (Array.from(body?.querySelectorAll(".token") ?? []));
    if (!spans.length) return;
    const now = current ? spans.indexOf(current) : -1;
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const span = spans[Math.min(Math.max(next, 0), spans.length - 1)];
    span.scrollIntoView({ block: "nearest" });
    show(span);
    announcer.textContent = `${span.textContent}, ${tip.querySelector("strong")?.textContent}`;
  });
}

/**
 * The likeliest tokens where one stands, itself first.
 * @param {Token} token
 */
function likely({ id, text, logprob, others }) {
  const list = made("ul", {});
  const rows = [[text, logprob], ...others.filter(([other]) => other !== text)];
  for (const [at, [name, value]] of /** @type {[string, number][]} */ (rows).entries()) {
    const row = made("li", { className: at ? "" : "taken" });
    const share = Math.exp(value);
    row.style.setProperty("--share", String(share));
    row.append(made("code", { textContent: spelt(name), title: at ? "" : `id ${id}` }));
    row.append(made("span", { textContent: `${(100 * share).toFixed(share < 0.01 ? 2 : 0)} %` }));
    list.append(row);
  }
  return list;
}

/** @param {string} text */
function spelt(text) {
  return text.replaceAll("\n", "↵").replaceAll(" ", "␣").replaceAll("\t", "⇥") || "∅";
}

/**
 * Puts the tip over a token, or under it where there is no room, within the window.
 * @param {HTMLElement} tip
 * @param {HTMLElement} span
 */
function place(tip, span) {
  const around = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, around.left + around.width / 2 - width / 2), innerWidth - width - 8);
  const top = around.top - height - 8 < 8 ? around.bottom + 8 : around.top - height - 8;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${top}px`);
}
